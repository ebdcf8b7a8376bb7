"""What a measurement gives: results, the conditions they were taken under, and tables of them."""

from __future__ import annotations

import datetime
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from .report import versions
from .timing import Timing

REGRAFT = "regraft"


@dataclass(frozen=True)
class Result:
    """One candidate on one row; `timing` is None where it failed or was wrong, and `problem` says how."""

    row: str
    candidate: str
    batch: int
    length: int
    timing: Timing | None = None
    host_ms: float = 0.0
    """Until the call returns, the device still working."""
    first_s: float = 0.0
    """From `optimize` or `torch.compile` to the first result."""
    peak_gb: float = 0.0
    """Device memory while it runs, weights included."""
    error: float | None = None
    """max |candidate - oracle| of the worst output."""
    error_eager: float | None = None
    bound: float | None = None
    problem: str = ""
    reused: str = ""
    """The date of the run this was taken from, where it was not measured now."""


@dataclass
class Bench:
    """All results of one run, and under which conditions."""

    model: str
    dtype: str
    device: str
    command: str = field(default_factory=lambda: " ".join(["python -m regraft", *sys.argv[1:]]))
    date: str = field(default_factory=lambda: datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"))
    versions: dict[str, str] = field(default_factory=versions)
    rates: dict[str, float] = field(default_factory=dict)
    """What the device reached in this run: copy in TB/s, bf16 matrix product in TFLOP/s."""
    results: list[Any] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, the summary of forwards with it."""
        plain = asdict(self)
        rows = [r for r in self.results if isinstance(r, Result)]
        if rows:
            plain["summary"] = [asdict(s) for s in summaries(rows)]
            plain["geometric_mean"] = geometric_mean(summaries(rows))
        return plain


@dataclass(frozen=True)
class Summary:
    """regraft on one row against the fastest of the others."""

    row: str
    best_peer: str
    peer_ms: float
    regraft_ms: float
    ratio: float
    """The peer's time over ours: above 1 is faster."""
    memory_ratio: float | None
    """Our peak over eager's."""
    first_ratio: float | None
    """Our seconds to the first result over those of max-autotune."""


def device_name(device: torch.device) -> str:
    """`NVIDIA H200`, or the number of CPU threads."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"


def summaries(results: Sequence[Result]) -> list[Summary]:
    """One for each row on which regraft and a peer were measured."""
    found = []
    for row in dict.fromkeys(r.row for r in results):
        timed = {r.candidate: r for r in results if r.row == row and r.timing is not None and not r.problem}
        peers = {n: r for n, r in timed.items() if n != REGRAFT}
        if REGRAFT not in timed or not peers:
            continue
        ours, eager, tuned = timed[REGRAFT], timed.get("eager"), timed.get("compile-max")
        best = min(peers, key=lambda n: _ms(peers[n]))
        found.append(
            Summary(
                row,
                best,
                _ms(peers[best]),
                _ms(ours),
                _ms(peers[best]) / _ms(ours),
                ours.peak_gb / eager.peak_gb if eager is not None and eager.peak_gb else None,
                ours.first_s / tuned.first_s if tuned is not None and tuned.first_s else None,
            )
        )
    return found


def _ms(result: Result) -> float:
    return result.timing.median_ms if result.timing is not None else math.nan


def geometric_mean(rows: Sequence[Summary]) -> float | None:
    """Of the ratios to the best peer; None without rows."""
    return math.exp(sum(math.log(s.ratio) for s in rows) / len(rows)) if rows else None


def table(results: Sequence[Result]) -> list[str]:
    """One line a candidate: time, ratio of eager to it, memory, first result, error and bound."""
    eager = next((r.timing.median_ms for r in results if r.candidate == "eager" and r.timing), None)
    lines = [results[0].row] if results else []
    for r in results:
        if r.timing is None:
            lines.append(f"  {r.candidate:<15} {r.problem}")
            continue
        ratio = f"{eager / r.timing.median_ms:6.2f}x" if eager else ""
        parts = [f"{r.timing.median_ms:9.3f} ms {ratio}", f"host {r.host_ms:.2f} ms", f"first {r.first_s:.1f} s"]
        if r.peak_gb:
            parts.append(f"{r.peak_gb:.2f} GB")
        if r.error is not None and r.bound is not None:
            parts.append(f"error {r.error:.1e} of {r.bound:.1e} allowed")
        parts += [f"from {r.reused}"] if r.reused else []
        lines.append(f"  {r.candidate:<15} " + "  ".join([*parts, r.problem]).rstrip())
    return lines


def summary_table(results: Sequence[Result]) -> list[str]:
    """regraft against the best peer of every row, the rows where it has no result, and the geometric mean."""
    rows = summaries(results)
    lines = []
    for s in rows:
        more = [f"memory {s.memory_ratio:.2f} of eager's"] if s.memory_ratio is not None else []
        more += [f"first result {s.first_ratio:.2f} of max-autotune's"] if s.first_ratio is not None else []
        times = f"{s.regraft_ms:9.3f} ms, {s.best_peer} {s.peer_ms:9.3f} ms"
        lines.append(f"{s.row:<40} {s.ratio:5.2f}x  {times}  {', '.join(more)}".rstrip())
    failed = [r for r in results if r.candidate == REGRAFT and r.row not in {s.row for s in rows}]
    lines += [f"{r.row:<40} no ratio: {r.problem or 'no other candidate was measured'}" for r in failed]
    mean = geometric_mean(rows)
    if mean is not None:
        slower = sum(s.ratio < 1 for s in rows)
        without = f", {len(failed)} rows without a ratio" if failed else ""
        lines.append(f"geometric mean {mean:.3f}x of the best peer over {len(rows)} rows, {slower} below 1{without}")
    return lines
