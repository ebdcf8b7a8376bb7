"""Fuse a linear layer with the activation behind it: activation(linear(x, w, b), kind) -> linear_act(x, w, b, kind)."""

from __future__ import annotations

from typing import Any

from torch import fx

from ..compiler.match import Match
from ..compiler.pattern import Builder
from ..compiler.provenance import module_of
from ..compiler.rule import Emitter, Rule, Stage


class LinearAct(Rule):
    """The activation reads nothing but the linear, and is its only reader."""

    stage = Stage.FUSE

    def pattern(self, p: Builder, x: Any) -> Any:
        y = p.linear(x, p.arg("weight"), p.arg("bias"))
        return p.any(p.activation(y, p.arg("kind")), p.tanh(y), p.sigmoid(y), tag="form")

    def emit(self, m: Match, g: Emitter) -> fx.Node:
        return g.linear_act(m.x, m.weight, m.bias, self._kind(m))

    def describe(self, m: Match) -> str:
        return f"{module_of(m.anchor.args[0]).rpartition('.')[2]} + {self._kind(m)} -> linear_act"  # type: ignore[arg-type]

    @staticmethod
    def _kind(m: Match) -> str:
        return str(("", "tanh", "sigmoid")[m.form] or m.kind)


RULES = (LinearAct(),)
