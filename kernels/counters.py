"""Counters in device memory for programs of a kernel that wait for none but must know which of them comes last.

They are 0 before every launch and set back to 0 by the kernel. Launches of one stream follow one another and share
theirs; a launch that is captured may run beside any other, so it has its own.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Final

import torch
from torch import Tensor

SIZE: Final = 1 << 20
"""Counters that are allocated at once, 4 MiB."""
SHARED: Final = 1 << 13
"""The least number of a stream."""


@dataclass
class _Pool:
    """The counters of a device that nobody has yet, and those of each stream."""

    rest: Tensor
    streams: dict[int, Tensor] = field(default_factory=dict)

    def take(self, count: int, captured: bool) -> Tensor:
        """That many counters for one user, for good."""
        if count > len(self.rest):
            if captured:  # cleared at each replay; kept, so that the graph gives this memory to nothing else
                _kept.append(torch.zeros(count, dtype=torch.int32, device=self.rest.device))
                return _kept[-1]
            self.rest = _zeros(max(count, SIZE), self.rest.device)
        taken, self.rest = self.rest[:count], self.rest[count:]
        return taken


_pools: dict[int, _Pool] = {}
_kept: list[Tensor] = []
_lock = threading.Lock()


def _zeros(count: int, device: torch.device) -> Tensor:
    """Zeros that any stream may use from now on."""
    zeros = torch.zeros(count, dtype=torch.int32, device=device)
    torch.cuda.current_stream(device).synchronize()
    return zeros


def counters(count: int, device: torch.device) -> Tensor:
    """`[count]` int32, all 0, for a launch on the current stream of the current device."""
    stream = torch.cuda.current_stream(device)
    captured = torch.cuda.is_current_stream_capturing()
    with _lock:
        pool = _pools.get(stream.device_index)
        if pool is None:
            rest = torch.empty(0, dtype=torch.int32, device=device)
            pool = _pools[stream.device_index] = _Pool(rest)
        if captured:
            return pool.take(count, True)
        found = pool.streams.get(stream.cuda_stream)
        if found is None or len(found) < count:
            found = pool.streams[stream.cuda_stream] = pool.take(max(count, SHARED), False)
        return found
