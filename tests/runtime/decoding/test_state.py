"""The state of a batch moves on by itself: on the device as on the host, and only where a row is in use."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from regraft.runtime.decoding.state import RING, DecodeState

WHERE = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def filled(device: str, rows: int = 5) -> DecodeState:
    state = DecodeState(8, 2, 4, 16, torch.device(device))
    for row, (computed, limit) in enumerate([(0, 9), (15, 60), (16, 60), (9, 9), (0, 0)]):
        state.set_length(row, computed, limit)
        state.set_token(row, 100 + row)
        for group in range(2):
            state.set_pages(row, group, 0, [10 * group + row, 20 + row, 30 + row, 40 + row])
    state.send()
    return state


@pytest.mark.parametrize("device", WHERE)
def test_rows_move_on_up_to_their_limit(device: str) -> None:
    state = filled(device)
    step = state.advance(5)
    assert step.input_ids.tolist() == [[100, 101, 102, 103, 104]]
    assert step.position_ids.tolist() == [[0, 15, 16, 0, 0]]
    assert step.lengths.tolist() == [1, 16, 17, 0, 0] and step.cu_seqlens_q.tolist() == [0, 1, 2, 3, 4, 5]
    assert [s.tolist() for s in step.slots] == [[0, 31, 22 * 16, -1, -1], [160, 11 * 16 + 15, 22 * 16, -1, -1]]
    assert state.active.tolist()[:5] == [True, True, True, False, False]
    state.take(torch.arange(5, device=device))
    assert state.ids.tolist()[:5] == [0, 1, 2, 103, 104] and state.tick.item() == 1
    step = state.advance(5)
    assert step.lengths.tolist() == [2, 17, 18, 0, 0] and step.slots[0].tolist() == [1, 21 * 16, 22 * 16 + 1, -1, -1]
    for i in range(2, RING + 3):
        state.advance(5)
        state.take(torch.full((5,), i, device=device))
    assert state.tick.item() == 2 and state.ring[0].tolist()[:5] == [RING + 1] * 5 and state.ring[2, 0] == 3
    assert state.computed.tolist()[:5] == [9, 60, 60, 9, 0]


@pytest.mark.parametrize("device", WHERE)
def test_many_changes_are_sent_in_parts(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("regraft.runtime.decoding.state.STAGED", 7)
    state = filled(device)
    assert state.tables[1].tolist()[2] == [12, 22, 32, 42] and state.limits.tolist()[:5] == [9, 60, 60, 9, 0]
    state.set_pages(2, 1, 1, [5, 6])
    state.send()
    assert state.tables[1].tolist()[2] == [12, 5, 6, 42] and state.tables[0].tolist()[2] == [2, 22, 32, 42]


def test_kernels_do_what_the_host_does() -> None:
    """In Triton's interpreter, in a process of its own."""
    program = """
import torch
from regraft.kernels import decode_triton
from regraft.runtime.decoding.state import DecodeState
made = torch.Generator().manual_seed(0)
states = [DecodeState(70, 2, 4, 16, torch.device("cpu")) for _ in range(2)]
for state in states:
    made.manual_seed(0)
    state.computed.copy_(torch.randint(0, 60, (70,), generator=made))
    state.limits.copy_(torch.randint(0, 64, (70,), generator=made))
    state._tables.copy_(torch.randint(0, 99, state._tables.shape, generator=made))
a, b = states
own = (b.computed, b.limits, b._tables, b.positions, b.lengths)
for step in range(3):
    a.advance(66)
    tokens = torch.randint(0, 99, (66,), generator=made)
    a.take(tokens)
    decode_triton.advance(*own, b.active.view(torch.uint8), b._slots, 66, 16)
    decode_triton.take(tokens, b.active.view(torch.uint8), b.ids, b.ring, b.tick)
    for name in ("computed", "positions", "lengths", "active", "_slots", "ids", "ring", "tick"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name
print("equal")
"""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    found = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert found.stdout.strip() == "equal", found.stderr
