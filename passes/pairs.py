"""Norms that run together with the product behind them where there is a single row.

    y, s = add_rms_norm(x, residual, w, ...);  z = gate_up(y, v, ...)    ->    z, s = joint(x, residual, w, ..., v, ...)

The two stay what they are, each with its kernels, for more rows than one: the number of rows decides in each call. Done
where the device's table says that a joint kernel is faster; it is compared with both nodes, like any kernel with its
node, before LOWER replaces them.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from ..compiler.provenance import module_of, source_of
from ..compiler.records import Check, PassResult, Reverted, Rewrite
from ..compiler.verify import Evaluator, compare
from ..kernels import choice, tuning
from ..kernels.features import features_of
from ..kernels.norm_products import JOINT, NORM
from ..kernels.op import Kernel, Op
from ..kernels.rms_norm import add_rms_norm
from ..kernels.table import PROVIDERS, op_of
from .early import at_rest, moving_of


@dataclass(frozen=True)
class Pair:
    """Two nodes and the kernel that computes both."""

    norm: fx.Node
    product: fx.Node
    op: Op
    """The product's."""
    kernel: Kernel

    @property
    def args(self) -> tuple[Any, ...]:
        """Of the joint op, as the nodes have them now."""
        first = choice.arranged(add_rms_norm, self.norm.args, self.norm.kwargs)
        return (*first, *choice.arranged(self.op, self.product.args, self.product.kwargs)[1:])

    @property
    def items(self) -> tuple[fx.Node | None, fx.Node | None]:
        """The normalised sum and the sum, where they are read."""
        found: dict[Any, fx.Node] = {user.args[1]: user for user in self.norm.users}
        return found.get(0), found.get(1)


Candidate = tuple[Pair, str]
"""A pair, and what makes its kernel right or wrong for it."""


def candidates(graph: fx.Graph, weights: Collection[fx.Node], device: torch.device) -> list[Candidate]:
    """The pairs of a graph of semantic ops that have a joint kernel, where the device's table says that it pays."""
    order = {node: index for index, node in enumerate(graph.nodes)}
    known: dict[str, bool] = {}
    found = []
    for product in graph.nodes:
        norm, op = _norm_in_front(product, order), op_of(product.target)
        if norm is None or op is None:
            continue
        joint = JOINT[op.name]
        for kernel in PROVIDERS.get(joint.name, ())[:1]:
            pair = Pair(norm, product, op, kernel)
            values = fx.node.map_arg(pair.args, lambda n: n.meta["val"])
            signature = joint.signature(*values)
            moving = moving_of(product, op, weights)
            key = f"{joint.name} {signature} {sorted(moving)}"
            if key not in known:
                taken = kernel.supports(signature) is None and moving.isdisjoint(kernel.early)
                known[key] = taken and _pays(kernel, values, device)
            if known[key]:
                found.append((pair, key))
    return found


def right(
    graph: fx.Graph, candidates: Sequence[Candidate], evaluator: Evaluator | None, result: PassResult
) -> list[Pair]:
    """Those whose kernel computes what both nodes do."""
    known: dict[str, bool] = {}
    for pair, key in candidates:
        if key not in known:
            known[key] = _right(graph, pair, evaluator, result)
    return [pair for pair, key in candidates if known[key]]


def _norm_in_front(product: fx.Node, order: dict[fx.Node, int]) -> fx.Node | None:
    """The norm of a sum whose normalised rows this product alone reads, and whose sum is read behind it."""
    op = op_of(product.target)
    item = product.args[0] if product.args else None
    if op is None or op.name not in JOINT or not isinstance(item, fx.Node) or item.target is not operator.getitem:
        return None
    norm, place = item.args
    if place != 0 or not isinstance(norm, fx.Node) or norm.target is not add_rms_norm.overload:
        return None
    items = list(norm.users)
    if list(item.users) != [product] or any(i.target is not operator.getitem for i in items):
        return None
    if len({i.args[1] for i in items}) < len(items):  # read twice
        return None
    rest = choice.arranged(op, product.args, product.kwargs)[1:]
    if item in rest or any(order[user] <= order[product] for i in items if i is not item for user in i.users):
        return None
    if free_unbacked_symbols(item.meta["val"]):  # arguments of one shape must run the same kernels: `choice.noting`
        return None
    return norm


