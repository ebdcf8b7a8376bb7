"""Timing that compares fairly: warm-up apart, several rounds in turn, medians, and on a GPU a cold L2 cache."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch

FLUSH_BYTES: Final = 256 << 20
"""Written between measurements; more than twice the L2 cache of any GPU so far."""


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one candidate."""

    median_ms: float
    fastest_ms: float
    slowest_ms: float
    rounds: int
    warmup_s: float
    """All calls before the measurement, compilation included, in seconds."""


Call = Callable[[], Any]


def measure(
    candidates: Mapping[str, Call],
    device: torch.device,
    *,
    rounds: int = 5,
    calls: int = 10,
    warmup: int = 3,
    device_time: bool = False,
) -> dict[str, Timing]:
    """Time every candidate, in turn, `rounds` times; each round is the median of `calls` calls.

    On CUDA a call is timed with events after the L2 cache was overwritten; the host waits before each call, so that a
    candidate which cannot launch as fast as the GPU works shows it. With `device_time` the launch is hidden behind a
    running kernel instead, and only the device's own time counts. On a CPU it is `perf_counter`, caches as they are.
    """
    if rounds < 1 or calls < 1:
        raise ValueError(f"rounds={rounds}, calls={calls}: both must be at least 1")
    warm = {name: _warm_up(call, device, warmup) for name, call in candidates.items()}
    flush = torch.empty(FLUSH_BYTES // 4, dtype=torch.int32, device=device) if device.type == "cuda" else None
    medians: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(rounds):
        names = list(candidates)
        for name in names if turn % 2 == 0 else reversed(names):
            times = [_once(candidates[name], device, flush, device_time) for _ in range(calls)]
            medians[name].append(statistics.median(times))
    return {
        name: Timing(statistics.median(found), min(found), max(found), rounds, warm[name])
        for name, found in medians.items()
    }


def _warm_up(call: Call, device: torch.device, times: int) -> float:
    start = time.perf_counter()
    for _ in range(times):
        call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _once(call: Call, device: torch.device, flush: torch.Tensor | None, device_time: bool) -> float:
    if flush is None:
        start = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - start)
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    flush.zero_()
    if device_time:
        torch.cuda._sleep(400_000)  # about 0.2 ms of spinning: the launches that follow queue up behind it
    else:
        torch.cuda.synchronize(device)
    begin.record()
    call()
    end.record()
    torch.cuda.synchronize(device)
    return float(begin.elapsed_time(end))
