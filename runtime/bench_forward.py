"""`regraft bench forward`: eager, torch.compile and regraft on one model, correctness first.

Each candidate's output is compared with the model's own code one precision up before it is timed; the bound is twice
the eager model's error plus a few ulp. Candidates run one after the other on the same weights, so that no other's
copies are in the device's memory, and eager is timed again at the end: where it drifted, the row says so.
"""

from __future__ import annotations

import gc
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from torch import nn

from ..compiler.verify import Distance, higher
from .bench import REGRAFT, Bench, Result, device_name, table
from .certificate import named_outputs
from .checks import dtype_of
from .device_memory import release_unused
from .loading import inputs_for
from .optimize import optimize, restore
from .oracle import run_oracle, run_reference
from .reuse import Earlier
from .sliced import bound_of, distance_of
from .timing import device_rates, measure

COMPILE_MODES: Final[Mapping[str, str]] = {
    "compile": "default",
    "compile-graphs": "reduce-overhead",
    "compile-max": "max-autotune",
}
CANDIDATES: Final = ("eager", *COMPILE_MODES, REGRAFT)
DRIFT: Final = 0.03
"""Of eager's time between the start and the end of a row; more is told."""

Inputs = dict[str, Any]
"""Tensors, and Python values such as `logits_to_keep`, by the names of the forward's arguments."""


class TimeUp(BaseException):
    """A candidate took longer than it may. Not an `Exception`, which compilers catch to go on."""


