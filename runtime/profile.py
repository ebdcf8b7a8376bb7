"""`regraft profile`: what bounds each phase of a model, kernel by kernel, from torch.profiler.

The graph is run node by node under the profiler, so that each kernel is known by the node that launched it, and with
it by what it should cost: FLOPs and bytes at these sizes. What the call itself takes beyond its kernels, run as a user
runs it, is what the device waited for the host.
"""

from __future__ import annotations

import bisect
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import sympy
import torch
from torch import fx

from ..compiler.cost import UNKNOWN_SIZE, called_op, node_cost, node_dtype, op_name, over_layers
from ..compiler.device import Device, device_for
from ..compiler.program import Program
from ..compiler.provenance import module_of
from ..compiler.shapes import evaluate
from ..kernels.cost import Cost

SHORT_US: Final = 4.0
"""A kernel this short mostly starts and ends."""
LOW: Final = 0.5
"""Of the roof; what reaches less is bound by something else than the roof."""
IDLE: Final = 0.25
"""Of a call; where the device waits longer, the host bounds the phase."""


@dataclass(frozen=True)
class Line:
    """The kernels of one op at one place of every layer."""

    op: str
    module: str
    kernels: tuple[str, ...]
    """Names, those of the largest share first."""
    count: int
    us: float
    """All of them together."""
    flops: float
    bytes: float
    roof_us: float
    """What the device needs at least."""
    bound: str
    """`bandwidth`, `compute`, `launch` or `occupancy`."""
    blocks: int = 0
    """Thread blocks of its smallest kernel."""
    occupancy: float = 100.0
    """Warps resident, in percent of what the device holds; the mean over time."""

    @property
    def share(self) -> float:
        """Of the roofline that was reached."""
        return self.roof_us / self.us if self.us else 0.0


@dataclass(frozen=True)
class Phase:
    """One call, taken apart."""

    name: str
    wall_us: float
    """Of the call as a user makes it."""
    lines: tuple[Line, ...] = field(default=())
    """Longest first."""
    missing: str = ""
    """Why it was not measured."""

    @property
    def device_us(self) -> float:
        """Of all kernels."""
        return sum(line.us for line in self.lines)

    @property
    def roof_us(self) -> float:
        """Of all kernels at the roofline."""
        return sum(line.roof_us for line in self.lines)

    @property
    def bound(self) -> str:
        """What most of the call's time goes to."""
        times: dict[str, float] = {}
        for line in self.lines:
            times[line.bound] = times.get(line.bound, 0.0) + line.us
        idle = self.wall_us - self.device_us
        if idle > IDLE * self.wall_us:
            times["launch"] = times.get("launch", 0.0) + idle
        return max(times, key=lambda b: times[b]) if times else "launch"

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        derived = {"device_us": self.device_us, "roof_us": self.roof_us, "bound": self.bound}
        return {**asdict(self), **derived, "lines": [{**asdict(n), "share": n.share} for n in self.lines]}


@dataclass(frozen=True)
class _Kernel:
    name: str
    us: float
    blocks: int
    occupancy: float


