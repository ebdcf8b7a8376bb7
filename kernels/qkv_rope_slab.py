"""The q, k and v projection of up to 64 rows on Hopper at the speed of the memory: heads are turned behind it."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from . import qkv_rope as ops
from . import slab_gluon, stream_gluon
from .linear_act_wgmma import refuse_operands
from .op import Kernel, Signature
from .qkv_rope_triton import refuse_qkv, turn


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
    y = slab_gluon.linear_act(x, weight, bias, "identity")
    turn(x, y, cos, sin, q_weight, k_weight, (q_heads, k_heads, head_dim), norm, eps, offset, mid_dtype, layout,
         compute_dtype)  # fmt: skip
    return y


def _supports(signature: Signature) -> str | None:
    return refuse_qkv(signature) or refuse_operands(signature) or stream_gluon.refuse_rows(signature)


KERNELS: Final = (Kernel(ops.qkv_rope, "slab", qkv_rope, _supports, early=("weight",)),)
