"""`regraft bench kernels`: every case of every op, each provider against its peers, on a cold cache.

Correctness first: on parts of the call, a provider's error against the reference in the next precision must be at most
twice that of the first peer that works plus a few ulp. Then the device's time for providers and peers in turn, rates
from the op's cost, and the share of what the device was seen to reach in this run with a copy and a matrix product.
"""

from __future__ import annotations

import fnmatch
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch

from ..compiler.device import Device, device_for
from ..compiler.verify import Distance, higher
from ..kernels import tuning
from ..kernels.case import Arguments, Case
from ..kernels.cases import cases
from ..kernels.choice import choose
from ..kernels.op import Kernel
from ..kernels.table import PROVIDERS
from .bench import Bench, device_name
from .sliced import bound_of, distance_of
from .timing import Timing, device_rates, measure_kernels

COLD_BYTES: Final = 320 << 20
"""What the copies of a case's arguments take together, so that none is found in a cache."""

MOST_COPIES: Final = 64
SLOWER: Final = 1.03
"""How much slower than the best peer our choice may be without a remark."""

Call = Callable[[], Any]


@dataclass(frozen=True)
class KernelResult:
    """One provider or peer on one case."""

    op: str
    case: str
    provider: str
    peer: bool = False
    chosen: bool = False
    """Whether it is the provider that the table of choices picks."""
    timing: Timing | None = None
    us: float = 0.0
    gb_s: float = 0.0
    tflop_s: float = 0.0
    share: float = 0.0
    """Of the limit: the time that copy and matrix product of this run allow, over the time it took."""
    ratio: float | None = None
    """The best peer's time over this one's: above 1 is faster."""
    config: str = ""
    error: float | None = None
    bound: float | None = None
    problem: str = ""


@dataclass(frozen=True)
class _Limits:
    flops_per_s: float
    bytes_per_s: float

    def seconds(self, flops: int, moved: int) -> float:
        return max(flops / self.flops_per_s, moved / self.bytes_per_s)


def bench_kernels(
    device: torch.device,
    dtype: torch.dtype = torch.bfloat16,
    ops: Sequence[str] = (),
    *,
    shape: str = "",
    rounds: int = 5,
    calls: int = 20,
    say: Callable[[str], None] = lambda line: None,
    done: Callable[[Bench], None] = lambda bench: None,
) -> Bench:
    """Time the cases of the named ops, of all where none is named, whose names contain `shape` (`*` and `?` stand for
    any text). `done` is called after each case. Raises ValueError for an op without cases, or where no case is left.
    """
    known = cases(dtype)
    for op in ops:
        if op not in known:
            raise ValueError(f"op {op!r} has no cases; known: {', '.join(sorted(known))}")
    chosen = [c for name in ops or known for c in known[name] if fnmatch.fnmatch(c.name, f"*{shape}*")]
    if not chosen:
        raise ValueError(f"no case's name contains {shape!r}")
    bench = Bench("kernels", str(dtype).removeprefix("torch."), device_name(device))
    bench.rates = device_rates(device)
    limits = _limits(bench.rates, device_for(device), dtype)
    say(", ".join(f"{name} {value:.2f}" for name, value in bench.rates.items()))
    for case in chosen:
        results = _case(case, device, limits, rounds, calls)
        bench.results += results
        for line in _table(case, results):
            say(line)
        done(bench)
    slow = slower(bench.results)
    say(f"{len(slow)} of {len(chosen)} cases more than {SLOWER - 1:.0%} slower than the best peer")
    for line in slow:
        say("  " + line)
    return bench


def _limits(rates: Mapping[str, float], roofs: Device, dtype: torch.dtype) -> _Limits:
    half = dtype in (torch.bfloat16, torch.float16)
    flops = rates["matmul_tflop_s"] * 1e12 if half and "matmul_tflop_s" in rates else roofs.flops_of(dtype)
    return _Limits(flops, rates["copy_tb_s"] * 1e12 if "copy_tb_s" in rates else roofs.bytes_per_s)


