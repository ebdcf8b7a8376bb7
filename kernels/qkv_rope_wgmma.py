"""The q, k and v projection with norm and rotation in the epilogue of the matrix product, on Hopper."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from . import qkv_rope as ops
from . import qkv_rope_triton
from .launch import empty
from .linear_act_wgmma import Rope, fits, multiply, refuse_operands
from .op import Kernel, Signature

HEADS: Final = (64, 128, 256)
"""Head dimensions of which a whole number fits a tile."""


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
    vectors = [t for t in (cos, sin, bias, q_weight, k_weight) if t is not None]
    length, cos_, sin_, strides = qkv_rope_triton.tables(x, cos, sin) if x.numel() else (0, cos, sin, (0, 0, 0, 0))
    if not length or any(t.stride(-1) != 1 for t in vectors) or not fits(rows, weight):
        return qkv_rope_triton.qkv_rope(
            x, weight, bias, cos, sin, q_weight, k_weight, q_heads, k_heads, head_dim,
            norm, eps, offset, mid_dtype, layout, compute_dtype,
        )  # fmt: skip
    y = empty((*x.shape[:-1], weight.shape[0]), x.dtype, x.device)
    mid, promoted = qkv_rope_triton.norm_dtypes(x.dtype, (q_weight, k_weight), offset, mid_dtype)
    product = qkv_rope_triton.product_dtype(x.dtype, cos, sin, compute_dtype)
    rope = Rope(
        (cos_, sin_, x if q_weight is None else q_weight, x if k_weight is None else k_weight),
        (length, *strides, q_heads * head_dim, (q_heads + k_heads) * head_dim, eps, offset),
        (head_dim, norm, mid, promoted, product),
    )
    multiply(rows, weight, bias, y, "identity", False, rope)
    return y


def _supports(signature: Signature) -> str | None:
    refused = qkv_rope_triton.refuse_qkv(signature) or refuse_operands(signature)
    if refused is not None:
        return refused
    head, rotary = signature["head_dim"], signature["cos"].shape[-1]
    if head not in HEADS or rotary != head or signature["layout"] != "half":
        return f"{rotary} of {head} columns in layout {signature['layout']!r}; this kernel turns whole heads of {HEADS}"
    return None


KERNELS: Final = (Kernel(ops.qkv_rope, "wgmma", qkv_rope, _supports),)
