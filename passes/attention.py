"""Raise attention where it did not come through transformers' registry: SDPA, and the eager spelling.

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


def split_mask(g: Emitter, mask: fx.Node | None) -> tuple[fx.Node | None, fx.Node | None]:
    """A mask as it is added to scores, taken apart: which keys are visible (bool), and what is added there (float).

    `where(visible, bias, lowest)` and `masked_fill(bias, hidden, lowest)` hold both; a number 0 for bias is nothing.
    """
    if mask is None:
        return None, None
    if mask.meta["val"].dtype is torch.bool:
        return mask, None
    if mask.target in OPS["where"].targets and _is_lowest(mask.args[2]):
        condition, bias = mask.args[0], mask.args[1]
        return condition, None if scalar_of(bias) == 0 else bias  # type: ignore[return-value]
    if mask.target in OPS["masked_fill"].targets and _is_lowest(mask.args[2]):
        bias, hidden = mask.args[0], mask.args[1]
        return g.call(aten.logical_not.default, hidden), None if scalar_of(bias) == 0 else bias  # type: ignore[return-value]
    return None, mask


def _is_lowest(value: Any) -> bool:
    """-inf, or a number that no score comes near: half the lowest of fp16 or below."""
    number = scalar_of(value)
    return number is not None and number <= torch.finfo(torch.float16).min / 2


def emit_attention(
    g: Emitter, q: Any, k: Any, v: Any, mask: Any, bias: Any, scale: float, right: int = -1, softcap: float = 0.0
) -> fx.Node:
    """attention in SDPA's layout [B, H, Q, Dv]."""
    return g.transpose(g.attention(q, k, v, mask, bias, None, None, scale, -1, right, softcap), 1, 2)


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


