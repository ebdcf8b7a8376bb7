"""Counters in device memory for programs of a kernel that must know of each other, such as which of them comes last.

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
LINE: Final = 32
"""They are given in multiples of it: launch plans are made for aligned addresses."""
AHEAD: Final = 1 << 18
"""Counters that are there for captures: none can be cleared in time while one is under way."""


@dataclass
class _Pool:
    """The counters of a device that nobody has yet, and those of each stream."""

    device: torch.device
    rest: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int32))
    streams: dict[int, Tensor] = field(default_factory=dict)

    def take(self, count: int, captured: bool) -> Tensor:
        """At least that many counters for one user, for good."""
        count = -(-count // LINE) * LINE
        if count > len(self.rest):
            if captured:  # cleared at each replay; kept, so that the graph gives this memory to nothing else
                _kept.append(torch.zeros(count, dtype=torch.int32, device=self.device))
                return _kept[-1]
            self.extend(count)
        taken, self.rest = self.rest[:count], self.rest[count:]
        return taken

    def extend(self, count: int) -> None:
        """Have at least that many more that nobody has; what is left of the old ones is given to nobody."""
        self.rest = _zeros(max(count, SIZE), self.device)
        _kept.append(self.rest)  # captured graphs have addresses in it, which keep no memory alive


_pools: dict[int, _Pool] = {}
_kept: list[Tensor] = []
_lock = threading.Lock()


def _zeros(count: int, device: torch.device) -> Tensor:
    """Zeros that any stream may use from now on."""
    zeros = torch.zeros(count, dtype=torch.int32, device=device)
    torch.cuda.current_stream(device).synchronize()
    return zeros


def counters(count: int, device: torch.device) -> Tensor:
    """`[count]` int32 or more, all 0, for a launch on the current stream of the current device."""
    if device.type != "cuda":
        return torch.zeros(count, dtype=torch.int32, device=device)  # of the interpreter
    stream = torch.cuda.current_stream(device)
    captured = torch.cuda.is_current_stream_capturing()
    with _lock:
        pool = _pools.get(stream.device_index)
        if pool is None:
            pool = _pools[stream.device_index] = _Pool(torch.device("cuda", stream.device_index))
        if captured:
            return pool.take(count, True)
        if len(pool.rest) < AHEAD:  # what is captured has run before, so that a capture finds as many as it needs
            pool.extend(AHEAD)
        found = pool.streams.get(stream.cuda_stream)
        if found is None or len(found) < count:
            found = pool.streams[stream.cuda_stream] = pool.take(max(count, SHARED), False)
        return found
