"""The cost section of a report: bytes, FLOPs and roofline time of the graph before and after."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import sympy

from ..compiler.cost import UNKNOWN_SIZE, GraphCost, graph_cost
from ..compiler.device import Device
from ..compiler.program import Program
from ..compiler.shapes import dim_names, evaluate

LENGTH = 512
"""Every dynamic dimension but the batch, where the model allows that many."""


@dataclass(frozen=True)
class CostReport:
    """Both graphs at the same sizes."""

    device: Device
    sizes: dict[str, int]
    """By dimension of an argument: `{"input_ids[0]": 1, "input_ids[1]": 512}`."""
    hints: dict[sympy.Symbol, int]
    before: GraphCost
    after: GraphCost

    def to_dict(self) -> dict[str, Any]:
        """Plain data; FLOPs and bytes as numbers at `sizes`."""
        return {
            "device": {"name": self.device.name, "bytes_per_s": self.device.bytes_per_s, "source": self.device.source},
            "sizes": self.sizes,
            "before": self._side(self.before),
            "after": self._side(self.after),
        }

    def number(self, expr: sympy.Expr) -> int:
        """An expression at `sizes`."""
        return int(evaluate(expr, self.hints, UNKNOWN_SIZE))

    def _side(self, cost: GraphCost) -> dict[str, Any]:
        def shares(group: Any) -> list[dict[str, Any]]:
            return [
                {
                    "name": s.name,
                    "count": s.count,
                    "flops": self.number(s.cost.flops),
                    "bytes": self.number(s.cost.bytes),
                    "us": round(s.us, 2),
                }
                for s in group
            ]

        return {
            "us": round(cost.us, 2),
            "flops": self.number(cost.total.flops),
            "bytes": self.number(cost.total.bytes),
            "kernels": sum(s.count for s in cost.by_op),
            "by_op": shares(cost.by_op),
            "by_module": shares(cost.by_module),
        }


def cost_report(before: Program, after: Program, device: Device) -> CostReport:
    """Cost both graphs for one sequence of `LENGTH`, or as long as the model allows."""
    names = dim_names(before)
    hints: dict[sympy.Symbol, int] = {}
    for symbol, name in names.items():
        high = before.limits.ranges.get(symbol.name, (1, None))[1]
        wanted = 1 if name.endswith("[0]") else LENGTH
        hints[symbol] = wanted if high is None else min(wanted, high)
    known = {**dict.fromkeys(dim_names(after), LENGTH), **hints}
    return CostReport(
        device,
        {name: hints[symbol] for symbol, name in names.items()},
        hints,
        graph_cost(before.graph, device, known),
        graph_cost(after.graph, device, known),
    )
