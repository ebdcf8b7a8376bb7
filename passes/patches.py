"""Compute convolutions over patches that do not overlap as one linear layer.

    conv(x, w, b, stride=kernel)    ->    linear(x cut into patches, w, b)

The patch embedding of a vision transformer. Libraries of convolutions reorder image, weight and result for their own
kernels; a matrix product reads the patches once they lie in rows, and its result lies as tokens.
"""

from __future__ import annotations

import math
from typing import Any

from torch import fx

from ..compiler.match import Match
from ..compiler.opset import Role, role_of
from ..compiler.pattern import Builder
from ..compiler.rule import Emitter, Reject, Rule, Stage


class Patches(Rule):
    """In one to three dimensions; what is left at the end of an image is no patch."""

    stage = Stage.FUSE
    label = "patches -> linear"

    def pattern(self, p: Builder, x: Any, w: Any) -> Any:
        return p.conv(x, w, p.arg("bias"), p.arg("stride"))

    def check(self, m: Match) -> Reject | None:
        kernel, sizes = _sizes(m)
        stride = list(m.stride) * (len(kernel) if len(m.stride) == 1 else 1)  # one number stands for all dimensions
        if stride != kernel or math.prod(kernel) == 1:
            return Reject(f"kernel {kernel} and stride {m.stride} make no patches", m.x, quiet=True)
        if len(m.val(m.x).shape) != len(kernel) + 2:
            return Reject("no batch of images", m.x)
        if not all(isinstance(s, int) and s >= k for s, k in zip(sizes, kernel, strict=True)):
            return Reject(f"images of {sizes} are not cut when the program is made", m.x)
        if any(user.op != "output" and role_of(user) is not Role.VIEW for user in m.anchor.users):
            return Reject("the patches are read as an image", m.anchor)
        return None

    def emit(self, m: Match, g: Emitter) -> fx.Node:
        kernel, sizes = _sizes(m)
        rank, (out, channels) = len(kernel), m.val(m.w).shape[:2]
        counts = [s // k for s, k in zip(sizes, kernel, strict=True)]
        x = m.x
        for i, (size, count, k) in enumerate(zip(sizes, counts, kernel, strict=True)):
            if count * k < size:
                x = g.slice(x, 2 + i, 0, count * k)
        for i, pair in enumerate(zip(counts, kernel, strict=True)):
            x = g.unflatten(x, 2 + 2 * i, list(pair))
        x = g.permute(x, [0, *range(2, 2 + 2 * rank, 2), 1, *range(3, 3 + 2 * rank, 2)])
        rows = g.reshape(x, [-1, math.prod(counts), channels * math.prod(kernel)])
        y = g.linear(rows, g.reshape(m.w, [out, -1]), m.bias)  # [B, patches, out]
        return g.unflatten(g.transpose(y, 1, 2), 2, counts)


def _sizes(m: Match) -> tuple[list[int], list[Any]]:
    """The kernel's sizes and the image's, without channels."""
    return list(m.val(m.w).shape[2:]), list(m.val(m.x).shape[2:])


RULES = (Patches(),)
