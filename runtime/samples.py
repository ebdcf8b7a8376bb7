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
from torch.nn import Parameter

SAMPLES: Final = 64
"""Elements of each tensor."""


class Samples:
    """What some elements of each of a list of tensors were when they were last looked at."""

    def __init__(self) -> None:
        self.taken: list[Tensor] = []
        self._state: object = None
        self._tables: list[Tensor] = []
        self._on_cpu: list[Tensor] = []

    @torch.no_grad()
    def changed(self, tensors: Sequence[Tensor], state: object) -> bool:
        """Whether any is another than at the last look, if there was one. The host waits for the device.

        Args:
            tensors: those without memory of their own, such as on the meta device, are left out.
            state: equal to that of the last look where all tensors are where they were, of the same sizes.
        """
        if state != self._state:
            readable = [t for t in tensors if _is_readable(t)]
            self._tables = [_table(readable, d) for d in dict.fromkeys(t.device for t in readable if t.is_cuda)]
            self._on_cpu = [t for t in readable if not t.is_cuda]
            self._state = state
        now = [*map(_read, self._tables), *map(_bytes, self._on_cpu)]
        before, self.taken = self.taken, now
        return bool(before) and (len(now) != len(before) or not all(map(_equal, now, before)))


def _is_readable(tensor: Tensor) -> bool:
    if type(tensor) not in (Tensor, Parameter) or tensor.layout is not torch.strided or tensor.is_quantized:
        return False
    if tensor.device.type not in ("cpu", "cuda"):
        return False
    end = tensor.storage_offset() + elements_in_a_row(tensor)
    return end * tensor.element_size() <= tensor.untyped_storage().nbytes()


def _table(tensors: list[Tensor], device: torch.device) -> Tensor:
    rows = [(t.data_ptr(), elements_in_a_row(t), t.element_size()) for t in tensors if t.device == device]
    return torch.tensor(rows, dtype=torch.int64, device=device)


def _read(table: Tensor) -> Tensor:
    from ..kernels.samples_triton import samples  # Triton is not there on every platform

    with torch.cuda.device(table.device):
        return samples(table, SAMPLES)


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
    count = elements_in_a_row(tensor)
    row = tensor.detach().as_strided((count,), (1,))
    return row[:: max(1, (count - 1) // (SAMPLES - 1))][:SAMPLES].clone().view(torch.uint8)


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.device == other.device and torch.equal(one, other)
