"""The public form of a rewrite: `Rule` for subgraphs, `GroupRule` for siblings, `Reject` for a refusal with its reason.

class Swish2(Rule):
    \"\"\"x * sigmoid(x) -> silu(x)\"\"\"

    def pattern(self, p, x):                     # what to look for; called once with a builder
        return p.mul(x, p.sigmoid(x))

    def check(self, m):                          # None, or why not
        if m.dtype(m.x) == torch.float64:
            return Reject("float64 stays as it is", m.x)

    def emit(self, m, g):                        # what to put there
        return g.silu(m.x)

model = regraft.optimize(model, rules=[Swish2()])
"""

from __future__ import annotations

import enum
import re
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from .match import Match
from .opset import arguments, spec_of
from .pattern import Builder, Pattern, trace


class Stage(enum.IntEnum):
    """When a pass runs. RAISE rules see canonical ATen, FUSE rules the semantic ops that RAISE made.

    CACHE puts keys and values into pages, where a graph for decoding is made."""

    CANONICALIZE = 1
    RAISE = 2
    FUSE = 3
    CACHE = 4
    PACK = 5
    LOWER = 6


@dataclass(frozen=True)
class Reject:
    """Why a rule does not fire at a place whose structure fits: the reason, and the offending value.

    `quiet` for a place that is plainly something else (a matmul of two activations is no missed linear layer): it is
    refused without being told as a near-miss.
    """

    reason: str
    value: Any = None
    quiet: bool = False


def _snake(name: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()


class _Named:
    name: str = ""
    """For reports and switches; by default the class name in snake case."""
    stage: Stage = Stage.FUSE
    label: str = ""
    """What a hit is called in the report: `gate + up -> gate_up`. Empty: the name."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "name" not in cls.__dict__:
            cls.name = _snake(cls.__name__)


class Rule(_Named):
    """Replace a subgraph. Subclasses write `pattern`, usually `check`, and `emit`."""

    _pattern: Pattern | None = None

    def pattern(self, p: Builder, *variables: Any) -> Any:
        """The subgraph, as operators on the variables; a tuple for several outputs (the first is the anchor)."""
        raise NotImplementedError(f"{type(self).__name__} needs a method pattern(self, p, ...)")

    def check(self, m: Match) -> Reject | None:
        """None where the rule may fire at this match, else the reason why not."""
        return None

    def emit(self, m: Match, g: Emitter) -> fx.Node | tuple[fx.Node, ...]:
        """Build the replacement from `g` (operators as attributes): one node for each output of the pattern."""
        raise NotImplementedError(f"{type(self).__name__} needs a method emit(self, m, g)")

    def describe(self, m: Match) -> str:
        """What was fused here, for people."""
        return self.label or self.name

    @property
    def traced(self) -> Pattern:
        """The pattern as data, traced once."""
        if self._pattern is None:
            self._pattern = trace(self.pattern)
        return self._pattern


class GroupRule(_Named):
    """Replace siblings: nodes that `key` puts into one group, such as linears that read the same value."""

    targets: frozenset[Any] = frozenset()
    """Which nodes to ask `key` about; empty: every call."""

    def key(self, node: fx.Node) -> Hashable | None:
        """Nodes with equal keys form a group; None leaves the node out."""
        raise NotImplementedError(f"{type(self).__name__} needs a method key(self, node)")

    def check(self, group: Sequence[fx.Node]) -> Reject | None:
        """None where the group may be replaced, else the reason why not."""
        return None

    def emit(self, group: Sequence[fx.Node], g: Emitter) -> tuple[fx.Node, ...]:
        """Build the replacement: one node for each node of the group, in order."""
        raise NotImplementedError(f"{type(self).__name__} needs a method emit(self, group, g)")

    def describe(self, group: Sequence[fx.Node]) -> str:
        """What was fused here, for people."""
        return self.label or self.name


class Emitter:
    """`g` in `emit`: every operator of the opset and of `torch.ops.regraft` is an attribute that appends a node.

    `g.mul(a, b)`, `g.rms_norm(x, w, 1e-6)`, `g.call(torch.ops.my.op.default, x)`. Names that stand for several
    overloads pick the one that fits the operands.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self.nodes: list[fx.Node] = []

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """Append a call of an operator overload (or any functional callable on tensors)."""
        node = self.graph.call_function(target, args, kwargs)
        self.nodes.append(node)
        return node

    def __getattr__(self, name: str) -> Callable[..., fx.Node]:
        if name.startswith("__"):
            raise AttributeError(name)
        targets = spec_of(name).targets

        def make(*args: Any, **kwargs: Any) -> fx.Node:
            return self.call(_overload(name, targets, args), *args, **kwargs)

        return make

    def item(self, node: fx.Node, index: int) -> fx.Node:
        """Output number `index` of an operator with several."""
        import operator

        return self.call(operator.getitem, node, index)


_PREFERRED = {
    "reshape": torch.ops.aten.reshape.default,
    "cast": torch.ops.aten._to_copy.default,
    "split": torch.ops.aten.split_with_sizes.default,
    "softmax": torch.ops.aten.softmax.int,
    "matmul": torch.ops.aten.matmul.default,
    "where": torch.ops.aten.where.self,
    "alias": torch.ops.aten.alias.default,
    "conv": torch.ops.aten.conv2d.default,
}


def _overload(name: str, targets: frozenset[Any], args: tuple[Any, ...]) -> Any:
    if len(targets) == 1:
        return next(iter(targets))
    if name in _PREFERRED:
        return _PREFERRED[name]
    scalar = len(args) > 1 and not isinstance(args[1], fx.Node)
    wanted = "Scalar" if scalar else "Tensor"
    # aten.*.Tensor takes Python numbers too, and export itself writes it so
    tensor = [t for t in targets if t._overloadname == "Tensor"]
    return tensor[0] if tensor else next(t for t in targets if t._overloadname == wanted)


def producer(node: fx.Node, name: str) -> Any:
    """The node's argument of that schema name."""
    return arguments(node)[name]
