"""Tokens on their way to the host: copied in the order of the stream, waited for when they are looked at."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Readback:
    """A copy of a contiguous int64 tensor [lines, rows] as it is behind everything launched so far.

    Args:
        wanted: of each result, its row, its first line, and how many lines it has; lines go round.
    """

    def __init__(self, tensor: Tensor, wanted: Sequence[tuple[int, int, int]]) -> None:
        self._wanted = tuple(wanted)
        self._event: torch.cuda.Event | None = None
        if tensor.is_cuda:
            self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._host.copy_(tensor, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        else:
            self._host = tensor.clone()

    def read(self) -> list[list[int]]:
        """Wait, and return the tokens of each result."""
        if self._event is not None:
            self._event.synchronize()
        lines: list[list[int]] = self._host.tolist()
        return [[lines[(first + i) % len(lines)][row] for i in range(count)] for row, first, count in self._wanted]
