"""Run pieces of a graph on real values, in the model's precision and one precision up, and compare.

The oracle for a site is the original subgraph one precision up (fp32 for bf16 and fp16, fp64 for fp32). A replacement
is kept when it means the same (it agrees with the oracle when itself evaluated one precision up) and when its own error
in the model's precision is at most twice the original's plus a few ulp.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.utils._pytree import tree_leaves, tree_map

from .program import Input, InputKind, Program
from .records import Check

ULPS = 4.0
"""Slack on the largest element, in units of the last place at the oracle's largest value."""


def higher(dtype: torch.dtype) -> torch.dtype:
    """One precision up; integers and bools stay."""
    if dtype in (torch.bfloat16, torch.float16):
        return torch.float32
    return torch.float64 if dtype.is_floating_point else dtype


def upcast(value: Any, target: torch.dtype) -> Any:
    """Floating tensors, and floating dtypes given as arguments, brought to `target`."""

    def leaf(x: Any) -> Any:
        if isinstance(x, torch.Tensor) and x.is_floating_point():
            return x.to(target)
        return target if isinstance(x, torch.dtype) and x.is_floating_point else x

    return tree_map(leaf, value)


class Upcast(fx.Interpreter):
    """Runs a whole graph one precision up, node by node: weights are brought up where they are used, never all at once.

    `target` is fp32 for a bf16 model, fp64 for an fp32 one. Dtypes written in the graph are raised too, so that nothing
    is rounded on the way.
    """

    def __init__(self, gm: fx.GraphModule, target: torch.dtype) -> None:
        super().__init__(gm)
        self.target = target

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Evaluate one node with every floating operand raised; what asserts the dtypes of before has no say."""
        if target is torch.ops.aten._assert_tensor_metadata.default:
            return None
        return target(*upcast(args, self.target), **upcast(kwargs, self.target))


class Evaluator:
    """Values of nodes of a program on example inputs and the user's weights, computed when asked for and remembered.

    Packed weights, which together are as large as the model, are made anew each time.
    """

    def __init__(
        self, program: Program, weights: Callable[[Input], torch.Tensor], inputs: Mapping[str, torch.Tensor]
    ) -> None:
        self._program = program
        self._meaning = program.placeholder_inputs()
        self._weights = weights
        self._inputs = inputs
        self._values: dict[fx.Node, Any] = {}
        self.verified: set[Any] = set()
        """Sites that were compared and passed, by rule and signature."""

    def value(self, node: fx.Node) -> Any:
        """The node's value; evaluates what it depends on first."""
        stack = [node]
        while stack:
            top = stack[-1]
            if top in self._values or self.is_packed(top):
                stack.pop()
                continue
            waiting = [i for i in top.all_input_nodes if i not in self._values and not self.is_packed(i)]
            if waiting:
                stack.extend(waiting)
                continue
            self._values[top] = self._evaluate(top)
            stack.pop()
        return self._read(node)

    def _read(self, node: fx.Node) -> Any:
        return self._evaluate(node) if self.is_packed(node) else self._values[node]

    def is_packed(self, node: fx.Node) -> bool:
        """Whether the node is a packed weight, which is made anew each time."""
        return node.op == "placeholder" and self._stands_for(node).kind is InputKind.PACKED

    def _stands_for(self, node: fx.Node) -> Input:
        if node not in self._meaning:  # packed after the evaluator was made
            self._meaning = self._program.placeholder_inputs()
        return self._meaning[node]

    def forget(self, nodes: Sequence[fx.Node]) -> None:
        """Drop the values of nodes that left the graph."""
        for node in nodes:
            self._values.pop(node, None)

    @torch.no_grad()
    def _evaluate(self, node: fx.Node) -> Any:
        if node.op == "placeholder":
            meaning = self._stands_for(node)
            if meaning.kind in (InputKind.STEP, InputKind.PAGES):
                return meaning.value
            return self._inputs[meaning.target] if meaning.kind is InputKind.USER else self._weights(meaning)
        args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), self._read)
        return node.target(*args, **kwargs)  # type: ignore[operator]


@torch.no_grad()
def evaluate_upcast(
    nodes: Sequence[fx.Node], wanted: Sequence[fx.Node], outside: Callable[[fx.Node], Any], target: torch.dtype
) -> list[Any]:
    """Evaluate `nodes` (in graph order) one precision up, taking everything else from `outside`."""
    values: dict[fx.Node, Any] = {}

    def read(node: fx.Node) -> Any:
        if node not in values:
            values[node] = upcast(outside(node), target)
        return values[node]

    for node in nodes:
        args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), read)
        values[node] = node.target(*upcast(args, target), **upcast(kwargs, target))  # type: ignore[operator]
    return [values[n] if n in values else read(n) for n in wanted]


FEW = 256
"""Elements below which their mean error says nothing."""


