"""Forwards by CUDA graph: the same bits as without, outputs that stay, weights that may change, bounds that hold."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import zoo

import regraft
from regraft.runtime import cuda_graphs
from regraft.runtime.cuda_graphs import Graphs

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def graphs_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU that others use as well is slow, and makes a graph look needless."""
    monkeypatch.setattr(cuda_graphs, "HOST_SHARE", 0.0)


@pytest.fixture
def llama() -> Iterator[tuple[Any, torch.Tensor]]:
    model, inputs = zoo.build("llama", dtype=torch.bfloat16)
    ids = inputs["input_ids"].cuda()
    yield regraft.optimize(model.cuda(), example_inputs={"input_ids": ids}, verbose=False), ids


def _graphs(model: Any) -> Graphs:
    graphs = model.forward.graphs[0].executable.graphs
    assert graphs is not None
    return graphs


def test_replays_give_the_same_bits_and_outputs_stay(llama: tuple[Any, torch.Tensor]) -> None:
    model, ids = llama
    graphs = _graphs(model)
    first = model(ids)
    others = [model((ids + i) % 7) for i in range(5)]
    assert len(graphs) >= 1 and graphs.refused is None
    again = model(ids)
    assert torch.equal(first.logits, again.logits)
    for i, output in enumerate(others):
        assert torch.equal(output.logits, model((ids + i) % 7).logits)
        assert torch.equal(output.past_key_values.layers[0].keys, model((ids + i) % 7).past_key_values.layers[0].keys)


def test_changed_weights_are_used(llama: tuple[Any, torch.Tensor]) -> None:
    model, ids = llama
    for _ in range(4):
        before = model(ids).logits
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    torch.testing.assert_close(model(ids).logits, 2 * before, rtol=0, atol=0)
    state = {n: t.clone() for n, t in model.state_dict().items()}
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach() * 0.5)
    torch.testing.assert_close(model(ids).logits, before, rtol=0, atol=0)
    model.load_state_dict(state, assign=True)
    torch.testing.assert_close(model(ids).logits, 2 * before, rtol=0, atol=0)


def _write(model: Any) -> None:
    """Of these buffers the graph reads copies."""
    for block in model.transformer.h:
        block.attn.embed_positions.mul_(8)


def _transpose(model: Any) -> None:
    """Other strides on the same memory."""
    for block in model.transformer.h:
        block.attn.out_proj.weight.data = block.attn.out_proj.weight.data.t()


def _override(model: Any) -> None:
    model.transformer.h[0].mlp.forward = torch.zeros_like


NEAR = 4e-3
"""A tenth of what the least of these changes does to a logit."""


