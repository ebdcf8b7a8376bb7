"""Where weights of 1 to 10 MiB stand on a GPU: one behind the other, in segments that they fill.

The caching allocator puts such tensors into segments of 20 MiB, best fit first: weights of 8, 4 and 6 MiB leave a tenth
of each segment empty for good. A request of 10 MiB or more gets a segment of its own size, rounded up to 2 MiB, and
once that is free again it is cut into what is asked for next, if no other free block fits better. So for each group of
weights all free blocks are taken, a segment of the group's size is made and let go, and the weights are allocated.
Each is a tensor with memory of its own, as before.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from .device_memory import SHARED_SEGMENT

MIB: Final = 1 << 20
GROUP: Final = 20 * MIB
"""Bytes of a group at least: a segment is rounded up to `ROUNDED`, a tenth of it at most."""
ROUNDED: Final = 2 * MIB
WASTE: Final = 1 / 64
"""Of a group that ends before it has twice as much as it needs."""
BLOCK: Final = 512
"""What the allocator rounds tensors up to."""


def groups(sizes: Iterable[int]) -> list[list[int]]:
    """Sizes in bytes, in their order, in groups that fill a segment each; too little for a segment is in no group."""
    found: list[list[int]] = []
    open_group: list[int] = []
    for size in sizes:
        open_group.append(size)
        total = sum(map(_rounded, open_group))
        if total >= GROUP and (-total % ROUNDED <= WASTE * total or total >= 2 * GROUP):
            found.append(open_group)
            open_group = []
    if sum(open_group) >= SHARED_SEGMENT.stop:
        found.append(open_group)
    elif found:
        found[-1] += open_group
    return found


class Room:
    """Memory for weights of these sizes, in bytes, that come in this order on this device and its current stream."""

    def __init__(self, sizes: Iterable[int], device: torch.device) -> None:
        self._device = device
        self._groups = groups(size for size in sizes if size >= SHARED_SEGMENT.start) if _by_segments(device) else []
        self._ready: list[Tensor] = []

    def empty(self, shape: Sequence[int], dtype: torch.dtype, strides: Sequence[int] | None = None) -> Tensor:
        """An uninitialized tensor that fills its memory; contiguous where no strides are given."""
        strides = strides or [math.prod(shape[i + 1 :]) for i in range(len(shape))]
        size = math.prod(shape) * dtype.itemsize
        if not self._ready and self._groups and size in self._groups[0]:
            self._ready = _segment(self._groups.pop(0), self._device)
        place = next((i for i, block in enumerate(self._ready) if block.nbytes == size), None)
        if place is None:
            return torch.empty_strided(shape, strides, dtype=dtype, device=self._device)
        storage = self._ready.pop(place).untyped_storage()
        return torch.empty(0, dtype=dtype, device=self._device).set_(storage, 0, tuple(shape), tuple(strides))


def _rounded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _by_segments(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_available() and torch.cuda.get_allocator_backend() == "native"


def _segment(sizes: Sequence[int], device: torch.device) -> list[Tensor]:
    """Blocks of these sizes, in a segment without anything else if there is memory for one."""
    torch.cuda.empty_cache()
    stream = torch.cuda.current_stream(device).cuda_stream
    taken = [_block(size, device) for size in free_blocks(torch.cuda.memory_snapshot(), device, stream)]
    try:
        _block(sum(map(_rounded, sizes)), device)  # let go at once: from here on the only block to be cut
    except torch.OutOfMemoryError:
        taken.clear()  # the weights go where there is room
    made = [_block(size, device) for size in sizes]
    taken.clear()
    return made


def free_blocks(segments: Sequence[Mapping[str, Any]], device: torch.device, stream: int) -> list[int]:
    """Bytes of the free blocks of a memory snapshot that a weight may be cut from, the largest first."""
    return sorted(
        (
            block["size"]
            for segment in segments
            if not segment["is_expandable"]
            and (segment["device"], segment["stream"], segment["segment_type"]) == (device.index, stream, "large")
            and tuple(segment["segment_pool_id"]) == (0, 0)
            for block in segment["blocks"]
            if block["state"] == "inactive" and block["size"] > MIB
        ),
        reverse=True,
    )


def _block(size: int, device: torch.device) -> Tensor:
    return torch.empty(size, dtype=torch.uint8, device=device)
