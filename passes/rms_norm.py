"""Raise RMSNorm, in whichever order and precision the model rounds.

    mul(w, _to_copy(mul(x32, rsqrt(add(mean(pow(x32, 2), [-1], True), eps))), bf16))     x32 = _to_copy(x, float32)
    ->  rms_norm(x, w, eps, offset=0, mid_dtype=bf16)

What is recorded: the dtype rounded to before the weight (llama), after it (gemma, OLMo 2), and whether the weight is
stored less one (gemma's 1 + w). Together they make the op bit-exact with the spelling it replaces.

    aten.rms_norm(x, [D], w, eps)   ->  rms_norm(x, w, eps, out_dtype=dtype of x)       torch.nn.RMSNorm

PyTorch's own multiplies by the weight before it rounds, and gives the dtype of x whatever the weight's.

    x / sqrt(mean(x^2) + eps) * w        rounds elsewhere: a FUSE rule, verified
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ..compiler.match import Match
from ..compiler.opset import CASTS
from ..compiler.pattern import Builder
from ..compiler.rule import Emitter, Reject, Rule, Stage
from ..kernels.rms_norm import result_dtype


def _inverse_rms(p: Builder, x: Any, eps: Any) -> Any:
    wide = p.cast(x, "variance_dtype")
    mean = p.mean(p.any(p.pow(wide, 2), p.mul(wide, wide), p.square(wide)), [-1], True)
    shifted = p.add(mean, eps)
    return p.any(p.rsqrt(shifted), p.pow(shifted, -0.5))


def _compute_dtype(x: torch.dtype) -> torch.dtype:
    return torch.float64 if x is torch.float64 else torch.float32


class RMSNorm(Rule):
    """x * rsqrt(mean(x^2) + eps) * w, with or without a cast at each step, w or 1 + w."""

    stage = Stage.RAISE

    def pattern(self, p: Builder, x: Any, w: Any, eps: Any) -> Any:
        normed = p.cast(p.mul(p.cast(x, "input_dtype"), _inverse_rms(p, x, eps)), "mid_dtype")
        scale = p.any(p.add(p.cast(w, "weight_dtype"), 1.0), w, tag="plain")
        return p.cast(p.mul(normed, scale), "out_dtype")

    def check(self, m: Match) -> Reject | None:
        reject = _check_statistics(m)
        if reject is not None:
            return reject
        weight = m.val(m.w)
        if not isinstance(weight, torch.Tensor) or weight.dim() != 1:
            return Reject("the weight is not a vector", m.w)
        if not m.plain:
            summed = m.weight_dtype or weight.dtype
            if summed is not _compute_dtype(m.dtype(m.x) or torch.float32):
                return Reject(f"1 + w is rounded to {summed}", m.w)
        return None

    def emit(self, m: Match, g: Emitter) -> fx.Node:
        weight, offset = (m.w, 0.0) if m.plain else (m.w, 1.0)
        if m.plain and isinstance(weight, fx.Node) and weight.target in CASTS:
            uncast = weight.args[0]
            if self._dtype(m, Match.val(uncast).dtype, offset) == self._dtype(m, Match.val(weight).dtype, offset):
                weight = uncast
        return g.rms_norm(m.x, weight, float(m.eps), offset, m.mid_dtype, m.out_dtype)

    @staticmethod
    def _dtype(m: Match, weight: torch.dtype, offset: float) -> torch.dtype:
        x = m.dtype(m.x)
        assert x is not None
        return result_dtype(x, weight, offset, m.mid_dtype, None)


class RMSNormWithoutWeight(Rule):
    """x * rsqrt(mean(x^2) + eps)"""

    name = "rms_norm_without_weight"
    stage = Stage.RAISE

    def pattern(self, p: Builder, x: Any, eps: Any) -> Any:
        return p.cast(p.mul(p.cast(x, "input_dtype"), _inverse_rms(p, x, eps)), "mid_dtype")

    def check(self, m: Match) -> Reject | None:
        return _check_statistics(m)

    def emit(self, m: Match, g: Emitter) -> fx.Node:
        return g.rms_norm(m.x, None, float(m.eps), 0.0, m.mid_dtype, None)


class ATenRMSNorm(Rule):
    """`torch.nn.RMSNorm` and `F.rms_norm` over one dimension; weight and eps are optional."""

    name = "aten_rms_norm"
    stage = Stage.RAISE

    def pattern(self, p: Builder, x: Any) -> Any:
        return p.rms_norm_aten(x, p.arg("shape"), p.arg("weight"), p.arg("eps"))

    def check(self, m: Match) -> Reject | None:
        x = m.dtype(m.x)
        if x is None or not x.is_floating_point:
            return Reject("the input is not a floating-point tensor", m.x)
        if len(m.shape) != 1:
            return Reject(f"normalises over {len(m.shape)} dimensions", m.x)
        if m.eps is not None and not isinstance(m.eps, int | float):
            return Reject("eps is not a number", m.eps)
        return None

    def emit(self, m: Match, g: Emitter) -> fx.Node:
        x = m.dtype(m.x)
        assert x is not None
        # without one, it is the epsilon of the dtype that PyTorch computes in, not of x
        eps = torch.finfo(_compute_dtype(x)).eps if m.eps is None else float(m.eps)
        return g.rms_norm(m.x, m.weight, eps, 0.0, None, x)


def _check_statistics(m: Match) -> Reject | None:
    x = m.dtype(m.x)
    if x is None or not x.is_floating_point:
        return Reject("the input is not a floating-point tensor", m.x)
    compute = _compute_dtype(x)
    if (m.variance_dtype or x) is not compute:
        return Reject(f"the mean of squares is rounded to {m.variance_dtype or x}, not {compute}", m.x)
    if (m.input_dtype or compute) is not compute:
        return Reject(f"the input is scaled in {m.input_dtype}, not {compute}", m.x)
    if not isinstance(m.eps, int | float):
        return Reject("eps is not a number", m.eps)
    return None


class DividedRMSNorm(Rule):
    """x / sqrt(mean(x^2) + eps) * w"""

    stage = Stage.FUSE
    label = "mean + sqrt + div -> rms_norm"

    def pattern(self, p: Builder, x: Any, w: Any, eps: Any) -> Any:
        wide = p.cast(x, "variance_dtype")
        mean = p.mean(p.any(p.pow(wide, 2), p.mul(wide, wide), p.square(wide)), [-1], True)
        normed = p.cast(p.div(p.cast(x, "input_dtype"), p.sqrt(p.add(mean, eps))), "mid_dtype")
        return p.cast(p.mul(normed, w), "out_dtype")

    def check(self, m: Match) -> Reject | None:
        weight = m.val(m.w)
        if not isinstance(weight, torch.Tensor) or weight.dim() != 1:
            return Reject("the weight is not a vector", m.w)
        return _check_statistics(m)

    def emit(self, m: Match, g: Emitter) -> fx.Node:
        return g.rms_norm(m.x, m.w, float(m.eps), 0.0, m.mid_dtype, m.out_dtype)


RULES = (RMSNorm(), RMSNormWithoutWeight(), ATenRMSNorm(), DividedRMSNorm())
