"""Find a pattern in a graph: backtracking from one anchor, local commutativity, and a memory of the deepest failure.

The matcher visits only nodes whose target can be the pattern's root. Where a branch fails, the failure that got
furthest is kept: it is what the user reads as a near-miss.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from .opset import BY_TARGET, CASTS, arguments, is_free, scalar_of
from .pattern import AnyOf, Cast, Op, P, Param, Pattern, Var

# Arguments that speak of memory, not of values; a pattern need not mention them.
_LAYOUT_ARGUMENTS = frozenset(
    ["layout", "device", "pin_memory", "non_blocking", "memory_format", "copy", "half_to_float"]
)

Bindings = dict[Any, Any]


class GraphIndex:
    """A graph's nodes by target and position, with normalised arguments. Rebuilt when the graph has changed."""

    def __init__(self, graph: fx.Graph) -> None:
        self.order: dict[fx.Node, int] = {}
        self.by_target: dict[Any, list[fx.Node]] = defaultdict(list)
        self._arguments: dict[fx.Node, dict[str, Any]] = {}
        for position, node in enumerate(graph.nodes):
            self.order[node] = position
            if node.op == "call_function":
                self.by_target[node.target].append(node)

    def arguments(self, node: fx.Node) -> dict[str, Any]:
        """`opset.arguments`, computed once for each node."""
        found = self._arguments.get(node)
        if found is None:
            found = self._arguments[node] = arguments(node)
        return found

    def anchors(self, roots: frozenset[Any]) -> list[fx.Node]:
        """Nodes that can be the root of a pattern, last first: the longest spelling wins over its own parts."""
        found = [n for target in roots for n in self.by_target.get(target, ())]
        return sorted(found, key=self.order.__getitem__, reverse=True)


@dataclass
class Failure:
    """The furthest point a match attempt reached, and why it went no further."""

    depth: int = 0
    wanted: str = ""
    found: str = ""
    node: fx.Node | None = None


@dataclass
class Match:
    """A place where a pattern holds. Variables and tags are attributes: `m.x`, `m.eps`, `m.rounded`."""

    outputs: tuple[fx.Node, ...]
    nodes: tuple[fx.Node, ...]
    """Every node of the pattern, outputs included, in graph order."""
    bindings: dict[str, Any] = field(default_factory=dict)

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["bindings"][name]
        except KeyError:
            raise AttributeError(
                f"the pattern binds no {name!r}; it binds {', '.join(sorted(self.__dict__['bindings']))}"
            ) from None

    @property
    def anchor(self) -> fx.Node:
        return self.outputs[0]

    @property
    def inputs(self) -> tuple[fx.Node, ...]:
        """Nodes outside the match that it reads, each once."""
        inside = set(self.nodes)
        return tuple(dict.fromkeys(i for n in self.nodes for i in n.all_input_nodes if i not in inside))

    def dtype(self, value: Any) -> torch.dtype | None:
        """The dtype of a bound tensor; None for a number."""
        tensor = self.val(value)
        return tensor.dtype if isinstance(tensor, torch.Tensor) else None

    @staticmethod
    def val(value: Any) -> Any:
        """The fake tensor of a bound node; a number stands for itself."""
        return value.meta.get("val") if isinstance(value, fx.Node) else value

    def only(self, *targets: Any) -> list[fx.Node]:
        """The matched nodes with one of these targets, in graph order."""
        return [n for n in self.nodes if n.target in targets]


def literal_equal(wanted: Any, found: Any) -> bool:
    """Equality by value, whatever form a number arrives in."""
    if isinstance(wanted, list | tuple):
        return isinstance(found, list | tuple) and len(wanted) == len(found) and all(map(literal_equal, wanted, found))
    if isinstance(wanted, bool | int | float):
        number = scalar_of(found)
        return number is not None and number == wanted
    return type(wanted) is type(found) and bool(wanted == found)


