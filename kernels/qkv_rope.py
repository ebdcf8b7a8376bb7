"""The q, k and v projection of an attention block with everything that follows it but the attention itself."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .cost import Cost, nbytes, numel, sizes
from .op import define
from .rms_norm import normalize
from .rope import rotate


def _qkv_rope_cost(
    x: Tensor, weight: Tensor, bias: Tensor | None, cos: Tensor, sin: Tensor, *rest: object, **named: object
) -> Cost:
    """The product's: what happens to q and k happens beside it."""
    n, k = sizes(weight)
    rows = numel(x) / k
    return Cost(2 * rows * n * k, nbytes(x, weight, bias, cos, sin) + rows * n * x.element_size())


@define(cost=_qkv_rope_cost)
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
    """`y = x @ weight.T + bias`, its columns of q and k heads normalised (if `norm`) and rotated, the rest as they are.

    x `[..., K]`; weight `[N, K]`: the rows of `q_heads` heads of q, of `k_heads` heads of k, then any others; bias
    `[N]` or absent; result `[..., N]` in x's dtype. Each head of `head_dim` columns becomes
    `rope(rms_norm(head, q_weight or k_weight, eps, offset, mid_dtype, x.dtype), cos, sin, layout, compute_dtype)`;
    cos and sin `[..., R]` broadcast over x's leading dimensions, the norm's weights are `[head_dim]` or absent. y is
    rounded to x's dtype before that, as separate kernels round it.
    """
    y = F.linear(x, weight, bias)
    q_end, k_end = q_heads * head_dim, (q_heads + k_heads) * head_dim
    turned = []
    for part, norm_weight in ((y[..., :q_end], q_weight), (y[..., q_end:k_end], k_weight)):
        heads = part.unflatten(-1, (-1, head_dim))  # [..., heads, D]
        if norm:
            heads = normalize(heads, norm_weight, eps, offset, mid_dtype, y.dtype)
        turned.append(rotate(heads, cos.unsqueeze(-2), sin.unsqueeze(-2), layout, compute_dtype).flatten(-2))
    return torch.cat((*turned, y[..., k_end:]), dim=-1)
