"""A product behind the norm of a sum: what stands in front of attention and of the MLP in most decoders.

Beside a product of many rows the norm is nothing; beside one of a single row its launch is not. So these ops stand in
no graph: `passes/pairs.py` finds the pairs of nodes that they are, and the number of rows decides, call by call.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final

import torch
from torch import Tensor

from .cost import Cost, nbytes
from .linear_act import gate_up, linear_act
from .op import Op, define
from .qkv_rope import qkv_rope
from .rms_norm import add_rms_norm, result_dtype

NORM: Final = 7
"""Arguments of a joint op that are those of `add_rms_norm`; behind them come the product's without its x."""


def _cost(
    product: Op,
    x: Tensor,
    residual: Tensor,
    norm_weight: Tensor | None,
    norm_eps: float,
    norm_offset: float,
    norm_mid_dtype: torch.dtype | None,
    norm_out_dtype: torch.dtype | None,
    *rest: Any,
    **named: Any,
) -> Cost:
    """The normalised row is neither written nor read."""
    norm = (norm_weight, norm_eps, norm_offset, norm_mid_dtype, norm_out_dtype)
    total = torch.promote_types(x.dtype, residual.dtype)
    weight = None if norm_weight is None else norm_weight.dtype
    y = x.to(result_dtype(total, weight, norm_offset, norm_mid_dtype, norm_out_dtype))
    return add_rms_norm.cost(x, residual, *norm) + product.cost(y, *rest, **named) + Cost(bytes=-2 * nbytes(y))


@define(cost=functools.partial(_cost, linear_act))
def norm_linear_act(
    x: Tensor,
    residual: Tensor,
    norm_weight: Tensor | None,
    norm_eps: float,
    norm_offset: float,
    norm_mid_dtype: torch.dtype | None,
    norm_out_dtype: torch.dtype | None,
    weight: Tensor,
    bias: Tensor | None,
    kind: str,
) -> tuple[Tensor, Tensor]:
    """`y, s = add_rms_norm(x, residual, norm_...)`, then `linear_act(y, weight, bias, kind), s`."""
    norm = (norm_weight, norm_eps, norm_offset, norm_mid_dtype, norm_out_dtype)
    y, s = add_rms_norm.reference(x, residual, *norm)
    return linear_act.reference(y, weight, bias, kind), s


@define(cost=functools.partial(_cost, gate_up))
def norm_gate_up(
    x: Tensor,
    residual: Tensor,
    norm_weight: Tensor | None,
    norm_eps: float,
    norm_offset: float,
    norm_mid_dtype: torch.dtype | None,
    norm_out_dtype: torch.dtype | None,
    weight: Tensor,
    bias: Tensor | None,
    kind: str,
) -> tuple[Tensor, Tensor]:
    """`y, s = add_rms_norm(x, residual, norm_...)`, then `gate_up(y, weight, bias, kind), s`."""
    norm = (norm_weight, norm_eps, norm_offset, norm_mid_dtype, norm_out_dtype)
    y, s = add_rms_norm.reference(x, residual, *norm)
    return gate_up.reference(y, weight, bias, kind), s


@define(cost=functools.partial(_cost, qkv_rope))
def norm_qkv_rope(
    x: Tensor,
    residual: Tensor,
    norm_weight: Tensor | None,
    norm_eps: float,
    norm_offset: float,
    norm_mid_dtype: torch.dtype | None,
    norm_out_dtype: torch.dtype | None,
    weight: Tensor,
    bias: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    q_heads: int,
    k_heads: int,
    head_dim: int,
    norm: bool,
    eps: float,
    offset: float,
    mid_dtype: torch.dtype | None,
    layout: str,
    compute_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    """`y, s = add_rms_norm(x, residual, norm_...)`, then `qkv_rope(y, weight, bias, cos, ...), s`."""
    first = (norm_weight, norm_eps, norm_offset, norm_mid_dtype, norm_out_dtype)
    y, s = add_rms_norm.reference(x, residual, *first)
    heads = (q_weight, k_weight, q_heads, k_heads, head_dim, norm, eps, offset, mid_dtype, layout, compute_dtype)
    return qkv_rope.reference(y, weight, bias, cos, sin, *heads), s


JOINT: Final[Mapping[str, Op]] = MappingProxyType(
    {linear_act.name: norm_linear_act, gate_up.name: norm_gate_up, qkv_rope.name: norm_qkv_rope}
)
"""The joint op by the product's name."""

PARTS: Final[Mapping[str, tuple[str, str]]] = MappingProxyType(
    {joint.name: (add_rms_norm.name, product) for product, joint in JOINT.items()}
)
"""The ops that a joint op stands for, by its name."""
