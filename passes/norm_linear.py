"""Let a linear layer normalise its own input where that pays:

    linear(rms_norm(x, w_norm, eps), w, b)    ->    norm_linear(x, w_norm, w, b, eps)

The statistics are computed again for every block of output columns, so the cost model takes it for few rows or few
columns only (a router, a small static batch), and leaves it where the sizes are open.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from ..compiler.match import Match
from ..compiler.pattern import Builder
from ..compiler.rule import Emitter, Reject, Rule, Stage


class NormLinear(Rule):
    """The linear is the norm's only reader."""

    stage = Stage.FUSE
    label = "rms_norm + linear -> norm_linear"

    def pattern(self, p: Builder, x: Any) -> Any:
        names = ("norm_weight", "eps", "offset", "mid_dtype", "out_dtype")
        return p.linear(p.rms_norm(x, *[p.arg(n) for n in names]), p.arg("weight"), p.arg("bias"))

    def check(self, m: Match) -> Reject | None:
        if m.anchor.args[0].meta["val"].dtype is not m.dtype(m.weight):  # type: ignore[union-attr]
            return Reject("the normalised input and the weight differ in dtype", m.weight)
        return None

    def emit(self, m: Match, g: Emitter) -> fx.Node:
        return g.norm_linear(m.x, m.norm_weight, m.weight, m.bias, m.eps, m.offset, m.mid_dtype, m.out_dtype)


RULES = (NormLinear(),)
