"""The executor's way with CUDA graphs, on the CPU: a graph is a function that is run again on the tensors it was made
of. Captures must change nothing, replays must find their inputs where they were."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable
from typing import Any

import pytest
import torch
from flat_models import flat_of, tiny
from paged_flat import Greedy, TinyFlat, prompts

from regraft.runtime.decoding.engine import Engine
from regraft.runtime.decoding.graphs import NotCaptured
from regraft.runtime.decoding.memory import Limits
from regraft.runtime.decoding.params import SamplingParams
from regraft.runtime.decoding.requests import Request
from regraft.runtime.decoding.sampling import Sampler
from regraft.runtime.decoding.sequences import State


class Repeated:
    """Has the interface of `StepGraphs`; what a function returned is written to by every replay."""

    held = 0

    def __init__(self) -> None:
        self.functions: dict[Any, tuple[Callable[[], Any], Any]] = {}
        self.replays = 0
        self.said: list[list[int]] = []

    def __len__(self) -> int:
        return len(self.functions)

    def __contains__(self, key: Hashable) -> bool:
        return key in self.functions

    def clear(self) -> None:
        self.functions.clear()

    def announce(self, what: str, sizes: list[int], bytes_each: int) -> None:
        if what.startswith("decoding"):
            self.said.append(list(sizes))

    def capture(self, key: Hashable, function: Callable[[], Any]) -> None:
        for _ in range(3):
            result = function()
        self.functions[key] = (function, result)

    def replay(self, key: Hashable) -> Any:
        function, result = self.functions[key]
        self.replays += 1
        new = function()
        for old, value in zip(*((r,) if isinstance(r, torch.Tensor) else r for r in (result, new))):
            old.copy_(value)
        for other, (_, kept) in self.functions.items():  # their memory is the same
            if other != key:
                for tensor in (kept,) if isinstance(kept, torch.Tensor) else kept:
                    tensor.zero_()
        return result


def build(**limits: Any) -> tuple[Engine, TinyFlat, Repeated]:
    flat, graphs = TinyFlat(), Repeated()
    engine = Engine(flat, "cpu", Limits(**{"max_batch_size": 6, "max_seq_len": 128, "token_budget": 50} | limits))  # type: ignore[arg-type]
    engine.executor.graphs = graphs  # type: ignore[assignment]
    return engine, flat, graphs


@pytest.mark.parametrize("count", [4, 17])
def test_captures_in_the_middle_change_nothing(count: int) -> None:
    engine, flat, graphs = build()
    given = prompts(count)
    sampler = Greedy()
    expected = [flat.greedy(p, 10 + i) for i, p in enumerate(given)]
    for _ in range(4):
        assert engine.run([Request(p, max_new_tokens=10 + i) for i, p in enumerate(given)], sampler) == expected
    decodes = [key for key in graphs.functions if key[0] == "decode"]
    assert any(key[0] == "prefill" for key in graphs.functions)
    assert {key[1] for key in decodes} <= {1, 2, 4, 8} and len(decodes) == len({key[1] for key in decodes})
    assert graphs.said[0] == ([4] if count == 4 else [8, 4, 2, 1])
    before = len(decodes), graphs.replays
    engine.run([Request(p[::-1], max_new_tokens=8) for p in given], sampler)
    assert sum(key[0] == "decode" for key in graphs.functions) == before[0] and graphs.replays > before[1]


def test_rows_out_of_use_keep_the_state_of_the_epilogue() -> None:
    """What a row took is counted from its assignment on: captures and rows beyond their limit add nothing."""
    engine, _, _ = build()
    sampler = Greedy()
    seen: list[tuple[int, int]] = []

    def on_token(index: int, token: int) -> None:
        for row, sequence in sampler.owners.items():
            call = engine._running
            if sequence is not None and sequence.state is State.RUNNING and call is not None and not call._flying:
                seen.append((int(sampler.taken[row]), max(0, sequence.computed + 1 - sequence.prompt_length)))

    engine.run([Request(p, max_new_tokens=30) for p in prompts(5)], sampler, on_token, burst=1)
    assert seen and all(taken == computed for taken, computed in seen)
    assert all(owner is None for owner in sampler.owners.values())


def test_sessions_by_graph() -> None:
    engine, flat, graphs = build()
    batch = prompts(5)
    for _ in range(2):
        session = engine.session(batch, 20)
        known = [list(p) for p in batch]
        logits = session.prefill()
        for _ in range(20):
            tokens = logits.argmax(-1)
            known = [[*row, token] for row, token in zip(known, tokens.tolist())]
            logits = session.step(tokens)
        session.close()
        assert [k[len(p) :] for k, p in zip(known, batch)] == [flat.greedy(p, 20) for p in batch]
    assert [key[1] for key in graphs.functions if key[0] == "decode"] == [8]


def test_graphs_of_weights_that_moved_are_not_replayed() -> None:
    engine, flat, graphs = build()
    sampler = Greedy()
    engine.run([Request([1, 2, 3])], sampler)
    flat.head, flat.version = flat.head * -1, 1
    assert engine.run([Request([1, 2, 3])], sampler) == [flat.greedy([1, 2, 3], 20)]
    assert len(graphs) == 1


@pytest.mark.parametrize("what", ["decode", "prefill"])
def test_what_cannot_be_captured_runs_all_the_same(
    what: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engine, flat, graphs = build()
    capture = graphs.capture

    def refused(key: Any, function: Callable[[], Any]) -> None:
        if key[0] == what:
            function()
            raise NotCaptured("operation not permitted when stream is capturing")
        capture(key, function)

    monkeypatch.setattr(graphs, "capture", refused)
    given = prompts(4)
    sampler = Greedy()
    for _ in range(4):
        expected = [flat.greedy(p, 12) for p in given]
        assert engine.run([Request(p, max_new_tokens=12) for p in given], sampler) == expected
    assert (engine.executor.graphs is None) == (what == "decode")  # prompts alone go without
    said = [r.getMessage() for r in caplog.records if "not permitted" in r.getMessage()]
    kinds = [
        re.match(r"(steps|prompts of (\d+) tokens and more) could not be captured as a CUDA graph", m) for m in said
    ]
    if what == "decode":
        assert [k and k[1] for k in kinds] == ["steps"]
    else:  # shorter ones are tried again, and each length once
        sizes = [int(k[2]) for k in kinds if k]
        assert len(sizes) == len(said) >= 1 and sizes == sorted(set(sizes), reverse=True)


def test_longer_prompts_by_graph() -> None:
    """Up to 2048 tokens, those that begin with the step apart from those that go on behind pages."""
    engine, flat, graphs = build(max_seq_len=2200, token_budget=2200)
    sampler = Greedy()
    lengths = (250, 257, 300, 600, 2048, 2049)
    made = torch.Generator().manual_seed(5)
    rounds = [[torch.randint(0, flat.vocab, (n,), generator=made).tolist() for n in lengths] for _ in range(4)]
    beginning = torch.randint(0, flat.vocab, (32,), generator=made).tolist()
    for given in rounds:
        for prompt in (*given, [*beginning, *given[2]]):
            assert engine.run([Request(prompt, max_new_tokens=2)], sampler) == [flat.greedy(prompt, 2)]
    shapes = {(k[1].tokens, k[1].max_q, k[1].fresh) for k in graphs.functions if k[0] == "prefill"}
    assert shapes == {(256, 256, False), (320, 320, False), *((size, size, True) for size in (320, 640, 2048))}
    before = graphs.replays
    engine.run([Request(rounds[0][4][::-1], max_new_tokens=1)], sampler)
    assert graphs.replays == before + 1


@pytest.mark.parametrize("first", [True, False])
def test_inference_mode_of_a_caller_does_not_stay(first: bool) -> None:
    """Tensors made in inference mode could not be written to outside of it."""
    with torch.inference_mode(first):
        engine, flat, _ = build()
        sampler = Sampler(flat.vocab, "cpu")
        assert engine.run([Request([1, 2, 3])], sampler) == [flat.greedy([1, 2, 3], 20)]
    with torch.inference_mode(not first):
        drawn = Request([1, 2, 3], SamplingParams(do_sample=True, top_k=1, repetition_penalty=1.0001))
        assert engine.run([drawn], sampler) == [flat.greedy([1, 2, 3], 20)]
        assert engine.run([Request([1, 2, 3, 4])], sampler) == [flat.greedy([1, 2, 3, 4], 20)]
        session = engine.session([[1, 2]], 3)
        logits = session.prefill()
    session.step(logits.argmax(-1))
    session.close()


def test_beside_an_encoder() -> None:
    """Rows read the states of whoever has them now: rounds of other states give what they give without graphs."""
    flat = flat_of(tiny("bart", tie_word_embeddings=False, init_std=0.3))
    torch.manual_seed(0)
    rounds = [[torch.randn(n, 64) for n in lengths] for lengths in ((7, 40, 16), (33, 5, 20), (1, 17, 60), (8, 8, 9))]
    requests = [Request([2, 5 + i], max_new_tokens=9 + i) for i in range(3)]
    found = []
    for graphs in (None, Repeated()):
        engine = Engine(flat, "cpu", Limits(max_batch_size=4, max_seq_len=40))
        engine.executor.graphs = graphs  # type: ignore[assignment]
        sampler = Greedy()
        found.append([engine.run(requests, sampler, states=states) for states in rounds])
    assert graphs is not None and graphs.replays > 30
    assert found[0] == found[1]
    assert len({str(tokens) for tokens in found[0]}) > 1
