"""Mixture of experts: each token through its top-k experts, weighted and summed."""

from __future__ import annotations

import sympy
import torch
from torch import Tensor
from torch.nn import functional as F

from .activation import activate
from .cost import Cost, nbytes, sizes
from .op import define


def gate(
    projected: Tensor,
    kind: str,
    interleaved: bool = False,
    limit: float = 0.0,
    limit_after: bool = False,
    alpha: float = 0.0,
    up_offset: float = 0.0,
) -> Tensor:
    """`[..., 2 I] -> [..., I]`: the gated activation of the experts.

    gate and up are the halves of the last dimension, or its even and odd entries where `interleaved`. With `limit`,
    gate is clamped from above (after its activation where `limit_after`) and up to `[-limit, limit]`. With `alpha` the
    activation is `g * sigmoid(alpha * g)` and `kind` is not used (gpt-oss). Result `act(gate) * (up + up_offset)`.
    """
    if interleaved:
        g, up = projected[..., ::2], projected[..., 1::2]
    else:
        g, up = projected.chunk(2, dim=-1)
    if limit and not limit_after:
        g = g.clamp(max=limit)
    g = g * torch.sigmoid(g * alpha) if alpha else activate(g, kind)
    if limit:
        g = g.clamp(max=limit) if limit_after else g
        up = up.clamp(min=-limit, max=limit)
    return (up + up_offset) * g if up_offset else g * up


def _moe_cost(
    hidden: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    up: Tensor,
    down: Tensor,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    kind: str = "silu",
    gated: bool = True,
    transposed: bool = False,
    interleaved: bool = False,
    limit: float = 0.0,
    limit_after: bool = False,
    alpha: float = 0.0,
    up_offset: float = 0.0,
) -> Cost:
    tokens, width = sizes(hidden)
    pairs = tokens * sizes(top_k_index)[1]
    experts = sizes(up)[0]
    per_pair = 2 * (sympy.prod(sizes(up)[1:]) + sympy.prod(sizes(down)[1:]))
    chosen = sizes(top_k_index)[1] / experts
    touched = 1 - (1.0 - chosen) ** tokens  # the share of the experts that some token chose, if they choose evenly
    weights = nbytes(up, down, up_bias, down_bias)
    traffic = nbytes(hidden, top_k_index, top_k_weights) + tokens * width * hidden.element_size()
    return Cost(pairs * per_pair, touched * weights + traffic)


def _moe_fake(
    hidden: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    up: Tensor,
    down: Tensor,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    kind: str = "silu",
    gated: bool = True,
    transposed: bool = False,
    interleaved: bool = False,
    limit: float = 0.0,
    limit_after: bool = False,
    alpha: float = 0.0,
    up_offset: float = 0.0,
) -> Tensor:
    return hidden.new_empty(hidden.shape)


@define(cost=_moe_cost, fake=_moe_fake)
def moe_experts(
    hidden: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    up: Tensor,
    down: Tensor,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    kind: str = "silu",
    gated: bool = True,
    transposed: bool = False,
    interleaved: bool = False,
    limit: float = 0.0,
    limit_after: bool = False,
    alpha: float = 0.0,
    up_offset: float = 0.0,
) -> Tensor:
    """`out[t] = sum_k w[t, k] * down_e(act(up_e(hidden[t])))` with `e = top_k_index[t, k]`; `[T, H]` in hidden's dtype.

    * hidden `[T, H]`, top_k_index int `[T, K]`, top_k_weights `[T, K]`. An index outside the experts adds nothing.
    * up `[E, 2 I, H]` (gate and up; `[E, I, H]` where not `gated`), down `[E, H, I]`; both with their last two
      dimensions swapped where `transposed`. up_bias `[E, 2 I]`, down_bias `[E, H]`.
    * kind, interleaved, limit, limit_after, alpha, up_offset: see `gate`.

    Experts are summed in ascending order in hidden's dtype, as the eager experts of transformers do.
    """
    out = torch.zeros_like(hidden)
    for e in range(up.shape[0]):
        token, slot = torch.where(top_k_index == e)
        if token.numel() == 0:
            continue
        x = hidden[token]  # [N, H]
        x = _linear(x, up[e], None if up_bias is None else up_bias[e], transposed)
        x = gate(x, kind, interleaved, limit, limit_after, alpha, up_offset) if gated else activate(x, kind)
        x = _linear(x, down[e], None if down_bias is None else down_bias[e], transposed)
        x = x * top_k_weights[token, slot, None]
        out.index_add_(0, token, x.to(out.dtype))
    return out


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    if not transposed:
        return F.linear(x, weight, bias)
    product = x @ weight
    return product if bias is None else product + bias
