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


def fill(sizes: Iterable[int], free: Iterable[Free]) -> list[tuple[Free, list[int]]]:
    """Which of the sizes go into which of the free blocks whose segments stay, the largest first."""
    left = sorted(sizes, reverse=True)
    found: list[tuple[Free, list[int]]] = []
    for block in sorted((b for b in free if b.stays), key=lambda b: b.size, reverse=True):
        room, inside = block.size, []
        for size in left:
            if _rounded(size) <= room:
                room -= _rounded(size)
                inside.append(size)
        for size in inside:
            left.remove(size)
        found += [(block, inside)] if inside else []
    return found


class Room:
    """Memory for weights of these sizes, in bytes, that come in about this order on this device and current stream.

    `leaving` are the addresses of the memory that they leave.
    """

    def __init__(self, sizes: Iterable[int], device: torch.device, leaving: Container[int] = ()) -> None:
        self._device, self._leaving = device, leaving
        self._groups: list[list[int]] = []
        self._ready: list[Tensor] = []
        wanted = [size for size in sizes if size >= SHARED_SEGMENT.start]
        if not wanted or not _by_segments(device):
            return
        torch.cuda.empty_cache()
        for block, inside in fill(wanted, self._free()):
            self._ready += self._cut(inside, block)
            for size in inside:
                wanted.remove(size)
        self._groups = groups(wanted)

    def empty(self, shape: Sequence[int], dtype: torch.dtype, strides: Sequence[int] | None = None) -> Tensor:
        """An uninitialized tensor that fills its memory; contiguous where no strides are given."""
        strides = strides or [math.prod(shape[i + 1 :]) for i in range(len(shape))]
        size = math.prod(shape) * dtype.itemsize
        ready = next((i for i, block in enumerate(self._ready) if block.nbytes == size), None)
        if ready is None and self._groups and size in self._groups[0]:
            torch.cuda.empty_cache()
            self._ready += self._cut(self._groups.pop(0), None)
            ready = next((i for i, block in enumerate(self._ready) if block.nbytes == size), None)
        if ready is None:
            return torch.empty_strided(shape, strides, dtype=dtype, device=self._device)
        storage = self._ready.pop(ready).untyped_storage()
        return torch.empty(0, dtype=dtype, device=self._device).set_(storage, 0, tuple(shape), tuple(strides))

    def _cut(self, sizes: Sequence[int], block: Free | None) -> list[Tensor]:
        """Blocks of these sizes, cut from a free one or else from a new segment; none if there is no memory for it."""
        others = sorted((f.size for f in self._free() if f != block), reverse=True)
        taken: list[Tensor] = []
        made: list[Tensor] = []
        try:
            for size in others:
                taken.append(self._bytes(size))
            if block is None:
                self._bytes(sum(map(_rounded, sizes)))  # let go at once: from here on the only block to be cut
            for size in sizes:
                made.append(self._bytes(size))
        except torch.OutOfMemoryError:
            made.clear()  # the weights go where there is room
        return made

    def _free(self) -> list[Free]:
        stream = torch.cuda.current_stream(self._device).cuda_stream
        return free_blocks(torch.cuda.memory_snapshot(include_traces=False), self._device, stream, self._leaving)

    def _bytes(self, size: int) -> Tensor:
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
