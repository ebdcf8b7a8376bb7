"""Raise the gated linear unit (Shazeer, arXiv 2002.05202):  activation(gate) * up  ->  glu(gate, up, kind)."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ..compiler.match import Match
from ..compiler.pattern import Builder
from ..compiler.rule import Emitter, Reject, Rule, Stage


class GLU(Rule):
    """An activation whose only use is a product with a tensor of the same shape and dtype."""

    stage = Stage.RAISE

    def pattern(self, p: Builder, gate: Any, up: Any) -> Any:
        return p.mul(p.activation(gate, p.arg("kind")), up)

    def check(self, m: Match) -> Reject | None:
        gate, up = m.val(m.gate), m.val(m.up)
        if not isinstance(up, torch.Tensor) or gate.dim() != up.dim() or gate.dtype is not up.dtype:
            return Reject("the factor is not a tensor of the gate's rank and dtype", m.up, quiet=True)
        if [str(s) for s in gate.shape] != [str(s) for s in up.shape]:
            return Reject(f"the factor has shape {list(up.shape)}, the gate {list(gate.shape)}", m.up, quiet=True)
        if m.up is m.gate:
            return Reject("gate and factor are one value", m.up)
        return None

    def emit(self, m: Match, g: Emitter) -> fx.Node:
        return g.glu(m.gate, m.up, m.kind)


RULES = (GLU(),)
