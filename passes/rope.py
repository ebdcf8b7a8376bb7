"""Raise rotary position embeddings (Su et al., arXiv 2104.09864).

    x*cos + cat(-x2, x1)*sin                          halves              (llama, NeoX)
    x*cos + stack(-x[1::2], x[::2]).flatten*sin       interleaved         (GPT-J, GLM, Cohere)
    cat(x1*cos - x2*sin, x2*cos + x1*sin)             half-width tables   (gpt-oss; DeepSeek: x1 = x[::2], x2 = x[1::2])
    view_as_real(view_as_complex(pairs of x) * freqs) complex tables       (Llama 4, DeepSeek V2)
    ->  rope(x, cos, sin, layout, compute_dtype)

A rotation of the first R of D elements, `cat(rope(x[:R]), x[R:])`, is one op too. x may be brought to another dtype
first and back behind it: recorded as `compute_dtype`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ..compiler.match import Match
from ..compiler.pattern import Builder
from ..compiler.rule import Emitter, Reject, Rule, Stage

aten = torch.ops.aten
_END = 2**62
_COMPLEX = {torch.float32: torch.complex64, torch.float64: torch.complex128}


def _width(m: Match) -> int | None:
    size = m.val(m.x).shape[-1]
    return size if isinstance(size, int) else None


def _interval(start: Any, end: Any, width: int) -> tuple[int, int] | None:
    if not isinstance(start, int | None) or not isinstance(end, int | None):
        return None
    first = 0 if start is None else start + width if start < 0 else start
    last = width if end is None or end >= width else end + width if end < 0 else end
    return first, last


def _compute_dtype(m: Match) -> torch.dtype | None:
    """The dtype x is brought to before the rotation, None where that is its own."""
    casts = {d for d in (m.x_dtype, m.rotated_dtype, m.turned_dtype) if d is not None}
    return casts.pop() if len(casts) == 1 else None


def _check_dtypes(m: Match) -> Reject | None:
    x = m.dtype(m.x)
    if m.anchor.meta["val"].dtype is not x:
        return Reject(f"the result is {m.anchor.meta['val'].dtype}, the input {x}", m.x)
    if len({d for d in (m.x_dtype, m.rotated_dtype, m.turned_dtype) if d is not None}) > 1:
        return Reject("the two products are computed in different precisions", m.x)
    one_sided = (m.x_dtype is None) != (m.rotated_dtype is None and m.turned_dtype is None)
    if one_sided:
        return Reject("only one of the two products is computed in another precision", m.x)
    return None


def _check_tables(m: Match) -> Reject | None:
    cos, sin, width = m.val(m.cos), m.val(m.sin), _width(m)
    if not isinstance(cos, torch.Tensor) or not isinstance(sin, torch.Tensor) or not cos.dim() or not sin.dim():
        return Reject("cos and sin are not tensors", m.cos)
    if width is None or width % 2:
        return Reject("the last dimension is not an even number", m.x)
    if cos.shape[-1] != width or sin.shape[-1] != width:
        return Reject(f"tables of width {cos.shape[-1]} for a head of {width}", m.cos)
    return None


class RopeHalf(Rule):
    """x*cos + cat(-x2, x1)*sin; with the signs the other way round, a rotation by the negative angle."""

    name = "rope_half"
    stage = Stage.RAISE
    label = "rope"

    def pattern(self, p: Builder, x: Any, cos: Any, sin: Any) -> Any:
        source = p.cast(x, "rotated_dtype")
        first = p.slice(source, -1, p.arg("a"), p.arg("b"))
        second = p.slice(source, -1, p.arg("c"), p.arg("d"))
        rotated = p.any(p.cat([p.neg(second), first], -1), p.cat([second, p.neg(first)], -1), tag="negative")
        turned = p.cast(rotated, "turned_dtype")
        return p.cast(p.add(p.mul(p.cast(x, "x_dtype"), cos), p.mul(turned, sin)))

    def check(self, m: Match) -> Reject | None:
        reject = _check_dtypes(m) or _check_tables(m)
        if reject is not None:
            return reject
        width = _width(m)
        assert width is not None
        if (_interval(m.a, m.b, width), _interval(m.c, m.d, width)) != ((0, width // 2), (width // 2, width)):
            return Reject(f"the slices are not the two halves of {width}", m.x)
        return None

    def emit(self, m: Match, g: Emitter) -> fx.Node:
        return g.rope(m.x, m.cos, g.neg(m.sin) if m.negative else m.sin, "half", _compute_dtype(m))


class RopeInterleaved(Rule):
    """x*cos + stack(-x[1::2], x[::2], -1).flatten(-2)*sin"""

    stage = Stage.RAISE
    label = "rope"

    def pattern(self, p: Builder, x: Any, cos: Any, sin: Any) -> Any:
        source = p.cast(x, "rotated_dtype")
        even = p.slice(source, -1, 0, p.arg("a"), 2)
        odd = p.slice(source, -1, 1, p.arg("b"), 2)
        turned = p.cast(p.view(p.stack([p.neg(odd), even], -1), "shape"), "turned_dtype")
        return p.cast(p.add(p.mul(p.cast(x, "x_dtype"), cos), p.mul(turned, sin)))

    def check(self, m: Match) -> Reject | None:
        reject = _check_dtypes(m) or _check_tables(m)
        if reject is not None:
            return reject
        width = _width(m)
        assert width is not None
        if any(isinstance(end, int) and end < width for end in (m.a, m.b)):
            return Reject("only a part of the elements is paired", m.x)
        reshapes = m.only(aten.reshape.default)
        if any(r.meta["val"].shape[-1] != width for r in reshapes):
            return Reject("the pairs are not laid side by side", m.x)
        return None

    def emit(self, m: Match, g: Emitter) -> fx.Node:
        return g.rope(m.x, m.cos, m.sin, "interleaved", _compute_dtype(m))


class RopeHalfTables(Rule):
    """cat(x1*cos - x2*sin, x2*cos + x1*sin) with tables of half the width; x1, x2 are the halves, or even and odd."""

    stage = Stage.RAISE
    label = "rope"

    def pattern(self, p: Builder, x: Any, cos: Any, sin: Any) -> Any:
        first = p.slice(x, -1, p.arg("a"), p.arg("b"), p.arg("step"))
        second = p.slice(x, -1, p.arg("c"), p.arg("d"), p.arg("step"))
        top = p.sub(p.mul(first, cos), p.mul(second, sin))
        bottom = p.add(p.mul(second, cos), p.mul(first, sin))
        return p.cat([top, bottom], -1)

    def check(self, m: Match) -> Reject | None:
        width = _width(m)
        if width is None or width % 2:
            return Reject("the last dimension is not an even number", m.x)
        last = [t.shape[-1] if isinstance(t, torch.Tensor) else None for t in (m.val(m.cos), m.val(m.sin))]
        if not all(isinstance(size, int) and size == width // 2 for size in last):
            return Reject(f"the tables are not {width // 2} wide", m.cos)
        if m.anchor.meta["val"].dtype is not m.dtype(m.x):
            return Reject(f"the result is {m.anchor.meta['val'].dtype}, the input {m.dtype(m.x)}", m.x)
        if m.step == 1:
            halves = (_interval(m.a, m.b, width), _interval(m.c, m.d, width))
            return (
                None
                if halves == ((0, width // 2), (width // 2, width))
                else Reject(f"the slices are not the two halves of {width}", m.x)
            )
        if m.step == 2 and (m.a, m.c) == (0, 1):
            return None
        return Reject(f"slices with step {m.step} from {m.a} and {m.c}", m.x)

    def emit(self, m: Match, g: Emitter) -> fx.Node:
        cos, sin = (g.cat([table, table], -1) for table in (m.cos, m.sin))
        x = m.x
        if m.step == 2:  # even elements before odd ones
            x = g.cat([g.slice(x, -1, 0, _END, 2), g.slice(x, -1, 1, _END, 2)], -1)
        return g.rope(x, cos, sin, "half", None)


class RopeComplex(Rule):
    """Pairs of elements as complex numbers, times exp(i*angle). A complex product may round otherwise, like SDPA."""

    stage = Stage.RAISE
    label = "rope"

    def pattern(self, p: Builder, x: Any, freqs: Any) -> Any:
        pairs = p.view_as_complex(p.view(p.cast(x, "x_dtype"), "pairs"))
        return p.cast(p.view(p.view_as_real(p.mul(pairs, freqs)), "shape"))

    def check(self, m: Match) -> Reject | None:
        x, freqs, result = m.val(m.x), m.val(m.freqs), m.anchor.meta["val"]
        compute, width = m.x_dtype or x.dtype, result.shape[-1]
        if not isinstance(width, int) or width % 2:
            return Reject("the last dimension is not an even number", m.x)
        if not isinstance(freqs, torch.Tensor) or freqs.dtype is not _COMPLEX.get(compute):
            return Reject(f"x is {compute}, the tables are not the complex numbers of that", m.freqs)
        if freqs.shape[-1] != width // 2:
            return Reject(f"tables of {freqs.shape[-1]} for {width // 2} pairs", m.freqs)
        if result.dtype is not x.dtype:
            return Reject(f"the result is {result.dtype}, the input {x.dtype}", m.x)
        pairs = m.only(aten.view_as_complex.default)[0].args[0].meta["val"]  # type: ignore[union-attr]
        if [str(s) for s in pairs.shape] != [*(str(s) for s in result.shape[:-1]), str(width // 2), "2"]:
            return Reject("the pairs are not neighbours in the last dimension", m.x)
        return None

    def emit(self, m: Match, g: Emitter) -> fx.Node:
        x, shape = m.x, m.anchor.meta["val"].shape
        if [str(s) for s in m.val(x).shape] != [str(s) for s in shape]:
            x = g.reshape(x, [*m.pairs[:-2], shape[-1]])  # heads were taken apart and paired in one step
        tables = g.view_as_real(m.freqs)
        cos, sin = (g.repeat_interleave(g.select(tables, -1, i), 2, -1) for i in (0, 1))
        return g.rope(x, cos, sin, "interleaved", m.x_dtype)


class RopePartial(Rule):
    """cat(rope(x[..., :R]), x[..., R:]) -> rope(x): the op leaves the rest as it is."""

    stage = Stage.RAISE
    label = "rope of a part of the head"

    def pattern(self, p: Builder, x: Any, cos: Any, sin: Any) -> Any:
        turned = p.rope(p.slice(x, -1, p.arg("a"), p.arg("b")), cos, sin, p.arg("layout"), p.arg("compute_dtype"))
        return p.cat([turned, p.slice(x, -1, p.arg("c"), p.arg("d"))], -1)

    def check(self, m: Match) -> Reject | None:
        width, rotated = _width(m), m.val(m.cos).shape[-1]
        if width is None or not isinstance(rotated, int):
            return Reject("the head size is not a number", m.x)
        if (_interval(m.a, m.b, width), _interval(m.c, m.d, width)) != ((0, rotated), (rotated, width)):
            return Reject(f"the slices do not part {width} at {rotated}", m.x)
        return None

    def emit(self, m: Match, g: Emitter) -> fx.Node:
        return g.rope(m.x, m.cos, m.sin, m.layout, m.compute_dtype)


RULES = (RopeHalf(), RopeInterleaved(), RopeHalfTables(), RopeComplex(), RopePartial())
