"""Fuse a residual addition with the norm that reads it:

s = add(x, residual);  y = rms_norm(s, w, ...)    ->    y, s = add_rms_norm(x, residual, w, ...)
s = add(x, residual);  y = layer_norm(s, w, b)    ->    y, s = add_layer_norm(x, residual, w, b)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ..compiler.match import Match
from ..compiler.pattern import Builder
from ..compiler.rule import Emitter, Reject, Rule, Stage


class AddRMSNorm(Rule):
    """The sum goes on as the next residual."""

    stage = Stage.FUSE
    label = "residual add + rms_norm -> add_rms_norm"

    def pattern(self, p: Builder, x: Any, residual: Any) -> Any:
        total = p.add(x, residual)
        names = ("weight", "eps", "offset", "mid_dtype", "out_dtype")
        return p.rms_norm(total, *[p.arg(n) for n in names]), total

    def check(self, m: Match) -> Reject | None:
        return _check_sum(m)

    def emit(self, m: Match, g: Emitter) -> tuple[fx.Node, ...]:
        both = g.add_rms_norm(m.x, m.residual, m.weight, m.eps, m.offset, m.mid_dtype, m.out_dtype)
        return g.item(both, 0), g.item(both, 1)


class AddLayerNorm(Rule):
    """The same for layer norm."""

    stage = Stage.FUSE
    label = "residual add + layer_norm -> add_layer_norm"

    def pattern(self, p: Builder, x: Any, residual: Any) -> Any:
        total = p.add(x, residual)
        return p.regraft_layer_norm(total, p.arg("weight"), p.arg("bias"), p.arg("eps")), total

    def check(self, m: Match) -> Reject | None:
        return _check_sum(m)

    def emit(self, m: Match, g: Emitter) -> tuple[fx.Node, ...]:
        both = g.add_layer_norm(m.x, m.residual, m.weight, m.bias, m.eps)
        return g.item(both, 0), g.item(both, 1)


def _check_sum(m: Match) -> Reject | None:
    x, residual, total = m.val(m.x), m.val(m.residual), m.outputs[1].meta["val"]
    for name, value in (("x", x), ("residual", residual)):
        if not isinstance(value, torch.Tensor) or [str(s) for s in value.shape] != [str(s) for s in total.shape]:
            return Reject("the addition broadcasts", m.bindings[name], quiet=True)
        if value.dtype is not total.dtype:
            return Reject(f"the addition brings {value.dtype} to {total.dtype}", m.bindings[name])
    return None


RULES = (AddRMSNorm(), AddLayerNorm())
