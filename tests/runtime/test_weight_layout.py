"""Weights of 1 to 10 MiB fill the segments that the caching allocator gives them."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import nn

from regraft.runtime import weight_layout
from regraft.runtime import weights as runtime_weights
from regraft.runtime.weight_layout import MIB, ROUNDED, Free, Room, fill, free_blocks, groups
from regraft.runtime.weights import Weights


@pytest.mark.parametrize(
    "layer",
    [
        [8 * MIB, 4 * MIB, 12 * MIB, 6 * MIB],  # Qwen3-0.6B
        [3 * 768 * 768 * 2, 768 * 768 * 2, 768 * 3072 * 2, 768 * 3072 * 2],  # BERT-base
        [1920 * 1280 * 2, 1280 * 1280 * 2, 7040 * 1280 * 2, 3520 * 1280 * 2],
    ],
)
@pytest.mark.parametrize("layers", [2, 12, 28])
def test_groups_keep_the_order_and_fill_their_segments(layer: list[int], layers: int) -> None:
    sizes = layer * layers
    found = groups(sizes)
    assert [size for group in found for size in group] == sizes
    totals = list(map(sum, found))
    assert all(total <= 80 * MIB for total in totals), "a group exists twice for a moment"
    assert sum(-total % ROUNDED for total in totals) <= 0.04 * sum(sizes)


def test_too_little_for_a_segment_is_in_no_group() -> None:
    assert groups([2 * MIB, 3 * MIB]) == []
    assert groups([2 * MIB, 9 * MIB]) == [[2 * MIB, 9 * MIB]]
    assert groups([20 * MIB, 2 * MIB]) == [[20 * MIB, 2 * MIB]]


def test_free_blocks_are_those_that_the_allocator_would_cut() -> None:
    segment = {
        "device": 0,
        "stream": 0,
        "segment_type": "large",
        "segment_pool_id": (0, 0),
        "is_expandable": False,
        "blocks": [
            {"address": 0, "size": 3 * MIB, "state": "inactive"},
            {"address": 3 * MIB, "size": 4 * MIB, "state": "active_allocated"},
            {"address": 7 * MIB, "size": 5 * MIB, "state": "inactive"},
            {"address": 12 * MIB, "size": MIB, "state": "inactive"},
        ],
    }
    other = {"device": 1, "stream": 7, "segment_type": "small", "segment_pool_id": (0, 1), "is_expandable": True}
    segments = [segment, *({**segment, name: value} for name, value in other.items())]
    for leaving, stays in (({3 * MIB}, False), ({4 * MIB}, True)):
        found = free_blocks(segments, torch.device("cuda", 0), 0, leaving)
        assert found == [Free(3 * MIB, 0, stays), Free(5 * MIB, 7 * MIB, stays)]


def test_what_is_free_in_segments_that_stay_is_filled() -> None:
    sizes = [4 * MIB, 6 * MIB, 8 * MIB] * 2
    small, large, leaving = Free(5 * MIB, 0, True), Free(23 * MIB, 50 * MIB, True), Free(20 * MIB, 90 * MIB, False)
    assert fill(sizes, [small, leaving, large]) == [
        (large, [8 * MIB, 8 * MIB, 6 * MIB]),
        (small, [4 * MIB]),
    ]
    assert fill(sizes, [leaving, Free(3 * MIB, 0, True)]) == []


def test_room_without_a_gpu_is_ordinary_memory() -> None:
    room = Room([2 * MIB] * 20, torch.device("cpu"))
    made = room.empty((1024, 1024), torch.bfloat16, (1, 1024))
    assert made.stride() == (1, 1024) and made.untyped_storage().nbytes() == made.nbytes


def test_weights_get_memory_of_their_own_from_the_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU, with the allocator's part left out: each planned size once, whatever else is asked for in between."""
    made: list[tuple[list[int], Free | None]] = []
    hole = Free(7 * MIB, 0, True)

    def cut(room: Room, sizes: list[int], block: Free | None) -> list[torch.Tensor]:
        made.append((sizes, block))
        return [torch.empty(size, dtype=torch.uint8) for size in sizes]

    monkeypatch.setattr(weight_layout, "_by_segments", lambda device: True)
    monkeypatch.setattr(Room, "_free", lambda room: [hole])
    monkeypatch.setattr(Room, "_cut", cut)
    room = Room([100, *[6 * MIB] * 5, 200], torch.device("cpu"))
    tensors = [room.empty((3, MIB), torch.bfloat16) for _ in range(2)]
    tensors.append(room.empty((5, 5), torch.float32))  # not planned
    tensors += [room.empty((3, MIB), torch.bfloat16) for _ in range(4)]  # one more than planned
    assert made == [([6 * MIB], hole), ([6 * MIB] * 4, None)]
    assert len({t.untyped_storage().data_ptr() for t in tensors}) == 7
    assert all(t.untyped_storage().nbytes() == t.nbytes and t.is_contiguous() and not t._is_view() for t in tensors)


