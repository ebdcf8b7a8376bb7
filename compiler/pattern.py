"""Patterns: what a rule looks for, written as a Python function over a builder whose attributes are operators.

    def pattern(self, p, x, w, eps):
        ms = p.mean(p.pow(p.cast(x), 2), [-1], True)
        return p.mul(p.cast(p.mul(p.cast(x), p.rsqrt(p.add(ms, eps))), tag="rounded"), w)

The function is called once. Its parameters after `p` are variables: each binds a node or a number, and one that occurs
twice must be the same value in both places. Nothing is traced through torch: no shapes, dtypes or constants are burned
in.
An argument that the pattern does not mention must have its schema default in the graph: there are no silent wildcards.

(The builder is onnxscript's idea; the engine behind it follows tinygrad's and Inductor's anchors.)
"""

from __future__ import annotations

import inspect
import itertools
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from .opset import OpSpec, spec_of


@dataclass(eq=False, frozen=True)
class P:
    """One value in a pattern. Compared by identity: a value used twice means the same node."""

    where: str = field(default="", kw_only=True)
    """`rms_norm.py:41`, where the rule's author wrote it."""


@dataclass(eq=False, frozen=True)
class Var(P):
    """Binds whatever stands there: a node, or a number."""

    name: str


@dataclass(eq=False, frozen=True)
class Op(P):
    """An operator applied to values."""

    spec: OpSpec
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def __repr__(self) -> str:
        return self.spec.name


@dataclass(eq=False, frozen=True)
class Cast(P):
    """`x`, or `x` behind a dtype cast. The tag binds the dtype cast to, or None where there is no cast."""

    value: Any
    tag: str | None = None


@dataclass(eq=False, frozen=True)
class AnyOf(P):
    """The first alternative that matches. The tag binds its index."""

    alternatives: tuple[Any, ...]
    tag: str | None = None


@dataclass(eq=False, frozen=True)
class Param(P):
    """An argument that is not a tensor (a list of sizes, a number, a dim); binds it for `check` to inspect."""

    name: str


class Builder:
    """`p`: every operator of the opset and of `torch.ops.regraft` is an attribute; calls make pattern values."""

    def __init__(self) -> None:
        self._variables: dict[str, Var] = {}

    def __getattr__(self, name: str) -> Callable[..., Op]:
        if name.startswith("__"):
            raise AttributeError(name)
        spec = spec_of(name)

        def make(*args: Any, **kwargs: Any) -> Op:
            return Op(spec, tuple(args), dict(kwargs), where=_caller())

        return make

    def cast(self, x: Any, tag: str | None = None) -> Cast:
        """`x` with or without a dtype cast on it."""
        return Cast(x, tag, where=_caller())

    def any(self, *alternatives: Any, tag: str | None = None) -> AnyOf:
        """One of several spellings."""
        return AnyOf(alternatives, tag, where=_caller())

    def opt(self, op: str, x: Any, *args: Any, tag: str | None = None) -> AnyOf:
        """`op(x, *args)`, or `x` alone."""
        return AnyOf((Op(spec_of(op), (x, *args), {}, where=_caller()), x), tag, where=_caller())

    def variable(self, name: str) -> Var:
        """A further variable, for patterns that are built in a loop; the same name is the same variable."""
        return self._variables.setdefault(name, Var(name, where=_caller()))

    def view(self, x: Any, tag: str) -> Op:
        """`x` behind one reshape of any sizes; the sizes bind under `tag`, for `check` to inspect."""
        return Op(spec_of("reshape"), (x, Param(tag)), {}, where=_caller())

    def arg(self, name: str) -> Param:
        """A non-tensor argument, bound under `name` for `check` to inspect."""
        return Param(name, where=_caller())


def _caller() -> str:
    frame = sys._getframe(2)
    return f"{frame.f_code.co_filename.rsplit('/', 1)[-1]}:{frame.f_lineno}"


@dataclass(frozen=True)
class Pattern:
    """A traced pattern function: its outputs (the first is the anchor), variables and size."""

    outputs: tuple[P, ...]
    variables: tuple[str, ...]
    roots: frozenset[Any]
    """Targets an anchor node can have."""
    size: int
    """Number of operators and variables in the pattern's shortest form: the scale for near-misses."""


def trace(function: Callable[..., Any]) -> Pattern:
    """Call a pattern function once, with a builder and one variable for each further parameter."""
    names = list(inspect.signature(function).parameters)[1:]
    builder = Builder()
    result = function(builder, *[builder.variable(n) for n in names])
    outputs = result if isinstance(result, tuple) else (result,)
    for output in outputs:
        if not isinstance(output, P) or isinstance(output, Var):
            raise TypeError(f"a pattern returns operators applied to its variables, not {output!r}")
    roots = frozenset(t for spec in _root_specs(outputs[0]) for t in spec.targets)
    return Pattern(outputs, tuple(names), roots, len(list(_parts(outputs))))


def _root_specs(value: Any) -> Iterator[OpSpec]:
    if isinstance(value, Op):
        yield value.spec
    elif isinstance(value, Cast):
        yield spec_of("cast")
        yield from _root_specs(value.value)
    elif isinstance(value, AnyOf):
        for alternative in value.alternatives:
            yield from _root_specs(alternative)


def children(value: Any) -> Iterator[Any]:
    """The pattern values directly below one."""
    if isinstance(value, Op):
        for a in itertools.chain(value.args, value.kwargs.values()):
            yield from a if isinstance(a, list | tuple) else (a,)
    elif isinstance(value, Cast):
        yield value.value
    elif isinstance(value, AnyOf):
        yield from value.alternatives


def _parts(outputs: tuple[P, ...]) -> Iterator[P]:
    """Distinct operators and variables reachable, the shortest alternative of each choice only."""
    seen: set[int] = set()

    weights: dict[int, int] = {}

    def weight(value: Any) -> int:
        if not isinstance(value, P):
            return 0
        if id(value) not in weights:
            below = [weight(c) for c in children(value)]
            weights[id(value)] = min(below) if isinstance(value, AnyOf) else (not isinstance(value, Cast)) + sum(below)
        return weights[id(value)]

    def walk(value: Any) -> Iterator[P]:
        if not isinstance(value, P) or id(value) in seen:
            return
        seen.add(id(value))
        if isinstance(value, AnyOf):
            yield from walk(min(value.alternatives, key=weight))
            return
        if isinstance(value, Op | Var):
            yield value
        for child in children(value):
            yield from walk(child)

    for output in outputs:
        yield from walk(output)
