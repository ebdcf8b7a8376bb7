# mypy: disallow-untyped-defs=False
"""Rotation of heads whose halves a program has side by side, for kernels of few rows in Gluon."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def angles(tables, t, r, used, half):
    """cos and sin of both halves of a head: of rows t of x, columns r of the first half, where `used`.

    `tables`: cos, sin, rows of a sequence, strides of cos and of sin by sequence and position.
    """
    cos_ptr, sin_ptr, length, cos_b, cos_s, sin_b, sin_s = tables
    sequence, position = (t // length).to(gl.int64), (t % length).to(gl.int64)
    cos_ptr += sequence * cos_b + position * cos_s + r
    sin_ptr += sequence * sin_b + position * sin_s + r
    cos1 = gl.load(cos_ptr, mask=used, other=0.0)
    cos2 = gl.load(cos_ptr + half, mask=used, other=0.0)
    sin1 = gl.load(sin_ptr, mask=used, other=0.0)
    sin2 = gl.load(sin_ptr + half, mask=used, other=0.0)
    return cos1, cos2, sin1, sin2


@gluon.jit
def turned(x1, x2, by, PRODUCT: gl.constexpr):
    """Both halves, fp32, rotated by `angles`; rounded to PRODUCT."""
    cos1, cos2, sin1, sin2 = by
    cos1, cos2 = cos1.to(gl.float32), cos2.to(gl.float32)
    sin1, sin2 = sin1.to(gl.float32), sin2.to(gl.float32)
    # each product is rounded before the sum, as x * cos + rotated(x) * sin does
    y1 = (x1 * cos1).to(PRODUCT).to(gl.float32) - (x2 * sin1).to(PRODUCT).to(gl.float32)
    y2 = (x2 * cos2).to(PRODUCT).to(gl.float32) + (x1 * sin2).to(PRODUCT).to(gl.float32)
    return y1.to(PRODUCT).to(gl.float32), y2.to(PRODUCT).to(gl.float32)
