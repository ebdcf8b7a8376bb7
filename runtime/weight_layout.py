"""Where weights of 1 to 10 MiB stand on a GPU: one behind the other, in segments that they fill.

The caching allocator puts such tensors into segments of 20 MiB, best fit first: weights of 8, 4 and 6 MiB leave a tenth
of each segment empty for good. A request of 10 MiB or more gets a segment of its own size, rounded up to 2 MiB, and
once that is free again it is cut into what is asked for next, if no other free block fits better. So for each group of
weights all free blocks are taken, a segment of the group's size is made and let go, and the weights are allocated.
Before that, weights fill what is free in segments that stay anyway, since something else has a part of them. Each is a
tensor with memory of its own, as before.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Free:
    """A free block that tensors may be cut from."""

    size: int
    address: int
    stays: bool
    """Its segment holds something else than weights that will move."""


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


def plan(sizes: Sequence[int], free: Iterable[Free]) -> list[tuple[list[int], Free | None]]:
    """Which sizes come together, in their order, and where: in a block that is free, or in a segment of their own."""
    found: list[tuple[list[int], Free | None]] = []
    start = 0
    for block in sorted((b for b in free if b.stays), key=lambda b: b.size, reverse=True):
        end, left = start, block.size
        while end < len(sizes) and _rounded(sizes[end]) <= left:
            left -= _rounded(sizes[end])
            end += 1
        if end > start:
            found.append((list(sizes[start:end]), block))
        start = end
    return [*found, *((group, None) for group in groups(sizes[start:]))]


class Room:
    """Memory for weights of these sizes, in bytes, that come in this order on this device and its current stream.

    `leaving` are the addresses of the memory that they leave.
    """

    def __init__(self, sizes: Iterable[int], device: torch.device, leaving: Container[int] = ()) -> None:
        self._device, self._leaving = device, leaving
        self._plan: list[tuple[list[int], Free | None]] = []
        self._ready: list[Tensor] = []
        wanted = [size for size in sizes if size >= SHARED_SEGMENT.start]
        if wanted and _by_segments(device):
            torch.cuda.empty_cache()
            self._plan = plan(wanted, self._free())

    def empty(self, shape: Sequence[int], dtype: torch.dtype, strides: Sequence[int] | None = None) -> Tensor:
        """An uninitialized tensor that fills its memory; contiguous where no strides are given."""
        strides = strides or [math.prod(shape[i + 1 :]) for i in range(len(shape))]
        size = math.prod(shape) * dtype.itemsize
        if not self._ready and self._plan and size in self._plan[0][0]:
            self._ready = self._next(*self._plan.pop(0))
        place = next((i for i, block in enumerate(self._ready) if block.nbytes == size), None)
        if place is None:
            return torch.empty_strided(shape, strides, dtype=dtype, device=self._device)
        storage = self._ready.pop(place).untyped_storage()
        return torch.empty(0, dtype=dtype, device=self._device).set_(storage, 0, tuple(shape), tuple(strides))

    def _next(self, sizes: Sequence[int], block: Free | None) -> list[Tensor]:
        """Blocks of these sizes, one behind the other if there is memory for it."""
        torch.cuda.empty_cache()
        free = self._free()
        if block is not None:  # it may have grown
            block = next((f for f in free if f.address <= block.address < f.address + f.size), None)
        taken = [self._block(f.size) for f in sorted(free, key=lambda f: f.size, reverse=True) if f != block]
        if block is None:
            try:
                self._block(sum(map(_rounded, sizes)))  # let go at once: from here on the only block to be cut
            except torch.OutOfMemoryError:
                taken.clear()  # the weights go where there is room
        made = [self._block(size) for size in sizes]
        taken.clear()
        return made

    def _free(self) -> list[Free]:
        stream = torch.cuda.current_stream(self._device).cuda_stream
        return free_blocks(torch.cuda.memory_snapshot(), self._device, stream, self._leaving)

    def _block(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, device=self._device)


def _rounded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _by_segments(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_available() and torch.cuda.get_allocator_backend() == "native"


def free_blocks(
    segments: Sequence[Mapping[str, Any]], device: torch.device, stream: int, leaving: Container[int]
) -> list[Free]:
    """The free blocks of a memory snapshot that weights on this device and stream may be cut from."""
    found = []
    for segment in segments:
        kind = (segment["device"], segment["stream"], segment["segment_type"], tuple(segment["segment_pool_id"]))
        if kind != (device.index, stream, "large", (0, 0)) or segment["is_expandable"]:
            continue
        stays = any(b["state"] != "inactive" and b["address"] not in leaving for b in segment["blocks"])
        free = (b for b in segment["blocks"] if b["state"] == "inactive" and b["size"] > MIB)
        found += [Free(b["size"], b["address"], stays) for b in free]
    return found
