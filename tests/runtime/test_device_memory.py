"""Memory that nothing needs goes back, and what somebody else looks at stays where it is."""

from __future__ import annotations

import os
import subprocess
import sys
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from regraft.runtime import cuda_graphs
from regraft.runtime.cuda_graphs import Graphs
from regraft.runtime.device_memory import movable

SMALL = (600, 1024)
"""Of a bf16 weight that shares its segment."""


@pytest.mark.gpu
def test_a_small_weight_may_move_only_if_nobody_else_looks_at_its_memory() -> None:
    alone, seen, part, large, tiny = (
        torch.nn.Parameter(torch.randn(shape, device="cuda", dtype=torch.bfloat16))
        for shape in (SMALL, SMALL, (2, *SMALL), (10, *SMALL), (8, 8))
    )
    part = torch.nn.Parameter(part.data[1])
    view = seen.data[3]
    found = [movable(weight) for weight in (alone, seen, part, large, tiny)]
    assert found == [True, False, False, False, False]
    del view
    assert movable(seen)


WORKSPACES = """
import gc
import torch
from regraft.runtime.device_memory import release_unused

x = torch.randn(64, 64, device="cuda", dtype=torch.bfloat16)
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
"""

RESERVED = """
import gc
import torch
import transformers
from runtime_models import medium_llama, tokens
import regraft

def reserved(call):
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

def bert():
    with torch.device("cuda"):
        sizes = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=6, num_attention_heads=12)
        return transformers.BertModel(transformers.BertConfig(**sizes)).to(torch.bfloat16).eval()

model, ids = MODEL, tokens(1, 128).cuda()
with torch.no_grad():
    eager = reserved(lambda: model(ids))
    regraft.optimize(model, example_inputs={"input_ids": ids}, verbose=False)
    ours = reserved(lambda: model(ids))
assert "1 CUDA graph" in str(model.report)
assert ours <= eager, (ours, eager)
"""

KEPT = """
import torch
from regraft.runtime.cuda_graphs import Graphs
from regraft.runtime.device_memory import other_graphs

x = torch.randn(1024, 1024, device="cuda", dtype=torch.bfloat16)
graphs = Graphs(lambda x: (x @ x,), 1)
kept = [graphs([x], 1)[0] for _ in range(3)]
assert len(graphs) == 1 and all(c.lends for made in graphs._graphs.values() for c in made)
kept.append(graphs([x], 1)[0])
assert len(graphs) == 1 and not any(c.lends for made in graphs._graphs.values() for c in made)
assert not other_graphs(), "the pool of a graph that is gone, which what it lent keeps"
assert all(torch.equal(k, x @ x) for k in kept)
"""


@pytest.mark.gpu
@pytest.mark.parametrize(
    "source",
    [WORKSPACES, RESERVED.replace("MODEL", "bert()"), RESERVED.replace("MODEL", 'medium_llama("cuda")'), KEPT],
    ids=["workspaces", "bert", "llama", "kept"],
)
def test_memory_of_a_process_of_its_own(source: str) -> None:
    """Workspaces go unless a graph that is not ours may write to them; a graph reserves no more than eager code.

    In a fresh process: the graphs of other tests would count as somebody else's.
    """
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", source], env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_reason_against_graphs_is_told() -> None:
    graphs = Graphs(lambda x: (x,), 1)
    assert "third time" in graphs.told()
    graphs._direct[("a",)] = "outputs of 600 MiB, above 512"
    graphs._seen[("a",)] = graphs._seen[("b",)] = 3
    assert graphs.told() == "no CUDA graph for 1 of 2 shapes: outputs of 600 MiB, above 512"
    graphs.refused = "a CUDA graph could not be captured: it waits"
    assert graphs.told() == "no CUDA graph: a CUDA graph could not be captured: it waits"
    assert "mode" in Graphs(lambda x: (x,), 1, max_output_bytes=0).told()


def test_a_second_graph_for_the_same_shapes_does_not_push_itself_out() -> None:
    graphs = Graphs(lambda x: (x,), 1, max_output_bytes=100)
    for key in (("a",), ("b",), ("a",)):  # the outputs of a's first one are still held by the caller
        graphs._keep(key, SimpleNamespace(held=80))  # type: ignore[arg-type]
    assert list(graphs._graphs) == [("a",)] and len(graphs) == 2


def test_a_graph_lends_alone_until_another_one_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_graphs, "release_unused", lambda: None)
    graphs = Graphs(lambda x: (x,), 1)
    small, one, other, large = ("small",), ("one",), ("other",), ("large",)
    graphs._between |= {one, other}
    graphs._lending.add(large)
    shared: Any = SimpleNamespace(lender=None)

    def lends(key: tuple[str]) -> bool:
        found = graphs._lends(shared, key)
        graphs._keep(key, SimpleNamespace(held=0))  # type: ignore[arg-type]
        return found

    assert not lends(small) and lends(large) and lends(one)
    assert set(graphs._graphs) == {small, large, one}
    graphs._graphs.clear()  # the weights are others
    assert lends(one), "nothing was kept, and no other shape came"
    assert not lends(other)
    assert set(graphs._graphs) == {other}, "what lent gives way"
    assert not lends(one) and not lends(small) and lends(large)
    assert set(graphs._graphs) == {small, large, one, other}


def test_one_program_of_a_device_lends_at_a_time() -> None:
    """Each one that lends has a memory pool of its own."""
    shared: Any = SimpleNamespace(lender=None)
    key, large = ("one",), ("large",)

    def program() -> Graphs:
        graphs = Graphs(lambda x: (x,), 1)
        graphs._between.add(key)
        graphs._lending.add(large)
        return graphs

    first, second = program(), program()
    assert first._lends(shared, key)
    captured = torch.ones(1)
    shared.lender = weakref.ref(captured)
    assert not second._lends(shared, key) and second._lends(shared, large)
    del captured
    assert second._lends(shared, key)
