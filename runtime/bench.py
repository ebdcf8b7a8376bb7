"""`regraft bench forward`: eager, torch.compile and regraft on one model, correctness first.

Each candidate's output is compared with the model's own code one precision up before it is timed; the bound is twice
the eager model's error plus a few ulp. Candidates are timed in turn, medians of several rounds, compilation apart.
"""

from __future__ import annotations

import copy
import datetime
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import nn

from ..compiler.verify import Distance, bound_for, distance, higher
from .certificate import named_outputs
from .checks import dtype_of
from .loading import inputs_for
from .optimize import optimize
from .oracle import run_oracle, run_reference
from .report import versions
from .timing import Timing, measure

COMPILE_MODES = {"compile": "default", "compile-max": "max-autotune-no-cudagraphs", "compile-graphs": "max-autotune"}
CANDIDATES = ("eager", "regraft", *COMPILE_MODES)


@dataclass(frozen=True)
class Result:
    """One candidate at one shape; `timing` is None where it failed or was wrong, and `problem` says how."""

    candidate: str
    batch: int
    length: int
    timing: Timing | None
    error: float | None = None
    """max |candidate - oracle| of the worst output."""
    error_eager: float | None = None
    bound: float | None = None
    problem: str = ""
    compile_s: float = 0.0
    """Optimizing or compiling, first call included."""


@dataclass
class Bench:
    """All results of one run, and under which conditions."""

    model: str
    dtype: str
    device: str
    command: str = field(default_factory=lambda: " ".join(["python -m regraft", *sys.argv[1:]]))
    date: str = field(default_factory=lambda: datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"))
    versions: dict[str, str] = field(default_factory=versions)
    results: list[Any] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def device_name(device: torch.device) -> str:
    """`NVIDIA H200`, or the number of CPU threads."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"


def bench_forward(
    model: nn.Module,
    shapes: Sequence[tuple[int, int]],
    candidates: Sequence[str] = ("eager", "compile", "regraft"),
    *,
    rounds: int = 5,
    calls: int = 10,
    say: Callable[[str], None] = lambda line: None,
) -> Bench:
    """Compare the candidates at each (batch, length). `eager`, the model as it was loaded, is always measured."""
    device = next(model.parameters()).device
    dtype = dtype_of(model)
    bench = Bench(type(model).__name__, str(dtype).removeprefix("torch."), device_name(device))
    inputs = {shape: inputs_for(model, *shape) for shape in shapes}
    truths = {shape: _truth(model, given, dtype) for shape, given in inputs.items()}
    runs: dict[str, Callable[..., Any]] = {}
    problems: dict[str, str] = {}
    for name in dict.fromkeys(("eager", *candidates)):
        try:
            runs[name] = _prepare(name, model)
        except Exception as error:  # noqa: BLE001 - a compiler may fail in any way; the others are still measured
            problems[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    for shape in shapes:
        results = _at(shape, runs, inputs[shape], truths[shape], device, rounds, calls)
        results += [Result(name, *shape, None, problem=problem) for name, problem in problems.items()]
        bench.results += results
        for line in table(results):
            say(line)
    return bench


@dataclass(frozen=True)
class _Truth:
    """What a call should give, by output, and how far an answer may be from it."""

    oracle: dict[str, torch.Tensor]
    error: dict[str, Distance]
    """Of the model's own eager code in its own precision."""
    bound: dict[str, Distance]


def _truth(model: nn.Module, inputs: Mapping[str, torch.Tensor], dtype: torch.dtype) -> _Truth:
    oracle = _floats(run_oracle(model, model.forward, inputs, higher(dtype)))
    own = _floats(run_reference(model, model.forward, inputs))
    error = {k: distance(v, oracle[k]) for k, v in own.items()}
    return _Truth(oracle, error, {k: bound_for(e, oracle[k], dtype) for k, e in error.items()})


def _prepare(name: str, model: nn.Module) -> Callable[..., Any]:
    if name == "eager":
        return model.forward
    if name in COMPILE_MODES:
        mode = COMPILE_MODES[name]
        compiled: Callable[..., Any] = torch.compile(copy.deepcopy(model), mode=mode, dynamic=False)
        return compiled
    if name == "regraft":
        optimized: nn.Module = optimize(copy.deepcopy(model), verbose=False, on_error="raise")
        return optimized.forward
    raise ValueError(f"unknown candidate {name!r}; known: {', '.join(CANDIDATES)}")


def _at(
    shape: tuple[int, int],
    runs: Mapping[str, Callable[..., Any]],
    inputs: Mapping[str, torch.Tensor],
    truth: _Truth,
    device: torch.device,
    rounds: int,
    calls: int,
) -> list[Result]:
    checked: list[Result] = []
    ready: dict[str, Callable[[], Any]] = {}
    for name, run in runs.items():
        start = time.perf_counter()
        try:
            with torch.no_grad():
                found = _floats(run(**inputs))
        except Exception as error:  # noqa: BLE001 - as above
            checked.append(Result(name, *shape, None, problem=f"{type(error).__name__}: {str(error)[:200]}"))
            continue
        compile_s = time.perf_counter() - start
        result = _judged(name, shape, found, truth, compile_s)
        checked.append(result)
        if not result.problem or name == "eager":
            ready[name] = _bound_call(run, inputs)
    timings = measure(ready, device, rounds=rounds, calls=calls)
    return [replace(r, timing=timings.get(r.candidate)) for r in checked]


def _judged(
    name: str, shape: tuple[int, int], found: Mapping[str, torch.Tensor], truth: _Truth, compile_s: float
) -> Result:
    absent = [k for k in truth.oracle if k not in found]
    if absent:
        return Result(name, *shape, None, problem=f"wrong: no output {absent[0]}", compile_s=compile_s)
    distances = {k: distance(found[k], oracle) for k, oracle in truth.oracle.items()}
    worst = max(distances, key=lambda k: distances[k].largest / (truth.bound[k].largest or 1.0))
    numbers = (distances[worst].largest, truth.error[worst].largest, truth.bound[worst].largest)
    wrong = [k for k, d in distances.items() if not d <= truth.bound[k]]
    problem = f"wrong: {wrong[0]} is outside its bound" if wrong else ""
    return Result(name, *shape, None, *numbers, problem=problem, compile_s=compile_s)


def _bound_call(run: Callable[..., Any], inputs: Mapping[str, torch.Tensor]) -> Callable[[], Any]:
    def call() -> Any:
        with torch.no_grad():
            return run(**inputs)

    return call


def _floats(output: Any) -> dict[str, torch.Tensor]:
    """Floating-point outputs by name, caches left out: candidates may keep them in different forms."""
    found = named_outputs(output)
    return {k: v.detach() for k, v in found.items() if v.is_floating_point() and not k.startswith("past_key_values")}


def table(results: Sequence[Result]) -> list[str]:
    """One line a candidate: time, ratio to eager, error and bound."""
    eager = next((r.timing.median_ms for r in results if r.candidate == "eager" and r.timing), None)
    lines = [f"batch {results[0].batch}, length {results[0].length}"] if results else []
    for r in results:
        if r.timing is None:
            lines.append(f"  {r.candidate:<15} {r.problem}")
            continue
        ratio = f"{eager / r.timing.median_ms:6.2f}x" if eager else ""
        error = f"error {r.error:.1e} of {r.bound:.1e} allowed" if r.error is not None and r.bound is not None else ""
        first = f"first call {r.compile_s:.1f} s"
        lines.append(
            f"  {r.candidate:<15} {r.timing.median_ms:9.3f} ms {ratio}   {error}   {first}   {r.problem}".rstrip()
        )
    return lines