def _pays(kernel: Kernel, args: Sequence[Any], device: torch.device) -> bool:
    """Whether the table says so for one row."""
    features = {**features_of(kernel.op.name, args), "M": 1}
    entries = tuning.providers(tuning.device_limits(device)[0]).get(kernel.op.name, ())
    return next((e.provider == kernel.provider for e in entries if e.matches(features)), False)


def _right(graph: fx.Graph, pair: Pair, evaluator: Evaluator | None, result: PassResult) -> bool:
    """The kernel against the two nodes on the user's weights, where there are any."""
    if evaluator is None:
        return True
    item, total = pair.items
    sides = [(pair.product, [pair.norm, item, pair.product])]
    if total is not None:
        sides.append((total, [pair.norm, total]))
    with graph.inserting_after(pair.product):
        trial = graph.call_function(at_rest(pair.kernel), pair.args)
    with graph.inserting_after(trial):
        new = [graph.call_function(operator.getitem, (trial, i)) for i in range(len(sides))]
    check: Check | None = None
    wrong = None
    try:
        for (output, old), made in zip(sides, new, strict=True):  # apart: a large sum would hide a wrong product
            check = compare(evaluator, old, [output], [trial, made], [made], meaning=False)  # type: ignore[arg-type]
            if not check.passed:
                wrong = f"errs by {check.error_after:.3g}, allowed {check.bound:.3g}"
                break
    except Exception as error:
        if not choice.is_kernel_failure(error):
            raise
        wrong = f"does not run ({choice.brief(error)})"
    finally:
        evaluator.forget([*new, trial])
        for node in reversed([trial, *new]):
            graph.erase_node(node)
    if wrong is not None:
        node, kernel = pair.product, pair.kernel
        text = f"the {kernel.provider} kernel of {kernel.op.name} {wrong}"
        result.reverted.append(Reverted("lower", module_of(node), source_of(node), text, check))
    return wrong is None


def join(graph: fx.Graph, pairs: Sequence[Pair], result: PassResult) -> None:
    """Make one node of each pair, whose nodes call kernels by now."""
    bound: dict[tuple[Any, ...], Callable[..., Any]] = {}
    for pair in pairs:
        key = (pair.kernel, pair.norm.target, pair.product.target)
        if key not in bound:
            bound[key] = by_rows(pair.kernel, pair.norm.target, pair.product.target)  # type: ignore[arg-type]
        item, total = pair.items
        with graph.inserting_before(pair.product):
            joint = graph.call_function(bound[key], pair.args)
            made = [graph.call_function(operator.getitem, (joint, i)) for i in (0, 1)]
        joint.meta.update({k: v for k, v in pair.product.meta.items() if k != "val"})
        for old, new in zip((pair.product, total), made, strict=True):
            if old is not None:
                new.meta.update(old.meta)
                old.replace_all_uses_with(new)
        joint.meta["val"] = (pair.product.meta["val"], pair.norm.meta["val"][1])
        for node in (pair.product, item, total, pair.norm):
            if node is not None:
                graph.erase_node(node)
        if total is None:
            graph.erase_node(made[1])
        label = f"{pair.kernel.op.name} -> {pair.kernel.provider} (one row)"
        where = module_of(joint), source_of(joint)
        result.rewrites.append(Rewrite("lower", *where, label, (joint.name,), (joint.name,)))


def by_rows(kernel: Kernel, norm: Callable[..., Any], product: Callable[..., Any]) -> Callable[..., Any]:
    """A function of the joint op's arguments: the kernel for one row of x, else norm and product after each other."""
    single = choice.bind(kernel.op, (kernel,))

    @functools.wraps(kernel.run)
    def joint(*args: Any) -> tuple[Any, Any]:
        x = args[0]
        if x.numel() == x.shape[-1]:
            return single(*args)  # type: ignore[no-any-return]
        y, s = norm(*args[:NORM])
        return product(y, *args[NORM:]), s

    return joint
