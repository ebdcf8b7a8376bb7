"""Fuse the two projections of a gated MLP and the gate itself:

glu(linear(x, wg, bg), linear(x, wu, bu), kind)              ->  gate_up(x, cat(wg, wu), cat(bg, bu), kind)
y = linear(x, w, b);  glu(y[..., :I], y[..., I:], kind)      ->  gate_up(x, w, b, kind)                       (Phi-3)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ..compiler.match import Match
from ..compiler.pattern import Builder
from ..compiler.provenance import module_of
from ..compiler.rule import Emitter, Reject, Rule, Stage
from .linear import is_weight

aten = torch.ops.aten


class GateUp(Rule):
    """Two linears on one value whose only use is the gated unit."""

    stage = Stage.FUSE

    def pattern(self, p: Builder, x: Any) -> Any:
        gate = p.linear(x, p.arg("gate_weight"), p.arg("gate_bias"))
        up = p.linear(x, p.arg("up_weight"), p.arg("up_bias"))
        return p.glu(gate, up, p.arg("kind"))

    def check(self, m: Match) -> Reject | None:
        weights = (m.gate_weight, m.up_weight)
        if not all(map(is_weight, weights)):
            return Reject("a weight is computed", m.anchor)
        if [str(s) for s in m.val(weights[0]).shape] != [str(s) for s in m.val(weights[1]).shape]:
            return Reject("gate and up have different widths", m.anchor)
        if m.dtype(weights[0]) is not m.dtype(weights[1]):
            return Reject("gate and up have different dtypes", m.anchor)
        if (m.gate_bias is None) != (m.up_bias is None):
            return Reject("only one of gate and up has a bias", m.anchor)
        if any(user.target is aten.cat.default for w in weights for user in w.users):
            return Reject("a weight is already part of another fused weight", m.anchor)
        return None

    def emit(self, m: Match, g: Emitter) -> fx.Node:
        bias = None if m.gate_bias is None else g.cat([m.gate_bias, m.up_bias], 0)
        return g.gate_up(m.x, g.cat([m.gate_weight, m.up_weight], 0), bias, m.kind)

    def describe(self, m: Match) -> str:
        gate, up = (module_of(n).rpartition(".")[2] for n in (m.anchor.args[0], m.anchor.args[1]))  # type: ignore[arg-type]
        return f"{gate} + {up} + {m.kind} -> gate_up"


class PackedGateUp(Rule):
    """One linear whose two halves are gate and up."""

    stage = Stage.FUSE

    def pattern(self, p: Builder, x: Any) -> Any:
        both = p.linear(x, p.arg("weight"), p.arg("bias"))
        gate = p.slice(both, -1, p.arg("a"), p.arg("b"))
        return p.glu(gate, p.slice(both, -1, p.arg("c"), p.arg("d")), p.arg("kind"))

    def check(self, m: Match) -> Reject | None:
        width = m.val(m.weight).shape[0]
        if (m.a, m.b, m.c) != (0, width // 2, width // 2) or m.d < width or width % 2:
            return Reject(
                f"the halves are [{m.a}:{m.b}] and [{m.c}:{m.d}] of {width}; the op wants the gate first", m.anchor
            )
        return None

    def emit(self, m: Match, g: Emitter) -> fx.Node:
        return g.gate_up(m.x, m.weight, m.bias, m.kind)

    def describe(self, m: Match) -> str:
        linear = m.only(aten.linear.default)[0]
        return f"{module_of(linear).rpartition('.')[2]} + {m.kind} -> gate_up"


RULES = (GateUp(), PackedGateUp())