@pytest.mark.parametrize("change", [_write, _transpose, _override])
def test_what_a_graph_gave_that_was_launched_ahead_is_not_used_after_a_change(
    change: Callable[[Any], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It starts once weights are known to be where they were; versions, forms and modules are seen later."""
    model, inputs = zoo.build("gptj")
    ids = inputs["input_ids"].cuda()
    model = regraft.optimize(model.cuda(), example_inputs={"input_ids": ids}, verbose=False)
    launched = []
    replayed = Graphs.replayed

    def watched(graphs: Graphs, *args: Any) -> Any:
        launched.append(replayed(graphs, *args))
        return launched[-1]

    monkeypatch.setattr(Graphs, "replayed", watched)
    for _ in range(5):
        before = model(ids).logits
    assert launched[-1] is not None
    change(model)
    launched.clear()
    with torch.no_grad():
        want = model.forward.original(input_ids=ids).logits
        got = model(ids).logits
    assert launched[0] is not None
    torch.testing.assert_close(got, want, rtol=0, atol=NEAR)
    assert not torch.allclose(before, want, rtol=0, atol=NEAR)
    served = model.report.calls["graph"]
    for _ in range(5):
        torch.testing.assert_close(model(ids).logits, want, rtol=0, atol=NEAR)
    assert model.report.calls["graph"] == served + 5


def test_other_streams_and_random_numbers(llama: tuple[Any, torch.Tensor]) -> None:
    model, ids = llama
    want = [model((ids + i) % 11).logits for i in range(4)]
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    got = []
    for i in range(4):
        with torch.cuda.stream(streams[i % 2]):
            got.append(model((ids + i) % 11).logits)
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))
    torch.rand(3, device="cuda")


def test_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_graphs, "MAX_GRAPHS", 2)
    graphs = Graphs(lambda x, w: (x * w,), 1, max_output_bytes=400)
    w = torch.tensor(3.0, device="cuda")
    for size in (10, 20, 30, 200):
        for _ in range(4):
            x = torch.randn(size, device="cuda")
            (y,) = graphs([x, w], 1)
            assert torch.equal(y, x * w)
    assert len(graphs) == 2
    w.fill_(5.0)
    x = torch.randn(30, device="cuda")
    assert torch.equal(graphs([x, w], 1)[0], x * 5)
    graphs([x, w * 2], 2)  # another version: what was captured reads weights that are no longer there
    assert torch.equal(graphs([x, w * 2], 2)[0], x * 10)


def test_lent_outputs_are_never_written_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_graphs, "MAX_COPIED_BYTES", 0)
    graphs = Graphs(lambda x, w: (x * w, (x + w).view(2, -1)), 1)
    w = torch.tensor(3.0, device="cuda")
    kept = []
    for i in range(12):
        x = torch.randn(100, device="cuda")
        product, total = graphs([x, w], 1)
        assert torch.equal(product, x * 3) and torch.equal(total, (x + 3).view(2, -1))
        if i % 3 == 0:
            kept.append((x, product[5:9]))  # a view is enough to keep it
        for old, part in kept:
            assert torch.equal(part, old[5:9] * 3)
    assert len(graphs) == cuda_graphs.COPIES
    captured = next(iter(graphs._graphs.values()))
    stream = torch.cuda.current_stream().cuda_stream
    assert not any(c.free(stream) for c in captured)
    del kept, part, product, total
    assert all(c.free(stream) for c in captured)
    assert not any(c.free(stream + 1) for c in captured), "another stream's consumers are not waited for"


def test_no_graph_writes_where_another_ones_outputs_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_graphs, "MAX_COPIED_BYTES", 0)

    def function(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        first = x * 2
        second = first + 1
        del first
        return (second * 3,)

    for first_size, second_size in ((1 << 20, 1 << 20), (1 << 20, 1 << 19)):
        graphs = Graphs(function, 1)
        one, two = torch.randn(first_size, device="cuda"), torch.randn(second_size, device="cuda")
        for x in (one, two):
            for _ in range(2):
                graphs([x], 1)
        held = graphs([one], 1)[0]
        other = graphs([two], 1)[0]
        want = other.clone()
        del held
        graphs([one], 1)
        assert torch.equal(other, want)


def test_outputs_in_between_are_lent_until_they_are_kept_or_another_shape_comes() -> None:
    def own(graphs: Graphs, x: torch.Tensor) -> bool:
        """Whether the result is the graph's own memory, in which case it is the next one's too."""
        first = graphs([x], 1)[0].data_ptr()
        lent = any(c.lends for made in graphs._graphs.values() for c in made)
        assert (graphs([x], 1)[0].data_ptr() == first) or not lent
        return lent

    one, two = torch.randn(1 << 22, device="cuda"), torch.randn(1 << 21, device="cuda")
    cuda_graphs._shared(one.device).lender = None  # of another test
    for reason in ("kept", "shapes"):
        graphs = Graphs(lambda x: (x * 2 + 1,), 1)
        for _ in range(3):
            graphs([one], 1)
        assert len(graphs) == 1 and own(graphs, one)
        kept = [graphs([one], 1)[0]]
        assert not torch.equal(kept[0], one) and len(graphs) == 1
        if reason == "kept":
            kept += [graphs([one], 1)[0] for _ in range(4)]
        else:
            for _ in range(4):
                assert torch.equal(graphs([two], 1)[0], two * 2 + 1)
            for _ in range(2):
                kept.append(graphs([one], 1)[0])
        assert all(torch.equal(k, one * 2 + 1) for k in kept)
        assert len({k.data_ptr() for k in kept}) == len(kept)
        assert len(graphs) == (1 if reason == "kept" else 2) and not own(graphs, one)


def test_inference_mode_first(llama: tuple[Any, torch.Tensor]) -> None:
    model, ids = llama
    with torch.inference_mode():
        for _ in range(4):
            want = model(ids).logits.clone()
    with torch.no_grad():
        assert torch.equal(model(ids).logits, want)


def test_a_graph_that_computes_something_else_is_not_used() -> None:
    calls = 0

    def function(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        nonlocal calls
        calls += 1
        return (x + (calls if torch.cuda.is_current_stream_capturing() else 0),)

    graphs = Graphs(function, 1)
    x = torch.ones(3, device="cuda")
    for _ in range(5):
        assert torch.equal(graphs([x], 1)[0], x)
    assert graphs.refused is not None and "another result" in graphs.refused and len(graphs) == 0


def test_a_function_that_cannot_be_captured_runs_directly() -> None:
    graphs = Graphs(lambda x: (x * x.sum().item(),), 1)
    x = torch.ones(3, device="cuda")
    for _ in range(5):
        assert torch.equal(graphs([x], 1)[0], 3 * x)
    assert graphs.refused is not None and len(graphs) == 0
    torch.rand(3, device="cuda")  # the generator is not left in the capture
