"""`regraft bench kernels`: every case of every op, each provider against PyTorch, on a cold cache.

Correctness first: a provider's error against the reference in the next precision must be at most twice that of
PyTorch's own spelling plus a few ulp. The time is the device's, the launch hidden; GB/s and TFLOP/s come from the op's
cost, and the share of the roofline from the device's measured rates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..compiler.device import Device, device_for
from ..compiler.verify import bound_for, distance, higher
from ..kernels.cases import Case, cases
from ..kernels.table import PROVIDERS
from .bench import Bench, device_name
from .timing import Timing, measure


@dataclass(frozen=True)
class KernelResult:
    """One provider (or the peer) on one case."""

    op: str
    case: str
    provider: str
    timing: Timing | None
    us: float = 0.0
    gb_s: float = 0.0
    tflop_s: float = 0.0
    roofline_share: float = 0.0
    """Time that the device's rates allow, over the time it took."""
    error: float | None = None
    bound: float | None = None
    problem: str = ""


def bench_kernels(
    device: torch.device,
    dtype: torch.dtype = torch.bfloat16,
    ops: Sequence[str] = (),
    *,
    rounds: int = 3,
    calls: int = 10,
    say: Callable[[str], None] = lambda line: None,
) -> Bench:
    """Time all cases of the named ops, all ops where none is named. Raises ValueError for an op without cases."""
    known = cases(dtype)
    for op in ops:
        if op not in known:
            raise ValueError(f"op {op!r} has no cases; known: {', '.join(sorted(known))}")
    bench = Bench("kernels", str(dtype).removeprefix("torch."), device_name(device))
    roofs = device_for(device)
    for name in ops or known:
        for case in known[name]:
            results = _case(case, device, roofs, rounds, calls)
            bench.results += results
            for line in _table(case, results):
                say(line)
    return bench


def _case(case: Case, device: torch.device, roofs: Device, rounds: int, calls: int) -> list[KernelResult]:
    torch.manual_seed(0)
    arguments = case.arguments(device)
    wide = {k: _widen(v, higher(case.dtype)) for k, v in arguments.items()}
    oracle = _tensors(case.op.reference(**wide))
    del wide
    peer = _tensors(case.peer(**arguments))
    bounds = [bound_for(distance(p, o), o, case.dtype) for p, o in zip(peer, oracle, strict=True)]
    runs: dict[str, Callable[[], Any]] = {case.peer_name: lambda: case.peer(**arguments)}
    errors: dict[str, float] = {case.peer_name: max(distance(p, o).largest for p, o in zip(peer, oracle, strict=True))}
    problems: dict[str, str] = {}
    signature = case.op.signature(**arguments)
    for kernel in PROVIDERS.get(case.op.name, ()):
        refused = kernel.supports(signature)
        if refused is not None:
            problems[kernel.provider] = refused
            continue
        ordered = [arguments.get(a.name, a.default_value) for a in case.op.overload._schema.arguments]
        found = _tensors(kernel.run(*ordered))
        apart = [distance(f, o) for f, o in zip(found, oracle, strict=True)]
        errors[kernel.provider] = max(d.largest for d in apart)
        if not all(d <= b for d, b in zip(apart, bounds, strict=True)):
            problems[kernel.provider] = f"wrong: error {errors[kernel.provider]:.1e}"
            continue
        runs[kernel.provider] = lambda run=kernel.run, given=ordered: run(*given)  # type: ignore[misc]
    del oracle, peer
    timings = measure(runs, device, rounds=rounds, calls=calls, device_time=True)
    flops, moved = case.cost()
    allowed_s = max(flops / roofs.flops_of(case.dtype), moved / roofs.bytes_per_s)
    bound = max(b.largest for b in bounds)
    results = []
    for name in (*runs, *problems):
        timing = timings.get(name)
        seconds = timing.median_ms / 1e3 if timing is not None else 0.0
        rates = (moved / seconds / 1e9, flops / seconds / 1e12, allowed_s / seconds) if seconds else (0.0, 0.0, 0.0)
        results.append(
            KernelResult(
                case.op.name,
                case.name,
                name,
                timing,
                1e6 * seconds,
                *rates,
                error=errors.get(name),
                bound=bound,
                problem=problems.get(name, ""),
            )
        )
    return results


def _widen(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def _tensors(value: Any) -> list[torch.Tensor]:
    return [value] if isinstance(value, torch.Tensor) else list(value)


def _table(case: Case, results: Sequence[KernelResult]) -> list[str]:
    lines = [f"{case.op.name}, {case.name}"]
    for r in results:
        if r.timing is None:
            lines.append(f"  {r.provider:<24} {r.problem}")
        else:
            rates = f"{r.gb_s:8.0f} GB/s {r.tflop_s:8.1f} TFLOP/s {100 * r.roofline_share:5.0f} % of roofline"
            lines.append(f"  {r.provider:<24} {r.us:10.1f} us {rates}")
    return lines
