"""Raise softmax over the last dimension that is not part of an attention, with the cast behind it.

    _to_copy(softmax(x, -1, float32), bfloat16)    ->    regraft.softmax(x, float32, bfloat16)

It runs after the attention rules, which contain a softmax. Routers of experts, poolings, and attention of a form that
no rule knows keep every bit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ..compiler.match import Match
from ..compiler.pattern import Builder
from ..compiler.rule import Emitter, Reject, Rule, Stage


class Softmax(Rule):
    """softmax(x, -1) in any precision, rounded afterwards or not."""

    stage = Stage.RAISE

    def pattern(self, p: Builder, x: Any) -> Any:
        return p.cast(p.softmax(x, p.arg("dim"), p.arg("wide")), "out_dtype")

    def check(self, m: Match) -> Reject | None:
        x = m.dtype(m.x)
        if m.dim != -1:
            return Reject(f"softmax over dimension {m.dim}, not the last", m.x, quiet=True)
        if x is None or not x.is_floating_point:
            return Reject("the input is not a floating-point tensor", m.x)
        if m.out_dtype is not None and not m.out_dtype.is_floating_point:
            return Reject(f"the result is cast to {m.out_dtype}", m.x)
        return None

    def emit(self, m: Match, g: Emitter) -> fx.Node:
        wide = {True: torch.float32, False: None}.get(m.wide, m.wide)  # ATen's `_softmax` has a bool there
        return g.regraft_softmax(m.x, wide, m.out_dtype)


RULES = (Softmax(),)
