"""Raise layer norm over the last dimension, and the spelling that writes it out.

    layer_norm(x, [D], w, b, eps)                                  ->  regraft.layer_norm(x, w, b, eps)
    rms_norm(sub(x32, mean(x32, [-1], True)), w, eps, out_dtype)   ->  regraft.layer_norm(x, w, None, eps)     (Cohere)

The first keeps every bit and is a RAISE rule. The second sums in another order, so it is a FUSE rule and verified.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ..compiler.match import Match
from ..compiler.pattern import Builder
from ..compiler.rule import Emitter, Reject, Rule, Stage

aten = torch.ops.aten


class LayerNorm(Rule):
    """ATen's layer norm over one dimension; weight and bias are optional."""

    stage = Stage.RAISE

    def pattern(self, p: Builder, x: Any) -> Any:
        return p.layer_norm(x, p.arg("shape"), p.arg("weight"), p.arg("bias"), p.arg("eps"), p.arg("cudnn"))

    def check(self, m: Match) -> Reject | None:
        if len(m.shape) != 1:
            return Reject(f"normalises over {len(m.shape)} dimensions", m.x)
        return None

    def emit(self, m: Match, g: Emitter) -> fx.Node:
        return g.regraft_layer_norm(m.x, m.weight, m.bias, float(m.eps))


class CenteredRMSNorm(Rule):
    """(x - mean(x)) normalised by its root mean square is layer norm without bias."""

    stage = Stage.FUSE
    label = "mean + sub + rms_norm -> layer_norm"

    def pattern(self, p: Builder, x: Any, eps: Any) -> Any:
        wide = p.cast(x)
        centered = p.sub(wide, p.mean(wide, [-1], True))
        return p.rms_norm(centered, p.arg("weight"), eps, 0.0, p.arg("mid_dtype"), p.arg("out_dtype"))

    def check(self, m: Match) -> Reject | None:
        x, weight = m.dtype(m.x), m.dtype(m.weight)
        if m.mid_dtype is not None:
            return Reject("rounds before the weight", m.anchor)
        if weight is not None and weight is not x:
            return Reject(f"the weight is {weight}, the input {x}", m.weight)
        if m.anchor.meta["val"].dtype is not x:
            return Reject(f"the result is {m.anchor.meta['val'].dtype}, the input {x}", m.x)
        return None

    def emit(self, m: Match, g: Emitter) -> fx.Node:
        return g.regraft_layer_norm(m.x, m.weight, None, float(m.eps))


RULES = (LayerNorm(), CenteredRMSNorm())
