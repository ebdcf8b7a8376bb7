"""Graphs that are launched before all is looked at: what they give is used only where nothing has changed.

On a CPU, with a stand-in for CUDA graphs; `test_cuda_graphs.py` has the same of real ones.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import zoo

import regraft
from regraft.runtime import executable
from regraft.runtime.weights import Change, Weights


class Captured:
    """Computes with the tensors that were there when its shapes came first, as a CUDA graph does."""

    refused, held = None, 0

    def __init__(self, function: Callable[..., Any], count: int, max_output_bytes: int) -> None:
        self._function, self._count = function, count
        self._kept: dict[Any, Sequence[Any]] = {}
        self._version: object = None
        self.launched = 0
        """How many times ahead."""

    def __len__(self) -> int:
        return len(self._kept)

    def told(self) -> str:
        return ""

    def replayed(self, given: Sequence[Any], version: object, may: Callable[[], bool]) -> Any:
        fixed = self._kept.get(tuple(t.shape for t in given))
        if version != self._version or fixed is None or not may():
            return None
        self.launched += 1
        return list(self._function(*given, *fixed))

    def __call__(self, values: Sequence[Any], version: object) -> Any:
        if version != self._version:
            self._kept.clear()
            self._version = version
        given, fixed = values[: self._count], values[self._count :]
        return self._function(*given, *self._kept.setdefault(tuple(t.shape for t in given), fixed))


@pytest.fixture
def gptj(monkeypatch: pytest.MonkeyPatch) -> tuple[Any, torch.Tensor]:
    """Whose graph reads copies of buffers."""
    monkeypatch.setattr(executable, "Graphs", Captured)
    model, inputs = zoo.build("gptj")
    return regraft.optimize(model, example_inputs=inputs, verbose=False), inputs["input_ids"]


def captured(model: Any) -> Captured:
    graphs = model.forward.graphs[0].executable.graphs
    assert isinstance(graphs, Captured)
    return graphs


def write(model: Any) -> None:
    for block in model.transformer.h:
        block.attn.embed_positions.mul_(8)


def override(model: Any) -> None:
    model.transformer.h[0].mlp.forward = torch.zeros_like


def exchange(model: Any) -> None:
    for block in model.transformer.h:
        block.attn.out_proj.weight.data = block.attn.out_proj.weight.data.t()


CHANGES = pytest.mark.parametrize("change", [write, override, exchange])


def original(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model.forward.original(input_ids=ids).logits
    return logits


def test_nothing_is_looked_at_twice(gptj: tuple[Any, torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = gptj
    model(ids)
    asked: list[str] = []

    def counted(name: str, method: Callable[[Weights], Any]) -> Callable[[Weights], Any]:
        def call(self: Weights) -> Any:
            asked.append(name)
            return method(self)

        return call

    for name in ("changes", "unmoved"):
        monkeypatch.setattr(Weights, name, counted(name, getattr(Weights, name)))
    served = model.report.calls["graph"]
    torch.testing.assert_close(model(ids).logits, original(model, ids))
    assert captured(model).launched == 1 and asked == ["unmoved", "changes"]
    asked.clear()
    model(ids[:, :5])  # of these shapes there is no graph
    assert captured(model).launched == 1 and asked == ["changes"]
    assert model.report.calls["graph"] == served + 2


@CHANGES
def test_a_change_is_seen_behind_the_launch(change: Callable[[Any], None], gptj: tuple[Any, torch.Tensor]) -> None:
    model, ids = gptj
    model(ids)
    before = model(ids).logits
    graphs = captured(model)
    launched = graphs.launched
    change(model)
    want = original(model, ids)
    assert not torch.allclose(before, want, atol=1e-3)
    torch.testing.assert_close(model(ids).logits, want)
    assert graphs.launched == launched + 1
    torch.testing.assert_close(model(ids).logits, want)


@pytest.mark.parametrize("change", [write, override])
def test_a_change_that_another_thread_follows_in_between(
    change: Callable[[Any], None], gptj: tuple[Any, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind its launch the first thread is held until the second has returned; then nothing seems to have changed."""
    model, ids = gptj
    model(ids)
    graphs, launched, followed = captured(model), threading.Event(), threading.Event()
    change(model)
    want = original(model, ids)
    found: list[torch.Tensor] = []
    first = threading.Thread(target=lambda: found.append(model(ids).logits))
    changes = Weights.changes

    def held(self: Weights) -> Change:
        if threading.current_thread() is first and not launched.is_set():
            launched.set()
            assert followed.wait(30)
        return changes(self)

    monkeypatch.setattr(Weights, "changes", held)
    first.start()
    assert launched.wait(30) and graphs.launched == 1
    found.append(model(ids).logits)
    followed.set()
    first.join(30)
    assert len(found) == 2
    for logits in found:
        torch.testing.assert_close(logits, want)
