"""Memory that nothing needs goes back, and what somebody else looks at stays where it is."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from runtime_models import medium_llama, tokens

import regraft
from regraft.runtime import device_memory
from regraft.runtime.cuda_graphs import Graphs
from regraft.runtime.device_memory import move_small, release_unused

SMALL = (600, 1024)
"""Of a bf16 weight that shares its segment."""


@pytest.mark.gpu
def test_a_small_weight_moves_only_if_nobody_else_looks_at_its_memory() -> None:
    alone, seen, part, large, tiny = (
        torch.nn.Parameter(torch.randn(shape, device="cuda", dtype=torch.bfloat16))
        for shape in (SMALL, SMALL, (2, *SMALL), (10, *SMALL), (8, 8))
    )
    part = torch.nn.Parameter(part.data[1])
    view = seen.data[3]
    for weight, moves in ((alone, True), (seen, False), (part, False), (large, False), (tiny, False)):
        before, values = weight.data_ptr(), weight.detach().clone()
        move_small(weight)
        assert (weight.data_ptr() != before) is moves
        assert torch.equal(weight, values)
    assert view.data_ptr() == seen[3].data_ptr()


@pytest.mark.gpu
def test_workspaces_go_unless_another_graph_may_write_to_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_memory._Workspaces, "in_pools", True)
    x = torch.randn(64, 64, device="cuda", dtype=torch.bfloat16)
    gc.collect()
    release_unused()
    without = torch.cuda.memory_allocated()
    x @ x
    workspace = torch.cuda.memory_allocated() - without
    assert workspace > 1 << 20
    release_unused()
    assert torch.cuda.memory_allocated() == without
    x @ x
    foreign = torch.cuda.CUDAGraph()
    with torch.cuda.graph(foreign):
        y = x + 1
    release_unused()
    assert torch.cuda.memory_allocated() >= without + workspace
    del foreign, y
    gc.collect()
    release_unused()
    assert torch.cuda.memory_allocated() == without


def _reserved(call: Callable[[], Any]) -> int:
    """The most that calls reserve."""
    for _ in range(5):
        call()
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(2):
        call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_reserved()


@pytest.mark.gpu
def test_a_forward_by_a_graph_reserves_hardly_more_than_eager() -> None:
    model, ids = medium_llama("cuda"), tokens(1, 64).cuda()
    with torch.no_grad():
        eager = _reserved(lambda: model(ids))
        regraft.optimize(model, example_inputs={"input_ids": ids}, verbose=False)
        ours = _reserved(lambda: model(ids))
    assert "1 CUDA graph" in str(model.report)
    # weights of 1 to 10 MiB, four to a layer, are packed with up to a sixth between them
    assert ours <= 1.2 * eager


def test_a_reason_against_graphs_is_told() -> None:
    graphs = Graphs(lambda x: (x,), 1)
    assert "third time" in graphs.told()
    graphs._direct[("a",)] = "outputs of 600 MiB, above 512"
    graphs._seen[("a",)] = graphs._seen[("b",)] = 3
    assert graphs.told() == "no CUDA graph for 1 of 2 shapes: outputs of 600 MiB, above 512"
    graphs.refused = "a CUDA graph could not be captured: it waits"
    assert graphs.told() == "no CUDA graph: a CUDA graph could not be captured: it waits"
    assert "mode" in Graphs(lambda x: (x,), 1, max_output_bytes=0).told()