def test_weights_go_where_there_is_room_if_memory_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(room: Room, size: int) -> torch.Tensor:
        raise torch.OutOfMemoryError("none is left")

    monkeypatch.setattr(weight_layout, "_by_segments", lambda device: True)
    monkeypatch.setattr(Room, "_free", lambda room: [Free(7 * MIB, 0, True)])
    monkeypatch.setattr(Room, "_bytes", full)
    room = Room([6 * MIB] * 5, torch.device("cpu"))
    tensors = [room.empty((3, MIB), torch.bfloat16) for _ in range(5)]
    assert len({t.data_ptr() for t in tensors}) == 5


def test_weights_stay_where_graphs_of_others_may_read_them(monkeypatch: pytest.MonkeyPatch) -> None:
    def moved(others: bool) -> bool:
        model: Any = nn.Linear(4, 4)
        with monkeypatch.context() as patch:
            patch.setattr(runtime_weights, "movable", lambda tensor: True)
            patch.setattr(runtime_weights, "other_graphs", lambda: others)
            patch.setattr(runtime_weights, "release_unused", lambda: None)
            patch.setattr(runtime_weights, "Room", lambda *given: Room((), torch.device("cpu")))
            weights = Weights(model)
            weights._devices = [torch.device("cuda")]
            before = model.weight.data_ptr(), model.weight.detach().clone()
            version = weights.version
            weights.pack([])
            assert torch.equal(model.weight, before[1])
            assert (weights.version != version) is (model.weight.data_ptr() != before[0])
            return bool(model.weight.data_ptr() != before[0])

    assert moved(False) and not moved(True)


FILLED = """
import torch
from torch import nn
from regraft.runtime.weights import Weights

layers = [nn.Linear(1024, n, bias=False) for _ in range(20) for n in (4096, 2048, 3072)]
whole = torch.empty(16 << 20, dtype=torch.uint8, device="cuda")
del whole
stays = torch.ones(1 << 20, dtype=torch.int32, device="cuda")  # 4 MiB of a segment of 16
rest = torch.empty(12 << 20, dtype=torch.uint8, device="cuda")
model = nn.Sequential(*layers).to("cuda", torch.bfloat16)
del rest
torch.cuda.empty_cache()
values = [p.detach().cpu() for p in model.parameters()]
size = sum(p.nbytes for p in model.parameters()) + stays.nbytes
before = torch.cuda.memory_reserved()
weights = Weights(model)
weights.pack([])
assert bool((stays == 1).all())
assert torch.cuda.memory_reserved() <= 1.02 * size < before, (torch.cuda.memory_reserved(), size, before)
assert all(torch.equal(p.cpu(), v) for p, v in zip(model.parameters(), values))
"""


@pytest.mark.gpu
def test_weights_fill_their_segments_in_a_process_of_its_own() -> None:
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", FILLED], env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