class _Annotated(fx.Interpreter):
    """Runs a graph with each node under its own name."""

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm)
        self.costs: dict[str, Cost] = {}
        """Of nodes whose cost depends on values: an attention over pages reads what the sequences hold."""

    def run_node(self, n: fx.Node) -> Any:
        own = called_op(n.target)
        if own is not None and own.name == "paged_attention":
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            given = dict(zip((a.name for a in own.overload._schema.arguments), args)) | kwargs
            page, lengths = given["k_pages"].shape[1], given["lengths"].tolist()
            blocks = -(-max(lengths) // page)
            cost = own.cost(**{**given, "block_table": given["block_table"][:, :blocks]})
            filled = sympy.Rational(sum(lengths), max(1, len(lengths) * blocks * page))
            self.costs[n.name] = Cost(cost.flops * filled, cost.bytes * filled)
        with torch.profiler.record_function(f"regraft::{n.name}"):
            return super().run_node(n)


def profile_call(
    name: str, program: Program, values: Sequence[Any], call: Callable[[], Any], *, trace: Path | None = None
) -> Phase:
    """One phase: `values` are those of the program's placeholders, `call` is how a user runs it.

    `trace` is written for Perfetto.
    """
    device = next((v.device for v in values if isinstance(v, torch.Tensor)), torch.device("cpu"))
    lines = profile_graph(program, values, device, trace)
    return Phase(name, wall_us(call, device), lines)


def profile_graph(
    program: Program, values: Sequence[Any], device: torch.device, trace: Path | None = None
) -> tuple[Line, ...]:
    """The kernels of a program, run node by node on these values."""
    run = _Annotated(program.gm)
    with torch.no_grad():
        run.run(*values)
        _wait(device)
        activities = [torch.profiler.ProfilerActivity.CPU]
        activities += [torch.profiler.ProfilerActivity.CUDA] if device.type == "cuda" else []
        with torch.profiler.profile(activities=activities) as profiler:
            _Annotated(program.gm).run(*values)
            _wait(device)
    with tempfile.TemporaryDirectory() as folder:
        file = trace or Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(file))
        events = json.loads(file.read_text())["traceEvents"]
    found = kernels_by_node(events, device.type == "cuda")
    return lines_of(program.graph, found, device_for(device), sizes_of(program, values), run.costs)


def sizes_of(program: Program, values: Sequence[Any]) -> dict[sympy.Symbol, int]:
    """The value of each symbol of a program when its placeholders are these."""
    found: dict[sympy.Symbol, int] = {}
    for node, now in zip(program.placeholder_inputs(), values, strict=True):
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor):
            for size, known in zip(value.shape, now.shape, strict=True):
                if isinstance(size, torch.SymInt) and isinstance(size.node.expr, sympy.Symbol):
                    found[size.node.expr] = known
        elif isinstance(value, torch.SymInt) and isinstance(value.node.expr, sympy.Symbol):
            found[value.node.expr] = int(now)
    return found


def kernels_by_node(events: Sequence[Mapping[str, Any]], cuda: bool) -> dict[str, list[_Kernel]]:
    """The kernels of each node, from the events of a trace; on a CPU a node is one kernel.

    A kernel belongs to the innermost node in whose time on the host it was launched.
    """
    ranges = sorted(
        (float(e["ts"]), float(e["ts"]) + float(e["dur"]), e["name"].removeprefix("regraft::"))
        for e in events
        if e.get("cat") in ("user_annotation", "cpu_op") and str(e.get("name", "")).startswith("regraft::")
    )
    if not cuda:
        return {name: [_Kernel("cpu", end - start, 1, 100.0)] for start, end, name in ranges}
    launches = {
        e["args"]["correlation"]: float(e["ts"])
        for e in events
        if e.get("cat") in ("cuda_runtime", "cuda_driver") and "correlation" in e.get("args", {})
    }
    starts = [r[0] for r in ranges]
    found: dict[str, list[_Kernel]] = {}
    for e in events:
        if e.get("cat") not in ("kernel", "gpu_memcpy", "gpu_memset"):
            continue
        at = launches.get(e["args"].get("correlation"))
        place = bisect.bisect_right(starts, at) - 1 if at is not None else -1
        if at is None or place < 0 or at > ranges[place][1]:
            continue
        grid = e["args"].get("grid", [1, 1, 1])
        occupancy = float(e["args"].get("est. achieved occupancy %", 100.0))
        kernel = _Kernel(str(e["name"]), float(e["dur"]), grid[0] * grid[1] * grid[2], occupancy)
        found.setdefault(ranges[place][2], []).append(kernel)
    return found


