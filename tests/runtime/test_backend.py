"""`torch.compile(model, backend="regraft")`: the passes behind Dynamo, on every model, with the weights of the call."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import zoo
from kernel_checks import assert_close
from runtime_models import exactly
from torch import nn

import regraft
from regraft.runtime.backend import backend


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def _compiled(model: nn.Module, reports: list[Any], **options: Any) -> Any:
    return torch.compile(model, backend="regraft", options={"report": reports.append, "strict": True, **options})


def _longer(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    tokens = ("input_ids", "attention_mask", "decoder_input_ids")
    return {n: torch.cat([t, t[:, -2:]], 1) if n in tokens else t for n, t in inputs.items()}


def _assert_as_good(found: Any, plain: Any, exact: Any) -> None:
    for output in zip(*(r.to_tuple() for r in (found, plain, exact)), strict=True):
        if isinstance(output[0], torch.Tensor):
            assert_close(*output)


def test_the_entry_point_is_found() -> None:
    assert "regraft" in torch._dynamo.list_backends(exclude_tags=())


@pytest.mark.parametrize("name", zoo.EIGHTEEN)
def test_every_architecture_in_one_graph_at_two_lengths(name: str) -> None:
    model, inputs = zoo.build(name)
    reports: list[Any] = []
    compiled = _compiled(model, reports)
    with torch.no_grad():
        for given in (inputs, _longer(inputs)):
            expected = model(**given)
            _assert_as_good(compiled(**given), expected, exactly(model, **given))
    assert sum(r.calls["graph"] for r in reports) == 2
    assert sum(r.calls["original"] for r in reports) == 0
    found = {g.rule for g in reports[0].rewrites}
    assert {"rms_norm", "layer_norm"} & found
    assert name == "mamba2" or {"sdpa_attention", "eager_attention"} & found
    assert not reports[0].reverted


def test_a_second_instance_and_new_weights_are_used_not_the_first() -> None:
    """Dynamo reuses the compiled graph: weights baked into it would be silently wrong."""
    model, inputs = zoo.build("llama")
    other = copy.deepcopy(model)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(0.05 * torch.randn_like(p))
    expected = [m(**inputs).logits.detach().clone() for m in (model, other)]
    exact = [exactly(m, **inputs).logits for m in (model, other)]
    assert (expected[0] - expected[1]).abs().max() > 0.01
    reports: list[Any] = []
    with torch.no_grad():
        for _ in range(2):
            for m, logits, best in zip((model, other), expected, exact, strict=True):
                assert_close(_compiled(m, reports)(**inputs).logits, logits, best)
        compiled = _compiled(model, reports)
        model.load_state_dict(other.state_dict())
        assert_close(compiled(**inputs).logits, expected[1], exact[1])
        with torch.no_grad():
            model.model.layers[0].self_attn.q_proj.weight.mul_(1.5)
            other.model.layers[0].self_attn.q_proj.weight.mul_(1.5)
        assert_close(compiled(**inputs).logits, other(**inputs).logits, exactly(other, **inputs).logits)
        model.model.layers[1].mlp.up_proj.weight.data = torch.zeros_like(model.model.layers[1].mlp.up_proj.weight)
        other.model.layers[1].mlp.up_proj.weight.data.zero_()
        assert_close(compiled(**inputs).logits, other(**inputs).logits, exactly(other, **inputs).logits)


def test_in_inference_mode() -> None:
    """Weights are packed there too, by buffers that may be written to outside of it."""
    model, inputs = zoo.build("llama")
    reports: list[Any] = []
    compiled = _compiled(model, reports)
    for mode in (torch.inference_mode, torch.no_grad, torch.inference_mode):
        with mode():
            _assert_as_good(compiled(**inputs), model(**inputs), exactly(model, **inputs))
    assert sum(r.calls["original"] for r in reports) == 0


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_sizes_open_from_the_beginning(name: str) -> None:
    """Dynamo hands in floats of modules as tensors then: they are numbers, and others go to the original."""
    model, inputs = zoo.build(name)
    reports: list[Any] = []
    options = {"report": reports.append, "strict": True}
    compiled = torch.compile(model, backend="regraft", dynamic=True, options=options)
    with torch.no_grad():
        for given in (inputs, _longer(inputs)):
            _assert_as_good(compiled(**given), model(**given), exactly(model, **given))
        assert sum(r.calls["graph"] for r in reports) == 2
        for module in model.modules():
            for attribute in ("eps", "variance_epsilon"):
                if hasattr(module, attribute):
                    setattr(module, attribute, 0.25)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            found = compiled(**inputs)
        _assert_as_good(found, model(**inputs), exactly(model, **inputs))
        served = sum(r.calls["original"] for r in reports) == 0  # where Dynamo compiled another graph
        assert served != any("a float that the graph was compiled for" in str(w.message) for w in said)


def test_an_unknown_option_names_the_closest() -> None:
    model, inputs = zoo.build("llama")
    compiled = torch.compile(model, backend=backend, options={"pases": {}})
    with pytest.raises(Exception, match="did you mean 'passes'"):
        compiled(**inputs)


def test_a_pass_can_be_switched_off() -> None:
    model, inputs = zoo.build("llama")
    reports: list[Any] = []
    with torch.no_grad():
        _compiled(model, reports, passes={"qkv": False})(**inputs)
    assert "qkv" not in {g.rule for g in reports[0].rewrites}


def test_gradients_of_an_input_go_to_the_original_with_a_warning() -> None:
    model, inputs = zoo.build("llama")
    embeds = model.get_input_embeddings()(inputs["input_ids"]).detach().requires_grad_()
    reports: list[Any] = []
    compiled = _compiled(model, reports)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        compiled(inputs_embeds=embeds, use_cache=False).logits.sum().backward()
    assert embeds.grad is not None and float(embeds.grad.abs().sum()) > 0
    assert any(issubclass(w.category, regraft.RegraftWarning) for w in caught)
    assert reports[-1].calls["original"] == 1


class _Turning(nn.Module):
    """Pairs as complex numbers, brought to a device as models do: the graph asserts what they are."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        angles = torch.arange(x.shape[1], dtype=torch.float32)[:, None] * torch.tensor([1.0, 0.3, 0.1, 0.03])
        turns = torch.polar(torch.ones_like(angles), angles) * 2
        pairs = torch.view_as_complex(self.q(x).view(*x.shape[:-1], 4, 2))
        return torch.view_as_real(pairs * turns.to(x.device)).flatten(-2)


