"""Rotary position embedding (Su et al., arXiv 2104.09864), alone and after the q/k norm."""

from __future__ import annotations

import torch
from torch import Tensor

from .cost import Cost, nbytes, numel
from .op import define
from .rms_norm import normalize

LAYOUTS = ("half", "interleaved")


def _rotated(x: Tensor, layout: str) -> Tensor:
    if layout == "half":
        half = x.shape[-1] // 2
        return torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    if layout == "interleaved":
        return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
    raise ValueError(f"rope layout is one of {LAYOUTS}, got {layout!r}")


def rotate(x: Tensor, cos: Tensor, sin: Tensor, layout: str, compute_dtype: torch.dtype | None) -> Tensor:
    """The reference of `rope` as a plain function, for the ops that contain it."""
    width = cos.shape[-1]
    turned = x[..., :width] if compute_dtype is None else x[..., :width].to(compute_dtype)
    y = (turned * cos + _rotated(turned, layout) * sin).to(x.dtype)
    return y if width == x.shape[-1] else torch.cat((y, x[..., width:]), dim=-1)


def _rope_cost(
    x: Tensor, cos: Tensor, sin: Tensor, layout: str = "half", compute_dtype: torch.dtype | None = None
) -> Cost:
    return Cost(3 * numel(x), 2 * nbytes(x) + nbytes(cos, sin))


@define(cost=_rope_cost)
def rope(x: Tensor, cos: Tensor, sin: Tensor, layout: str = "half", compute_dtype: torch.dtype | None = None) -> Tensor:
    """`x * cos + rotated(x) * sin` on the first R = cos.shape[-1] of the last dimension; the rest passes through.

    x `[..., D]`, R even and at most D; cos and sin broadcast to `x[..., :R]`. Layout "half" pairs element i with
    i + R/2 (llama, NeoX), "interleaved" pairs 2i with 2i+1 (GPT-J; cos and sin already repeated to R). Computed in the
    promoted dtype of x (or `compute_dtype`) and cos; the result has x's dtype.
    """
    return rotate(x, cos, sin, layout, compute_dtype)


def _norm_rope_cost(
    x: Tensor,
    weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    offset: float = 0.0,
    mid_dtype: torch.dtype | None = None,
    out_dtype: torch.dtype | None = None,
    layout: str = "half",
) -> Cost:
    return Cost(7 * numel(x), 2 * nbytes(x) + nbytes(weight, cos, sin))


@define(cost=_norm_rope_cost)
def norm_rope(
    x: Tensor,
    weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    offset: float = 0.0,
    mid_dtype: torch.dtype | None = None,
    out_dtype: torch.dtype | None = None,
    layout: str = "half",
) -> Tensor:
    """`rope(rms_norm(x, weight, eps, offset, mid_dtype, out_dtype), cos, sin, layout)`, as on q and k."""
    return rotate(normalize(x, weight, eps, offset, mid_dtype, out_dtype), cos, sin, layout, None)
