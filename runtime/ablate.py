"""`regraft bench ablate`: what each fusion contributes, by taking it out of the pipeline and measuring the forward.

Every variant is compared with the model's own code one precision up before it is timed, as in `bench forward`. The
whole pipeline is measured again at the end: contributions smaller than what that moved by say nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from .bench import Bench, Result, device_name
from .bench_forward import Inputs, measured, truth_of
from .checks import dtype_of
from .errors import InputError
from .loading import inputs_for
from .optimize import optimize, restore
from .timing import device_rates


@dataclass(frozen=True)
class Contribution:
    """One pass: the forward without it."""

    name: str
    rewrites: int
    ms: float | None
    """Without the pass; None where that failed, and `problem` says how."""
    saves_ms: float | None
    """What the pass takes off; below 0 it costs."""
    problem: str = ""


@dataclass
class Ablation:
    """All passes of one model at one shape."""

    row: str
    ms: float
    """With all passes."""
    drift_ms: float
    """What the same moved by until the end."""
    passes: list[Contribution] = field(default_factory=list)

    def lines(self) -> list[str]:
        """As a table, the largest contribution first."""
        head = f"{self.row}: {self.ms:.3f} ms with all passes, {self.drift_ms:+.3f} ms at the end"
        lines = [head]
        for p in sorted(self.passes, key=lambda p: -(p.saves_ms or 0.0)):
            lines.append("  " + told(p, self.ms))
        return lines


def told(p: Contribution, ms: float) -> str:
    """`qkv (x32): saves 0.310 ms, 2.1 %`."""
    if p.ms is None or p.saves_ms is None:
        return f"{p.name} (x{p.rewrites}): {p.problem}"
    what = "saves" if p.saves_ms >= 0 else "costs"
    return f"{p.name} (x{p.rewrites}): {what} {abs(p.saves_ms):.3f} ms, {100 * abs(p.saves_ms) / ms:.1f} %"


def ablate(
    model: nn.Module,
    shape: tuple[int, int],
    *,
    name: str = "",
    passes: Sequence[str] = (),
    rounds: int = 5,
    calls: int = 10,
    limit_s: float = 300.0,
    mask: bool = True,
    say: Callable[[str], None] = lambda line: None,
) -> Bench:
    """Measure without each of `passes`, of all fusions that rewrote something where none is named.

    Raises ValueError where the whole pipeline is wrong or fails: then nothing can be said of its parts.
    """
    device = next(model.parameters()).device
    bench = Bench(name or type(model).__name__, str(dtype_of(model)).removeprefix("torch."), device_name(device))
    bench.rates = device_rates(device)
    row = f"{bench.model} {shape[0]}x{shape[1]}"
    inputs = inputs_for(model, *shape, mask=mask)
    truth = truth_of(model, inputs, dtype_of(model))
    counts: dict[str, int] = {}

    def without(off: str) -> Result:
        @contextmanager
        def prepare(_: str, given: nn.Module, example: Inputs) -> Iterator[Callable[..., Any]]:
            choice = {off: False} if off else None
            optimized = optimize(given, passes=choice, example_inputs=example, verbose=False, on_error="raise")
            if not off:
                counts.update({p.name: len(p.rewrites) for p in optimized.report.passes if p.stage == "FUSE"})
            try:
                yield optimized
            finally:
                restore(given)

        blank = Result(row, f"without {off}" if off else "all passes", *shape)
        return measured(blank, model, inputs, truth, rounds=rounds, calls=calls, limit_s=limit_s, prepare=prepare)

    whole = without("")
    if whole.timing is None or whole.problem:
        raise ValueError(f"{row}: {whole.problem or 'not measured'}")
    ms = whole.timing.median_ms
    found: list[Contribution] = []
    for off in passes or [p for p, count in counts.items() if count]:
        result = without(off)
        taken = result.timing.median_ms if result.timing is not None and not result.problem else None
        saves = taken - ms if taken is not None else None
        found.append(Contribution(off, counts.get(off, 0), taken, saves, result.problem))
        say(told(found[-1], ms))
    again = without("")
    drift = again.timing.median_ms - ms if again.timing is not None else 0.0
    bench.results = [Ablation(row, ms, drift, found)]
    return bench


def read_ablation(file: str, model: str) -> dict[str, Any]:
    """The only result of a JSON of `bench ablate`, or of several the first of this model.

    Raises InputError for a file that is not one, and where it has several models but not this one.
    """
    try:
        results: list[dict[str, Any]] = json.loads(Path(file).read_text())["results"]
        for result in results:
            for p in result["passes"]:
                Contribution(**p)
        rows = {str(result["row"]): {**result, "ms": float(result["ms"])} for result in results}
        only = next(iter(rows))
    except (OSError, ValueError, KeyError, TypeError, StopIteration) as error:
        raise InputError(f"--ablation {file}: not the JSON of `bench ablate` ({type(error).__name__})") from error
    row = only if len(rows) == 1 else next((r for r in rows if r.startswith(f"{model} ")), None)
    if row is None:
        raise InputError(f"--ablation {file}: has no row of {model}, only {', '.join(rows)}")
    return rows[row]
