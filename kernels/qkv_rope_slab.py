"""The q, k and v projection of up to 64 rows on Hopper at the speed of the memory, with norm and rotation.

Heads without a norm that are rotated whole are turned by the programs of the product, others in place behind it.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from . import qkv_rope as ops
from . import slab_gluon, stream_gluon
from .launch import empty
from .linear_act_wgmma import refuse_operands
from .op import Kernel, Signature
from .qkv_rope_triton import product_dtype, refuse_qkv, tables, turn


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
    rows, half = x.reshape(-1, x.shape[-1]), head_dim // 2
    halves = layout == "half" and head_dim == cos.shape[-1] and cos.stride(-1) == sin.stride(-1) == 1
    if halves and not norm and slab_gluon.turns(rows, weight, half):
        length, cos, sin, strides = tables(x, cos, sin)
        y = empty((*x.shape[:-1], weight.shape[0]), x.dtype, x.device)
        product = product_dtype(x.dtype, cos, sin, compute_dtype)
        sizes = (length, q_heads + k_heads, half)
        slab_gluon.linear_rope(rows, weight, bias, y, (cos, sin), strides, sizes, product)
        return y
    y = slab_gluon.linear_act(x, weight, bias, "identity")
    turn(x, y, cos, sin, q_weight, k_weight, (q_heads, k_heads, head_dim), norm, eps, offset, mid_dtype, layout,
         compute_dtype)  # fmt: skip
    return y


def _supports(signature: Signature) -> str | None:
    return refuse_qkv(signature) or refuse_operands(signature) or stream_gluon.refuse_rows(signature)


KERNELS: Final = (Kernel(ops.qkv_rope, "slab", qkv_rope, _supports, early=("weight",)),)