class Matcher:
    """Matches one pattern at anchors of one indexed graph."""

    def __init__(self, index: GraphIndex, pattern: Pattern) -> None:
        self.index = index
        self.pattern = pattern
        self.failure = Failure(depth=-1)

    def matches(self, anchor: fx.Node) -> Iterator[Match]:
        """Every way the pattern holds at `anchor`; `failure` then tells how far the others got."""
        self.failure = Failure(depth=-1)
        for bindings in self._match(self.pattern.outputs[0], anchor, {}):
            for complete, outputs in self._further_outputs(bindings, (anchor,)):
                found = self._build(complete, outputs)
                if found is not None:
                    yield found

    def refuse(self, depth_of: Match, wanted: str, found: str, node: fx.Node | None = None) -> None:
        """Record a refusal after the pattern itself held: deeper than any structural failure."""
        self.failure = Failure(self.pattern.size, wanted, found, node or depth_of.anchor)

    # -- structure -------------------------------------------------------------------------------------------------

    def _build(self, bindings: Bindings, outputs: tuple[fx.Node, ...]) -> Match | None:
        nodes = {n for key in bindings if isinstance(key, tuple) for n in [key[1]]}
        for node in nodes:
            if node in outputs:
                continue
            outside = [u for u in node.users if u not in nodes]
            if outside and not is_free(node):
                self._fail(self.pattern.outputs[0], node, bindings, f"its value is also used by {outside[0].name}")
                return None
        names = {k: v for k, v in bindings.items() if isinstance(k, str)}
        ordered = tuple(sorted(nodes, key=self.index.order.__getitem__))
        return Match(outputs, ordered, names)

    def _further_outputs(
        self, bindings: Bindings, outputs: tuple[fx.Node, ...]
    ) -> Iterator[tuple[Bindings, tuple[fx.Node, ...]]]:
        """Outputs after the first: already bound inside the match, or found by walking users of bound nodes."""
        if len(outputs) == len(self.pattern.outputs):
            yield bindings, outputs
            return
        wanted = self.pattern.outputs[len(outputs)]
        bound = bindings.get(wanted)
        if isinstance(bound, fx.Node):
            yield from self._further_outputs(bindings, (*outputs, bound))
            return
        tried: set[fx.Node] = set()
        for value in list(bindings.values()):
            if not isinstance(value, fx.Node):
                continue
            for user in value.users:
                for candidate in (user, *user.users):
                    if candidate in tried or candidate in outputs or ("node", candidate) in bindings:
                        continue
                    tried.add(candidate)
                    for extended in self._match(wanted, candidate, bindings):
                        yield from self._further_outputs(extended, (*outputs, candidate))

    def _fail(self, p: Any, value: Any, bindings: Bindings, found: str) -> None:
        depth = sum(isinstance(k, Op | Var) for k in bindings)
        if depth > self.failure.depth:
            wanted = f"{describe(p)} ({p.where})" if isinstance(p, P) and p.where else describe(p)
            self.failure = Failure(
                depth, wanted, found, value if isinstance(value, fx.Node) else self._nearest(bindings)
            )

    @staticmethod
    def _nearest(bindings: Bindings) -> fx.Node | None:
        return next((v for v in reversed(list(bindings.values())) if isinstance(v, fx.Node)), None)

    def _match(self, p: Any, value: Any, bindings: Bindings) -> Iterator[Bindings]:
        if not isinstance(p, P):
            yield from self._match_literal(p, value, bindings)
        elif isinstance(p, Param):
            if p.name not in bindings or literal_equal(bindings[p.name], value):
                yield bindings | {p.name: value}
        elif isinstance(p, Var):
            yield from self._match_variable(p, value, bindings)
        elif isinstance(p, Cast):
            yield from self._match_cast(p, value, bindings)
        elif isinstance(p, AnyOf):
            if p in bindings:
                if bindings[p] is value:
                    yield bindings
                else:
                    self._fail(
                        p,
                        value,
                        bindings,
                        f"{describe(value)}, while the same value is {describe(bindings[p])} elsewhere",
                    )
                return
            for i, alternative in enumerate(p.alternatives):
                for extended in self._match(alternative, value, bindings):
                    yield (extended | {p: value, p.tag: i}) if p.tag else (extended | {p: value})
        elif isinstance(p, Op):
            yield from self._match_op(p, value, bindings)

    def _match_literal(self, wanted: Any, value: Any, bindings: Bindings) -> Iterator[Bindings]:
        if isinstance(wanted, list | tuple) and any(isinstance(w, P) for w in wanted):
            if isinstance(value, list | tuple) and len(value) == len(wanted):
                yield from self._sequence(list(zip(wanted, value)), bindings)
        elif literal_equal(wanted, value):
            yield bindings
        else:
            self._fail(wanted, value, bindings, describe(value))

    def _match_variable(self, p: Var, value: Any, bindings: Bindings) -> Iterator[Bindings]:
        number = scalar_of(value)
        bound = value if number is None else number
        if p.name not in bindings:
            if isinstance(bound, fx.Node | bool | int | float):
                yield bindings | {p.name: bound, p: value}
        elif bindings[p.name] is bound or (number is not None and bindings[p.name] == number):
            yield bindings
        else:
            self._fail(
                p, value, bindings, f"{describe(value)}, while {p.name!r} is already {describe(bindings[p.name])}"
            )

    def _match_cast(self, p: Cast, value: Any, bindings: Bindings) -> Iterator[Bindings]:
        if p in bindings and bindings[p] is not value:
            self._fail(
                p, value, bindings, f"{describe(value)}, while the same value is {describe(bindings[p])} elsewhere"
            )
            return
        if isinstance(value, fx.Node) and value.target in CASTS:
            extra: Bindings = {p: value, ("node", value): value}
            if p.tag:
                extra[p.tag] = value.meta["val"].dtype
            yield from self._match(p.value, value.args[0], bindings | extra)
        extra = {p: value}
        if p.tag:
            extra[p.tag] = None
        yield from self._match(p.value, value, bindings | extra)

    def _match_op(self, p: Op, value: Any, bindings: Bindings) -> Iterator[Bindings]:
        if p in bindings:
            if bindings[p] is value:
                yield bindings
            else:
                self._fail(
                    p, value, bindings, f"{describe(value)}, while the same value is {describe(bindings[p])} elsewhere"
                )
            return
        if not isinstance(value, fx.Node) or value.target not in p.spec.targets:
            self._fail(p, value, bindings, describe(value))
            return
        given = self.index.arguments(value)
        names = list(given)
        pairs: list[tuple[Any, Any]] = list(zip(p.args, given.values()))
        if len(p.args) > len(names):
            self._fail(p, value, bindings, f"{len(names)} arguments")
            return
        for name, wanted in p.kwargs.items():
            if name not in given:
                self._fail(p, value, bindings, f"no argument {name!r}")
                return
            pairs.append((wanted, given[name]))
        for name in names[len(p.args) :]:
            if name not in p.kwargs and name not in _LAYOUT_ARGUMENTS and not _is_default(value, name, given[name]):
                self._fail(p, value, bindings, f"{name}={describe(given[name])}")
                return
        extended = bindings | {p: value, ("node", value): value}
        yield from self._sequence(pairs, extended)
        if p.spec.commutative and len(pairs) >= 2:
            swapped = [(pairs[0][0], pairs[1][1]), (pairs[1][0], pairs[0][1]), *pairs[2:]]
            yield from self._sequence(swapped, extended)

    def _sequence(self, pairs: Sequence[tuple[Any, Any]], bindings: Bindings) -> Iterator[Bindings]:
        if not pairs:
            yield bindings
            return
        for extended in self._match(*pairs[0], bindings):
            yield from self._sequence(pairs[1:], extended)


def _is_default(node: fx.Node, name: str, value: Any) -> bool:
    for argument in node.target._schema.arguments:  # type: ignore[union-attr]
        if argument.name == name:
            return argument.has_default_value() and bool(argument.default_value == value)
    return False


def describe(value: Any) -> str:
    """A value for people: `mul(%a, %b)`, `3.0`, `parameter w`."""
    if isinstance(value, fx.Node):
        if value.op == "placeholder":
            return f"the input {value.name}"
        spec = BY_TARGET.get(value.target)
        return f"{spec.name if spec else getattr(value.target, '__name__', value.target)} (%{value.name})"
    if isinstance(value, Var | Param):
        return value.name
    if isinstance(value, AnyOf):
        return " or ".join(dict.fromkeys(describe(a) for a in value.alternatives))
    if isinstance(value, Cast):
        return describe(value.value)
    return repr(value)
