"""Raise layer norm over the last dimension, and the spelling that writes it out.

    layer_norm(x, [D], w, b, eps)                                  ->  regraft.layer_norm(x, w, b, eps)
    rms_norm(sub(x32, mean(x32, [-1], True)), w, eps, out_dtype)   ->  regraft.layer_norm(x, w, None, eps)     (Cohere)
    (x32 - mean) / sqrt(variance + eps) * w + b                    ->  regraft.layer_norm(x, w, b, eps)        (DeBERTa)

The first keeps every bit and is a RAISE rule. The others sum in another order, so they are FUSE rules and verified.
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


class WrittenLayerNorm(Rule):
    """Mean and variance written out, with a root that divides or multiplies."""

    stage = Stage.FUSE
    label = "mean + variance + sqrt -> layer_norm"

    def pattern(self, p: Builder, x: Any, w: Any, b: Any, eps: Any) -> Any:
        wide = p.cast(x, "wide")
        centered = p.sub(wide, p.mean(wide, [-1], True))
        squares = p.any(p.pow(centered, 2), p.mul(centered, centered), p.square(centered))
        variance = p.any(p.mean(squares, [-1], True), p.var(wide, [-1], correction=p.arg("correction"), keepdim=True))
        shifted = p.add(variance, eps)
        normed = p.any(p.div(centered, p.sqrt(shifted)), p.mul(centered, p.rsqrt(shifted)))
        scaled = p.mul(p.cast(normed), w)
        return p.cast(p.any(p.add(p.cast(scaled), b), scaled, tag="no_bias"))

    def check(self, m: Match) -> Reject | None:
        x = m.dtype(m.x)
        if x is None or not x.is_floating_point or not isinstance(m.eps, int | float):
            return Reject("the input is not a floating-point tensor, or eps not a number", m.x)
        if x in (torch.float16, torch.bfloat16) and m.wide is None:
            return Reject(f"mean and variance are rounded to {x}", m.x)
        if m.bindings.get("correction", 0) != 0:
            return Reject(f"the variance divides by one less (correction {m.correction})", m.x)
        if m.anchor.meta["val"].dtype is not x:
            return Reject(f"the result is {m.anchor.meta['val'].dtype}, the input {x}", m.x)
        for name in ("w", "b")[: 2 - m.no_bias]:
            value = m.val(m.bindings[name])
            if not isinstance(value, torch.Tensor) or value.dim() != 1 or value.dtype is not x:
                return Reject(f"{'weight' if name == 'w' else 'bias'} is no vector of {x}", m.bindings[name])
        return None

    def emit(self, m: Match, g: Emitter) -> fx.Node:
        return g.regraft_layer_norm(m.x, m.w, None if m.no_bias else m.b, float(m.eps))


RULES = (LayerNorm(), CenteredRMSNorm(), WrittenLayerNorm())
