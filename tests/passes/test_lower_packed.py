"""Kernels are compared with their references also where they read weights that were packed just before."""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

import pytest
import torch
from runtime_models import tiny_llama
from torch import fx

import regraft
from regraft.kernels.linear_act import gate_up
from regraft.kernels.op import Kernel
from regraft.passes import early, lower


def test_a_kernel_that_reads_a_packed_weight_is_compared_and_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, ...]] = []

    def run(x: torch.Tensor, weight: torch.Tensor, *rest: Any) -> torch.Tensor:
        seen.append(tuple(weight.shape))
        return gate_up.reference(x, weight, *rest)

    kernels = MappingProxyType({"gate_up": (Kernel(gate_up, "here", run, lambda signature: None),)})
    monkeypatch.setattr(lower, "PROVIDERS", kernels)
    model = regraft.optimize(tiny_llama(2), verbose=False, on_error="raise")
    assert seen and set(seen) == {(2 * 112, 64)}
    labels = {group.label: group.count for group in model.report.rewrites if group.rule == "lower"}
    assert labels["gate_up -> here"] == 2


def test_a_kernel_that_reads_a_weight_early_takes_none_that_the_graph_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = fx.Graph()
    x, weight = graph.placeholder("x"), graph.placeholder("weight")
    computed = graph.call_function(torch.neg, (weight,))
    part = graph.call_function(torch.ops.aten.slice.Tensor, (weight, 0, 0, 4))
    copied = graph.call_function(torch.ops.aten.reshape.default, (part, [2, -1]))  # where it cannot be a view
    moves = {"x", "weight"}
    for given, moving in ((weight, {"x"}), (part, {"x"}), (copied, moves), (computed, moves), (x, moves)):
        node = graph.call_function(gate_up.overload, (x, given, None), {"kind": "silu"})
        assert early.moving_of(node, gate_up, {weight}) == moving

    def reads_early(*args: Any) -> torch.Tensor:
        raise AssertionError("x is not at rest")

    kernels = (Kernel(gate_up, "here", reads_early, lambda signature: None, early=("x",)),)
    monkeypatch.setattr(lower, "PROVIDERS", MappingProxyType({"gate_up": kernels}))
    model = regraft.optimize(tiny_llama(1), verbose=False, on_error="raise")
    assert "gate_up -> reference" in {group.label for group in model.report.rewrites if group.rule == "lower"}


def test_a_kernel_that_reads_early_is_compared_when_all_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []

    def run(x: str) -> str:
        done.append(x)
        return x

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: done.append("all"))
    assert early.at_rest(Kernel(gate_up, "here", run, lambda signature: None, early=("weight",)))("early") == "early"
    assert early.at_rest(Kernel(gate_up, "here", run, lambda signature: None)) is run
    assert done == ["all", "early"]