class EagerAttention(Rule):
    """softmax(q @ k.T * scale [softcapped] [+ bias] [masked]) @ v, in three or four dimensions."""

    stage = Stage.RAISE
    label = "eager attention -> attention"

    def pattern(self, p: Builder, q: Any, kt: Any, v: Any, factor: Any, divisor: Any, cap: Any, added: Any) -> Any:
        product = p.matmul(q, kt)
        with_bias = p.baddbmm(p.arg("alibi"), q, kt, beta=p.arg("beta"), alpha=p.arg("alpha"))
        scores = p.any(p.mul(product, factor), p.div(product, divisor), with_bias, product, tag="scaling")
        wide = p.cast(p.any(p.view(scores, "unfolded"), scores))
        capped = p.any(p.mul(p.tanh(p.div(wide, cap)), cap), wide, tag="uncapped")
        masked = p.any(
            p.masked_fill(p.any(p.add(capped, added), capped, tag="nothing_added"), p.arg("hidden"), p.arg("lowest")),
            p.where(p.arg("visible"), p.any(p.add(capped, added), capped, tag="nothing_added"), p.arg("lowest")),
            p.add(p.cast(p.any(p.add(capped, p.arg("position")), capped, tag="no_position")), added),
            capped,
            tag="masking",
        )
        weights = p.cast(p.softmax(p.cast(p.any(p.view(masked, "again"), masked)), -1, p.arg("softmax_dtype")))
        return p.matmul(p.any(p.view(weights, "folded"), weights), v)

    def check(self, m: Match) -> Reject | None:
        q, kt, v = _in_four(m.q), _keys(m.kt)[0], _in_four(m.v)
        if q is None or kt is None or v is None:
            return Reject("the operands have no shape [batch, heads, length, width]", m.q)
        heads = m.val(q).shape[1]
        if (
            not isinstance(heads, int)
            or m.val(kt).shape[1] not in (1, heads)
            or m.val(v).shape[1] != m.val(kt).shape[1]
        ):
            return Reject("queries, keys and values have different numbers of heads", m.q)
        for name, expected in (("scaling", (0, 1)), ("uncapped", (0,))):
            number = m.bindings.get({0: "factor", 1: "divisor"}.get(m.scaling, "") if name == "scaling" else "cap")
            if getattr(m, name) in expected and not isinstance(number, int | float):
                return Reject("the scale or cap is not a number", m.anchor)
        if m.scaling == 2 and m.beta != 1:
            return Reject(f"the bias is scaled by {m.beta}", m.anchor)
        if m.masking in (0, 1) and not _is_lowest(m.lowest):
            return Reject(f"masked scores are set to {m.lowest}", m.anchor)
        if m.masking != 3 or m.bindings.get("nothing_added") == 0:
            added = m.val(m.bindings.get("added")) if "added" in m.bindings else None
            if added is not None and (not isinstance(added, torch.Tensor) or added.dim() > 4):
                return Reject("what is added to the scores is not a tensor of at most 4 dimensions", m.anchor)
        return None

    def emit(self, m: Match, g: Emitter) -> fx.Node:
        q, (keys, across), v = _in_four(m.q), _keys(m.kt), _in_four(m.v)
        assert q is not None and keys is not None and v is not None
        k = g.transpose(keys, 2, 3) if across else keys
        scale = {
            0: lambda: float(m.factor),
            1: lambda: 1.0 / float(m.divisor),
            2: lambda: float(m.alpha),
            3: lambda: 1.0,
        }[m.scaling]()
        biases: list[fx.Node] = []
        if m.scaling == 2:
            length = g.call(aten.sym_size.int, k, 2)
            biases.append(g.reshape(m.alibi, [-1, m.val(q).shape[1], m.val(m.alibi).shape[1], length]))
        mask = None
        if m.masking == 0:
            mask = g.call(aten.logical_not.default, m.hidden)
        elif m.masking == 1:
            mask = m.visible
        elif m.masking == 2 and m.no_position == 0:
            biases.append(m.position)
        if "added" in m.bindings and (m.masking == 2 or m.bindings.get("nothing_added") == 0):
            if m.masking == 2:
                mask, bias = split_mask(g, m.added)
                biases += [bias] if bias is not None else []
            else:
                biases.append(m.added)
        bias = biases[0] if biases else None
        for further in biases[1:]:
            bias = g.add(bias, further)
        softcap = float(m.cap) if m.uncapped == 0 else 0.0
        result = emit_attention(g, q, k, v, mask, bias, scale, softcap=softcap)
        if m.anchor.meta["val"].dim() == 3:
            sizes = [-1, g.call(aten.sym_size.int, q, 2), m.val(v).shape[3]]
            result = g.reshape(result, sizes)
        return result


def _in_four(node: Any) -> fx.Node | None:
    """The 4-d tensor behind batch and heads folded into one dimension, or the node itself where it has four."""
    if not isinstance(node, fx.Node) or not isinstance(node.meta.get("val"), torch.Tensor):
        return None
    value = node.meta["val"]
    if value.dim() == 4:
        return node
    if value.dim() != 3 or node.target is not aten.reshape.default:
        return None
    source = node.args[0]
    inner = source.meta["val"]  # type: ignore[union-attr]
    fits = inner.dim() == 4 and [str(s) for s in inner.shape[2:]] == [str(s) for s in value.shape[1:]]
    return source if fits and isinstance(inner.shape[1], int) else None  # type: ignore[return-value]


def _keys(kt: Any) -> tuple[fx.Node | None, bool]:
    """The keys behind k.T in four dimensions, and whether they still lie [batch, heads, width, length] there."""
    if isinstance(kt, fx.Node) and kt.target is aten.transpose.int:
        rank = kt.meta["val"].dim()
        if {int(d) % rank for d in kt.args[1:]} == {rank - 1, rank - 2}:  # type: ignore[arg-type]
            return _in_four(kt.args[0]), False
    return _in_four(kt), True


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


RULES = (SDPA(), EagerAttention(), RepeatKV())
