"""RMSNorm, and RMSNorm after a residual addition (Zhang and Sennrich, arXiv 1910.07467).

Models differ in where they round: before the weight (llama), after it (gemma, OLMo 2), or not at all. `mid_dtype`,
`out_dtype` and `offset` say which, so that one op is bit-exact with each of them.
"""

from __future__ import annotations

import sympy
import torch
from torch import Tensor

from .cost import Cost, nbytes, numel
from .op import define


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def normalize(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    offset: float,
    mid_dtype: torch.dtype | None,
    out_dtype: torch.dtype | None,
) -> Tensor:
    """The reference of `rms_norm` as a plain function, for the ops that contain it."""
    compute = _compute_dtype(x)
    y = x.to(compute)
    y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + eps)
    if mid_dtype is not None:
        y = y.to(mid_dtype)
    if weight is not None:
        y = y * (weight if offset == 0 else weight.to(compute) + offset)
    return y if out_dtype is None else y.to(out_dtype)


def result_dtype(
    x: torch.dtype, weight: torch.dtype | None, offset: float, mid: torch.dtype | None, out: torch.dtype | None
) -> torch.dtype:
    """The dtype `rms_norm` returns, by PyTorch's promotion."""
    if out is not None:
        return out
    compute = torch.float64 if x == torch.float64 else torch.float32
    dtype = compute if mid is None else mid
    if weight is not None:
        dtype = torch.promote_types(dtype, weight if offset == 0 else compute)
    return dtype


def _out_bytes(
    x: Tensor, weight: Tensor | None, offset: float, mid_dtype: torch.dtype | None, out_dtype: torch.dtype | None
) -> sympy.Expr:
    out = result_dtype(x.dtype, None if weight is None else weight.dtype, offset, mid_dtype, out_dtype)
    return numel(x) * out.itemsize


def _rms_norm_cost(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    offset: float = 0.0,
    mid_dtype: torch.dtype | None = None,
    out_dtype: torch.dtype | None = None,
) -> Cost:
    return Cost(4 * numel(x), nbytes(x, weight) + _out_bytes(x, weight, offset, mid_dtype, out_dtype))


@define(cost=_rms_norm_cost)
def rms_norm(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    offset: float = 0.0,
    mid_dtype: torch.dtype | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """`x * rsqrt(mean(x^2) + eps) * (weight + offset)` over the last dimension.

    x `[..., D]`, weight `[D]` or absent. Computed in fp32 (fp64 for fp64 x); rounded to `mid_dtype` before the weight
    and to `out_dtype` at the end where they are given, otherwise promoted as PyTorch does.
    """
    return normalize(x, weight, eps, offset, mid_dtype, out_dtype)


def _add_rms_norm_cost(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    eps: float,
    offset: float = 0.0,
    mid_dtype: torch.dtype | None = None,
    out_dtype: torch.dtype | None = None,
) -> Cost:
    return _rms_norm_cost(x, weight, eps, offset, mid_dtype, out_dtype) + Cost(
        numel(x), nbytes(residual) + numel(x) * torch.promote_types(x.dtype, residual.dtype).itemsize
    )


@define(cost=_add_rms_norm_cost)
def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    eps: float,
    offset: float = 0.0,
    mid_dtype: torch.dtype | None = None,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """`s = x + residual; (rms_norm(s, ...), s)`; x and residual of the same shape `[..., D]`."""
    s = x + residual
    return normalize(s, weight, eps, offset, mid_dtype, out_dtype), s