@dataclass(frozen=True)
class Distance:
    """How far a value is from an oracle: largest and root-mean-square difference."""

    largest: float
    rms: float

    def __le__(self, other: Distance) -> bool:
        return self.largest <= other.largest and self.rms <= other.rms

    def within(self, bound: Distance, elements: int) -> bool:
        """Whether it is allowed. A mean over a handful of numbers is luck; their largest has ulps of slack."""
        return self.largest <= bound.largest if elements < FEW else self <= bound


def distance(value: Any, oracle: Any) -> Distance:
    """Difference over all tensors in the two values, in float64; infinite where only one is finite or shapes differ."""
    largest, squares, count = 0.0, 0.0, 0
    for a, b in zip(tree_leaves(value), tree_leaves(oracle), strict=True):
        if not isinstance(b, torch.Tensor):
            if a != b:
                return Distance(float("inf"), float("inf"))
            continue
        if not isinstance(a, torch.Tensor) or a.shape != b.shape:
            return Distance(float("inf"), float("inf"))
        if not b.is_floating_point():
            if not torch.equal(a, b.to(a.dtype)):
                return Distance(float("inf"), float("inf"))
            continue
        if b.numel() == 0:
            continue
        wide_a, wide_b = a.double(), b.double()
        delta = (wide_a - wide_b).abs()
        delta = torch.where((wide_a == wide_b) | (wide_a.isnan() & wide_b.isnan()), 0.0, delta)  # inf - inf
        if not bool(delta.isfinite().all()):
            return Distance(float("inf"), float("inf"))
        largest = max(largest, float(delta.max()))
        squares += float(delta.square().sum())
        count += delta.numel()
    return Distance(largest, (squares / count) ** 0.5 if count else 0.0)


def magnitude(value: Any) -> Distance:
    """Largest and root-mean-square finite element of a value."""
    parts = [t.double() for t in tree_leaves(value) if isinstance(t, torch.Tensor) and t.is_floating_point()]
    parts = [t[t.isfinite()] for t in parts]
    count = sum(t.numel() for t in parts)
    if not count:
        return Distance(0.0, 0.0)
    return Distance(
        max(float(t.abs().max()) for t in parts if t.numel()),
        (sum(float(t.square().sum()) for t in parts) / count) ** 0.5,
    )


def bound_for(error: Distance, oracle: Any, dtype: torch.dtype) -> Distance:
    """What a replacement's error may be: twice the original's, plus a few ulp of the oracle."""
    scale, eps = magnitude(oracle), torch.finfo(dtype).eps
    return Distance(2 * error.largest + ULPS * eps * scale.largest, 2 * error.rms + 0.5 * eps * scale.rms)


def compare(
    evaluator: Evaluator,
    old: Sequence[fx.Node],
    old_outputs: Sequence[fx.Node],
    new: Sequence[fx.Node],
    new_outputs: Sequence[fx.Node],
    *,
    meaning: bool = True,
) -> Check:
    """Compare a replacement that already stands in the graph with what it would replace.

    Both are evaluated on the same real inputs. `Check.passed` is false where the error against the oracle exceeds the
    bound, or, with `meaning`, where the replacement does not agree with the oracle when it is itself evaluated one
    precision up. Kernels, which have no higher precision, are compared without that.
    """
    before = [evaluator.value(n) for n in old_outputs]
    after = [evaluator.value(n) for n in new_outputs]
    tensors = [t for t in tree_leaves(before) if isinstance(t, torch.Tensor)]
    for a, b in zip([t for t in tree_leaves(after) if isinstance(t, torch.Tensor)], tensors):
        if a.dtype != b.dtype or a.shape != b.shape:
            form = f"{a.dtype} {list(a.shape)} instead of {b.dtype} {list(b.shape)}"
            return Check(0.0, float("inf"), 0.0, False, form)
    if _identical(before, after):
        return Check(0.0, 0.0, 0.0, True)
    floating = [t.dtype for t in tensors if t.is_floating_point()]
    if not floating:
        return Check(0.0, float("inf"), 0.0, False)
    lowest = max(floating, key=lambda d: torch.finfo(d).eps)
    target = higher(lowest)
    oracle = evaluate_upcast(old, old_outputs, evaluator.value, target)
    error_before = distance(before, oracle)
    error_after = distance(after, oracle)
    bound = bound_for(error_before, oracle, lowest)
    same = True
    if meaning:
        raised = evaluate_upcast(new, new_outputs, evaluator.value, target)
        same = distance(raised, oracle).rms <= 1024 * torch.finfo(target).eps * magnitude(oracle).rms
    return Check(error_before.largest, error_after.largest, bound.largest, same and error_after <= bound)


def _identical(before: Sequence[Any], after: Sequence[Any]) -> bool:
    for a, b in zip(tree_leaves(before), tree_leaves(after), strict=True):
        if isinstance(a, torch.Tensor):
            if a.dtype != b.dtype or a.shape != b.shape or not torch.equal(a, b):
                return False
        elif a != b:
            return False
    return True