def test_complex_numbers_are_verified_one_precision_up() -> None:
    torch.manual_seed(0)
    model, x = _Turning().eval(), torch.randn(2, 5, 8)
    compiled = torch.compile(model, backend=backend, options={"strict": True})
    with torch.no_grad():
        assert_close(compiled(x), model(x), exactly(model, x=x))


def test_an_error_of_ours_leaves_the_graph_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise ZeroDivisionError("nobody foresaw this")

    monkeypatch.setattr("regraft.runtime.backend._check_whole", broken)
    model, x = nn.Sequential(nn.Linear(8, 8), nn.GELU()).eval(), torch.randn(3, 8)
    with (
        torch.no_grad(),
        pytest.warns(regraft.RegraftWarning, match="as it is: the compiler failed .*ZeroDivisionError"),
    ):
        assert torch.equal(torch.compile(model, backend=backend)(x), model(x))
    torch._dynamo.reset()
    with torch.no_grad(), pytest.raises(Exception, match="nobody foresaw this"):
        torch.compile(model, backend=backend, options={"on_error": "raise"})(x)


def test_a_length_that_becomes_a_number_beside_a_new_mask() -> None:
    """The tokens' length varies since the second call; that of a mask seen for the first time does not."""
    model, _ = zoo.build("t5", layers=1)
    model = model.encoder
    compiled = torch.compile(model, backend=backend, options={"strict": True})
    with torch.no_grad():
        for length, masked in ((9, False), (11, True), (12, True), (13, True)):
            given = {"input_ids": torch.randint(3, 131, (2, length))}
            if masked:
                given["attention_mask"] = torch.arange(length).expand(2, -1).lt(length - 2).long()
            found, own = compiled(**given), model(**given)
            _assert_as_good(found, own, exactly(model, **given))


def test_a_graph_without_tensors_is_left_as_it_is() -> None:
    torch.compiler.reset()
    compiled = torch.compile(lambda: torch.arange(5).float() * 2, backend=backend)
    with pytest.warns(regraft.RegraftWarning, match="Dynamo's graph takes no tensors"):
        assert torch.equal(compiled(), torch.arange(5).float() * 2)
