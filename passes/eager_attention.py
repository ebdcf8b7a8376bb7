"""Raise attention that is written out: softmax between two matrix products, whatever happens to the scores before it.

    matmul(softmax(matmul(q, k.T) * s + bias, masked), v)    ->    attention(q, k, v, mask, bias, scale=s)

Between the first product and the softmax stands a chain of steps. The pattern takes up to `DEPTH` of them in any order:
scaling, softcap, addition of a bias, three spellings of masking, folding of batch and heads, subtraction of the
maximum; `scores_of` reads off what they come to. Sinks are a column of logits that is joined to the scores and cut off
again.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from ..compiler.match import Match
from ..compiler.opset import CASTS, VIEWS, scalar_of
from ..compiler.pattern import Builder
from ..compiler.rule import Emitter, Reject, Rule, Stage
from .attention import emit_attention, is_lowest, split_mask

aten = torch.ops.aten

DEPTH = 7
"""Steps between the product and the softmax."""

SCALE, DIVIDE, ADD, FILL, WHERE, WHERE_NOT, CAP, VIEW, SHIFT, SHIFT_2, FLOOR = range(11)


class EagerAttention(Rule):
    """In three or four dimensions, heads folded into the batch or not."""

    stage = Stage.RAISE
    label = "eager attention -> attention"

    def pattern(self, p: Builder, q: Any, kt: Any, v: Any) -> Any:
        rows = p.any(p.mul(q, p.variable("by_q")), p.div(q, p.variable("by_q")), q, tag="q_form")
        columns = p.any(p.mul(kt, p.variable("by_k")), p.div(kt, p.variable("by_k")), kt, tag="k_form")
        with_bias = p.baddbmm(p.arg("alibi"), q, kt, beta=p.arg("beta"), alpha=p.arg("alpha"))
        product = p.any(p.matmul(rows, columns), with_bias, tag="base")
        scores = product
        for i in range(DEPTH):
            scores = p.any(product, self._step(p, p.cast(scores), i), tag=f"step_{i}")
        plain = p.softmax(p.cast(scores), -1, p.arg("softmax_dtype"))
        joined = p.cat([p.cast(scores), p.arg("sinks")], -1)
        with_sinks = p.softmax(p.cast(p.any(self._shifted(p, joined), joined)), -1, p.arg("softmax_dtype"))
        weights = p.cast(p.any(plain, p.slice(with_sinks, -1, 0, p.arg("end")), tag="with_sinks"))
        cleared = p.masked_fill(weights, p.arg("hidden_after"), 0)
        weights = p.cast(p.any(cleared, p.nan_to_num(weights, p.arg("nan")), weights, tag="cleared"))
        return p.matmul(p.any(p.view(weights, "folded"), weights, tag="unfolded"), v)

    @staticmethod
    def _step(p: Builder, s: Any, i: int) -> Any:
        cap = p.variable(f"cap_{i}")
        return p.any(
            p.mul(s, p.variable(f"by_{i}")),
            p.div(s, p.variable(f"by_{i}")),
            p.add(s, p.variable(f"added_{i}")),
            p.masked_fill(s, p.arg(f"mask_{i}"), p.arg(f"lowest_{i}")),
            p.where(p.arg(f"mask_{i}"), s, p.arg(f"lowest_{i}")),
            p.where(p.arg(f"mask_{i}"), p.arg(f"lowest_{i}"), s),
            p.mul(p.tanh(p.div(s, cap)), cap),
            p.view(s, f"shape_{i}"),
            p.sub(s, p.amax(s, [-1], True)),
            p.sub(s, p.getitem(p.max_dim(s, -1, True), 0)),
            p.maximum(s, p.arg(f"lowest_{i}")),
            tag=f"form_{i}",
        )

    @staticmethod
    def _shifted(p: Builder, s: Any) -> Any:
        return p.any(p.sub(s, p.amax(s, [-1], True)), p.sub(s, p.getitem(p.max_dim(s, -1, True), 0)))

    def check(self, m: Match) -> Reject | None:
        operands = operands_of(m)
        if isinstance(operands, Reject):
            return operands
        scores = scores_of(m)
        if isinstance(scores, Reject):
            return scores
        for node in m.only(aten.reshape.default):
            shape = node.meta["val"].shape
            if len(shape) == 4 and (operands.folded or shape[1] != operands.heads):
                return Reject(f"scores are laid out as {list(shape)} for {operands.heads} heads", node)
        if m.anchor.meta["val"].dtype is not m.dtype(m.v):
            return Reject(f"the result is {m.anchor.meta['val'].dtype}, the values {m.dtype(m.v)}", m.v)
        if m.cleared == 0 and m.hidden_after not in [mask for mask, shown, _ in scores.masks if not shown]:
            return Reject("weights are cleared under another mask than the scores", m.hidden_after)
        if m.cleared == 1 and m.nan not in (None, 0):
            return Reject(f"a row without visible key gives {m.nan}", m.anchor)
        if m.with_sinks == 1:
            if sinks_of(m.sinks, operands.heads) is None:
                return Reject("what is joined to the scores is not one number for each head", m.sinks)
            if m.end != -1:
                return Reject(f"the column of sinks is not what is cut off: weights[..., :{m.end}]", m.anchor)
        return None

    def emit(self, m: Match, g: Emitter) -> fx.Node:
        operands, scores = operands_of(m), scores_of(m)
        assert isinstance(operands, Operands) and isinstance(scores, Scores)
        q, k, v = operands.in_four(m, g)
        for factor, rank in scores.factors:
            q = g.mul(q, in_four(g, factor, rank, operands))
        bias: fx.Node | None = None
        mask: fx.Node | None = None
        for added, by, rank in scores.biases:
            visible, rest = split_mask(g, added)
            if rest is not None:
                rest = in_four(g, rest if by == 1.0 else g.mul(rest, by), rank, operands)
                bias = rest if bias is None else g.add(bias, rest)
            if visible is not None:
                mask = _and(g, mask, in_four(g, visible, rank, operands))
        for given, shown, rank in scores.masks:
            visible = given if shown else g.call(aten.logical_not.default, given)
            mask = _and(g, mask, in_four(g, visible, rank, operands))
        sinks = sinks_of(m.sinks, operands.heads) if m.with_sinks == 1 else None
        result = emit_attention(g, q, k, v, mask, bias, scores.scale, softcap=scores.softcap, sinks=sinks)
        if m.anchor.meta["val"].dim() == 3:
            result = g.reshape(result, [-1, size_of(g, q, 2), size_of(g, v, 3)])
        return result


# -- scores ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scores:
    """softmax's argument as softcap(q @ k.T * scale * factors) + biases, where the masks let it through.

    Each tensor comes with the rank that the scores had there: 4, or 3 with heads in the batch dimension.
    """

    scale: float = 1.0
    factors: tuple[tuple[fx.Node, int], ...] = ()
    softcap: float = 0.0
    biases: tuple[tuple[fx.Node, float, int], ...] = ()
    """With the number it is multiplied by."""
    masks: tuple[tuple[fx.Node, bool, int], ...] = field(default=())
    """With whether true means visible."""


def scores_of(m: Match) -> Scores | Reject:
    """What the chain of steps comes to, read from the product outwards."""
    scores, rank = Scores(), max(m.val(m.q).dim(), m.val(m.kt).dim())
    for form, by in ((m.bindings.get("q_form"), "by_q"), (m.bindings.get("k_form"), "by_k")):
        if form in (SCALE, DIVIDE):
            number = scalar_of(m.bindings[by])
            if number is None:
                return Reject("an operand is multiplied by a tensor", m.bindings[by], quiet=True)
            scores = replace(scores, scale=scores.scale / number if form == DIVIDE else scores.scale * number)
    if m.base == 1:
        scores = Scores(scale=float(m.alpha))
        if m.beta:
            scores = replace(scores, biases=((m.alibi, float(m.beta), rank),))
    for i in [i for i in range(DEPTH) if m.bindings.get(f"step_{i}") == 1]:
        form = m.bindings[f"form_{i}"]
        if form == VIEW:
            rank = len(m.bindings[f"shape_{i}"])
            continue
        if rank not in (3, 4):
            return Reject(f"scores of {rank} dimensions", m.anchor)
        changed = _stepped(scores, form, i, rank, m)
        if isinstance(changed, Reject):
            return changed
        scores = changed
    return scores


def _stepped(scores: Scores, form: int, i: int, rank: int, m: Match) -> Scores | Reject:
    if form in (SHIFT, SHIFT_2):
        return scores
    if form in (SCALE, DIVIDE):
        return _scaled(scores, m.bindings[f"by_{i}"], form, rank, m)
    if form == CAP:
        if scores.biases or scores.masks or scores.softcap:
            return Reject("the softcap comes behind a bias or mask", m.anchor)
        cap = m.bindings[f"cap_{i}"]
        return (
            replace(scores, softcap=float(cap)) if isinstance(cap, int | float) else Reject("the cap is no number", cap)
        )
    if form == ADD:
        added = m.bindings[f"added_{i}"]
        if not isinstance(m.val(added), torch.Tensor):
            return scores  # the same number everywhere changes no softmax
        return replace(scores, biases=(*scores.biases, (added, 1.0, rank)))
    if not is_lowest(m.bindings[f"lowest_{i}"]):
        return Reject(f"masked scores are set to {m.bindings[f'lowest_{i}']}", m.anchor)
    if form == FLOOR:
        return scores
    return replace(scores, masks=(*scores.masks, (m.bindings[f"mask_{i}"], form == WHERE, rank)))


def _scaled(scores: Scores, by: Any, form: int, rank: int, m: Match) -> Scores | Reject:
    number = scalar_of(by)
    if number is None:
        value = m.val(by)
        of_rows = isinstance(value, torch.Tensor) and (value.dim() == 0 or value.shape[-1] == 1)
        if form == DIVIDE or not of_rows or scores.softcap or scores.biases:
            return Reject("the scores are multiplied by a tensor", by)
        return replace(scores, factors=(*scores.factors, (by, rank)))
    by = 1.0 / number if form == DIVIDE else float(number)
    if scores.softcap or (scores.masks and by <= 0):
        return Reject("the scores are scaled behind a softcap or mask", m.anchor)
    biases = tuple((bias, factor * by, at) for bias, factor, at in scores.biases)
    return replace(scores, scale=scores.scale * by, biases=biases)


# -- operands ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Operands:
    """q, k and v with a dimension of heads: found behind a fold into the batch, or of size 1 where there is none."""

    q: fx.Node
    k: fx.Node
    v: fx.Node
    across: bool
    """The keys lie [..., width, length] there."""
    heads: int
    folded: bool
    """They had three dimensions without a fold behind them: the head is to be put in."""

    def in_four(self, m: Match, g: Emitter) -> tuple[fx.Node, fx.Node, fx.Node]:
        q, k, v = (g.unsqueeze(t, 1) if self.folded else t for t in (self.q, self.k, self.v))
        return q, g.transpose(k, 2, 3) if self.across else k, v


def operands_of(m: Match) -> Operands | Reject:
    """The operands in four dimensions."""
    if not all(isinstance(t, fx.Node) and isinstance(m.val(t), torch.Tensor) for t in (m.q, m.kt, m.v)):
        return Reject("an operand is not a tensor", m.anchor)
    source, across = _untransposed(m.kt)
    ranks = {m.val(t).dim() for t in (m.q, source, m.v)}
    q, k, v = (_unfolded(_uncast(t, m.val(m.v).dtype)) for t in (m.q, source, m.v))
    folded = False
    if q is None or k is None or v is None:
        if ranks != {3}:
            return Reject("the operands have no shape [batch, heads, length, width]", m.q, quiet=ranks == {2})
        q, k, v, folded = m.q, source, m.v, True
    heads = 1 if folded else m.val(q).shape[1]
    if not isinstance(heads, int):
        return Reject("the number of heads is not fixed", q)
    if not folded and (m.val(k).shape[1] not in (1, heads) or m.val(v).shape[1] != m.val(k).shape[1]):
        return Reject("queries, keys and values have different numbers of heads", q)
    return Operands(q, k, v, across, heads, folded)


def _untransposed(kt: fx.Node) -> tuple[fx.Node, bool]:
    """The keys behind k.T, and whether they still lie [..., width, length] there."""
    kt = kt.args[0] if kt.target in CASTS and kt.args[0].target is aten.transpose.int else kt  # type: ignore
    if kt.target is aten.transpose.int:
        rank = kt.meta["val"].dim()
        if {int(d) % rank for d in kt.args[1:]} == {rank - 1, rank - 2}:  # type: ignore[arg-type]
            return kt.args[0], False  # type: ignore[return-value]
    return kt, True


def _uncast(node: fx.Node, dtype: torch.dtype) -> fx.Node:
    """What was only brought to a wider dtype: the op computes in fp32 itself."""
    source = node.args[0] if node.target in CASTS else None
    return source if isinstance(source, fx.Node) and source.meta["val"].dtype is dtype else node


def _unfolded(node: fx.Node) -> fx.Node | None:
    """The 4-d tensor behind batch and heads folded into one dimension, or the node itself where it has four."""
    value = node.meta["val"]
    if value.dim() == 4:
        return node
    if value.dim() != 3 or node.target is not aten.reshape.default:
        return None
    source: fx.Node = node.args[0]  # type: ignore[assignment]
    inner = source.meta["val"]
    fits = inner.dim() == 4 and [str(s) for s in inner.shape[2:]] == [str(s) for s in value.shape[1:]]
    return source if fits and isinstance(inner.shape[1], int) else None


def sinks_of(node: Any, heads: int) -> fx.Node | None:
    """The vector `[heads]` behind views that spread it over batch and queries."""
    while isinstance(node, fx.Node) and isinstance(node.meta.get("val"), torch.Tensor):
        shape = node.meta["val"].shape
        if tuple(shape) == (heads,):
            return node
        if (len(shape) == 4 and shape[1] not in (1, heads)) or node.target not in VIEWS:
            return None
        node = node.args[0]
    return None


def in_four(g: Emitter, node: fx.Node, rank: int, operands: Operands) -> fx.Node:
    """A tensor that broadcasts against scores of that rank, so that it broadcasts against `[batch, heads, Q, K]`."""
    known = node if "val" in node.meta else node.args[0]  # emitted here: elementwise on that
    assert isinstance(known, fx.Node)
    value = known.meta["val"]
    if rank == 4 or value.dim() < 3 or (isinstance(value.shape[0], int) and value.shape[0] == 1):
        return node
    if operands.folded:
        return g.unsqueeze(node, 1)
    return g.reshape(node, [-1, operands.heads, size_of(g, node, 1), size_of(g, node, 2)])


def size_of(g: Emitter, node: fx.Node, dim: int) -> Any:
    """A size as a number, or as a node where it varies."""
    size = node.meta["val"].shape[dim] if "val" in node.meta else None
    return size if isinstance(size, int) else g.call(aten.sym_size.int, node, dim)


def _and(g: Emitter, a: fx.Node | None, b: fx.Node) -> fx.Node:
    return b if a is None else g.call(aten.logical_and.default, a, b)


RULES = (EagerAttention(),)