def bench_forward(
    model: nn.Module,
    shapes: Sequence[tuple[int, int]],
    candidates: Sequence[str] = ("eager", "compile-graphs", REGRAFT),
    *,
    name: str = "",
    rounds: int = 5,
    calls: int = 10,
    limit_s: float = 300.0,
    mask: bool = True,
    arguments: Mapping[str, Any] | None = None,
    earlier: Earlier | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Bench:
    """Compare the candidates at each (batch, length). `eager`, the model as it was loaded, is always measured.

    A candidate that takes more than `limit_s` seconds to prepare and run is given up. Without `mask`, no attention
    mask is passed. `arguments` are further ones of the forward (`{"logits_to_keep": 1}`); they are part of a row's
    name. `earlier` may supply peers that were measured before under the same conditions.
    """
    device = next(model.parameters()).device
    dtype = dtype_of(model)
    bench = Bench(name or type(model).__name__, str(dtype).removeprefix("torch."), device_name(device))
    bench.rates = device_rates(device)
    for shape in shapes:
        row = row_name(bench.model, *shape, arguments)
        inputs = {**inputs_for(model, *shape, mask=mask), **(arguments or {})}
        truth = truth_of(model, inputs, dtype)
        blank = Result(row, "", *shape)
        results: list[Result] = []
        for choice in dict.fromkeys(("eager", *candidates)):
            eager = results[0] if results else None
            old = earlier.result(choice, bench, blank, eager) if earlier is not None and eager is not None else None
            if isinstance(old, str):
                say(f"{row}, {choice}: {old}; it is measured again")
            if isinstance(old, Result):
                results.append(old)
                continue
            entry = replace(blank, candidate=choice)
            results.append(measured(entry, model, inputs, truth, rounds=rounds, calls=calls, limit_s=limit_s))
        bench.results += results
        for line in [*table(results), *_drift(model, inputs, results[0], rounds, calls)]:
            say(line)
    return bench


def row_name(model: str, batch: int, length: int, arguments: Mapping[str, Any] | None = None) -> str:
    """`llama_8b 1x512 logits_to_keep=1`."""
    return " ".join([f"{model} {batch}x{length}", *(f"{k}={v}" for k, v in (arguments or {}).items())])


def _drift(model: nn.Module, inputs: Inputs, eager: Result, rounds: int, calls: int) -> list[str]:
    if eager.timing is None or next(model.parameters()).device.type != "cuda":
        return []
    again = measure({"eager": bound_call(model, inputs)}, next(model.parameters()).device, rounds=rounds, calls=calls)
    ratio = again["eager"].median_ms / eager.timing.median_ms
    return [f"  eager again at the end: {ratio:.3f} of its time at the start"] if abs(ratio - 1) > DRIFT else []


@dataclass(frozen=True)
class Truth:
    """What a call should give, by output, and how far an answer may be from it."""

    oracle: dict[str, torch.Tensor]
    """On the host: on a device it would keep memory around it from the graphs of the candidates, which have pools."""
    error: dict[str, Distance]
    """Of the model's own eager code in its own precision."""
    bound: dict[str, Distance]


def truth_of(model: nn.Module, inputs: Mapping[str, Any], dtype: torch.dtype) -> Truth:
    """What the model's own code gives one precision up, and how far from it that in its own precision is."""
    oracle = _floats(run_oracle(model, model.forward, inputs, higher(dtype)))
    own = _floats(run_reference(model, model.forward, inputs))
    error = {k: distance_of(v, oracle[k]) for k, v in own.items()}
    bound = {k: bound_of(e, oracle[k], dtype) for k, e in error.items()}
    return Truth({k: v.cpu() for k, v in oracle.items()}, error, bound)


@contextmanager
def candidate(name: str, model: nn.Module, inputs: Inputs) -> Iterator[Callable[..., Any]]:
    """A forward to call; the model is as it was afterwards. Raises ValueError for a name that is not known."""
    if name == "eager":
        yield model
    elif name in COMPILE_MODES:
        try:
            yield torch.compile(model, mode=COMPILE_MODES[name], dynamic=False)
        finally:
            torch.compiler.reset()
            if torch.cuda.is_initialized():
                from torch._inductor.cudagraph_trees import reset_cudagraph_trees

                reset_cudagraph_trees()
    elif name == REGRAFT:
        optimized: nn.Module = optimize(model, example_inputs=inputs, verbose=False, on_error="raise")
        try:
            yield optimized
        finally:
            restore(model)
    else:
        raise ValueError(f"unknown candidate {name!r}; known: {', '.join(CANDIDATES)}")


Prepare = Callable[[str, nn.Module, Inputs], AbstractContextManager[Callable[..., Any]]]


def measured(
    blank: Result,
    model: nn.Module,
    inputs: Inputs,
    truth: Truth,
    *,
    rounds: int,
    calls: int,
    limit_s: float,
    prepare: Prepare | None = None,
) -> Result:
    """One candidate, named in `blank`: prepared, compared, its memory and its time taken. A failure is a `problem`.

    `prepare` is `candidate` where it is not given.
    """
    device = next(model.parameters()).device
    _clean(device)
    try:
        with time_limit(limit_s), torch.no_grad():
            start = time.perf_counter()
            with (prepare or candidate)(blank.candidate, model, inputs) as run:
                run(**inputs)
                _wait(device)
                done = replace(blank, first_s=time.perf_counter() - start)
                for _ in range(2):  # CUDA graphs are recorded on the second call
                    run(**inputs)
                done = _judged(done, _floats(run(**inputs)), truth)
                if done.problem and blank.candidate != "eager":
                    return done
                done = replace(done, peak_gb=_peak_gb(run, inputs, device))
                call = bound_call(run, inputs)
                timing = measure({"": call}, device, rounds=rounds, calls=calls)[""]
                return replace(done, timing=timing, host_ms=_host_ms(call, device, calls))
    except TimeUp:
        return replace(blank, problem=f"gave up after {limit_s:.0f} s")
    except Exception as error:  # noqa: BLE001 - a compiler may fail in any way; the others are still measured
        return replace(blank, problem=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
    finally:
        _clean(device)


def _judged(result: Result, found: Mapping[str, torch.Tensor], truth: Truth) -> Result:
    absent = [k for k in truth.oracle if k not in found]
    if absent:
        return replace(result, problem=f"wrong: no output {absent[0]}")
    distances = {k: distance_of(found[k], oracle.to(found[k].device)) for k, oracle in truth.oracle.items()}
    worst = max(distances, key=lambda k: distances[k].largest / (truth.bound[k].largest or 1.0))
    wrong = [k for k, d in distances.items() if not d <= truth.bound[k]]
    return replace(
        result,
        error=distances[worst].largest,
        error_eager=truth.error[worst].largest,
        bound=truth.bound[worst].largest,
        problem=f"wrong: {wrong[0]} is outside its bound" if wrong else "",
    )


def _peak_gb(run: Callable[..., Any], inputs: Inputs, device: torch.device) -> float:
    """The most device memory taken during calls, without the inputs.

    What the allocator has reserved counts, for every candidate: the pools of CUDA graphs are never seen as in use.
    """
    if device.type != "cuda":
        return 0.0
    _clean(device)
    torch.cuda.reset_peak_memory_stats(device)
    for _ in range(2):
        run(**inputs)
    _wait(device)
    own = sum(t.nbytes for t in inputs.values() if isinstance(t, torch.Tensor))
    return (torch.cuda.max_memory_reserved(device) - own) / 1e9


def _host_ms(call: Callable[[], Any], device: torch.device, calls: int) -> float:
    times = []
    for _ in range(max(3, min(calls, 5))):
        _wait(device)
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return 1e3 * min(times)


def bound_call(run: Callable[..., Any], inputs: Mapping[str, Any]) -> Callable[[], Any]:
    """`run` on these inputs, without gradients."""

    def call() -> Any:
        with torch.no_grad():
            return run(**inputs)

    return call


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises TimeUp in the block after that many seconds, in the main thread of a system with timers."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def ring(signum: int, frame: Any) -> None:
        raise TimeUp

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _clean(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        release_unused()


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _floats(output: Any) -> dict[str, torch.Tensor]:
    """Floating-point outputs by name, caches left out: candidates may keep them in different forms."""
    found = named_outputs(output)
    return {k: v.detach() for k, v in found.items() if v.is_floating_point() and not k.startswith("past_key_values")}
