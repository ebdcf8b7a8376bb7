"""Raise attention where it did not come through transformers' registry: torch's SDPA, and repeated heads.

    scaled_dot_product_attention(q, k, v, mask, scale=s)              ->  transpose(attention(q, k, v, mask, scale=s))
    matmul(softmax(matmul(q, k.T) * s + mask), v)                     ->  the same
    attention(q, repeat_kv(k), repeat_kv(v))                          ->  attention(q, k, v): the op groups heads itself

A mask is kept as it is here, whatever it looks like; `passes.masks` finds out what it says. The op sums in another
order than either spelling, so these rules are verified like fusions and not required to keep bits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ..compiler.match import Match
from ..compiler.opset import OPS, scalar_of
from ..compiler.pattern import Builder
from ..compiler.rule import Emitter, Reject, Rule, Stage

aten = torch.ops.aten


LOWEST = -9984.0
"""What models add where they mean -inf is this or lower: -10000 rounded to bf16."""


def split_mask(g: Emitter, mask: fx.Node | None) -> tuple[fx.Node | None, fx.Node | None]:
    """A mask as it is added to scores, taken apart: which keys are visible (bool), and what is added there (float).

    `where(visible, bias, lowest)` and `masked_fill(bias, hidden, lowest)` hold both; one number for all keys is no
    bias.
    """
    if mask is None:
        return None, None
    if mask.meta["val"].dtype is torch.bool:
        return mask, None
    if mask.target in OPS["where"].targets and is_lowest(mask.args[2]):
        condition, bias = mask.args[0], mask.args[1]
        return condition, None if scalar_of(bias) is not None else bias  # type: ignore[return-value]
    if mask.target in OPS["masked_fill"].targets and is_lowest(mask.args[2]):
        bias, hidden = mask.args[0], mask.args[1]
        return g.call(aten.logical_not.default, hidden), None if scalar_of(bias) is not None else bias  # type: ignore[return-value]
    return None, mask


def is_lowest(value: Any) -> bool:
    """-inf, or a number that no score comes near."""
    number = scalar_of(value)
    return number is not None and number <= LOWEST


def emit_attention(
    g: Emitter,
    q: Any,
    k: Any,
    v: Any,
    mask: Any,
    bias: Any,
    scale: float,
    right: int = -1,
    softcap: float = 0.0,
    sinks: Any = None,
) -> fx.Node:
    """attention in SDPA's layout [B, H, Q, Dv]."""
    return g.transpose(g.attention(q, k, v, mask, bias, None, sinks, scale, -1, right, softcap), 1, 2)


class SDPA(Rule):
    """torch's scaled_dot_product_attention."""

    name = "sdpa_attention"
    stage = Stage.RAISE
    label = "scaled_dot_product_attention -> attention"

    def pattern(self, p: Builder, q: Any, k: Any, v: Any) -> Any:
        names = ("mask", "dropout", "causal", "scale", "enable_gqa")
        return p.sdpa(q, k, v, *[p.arg(n) for n in names])

    def check(self, m: Match) -> Reject | None:
        q, k, v = m.val(m.q), m.val(m.k), m.val(m.v)
        if m.dropout:
            return Reject("attention dropout is active", m.anchor)
        if not (q.dim() == k.dim() == v.dim() == 4):
            return Reject(f"{q.dim()} dimensions instead of batch, heads, length, width", m.q)
        if k.shape[1] != v.shape[1]:
            return Reject(f"{k.shape[1]} key heads and {v.shape[1]} value heads", m.k)
        if not m.enable_gqa and k.shape[1] not in (1, q.shape[1]):
            return Reject(f"{q.shape[1]} query heads on {k.shape[1]} key heads without enable_gqa", m.k)
        if m.causal and str(q.shape[2]) != str(k.shape[2]):
            return Reject("causal from the top left, with fewer queries than keys", m.q)
        if not isinstance(q.shape[-1], int):
            return Reject("the head size is not a number", m.q)
        return None

    def emit(self, m: Match, g: Emitter) -> fx.Node:
        scale = float(m.scale) if m.scale is not None else m.val(m.q).shape[-1] ** -0.5
        mask, bias = split_mask(g, m.mask)
        return emit_attention(g, m.q, m.k, m.v, mask, bias, scale, right=0 if m.causal else -1)


class RepeatKV(Rule):
    """attention on keys and values whose heads were repeated for it."""

    name = "repeat_kv"
    stage = Stage.RAISE
    label = "repeat_kv -> grouped heads"

    def pattern(self, p: Builder, q: Any, k: Any, v: Any) -> Any:
        def repeated(x: Any, tag: str) -> Any:
            copies = p.expand(p.unsqueeze(x, -3), p.arg(f"{tag}_sizes"))
            return p.any(
                p.view(p.any(p.clone(copies), copies), f"{tag}_shape"),
                p.repeat_interleave(x, p.arg(f"{tag}_times"), -3),
                tag=f"{tag}_form",
            )

        names = ("mask", "bias", "key_mask", "sinks", "scale", "left", "right", "softcap")
        return p.attention(q, repeated(k, "k"), repeated(v, "v"), *[p.arg(n) for n in names])

    def check(self, m: Match) -> Reject | None:
        q, k, v = m.val(m.q), m.val(m.k), m.val(m.v)
        if k.dim() != 4 or v.dim() != 4 or k.shape[1] != v.shape[1]:
            return Reject("keys and values have different numbers of heads", m.k)
        if not isinstance(k.shape[1], int) or q.shape[1] % k.shape[1]:
            return Reject(f"{q.shape[1]} query heads are not a multiple of {k.shape[1]} key heads", m.k)
        for node in m.only(aten.expand.default):
            times, heads = node.meta["val"].shape[2], node.meta["val"].shape[1]
            if heads * times != q.shape[1]:
                return Reject(f"{heads} heads repeated {times} times for {q.shape[1]} queries", node)
        return None

    def emit(self, m: Match, g: Emitter) -> fx.Node:
        return g.attention(m.q, m.k, m.v, m.mask, m.bias, m.key_mask, m.sinks, m.scale, m.left, m.right, m.softcap)


RULES = (SDPA(), RepeatKV())
