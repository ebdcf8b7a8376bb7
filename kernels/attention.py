"""Scaled dot-product attention with everything that models put around it."""

from __future__ import annotations

import sympy
import torch
from torch import Tensor

from .cost import Cost, nbytes, sizes
from .op import define


def visible_pairs(queries: sympy.Expr, keys: sympy.Expr, left: int, right: int) -> sympy.Expr:
    """How many (query, key) pairs the window leaves, for 1 <= queries <= keys.

    Query i has keys - queries + i keys before its own and queries - 1 - i behind it; the sums over i are triangles.
    """
    pairs = queries * keys
    if right == 0:
        pairs -= _triangle(queries - 1)
    elif right > 0:
        pairs -= _triangle(sympy.Max(0, queries - 1 - right))
    if left >= 0:
        pairs -= _triangle(sympy.Max(0, keys - 1 - left)) - _triangle(sympy.Max(0, keys - queries - 1 - left))
    return pairs


def _triangle(n: sympy.Expr) -> sympy.Expr:
    return n * (n + 1) / sympy.Integer(2)


def _attention_cost(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    key_mask: Tensor | None = None,
    sinks: Tensor | None = None,
    scale: float = 1.0,
    left: int = -1,
    right: int = -1,
    softcap: float = 0.0,
) -> Cost:
    batch, heads, queries, width = sizes(q)
    keys, value_width = sizes(v)[2:]
    pairs = batch * heads * visible_pairs(queries, keys, left, right)
    out = batch * heads * queries * value_width * v.element_size()
    flops = pairs * (2 * width + 2 * value_width + 5)
    return Cost(flops, nbytes(q, k, v, mask, bias, key_mask, sinks) + out)


def _window(queries: int, keys: int, left: int, right: int, device: torch.device) -> Tensor:
    """`[Q, K]` bool: key j visible from query i, which stands at key position i + (K - Q)."""
    position = torch.arange(queries, device=device).unsqueeze(1) + (keys - queries)
    key = torch.arange(keys, device=device).unsqueeze(0)
    if left < 0:
        return key <= position + right
    if right < 0:
        return key >= position - left
    return (key >= position - left) & (key <= position + right)


def _attention_fake(q: Tensor, k: Tensor, v: Tensor, *rest: object, **named: object) -> Tensor:
    """What the reference gives; to run all of it on symbolic sizes takes as long as capturing the rest of a layer."""
    batch, heads, queries, _ = q.shape
    return v.new_empty(batch, queries, heads, v.shape[-1])


@define(cost=_attention_cost, fake=_attention_fake)
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    key_mask: Tensor | None = None,
    sinks: Tensor | None = None,
    scale: float = 1.0,
    left: int = -1,
    right: int = -1,
    softcap: float = 0.0,
) -> Tensor:
    """`softmax(softcap(q @ k^T * scale) + bias, masked) @ v`, returned as `[B, Q, H, Dv]` contiguous in v's dtype.

    q `[B, H, Q, D]`, k `[B, Hkv, K, D]`, v `[B, Hkv, K, Dv]`; H a multiple of Hkv, head h reads kv head
    h // (H // Hkv).

    * Query i stands at key position p = i + (K - Q). Key j is visible where `left < 0 or j >= p - left` and
      `right < 0 or j <= p + right` (FlashAttention's convention: causal is `right=0`).
    * mask: bool, broadcastable to `[B, H, Q, K]`, true = may attend. key_mask: bool `[B, K]`, true = a real key.
    * bias: float, broadcastable to `[B, H, Q, K]`, added to the scaled, soft-capped scores.
    * softcap: `cap * tanh(s / cap)` where not 0 (Gemma 2).
    * sinks `[H]`: one more logit a head, which takes probability and gives no value (gpt-oss).

    Scores and softmax in fp32 (fp64 for fp64 q), probabilities rounded to v's dtype. A row without a visible key gives
    zeros; a NaN in the inputs stays a NaN.
    """
    batch, heads, queries, _ = q.shape
    kv_heads, keys = k.shape[1], k.shape[2]
    compute = torch.float64 if q.dtype == torch.float64 else torch.float32
    if heads != kv_heads:
        group = heads // kv_heads
        k = k.unsqueeze(2).expand(-1, -1, group, -1, -1).flatten(1, 2)
        v = v.unsqueeze(2).expand(-1, -1, group, -1, -1).flatten(1, 2)
    scores = torch.matmul(q.to(compute), k.to(compute).transpose(2, 3)) * scale  # [B, H, Q, K]
    if softcap != 0.0:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias.to(compute)
    hidden = float("-inf")
    if left >= 0 or right >= 0:
        scores = scores.masked_fill(~_window(queries, keys, left, right, q.device), hidden)
    if mask is not None:
        scores = scores.masked_fill(~mask, hidden)
    if key_mask is not None:
        scores = scores.masked_fill(~key_mask[:, None, None, :], hidden)
    if sinks is not None:
        sink = sinks.to(compute)[None, :, None, None].expand(batch, heads, queries, 1)
        probabilities = torch.softmax(torch.cat((scores, sink), dim=-1), dim=-1)[..., :-1]
    else:
        dead = (scores == hidden).all(dim=-1, keepdim=True)
        probabilities = torch.softmax(scores, dim=-1).masked_fill(dead, 0.0)
    return torch.matmul(probabilities.to(v.dtype), v).transpose(1, 2).contiguous()
