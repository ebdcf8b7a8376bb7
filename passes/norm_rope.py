"""Fuse the norm of queries and keys with their rotation:

rope(transpose(rms_norm(x, w, eps)), cos, sin)  ->  norm_rope(transpose(x), w, cos, sin, eps)      (Qwen3, Gemma 3)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ..compiler.match import Match
from ..compiler.pattern import Builder
from ..compiler.rule import Emitter, Reject, Rule, Stage

aten = torch.ops.aten


class NormRope(Rule):
    """A norm over the head dimension whose only use is the rotation, with or without a transpose of heads between."""

    stage = Stage.FUSE
    label = "q/k norm + rope -> norm_rope"

    def pattern(self, p: Builder, x: Any, cos: Any, sin: Any) -> Any:
        names = ("weight", "eps", "offset", "mid_dtype", "out_dtype")
        normed = p.rms_norm(x, *[p.arg(n) for n in names])
        turned = p.any(p.transpose(normed, p.arg("dim0"), p.arg("dim1")), normed, tag="in_place")
        return p.rope(turned, cos, sin, p.arg("layout"), p.arg("compute_dtype"))

    def check(self, m: Match) -> Reject | None:
        if m.in_place == 0 and -1 in (m.dim0, m.dim1):
            return Reject("the normalised dimension is moved", m.x)
        if m.compute_dtype is not None:
            return Reject(f"the rotation is computed in {m.compute_dtype}", m.anchor)
        return None

    def emit(self, m: Match, g: Emitter) -> fx.Node:
        x = m.x if m.in_place == 1 else g.transpose(m.x, m.dim0, m.dim1)
        return g.norm_rope(x, m.weight, m.cos, m.sin, m.eps, m.offset, m.mid_dtype, m.out_dtype, m.layout)


RULES = (NormRope(),)
