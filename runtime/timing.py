"""Timing that compares fairly: warm-up apart, several rounds in turn, medians, and on a GPU a cold L2 cache."""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch

FLUSH_BYTES: Final = 256 << 20
"""Written or read between measurements; more than twice the L2 cache of any GPU so far."""

ROUND_S: Final = 0.5
"""What a round of one candidate may take; slow calls are made fewer times."""

REPLAY_S: Final = 0.012
"""What the replays of a CUDA graph in one round take at least."""

KEPT_BYTES: Final = 8 << 30
"""Results that the calls in one CUDA graph may hold at the same time."""


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one candidate."""

    median_ms: float
    fastest_ms: float
    slowest_ms: float
    rounds: int
    warmup_s: float
    """All calls before the measurement, compilation included, in seconds."""
    how: str = ""
    """`graph`: calls in a CUDA graph; `events`: one at a time. Empty on a CPU."""


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
    """Time every candidate, in turn, `rounds` times; each round is the median of at most `calls` calls.

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
            times: list[float] = []
            while len(times) < calls and (sum(times) < 1e3 * ROUND_S or not times):
                times.append(_once(candidates[name], device, flush, device_time))
            medians[name].append(statistics.median(times))
    how = "events" if flush is not None else ""
    return {
        name: Timing(statistics.median(found), min(found), max(found), rounds, warm[name], how)
        for name, found in medians.items()
    }


def measure_kernels(
    candidates: Mapping[str, Sequence[Call]], device: torch.device, *, small: bool, rounds: int = 5, calls: int = 20
) -> dict[str, Timing]:
    """Device time of one call, cold: each candidate is a list of calls, one for each copy of its arguments.

    On CUDA about `calls` calls go into a CUDA graph, over the copies in turn: so much is read in between that each
    finds its own arguments gone from the L2 cache. Where all copies together are `small`, a read of 256 MB stands
    before each call, and its time, from a graph that has nothing else, is subtracted. Graphs are replayed in turn. What
    cannot be captured is timed by events with its launch hidden (`Timing.how`).
    """
    if rounds < 1 or calls < 1:
        raise ValueError(f"rounds={rounds}, calls={calls}: both must be at least 1")
    if device.type != "cuda":
        return measure({n: c[0] for n, c in candidates.items()}, device, rounds=rounds, calls=calls)
    warm = {name: _warm_up(each[0], device, 2) for name, each in candidates.items()}
    flush = _Flush(device)
    graphs: dict[str, _Graph] = {}
    for name, each in candidates.items():
        times = max(1, round(calls / len(each))) * len(each)
        if not _waits(each[0], device):
            graphs[name] = _Graph([each[i % len(each)] for i in range(times)], flush if small else None, device)
    base = _Graph([lambda: None] * calls, flush, device) if small else None
    found: dict[str, list[float]] = {name: [] for name in graphs}
    for turn in range(rounds):
        names = list(graphs)
        idle = base.run() / calls if base is not None else 0.0
        for name in names if turn % 2 == 0 else reversed(names):
            found[name].append(max(graphs[name].run() / graphs[name].calls - idle, 1e-5))
    timings = {
        name: Timing(statistics.median(ms), min(ms), max(ms), rounds, warm[name], "graph") for name, ms in found.items()
    }
    others = {n: c[0] for n, c in candidates.items() if n not in timings}
    return {**timings, **measure(others, device, rounds=rounds, calls=calls, device_time=True)}


def _waits(call: Call, device: torch.device) -> bool:
    """Whether the host waits for the device in it, which a CUDA graph cannot hold."""
    before = torch.cuda.get_sync_debug_mode()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the mode is a prototype
            torch.cuda.set_sync_debug_mode("error")
        call()
    except RuntimeError:
        return True
    finally:
        torch.cuda.set_sync_debug_mode(before)
        torch.cuda.synchronize(device)
    return False


class _Flush:
    """Fills the L2 cache with clean lines of something else: nothing is left to be written back later."""

    def __init__(self, device: torch.device) -> None:
        self._data = torch.ones(FLUSH_BYTES // 4096, 1024, dtype=torch.int32, device=device)
        self._largest = torch.empty(len(self._data), dtype=torch.int32, device=device)

    def __call__(self) -> None:
        torch.amax(self._data, dim=1, out=self._largest)


class _Graph:
    """Calls captured into a CUDA graph, with their results alive until the end of it so that none shares memory."""

    def __init__(self, calls: Sequence[Call], flush: _Flush | None, device: torch.device) -> None:
        self.calls, self._device = len(calls), device
        self._graph = torch.cuda.CUDAGraph()
        kept: list[Any] = []
        before = torch.cuda.memory_allocated(device)
        with torch.no_grad(), torch.cuda.graph(self._graph):
            for call in calls:
                if flush is not None:
                    flush()
                kept.append(call())
                if torch.cuda.memory_allocated(device) - before > KEPT_BYTES:
                    kept.clear()
        self._graph.replay()
        self._replays = max(1, min(50, int(1e3 * REPLAY_S / max(self._timed(1), 1e-3))))

    def run(self) -> float:
        """Milliseconds of one replay, the mean of several."""
        return self._timed(self._replays) / self._replays

    def _timed(self, times: int) -> float:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self._graph.replay()
        begin.record()
        for _ in range(times):
            self._graph.replay()
        end.record()
        torch.cuda.synchronize(self._device)
        return float(begin.elapsed_time(end))


def device_rates(device: torch.device) -> dict[str, float]:
    """What the device reaches now: `copy_tb_s` (bytes read and written), `matmul_tflop_s` in bf16; nothing on a CPU."""
    if device.type != "cuda":
        return {}
    source = torch.ones(1 << 30, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    a, b = (torch.randn(8192, 8192, dtype=torch.bfloat16, device=device) for _ in range(2))
    copy_ms = _back_to_back(lambda: target.copy_(source), device)
    matmul_ms = _back_to_back(lambda: a @ b, device)
    return {"copy_tb_s": 2 * source.nbytes / copy_ms / 1e9, "matmul_tflop_s": 2 * 8192**3 / matmul_ms / 1e9}


def _back_to_back(call: Call, device: torch.device) -> float:
    """Milliseconds of one of several calls in a row, outside of a CUDA graph, which would copy by another way."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    found = []
    for _ in range(4):
        call()
        begin.record()
        for _ in range(5):
            call()
        end.record()
        torch.cuda.synchronize(device)
        found.append(begin.elapsed_time(end) / 5)
    return float(min(found))


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
