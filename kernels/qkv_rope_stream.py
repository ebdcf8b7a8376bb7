"""The q, k and v projection of few rows on Hopper at the speed of the memory, with norm and rotation.

Heads of 128 columns that are rotated whole are turned by the programs of the product, others in place behind it.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from . import qkv_rope as ops
from . import stream_gluon
from .launch import empty
from .linear_act_wgmma import Rope, refuse_operands
from .op import Kernel, Signature
from .qkv_rope_triton import norm_dtypes, product_dtype, refuse_qkv, tables, turn


def qkv_rope(
    x: Tensor,
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
) -> Tensor:
    """As the op `qkv_rope`."""
    rows = x.reshape(-1, x.shape[-1])
    vectors = [t for t in (cos, sin, q_weight, k_weight) if t is not None]
    whole = head_dim == cos.shape[-1] == stream_gluon.HEAD and layout == "half"
    if whole and all(t.stride(-1) == 1 for t in vectors) and stream_gluon.readable(rows, weight):
        length, cos, sin, strides = tables(x, cos, sin)
        y = empty((*x.shape[:-1], weight.shape[0]), x.dtype, x.device)
        mid, promoted = norm_dtypes(x.dtype, (q_weight, k_weight), offset, mid_dtype)
        rope = Rope(
            (cos, sin, x if q_weight is None else q_weight, x if k_weight is None else k_weight),
            (length, *strides, q_heads, q_heads + k_heads, eps, offset),
            (norm, mid, promoted, product_dtype(x.dtype, cos, sin, compute_dtype)),
        )
        stream_gluon.linear_rope(rows, weight, bias, y, rope)
        return y
    y = stream_gluon.linear_act(x, weight, bias, "identity")
    turn(x, y, cos, sin, q_weight, k_weight, (q_heads, k_heads, head_dim), norm, eps, offset, mid_dtype, layout,
         compute_dtype)  # fmt: skip
    return y


def _supports(signature: Signature) -> str | None:
    return refuse_qkv(signature) or refuse_operands(signature) or stream_gluon.refuse_rows(signature)


KERNELS: Final = (Kernel(ops.qkv_rope, "stream", qkv_rope, _supports, early=("weight",)),)
