"""Raise activations to one op with a name, in each of the spellings that models use.

    x * 0.5 * (1 + tanh(sqrt(2/pi) * (x + 0.044715 x^3)))  ->  activation(x, "gelu_new")

A spelling that rounds differently has a kind of its own (`kernels.activation.ACTIVATIONS`), so no bit changes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from ..compiler.match import Match
from ..compiler.pattern import Builder
from ..compiler.rule import Emitter, Reject, Rule, Stage

Spelling = Callable[[Builder, Any], Any]

_SQRT_2_OVER_PI = math.sqrt(2.0 / math.pi)


def _gelu_new(p: Builder, x: Any) -> Any:
    inner = p.mul(p.add(x, p.mul(p.pow(x, 3.0), 0.044715)), _SQRT_2_OVER_PI)
    return p.mul(p.mul(x, 0.5), p.add(p.tanh(inner), 1.0))


def _gelu_fast(p: Builder, x: Any) -> Any:
    cubic = p.add(p.mul(p.mul(x, 0.044715), x), 1.0)
    return p.mul(p.mul(x, 0.5), p.add(p.tanh(p.mul(p.mul(x, 0.7978845608), cubic)), 1.0))


def _gelu_fast8(p: Builder, x: Any) -> Any:
    cubic = p.add(p.mul(p.mul(x, 0.044715), x), 1.0)
    return p.mul(p.mul(x, 0.5), p.add(p.tanh(p.mul(p.mul(x, 0.79788456), cubic)), 1.0))


SPELLINGS: tuple[tuple[str, Spelling], ...] = (
    ("gelu", lambda p, x: p.gelu(x)),
    ("gelu_tanh", lambda p, x: p.gelu(x, approximate="tanh")),
    ("gelu_new", _gelu_new),
    ("gelu_fast", _gelu_fast),
    ("gelu_fast8", _gelu_fast8),
    ("gelu_python", lambda p, x: p.mul(p.mul(x, 0.5), p.add(p.erf(p.div(x, math.sqrt(2.0))), 1.0))),
    ("quick_gelu", lambda p, x: p.mul(x, p.sigmoid(p.mul(x, 1.702)))),
    ("silu", lambda p, x: p.silu(x)),
    ("relu2", lambda p, x: p.any(p.square(p.relu(x)), p.pow(p.relu(x), 2))),
    ("relu", lambda p, x: p.relu(x)),
)


class Activation(Rule):
    """One spelling of one activation."""

    stage = Stage.RAISE

    def __init__(self, kind: str, spelling: Spelling) -> None:
        self.kind, self.spelling = kind, spelling
        self.name = f"activation_{kind}"
        self.label = kind

    def pattern(self, p: Builder, x: Any) -> Any:  # type: ignore[override]
        return self.spelling(p, x)

    def check(self, m: Match) -> Reject | None:
        value = m.val(m.x)
        if not isinstance(value, torch.Tensor) or not value.is_floating_point():
            return Reject("the input is not a floating-point tensor", m.x)
        return None

    def emit(self, m: Match, g: Emitter) -> fx.Node:
        return g.activation(m.x, self.kind)


RULES = tuple(Activation(kind, spelling) for kind, spelling in SPELLINGS)
