"""Before kernels are compared, all of them are called once where nothing is launched."""

from __future__ import annotations

from types import MappingProxyType, SimpleNamespace
from typing import Any

import pytest
import torch
from runtime_models import tiny_llama
from torch import fx

import regraft
from regraft.kernels import compiling
from regraft.kernels.linear_act import gate_up
from regraft.kernels.norm_products import JOINT
from regraft.kernels.op import Kernel
from regraft.kernels.tuning import Provided
from regraft.passes import ahead, lower, pairs

pytest.importorskip("triton")


def test_each_kernel_is_called_ahead_with_what_it_is_compared_on(monkeypatch: pytest.MonkeyPatch) -> None:
    nothing = [False]
    seen: list[tuple[str, bool, tuple[Any, ...]]] = []

    def kernel_of(op: Any) -> Kernel:
        def run(*args: Any) -> Any:
            seen.append((op.name, nothing[0], args))
            return op.reference(*args)

        return Kernel(op, "here", run, lambda signature: None)

    def run_all(calls: Any) -> None:
        nothing[0] = True
        for call in calls:
            call()
        nothing[0] = False

    def on_gpu(wanted: Any, evaluator: Any, device: torch.device) -> None:
        assert not seen
        ahead.compile_ahead(wanted, evaluator, torch.device("cuda"))
        assert all(there for _, there, _ in seen)

    monkeypatch.setattr(compiling, "ahead", run_all)
    monkeypatch.setattr(lower, "compile_ahead", on_gpu)
    monkeypatch.setattr(lower, "PROVIDERS", MappingProxyType({"gate_up": (kernel_of(gate_up),)}))
    joint = JOINT["gate_up"]
    monkeypatch.setattr(pairs, "PROVIDERS", MappingProxyType({joint.name: (kernel_of(joint),)}))
    entries = {joint.name: (Provided((("M", 1, 1),), "here"),)}
    monkeypatch.setattr(pairs.tuning, "providers", lambda file: entries)
    regraft.optimize(tiny_llama(2), verbose=False, on_error="raise")
    for name in (gate_up.name, joint.name):
        first, second, *_ = [(there, args) for other, there, args in seen if other == name]  # then it is used
        assert (first[0], second[0]) == (True, False)
        for given, later in zip(first[1], second[1], strict=True):
            if isinstance(given, torch.Tensor):
                assert (given.shape, given.stride(), given.dtype) == (later.shape, later.stride(), later.dtype)
        assert torch.equal(first[1][0], second[1][0])  # real values, but for packed weights


def test_nothing_is_done_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "ahead", lambda calls: pytest.fail("there is nothing to compile for"))
    regraft.optimize(tiny_llama(1), verbose=False, on_error="raise")


def test_a_call_that_fails_keeps_no_other_from_being_compiled() -> None:
    done: list[int] = []

    def call(number: int) -> None:
        done.append(number)
        if number == 1:
            raise ValueError("one that refuses its arguments")

    compiling.ahead([lambda n=n: call(n) for n in range(3)])  # type: ignore[misc]
    assert done == [0, 1, 2] and not compiling.replay.compiling()


def test_arguments_that_do_not_fit_in_memory_are_left_to_the_comparison(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = fx.Graph()
    fits, large = graph.placeholder("fits"), graph.placeholder("large")

    class Small:
        def is_packed(self, node: fx.Node) -> bool:
            return False

        def value(self, node: fx.Node) -> torch.Tensor:
            if node is large:
                raise torch.OutOfMemoryError("no room")
            return torch.ones(3)

    ran: list[torch.Tensor] = []
    kernel = SimpleNamespace(run=ran.append)
    monkeypatch.setattr(compiling, "ahead", lambda calls: [call() for call in calls])
    wanted: Any = [(kernel, (node,), {}) for node in (large, fits)]
    ahead.compile_ahead(wanted, Small(), torch.device("cuda"))  # type: ignore[arg-type]
    assert [x.tolist() for x in ran] == [[1, 1, 1]]
