"""Raise soft caps to one activation:

    mul(tanh(div(x, c)), c)  ->  activation(x, "softcap:c")

It runs after the attention rules, whose scores may have one inside; what is left caps logits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ..compiler.match import Match
from ..compiler.pattern import Builder
from ..compiler.rule import Emitter, Reject, Rule, Stage
from ..kernels.activation import SOFTCAP, is_known


class Softcap(Rule):
    """tanh between a division and a product with the same number."""

    stage = Stage.RAISE

    def pattern(self, p: Builder, x: Any) -> Any:
        return p.mul(p.tanh(p.div(x, p.variable("cap"))), p.variable("cap"))

    def check(self, m: Match) -> Reject | None:
        value = m.val(m.x)
        if not isinstance(value, torch.Tensor) or not value.is_floating_point():
            return Reject("the input is not a floating-point tensor", m.x)
        if not isinstance(m.cap, int | float) or not is_known(self._kind(m)):
            return Reject(f"the cap is {m.cap}, no positive number", m.x)
        return None

    def emit(self, m: Match, g: Emitter) -> fx.Node:
        return g.activation(m.x, self._kind(m))

    @staticmethod
    def _kind(m: Match) -> str:
        return f"{SOFTCAP}{float(m.cap)}"


RULES = (Softcap(),)
