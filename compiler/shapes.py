"""Sizes as algebra: symbolic shapes of a captured graph as sympy expressions, unified by name and evaluated at hints.

A dimension that varies from call to call is a `SymInt` whose expression is a sympy symbol or built from some. Two
dimensions are the same when their expressions are equal, not when they happened to have the same value at capture.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import sympy
import torch
from torch import fx

from ..kernels.cost import size as _size
from .program import Program

Size: TypeAlias = int | torch.SymInt | sympy.Expr
Bindings = dict[str, sympy.Expr]


def to_expr(size: Size) -> sympy.Expr:
    """An int, SymInt or expression as a sympy expression."""
    return size if isinstance(size, sympy.Expr) else _size(size)


def sizes(value: torch.Tensor | torch.SymInt | Sequence[Size]) -> tuple[sympy.Expr, ...]:
    """The shape of a (fake) tensor, or a shape given as a sequence. A symbolic scalar has no dimensions."""
    if isinstance(value, torch.SymInt | int):
        return ()
    shape = value.shape if isinstance(value, torch.Tensor) else value
    return tuple(to_expr(s) for s in shape)


def same(a: Size, b: Size) -> bool:
    """True where the two sizes are equal for every value of their symbols."""
    a, b = to_expr(a), to_expr(b)
    return bool(a == b) or (bool(a.free_symbols or b.free_symbols) and sympy.expand(a - b) == 0)


def unify(
    value: torch.Tensor | Sequence[Size], dims: str, bindings: Mapping[str, sympy.Expr] | None = None
) -> Bindings | None:
    """Match a shape against names: `unify(x, "B S H D", {})` is `{"B": ..., "S": ..., "H": ..., "D": ...}`.

    A name binds to the size standing there, and the same name must stand for an equal size wherever it is used, also
    in earlier `bindings`. A number matches itself, `_` anything, and a leading `...` any number of leading dimensions.
    Returns the extended bindings, or None where the shape does not fit; `bindings` itself is left as it was.
    """
    names = dims.split()
    shape = sizes(value)
    if names and names[0] == "...":
        names = names[1:]
        if len(shape) < len(names):
            return None
        shape = shape[len(shape) - len(names) :]
    if "..." in names:
        raise ValueError(f"'...' stands for leading dimensions only, got {dims!r}")
    if len(names) != len(shape):
        return None
    found: Bindings = dict(bindings or {})
    for name, size in zip(names, shape, strict=True):
        if name == "_":
            continue
        if name.isdigit():
            if size != int(name):
                return None
        elif not name.isidentifier():
            raise ValueError(f"a dimension is a name, a number, '_' or a leading '...', got {name!r} in {dims!r}")
        elif name not in found:
            found[name] = size
        elif not same(found[name], size):
            return None
    return found


def evaluate(expr: Size, hints: Mapping[sympy.Symbol, int] | Mapping[str, int], unknown: int | None = None) -> float:
    """The number an expression has at the given sizes, by symbol or by the symbol's name.

    Symbols without a size count as `unknown` (data-dependent sizes have no hint); without it they are a KeyError.
    """
    expr = to_expr(expr)
    if expr.is_Integer:
        return int(expr)
    values: dict[sympy.Symbol, sympy.Integer] = {}
    for symbol in expr.free_symbols:
        size = hints.get(symbol, hints.get(symbol.name))  # type: ignore[call-overload]
        if size is None:
            size = unknown
        if size is None:
            raise KeyError(f"no size given for {symbol} in {expr}; known: {', '.join(map(str, hints)) or 'none'}")
        values[symbol] = sympy.Integer(size)
    number = expr.xreplace(values)
    return int(number) if number.is_Integer else float(number)


def hints_of(graph: fx.Graph) -> dict[sympy.Symbol, int]:
    """The sizes that the symbols of a graph had at capture, read off its placeholders."""
    found: dict[sympy.Symbol, int] = {}
    for node in graph.nodes:
        if node.op != "placeholder":
            continue
        for size in _symbolic(node.meta.get("val")):
            expr = size.node.expr
            if isinstance(expr, sympy.Symbol) and expr not in found and size.node.hint is not None:
                found[expr] = int(size.node.hint)
    return found


def dim_names(program: Program) -> dict[sympy.Symbol, str]:
    """Where each symbol of a program comes from, for people: `{s77: "input_ids[1]"}`."""
    found: dict[sympy.Symbol, str] = {}
    for node, given in program.placeholder_inputs().items():
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor):
            for i, size in enumerate(value.shape):
                if isinstance(size, torch.SymInt) and isinstance(size.node.expr, sympy.Symbol):
                    found.setdefault(size.node.expr, f"{given.target}[{i}]")
    return found


def described(value: Any) -> Hashable:
    """What of an argument decides the dtype and shape of an operator's result: of a tensor, all but its elements.

    Two calls of one operator with equal descriptions have equal fake values and equal costs.
    """
    if isinstance(value, fx.Node):
        return described(value.meta.get("val"))
    if isinstance(value, torch.Tensor):
        return value.dtype, value.device, tuple(map(described, value.shape)), tuple(map(described, value.stride()))
    if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool):
        return value.node.expr
    if isinstance(value, list | tuple):
        return tuple(map(described, value))
    if isinstance(value, slice):
        return ("slice", described(value.start), described(value.stop), described(value.step))
    if isinstance(value, dict):
        return tuple((k, described(v)) for k, v in sorted(value.items()))
    return type(value).__name__, str(value)


def _symbolic(value: Any) -> Iterable[torch.SymInt]:
    if isinstance(value, torch.SymInt):
        yield value
    elif isinstance(value, torch.Tensor):
        shape: Sequence[object] = value.shape
        yield from (s for s in shape if isinstance(s, torch.SymInt))