def lines_of(
    graph: fx.Graph,
    found: Mapping[str, list[_Kernel]],
    device: Device,
    hints: Mapping[sympy.Symbol, int],
    costs: Mapping[str, Cost],
) -> tuple[Line, ...]:
    """Nodes of the same op at the same place of every layer, added up, longest first.

    `costs` holds those of nodes whose sizes do not say it.
    """
    groups: dict[tuple[str, str], list[fx.Node]] = {}
    for node in graph.nodes:
        if found.get(node.name):
            groups.setdefault((op_name(node), over_layers(module_of(node))), []).append(node)
    lines = []
    for (op, module), nodes in groups.items():
        flops = moved = roof = 0.0
        computes = False
        for node in nodes:
            cost = costs[node.name] if node.name in costs else node_cost(node)
            each_flops = float(evaluate(cost.flops, hints, UNKNOWN_SIZE))
            each_bytes = float(evaluate(cost.bytes, hints, UNKNOWN_SIZE))
            compute_s, memory_s = each_flops / device.flops_of(node_dtype(node)), each_bytes / device.bytes_per_s
            computes = computes or compute_s > memory_s
            flops, moved = flops + each_flops, moved + each_bytes
            roof += 1e6 * max(compute_s, memory_s)
        kernels = [k for node in nodes for k in found[node.name]]
        us = sum(k.us for k in kernels)
        by_name: dict[str, float] = {}
        for k in kernels:
            by_name[k.name] = by_name.get(k.name, 0.0) + k.us
        names = tuple(sorted(by_name, key=lambda n: -by_name[n]))
        bound = _bound(us / len(kernels), roof / us if us else 0.0, computes)
        occupancy = sum(k.us * k.occupancy for k in kernels) / us if us else 0.0
        blocks = min(k.blocks for k in kernels)
        lines.append(Line(op, module, names, len(nodes), us, flops, moved, roof, bound, blocks, occupancy))
    return tuple(sorted(lines, key=lambda line: -line.us))


def _bound(kernel_us: float, share: float, computes: bool) -> str:
    if share >= LOW:
        return "compute" if computes else "bandwidth"
    return "launch" if kernel_us < SHORT_US else "occupancy"


def table_of(phase: Phase, most: int = 20) -> list[str]:
    """The phase in one line, and its longest kernels below."""
    if phase.missing:
        return [f"{phase.name}: not measured, {phase.missing}"]
    idle = max(0.0, phase.wall_us - phase.device_us)
    lines = [
        f"{phase.name}: {phase.wall_us / 1e3:.3f} ms, kernels {phase.device_us / 1e3:.3f} ms, the device waits "
        f"{idle / 1e3:.3f} ms, roofline {phase.roof_us / 1e3:.3f} ms; bound by {phase.bound}"
    ]
    for n in phase.lines[:most]:
        rate = f"{n.bytes / n.us / 1e6:6.2f} TB/s {n.flops / n.us / 1e6:7.1f} TFLOP/s" if n.us else ""
        where = f"{n.op.removeprefix('regraft.')} {n.module}"
        share = n.us / phase.device_us
        why = f"{n.bound} ({n.blocks} blocks, {n.occupancy:.0f} %)" if n.bound == "occupancy" else n.bound
        lines.append(f"  {where[:52]:<52} x{n.count:<4} {n.us:9.1f} us {share:4.0%}  {rate}  {n.share:4.0%} {why}")
    rest = phase.lines[most:]
    if rest:
        lines.append(f"  {len(rest)} more, {sum(n.us for n in rest):.1f} us together")
    return lines


def wall_us(call: Callable[[], Any], device: torch.device, rounds: int = 5) -> float:
    """Microseconds of a call, the median of several, with what it needs warmed up."""
    for _ in range(4):  # shapes that come again are run by CUDA graphs
        call()
    times = []
    for _ in range(rounds):
        _wait(device)
        start = time.perf_counter()
        call()
        _wait(device)
        times.append(1e6 * (time.perf_counter() - start))
    return statistics.median(times)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
