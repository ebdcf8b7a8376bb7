"""Whether values were written to tensors in ways that PyTorch does not count, such as through `.data`.

A few elements of each tensor are compared with what they were: a change of all or most of a tensor is seen, a change of
a few elements may not be.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import itemgetter
from typing import Final

import torch
from torch import Tensor

SAMPLES: Final = 64
"""Elements of each tensor."""


class Samples:
    """What some elements of each of a list of tensors were when they were last looked at."""

    def __init__(self) -> None:
        self._taken: list[Tensor] = []
        self._state: object = None
        self._table: Tensor | None = None
        self._others: list[Tensor] = []

    @torch.no_grad()
    def changed(self, tensors: Sequence[Tensor], state: object) -> bool:
        """Whether any is another than at the last look, if there was one. The host waits for the device.

        Args:
            state: equal to that of the last look where all tensors are where they were, of the same sizes.
        """
        if state != self._state:
            rows = [(t.data_ptr(), elements_in_a_row(t), t.element_size()) for t in tensors if t.is_cuda]
            device = next((t.device for t in tensors if t.is_cuda), None)
            self._table = torch.tensor(rows, dtype=torch.int64, device=device) if rows else None
            self._others = [t for t in tensors if not t.is_cuda]
            self._state = state
        before, self._taken = self._taken, [*self._on_gpu(), *map(_bytes, self._others)]
        now = self._taken
        return bool(before) and (len(now) != len(before) or not all(map(_equal, now, before)))

    def renew(self, tensors: Sequence[Tensor], state: object) -> None:
        """What is there now is what the next look compares with, if there was a look before."""
        if self._taken:
            self.changed(tensors, state)

    def _on_gpu(self) -> list[Tensor]:
        if self._table is None:
            return []
        from ..kernels.samples_triton import samples  # Triton is not there on every platform

        with torch.cuda.device(self._table.device):
            return [samples(self._table, SAMPLES)]


def elements_in_a_row(tensor: Tensor) -> int:
    """How many elements lie one behind the other from the first: all of a dense tensor, in whatever order."""
    if tensor.is_contiguous():
        return tensor.numel()
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True), key=itemgetter(0)):
        if size > 1 and stride != expected:
            return min(tensor.numel(), 1)
        expected *= size
    return expected


def _bytes(tensor: Tensor) -> Tensor:
    row = tensor.detach().as_strided((elements_in_a_row(tensor),), (1,))
    return row[:: max(1, len(row) // SAMPLES)].clone().view(torch.uint8)


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.device == other.device and torch.equal(one, other)