def slower(results: Sequence[KernelResult]) -> list[str]:
    """Cases on which what the table picks is slower than the best peer, or nothing of ours runs."""
    lines = []
    for op, case in dict.fromkeys((r.op, r.case) for r in results):
        here = [r for r in results if (r.op, r.case) == (op, case)]
        ours = next((r for r in here if r.chosen and r.timing is not None), None)
        best = min((r for r in here if r.peer and r.timing is not None), key=lambda r: r.us, default=None)
        if best is not None and (ours is None or ours.us > SLOWER * best.us):
            what = (
                f"{ours.provider} {ours.us:.1f} us, {ours.us / best.us:.2f} times" if ours is not None else "nothing;"
            )
            lines.append(f"{op}, {case}: {what} {best.provider} {best.us:.1f} us")
    return lines


# -- one case ---------------------------------------------------------------------------------------------------------


class _Measured:
    """The providers and peers of a case on copies of its arguments."""

    def __init__(self, case: Case, device: torch.device) -> None:
        self.case = case
        torch.manual_seed(0)
        self.copies: list[Arguments] = [case.arguments(device)]
        self.nbytes = sum(t.nbytes for t in self.copies[0].values() if isinstance(t, torch.Tensor))
        if device.type == "cuda":
            more = min(MOST_COPIES, max(2, math.ceil(COLD_BYTES / max(self.nbytes, 1)))) - 1
            self.copies += [case.arguments(device) for _ in range(more)]
        self.calls: dict[str, list[Call]] = {}
        self.outputs: dict[str, list[torch.Tensor]] = {}
        self.problems: dict[str, str] = {}
        self.configs: dict[str, str] = {}

    @property
    def small(self) -> bool:
        """Whether all copies together would stay in a cache."""
        return self.nbytes * len(self.copies) < COLD_BYTES

    def add(self, name: str, prepare: Callable[[Arguments], Call]) -> None:
        """Run it once; what fails is a problem."""
        try:
            with warnings.catch_warnings(), torch.no_grad(), tuning.recorded() as configs:
                warnings.simplefilter("ignore")  # a backend of SDPA says with five of them why it refuses
                calls = [prepare(copy) for copy in self.copies]
                self.outputs[name] = _tensors(calls[0]())
            self.calls[name] = calls
            self.configs[name] = "; ".join(dict.fromkeys(map(str, configs)))
        except Exception as error:  # noqa: BLE001 - a peer may refuse a call in any way; the others are still measured
            self.problems[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"


def _case(case: Case, device: torch.device, limits: _Limits, rounds: int, calls: int) -> list[KernelResult]:
    found = _Measured(case, device)
    for name, peer in case.peers.items():
        found.add(name, peer)
    signature = case.op.signature(**found.copies[0])
    fitting: list[Kernel] = []
    for kernel in PROVIDERS.get(case.op.name, ()):
        refused = kernel.supports(signature)
        if refused is not None:
            found.problems[kernel.provider] = refused
            continue
        fitting.append(kernel)
        found.add(kernel.provider, lambda given, run=kernel.run: lambda: run(*_ordered(case, given)))  # type: ignore[misc]
    chosen = choose(case.op, fitting, _ordered(case, found.copies[0]), device).provider if fitting else ""
    errors, bound = _compare(found)
    found.outputs.clear()
    ready = {name: each for name, each in found.calls.items() if name not in found.problems}
    with torch.no_grad():
        timings = measure_kernels(ready, device, small=found.small, rounds=rounds, calls=calls)
    best = min((timings[n].median_ms for n in case.peers if n in timings), default=None)
    flops, moved = case.cost()
    allowed = limits.seconds(flops, moved)
    results = []
    for name in dict.fromkeys((*case.peers, *found.calls, *found.problems)):
        timing = timings.get(name)
        s = timing.median_ms / 1e3 if timing is not None else 0.0
        results.append(
            KernelResult(
                case.op.name,
                case.name,
                name,
                peer=name in case.peers,
                chosen=name == chosen,
                timing=timing,
                us=1e6 * s,
                gb_s=moved / s / 1e9 if s else 0.0,
                tflop_s=flops / s / 1e12 if s else 0.0,
                share=allowed / s if s else 0.0,
                ratio=best / timing.median_ms if timing is not None and best is not None else None,
                config=found.configs.get(name, ""),
                error=errors.get(name),
                bound=bound,
                problem=found.problems.get(name, ""),
            )
        )
    return results


def _ordered(case: Case, arguments: Arguments) -> list[Any]:
    return [arguments.get(a.name, a.default_value) for a in case.op.overload._schema.arguments]


def _compare(found: _Measured) -> tuple[dict[str, float], float | None]:
    """Largest error by name over all parts, and the largest bound; wrong ones become problems.

    The bound of an output is twice the error of the first peer plus a few ulp, over all parts together.
    """
    case, arguments = found.case, found.copies[0]
    names = list(found.outputs)
    judge = next((n for n in case.peers if n in found.outputs), None)
    worst: dict[tuple[str, int], Distance] = {}
    oracles: dict[int, list[torch.Tensor]] = {}
    with torch.no_grad():
        for small, pick in case.parts(arguments):
            wide = {k: _widen(v, higher(case.dtype)) for k, v in small.items()}
            for i, oracle in enumerate(_tensors(case.op.reference(**wide))):
                oracles.setdefault(i, []).append(oracle)
                for name in names:
                    d = distance_of(pick(found.outputs[name][i]).reshape(oracle.shape), oracle)
                    old = worst.get((name, i), d)
                    worst[name, i] = Distance(max(d.largest, old.largest), max(d.rms, old.rms))
    errors = {n: max(d.largest for (name, _), d in worst.items() if name == n) for n in names}
    if judge is None:
        return errors, None
    together = {i: torch.cat([p.reshape(-1) for p in parts]) for i, parts in oracles.items()}
    bounds = {i: bound_of(worst[judge, i], oracle, case.dtype) for i, oracle in together.items()}
    allowed = max(b.largest for b in bounds.values())
    for name in names:
        if name != judge and not all(worst[name, i] <= bounds[i] for i in bounds):
            found.problems[name] = f"wrong: error {errors[name]:.1e}, allowed {allowed:.1e}"
    return errors, allowed


def _widen(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, torch.dtype):
        return dtype if value.is_floating_point else value
    return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def _tensors(value: Any) -> list[torch.Tensor]:
    return [value] if isinstance(value, torch.Tensor) else list(value)


# -- what is told -----------------------------------------------------------------------------------------------------


def _table(case: Case, results: Sequence[KernelResult]) -> list[str]:
    lines = [f"{case.op.name}, {case.name}"]
    for r in results:
        mark = "*" if r.chosen else " "
        if r.timing is None:
            lines.append(f" {mark}{r.provider:<22} {r.problem}")
            continue
        rates = f"{r.gb_s / 1e3:6.2f} TB/s {r.tflop_s:7.1f} TFLOP/s {100 * r.share:4.0f} %"
        ratio = f"{r.ratio:5.2f}x" if r.ratio is not None else "      "
        events = " (by events)" if r.timing.how == "events" else ""
        lines.append(f" {mark}{r.provider:<22} {r.us:10.1f} us {ratio} {rates}  {r.config}{events}".rstrip())
    return lines


def regressions(results: Sequence[KernelResult], baseline: Mapping[str, Any], threshold: float) -> list[str]:
    """What got slower than in an earlier run's JSON by more than `threshold`, as a share of its time.

    Times are compared as ratios to the best peer where both runs have one, so that another clock does not count.
    """
    before = {(r["op"], r["case"], r["provider"]): r for r in baseline["results"]}
    lines = []
    for r in results:
        old = before.get((r.op, r.case, r.provider))
        if old is None or not old["us"] or r.peer:
            continue
        if r.timing is None:
            lines.append(f"{r.op}, {r.case}, {r.provider}: {r.problem or 'not measured'}; before {old['us']:.1f} us")
            continue
        was = old.get("ratio")
        slowdown = was / r.ratio if was and r.ratio else r.us / old["us"]
        if slowdown > 1 + threshold:
            lines.append(
                f"{r.op}, {r.case}, {r.provider}: {old['us']:.1f} -> {r.us:.1f} us, {slowdown:.2f} times as long"
            )
    return lines
