"""Fuse linears of one module that read the same value into one:

    linear(x, wq, bq), linear(x, wk), linear(x, wv, bv)  ->  y = linear(x, cat(wq, wk, wv), cat(bq, 0, bv)); slices of y

Any number of siblings, with and without bias. The concatenation is folded into one packed weight later, and the old
parameters become views of it.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from torch import fx

from ..compiler.opset import arguments
from ..compiler.provenance import module_of
from ..compiler.rule import Emitter, GroupRule, Reject, Stage
from .linear import is_weight

aten = torch.ops.aten


def _owner(node: fx.Node) -> str:
    """The module that a linear belongs to: the one around it, or around what wraps it alone (`q_proj.linear`).

    Wrappers are told by their siblings: `k_proj.linear` has the same name inside another one.
    """
    around, _, name = module_of(node).rpartition(".")
    outer, _, wrapper = around.rpartition(".")
    same_value = [u for u in arguments(node)["input"].users if u is not node and u.target is aten.linear.default]
    others = [module_of(u).rpartition(".") for u in same_value]
    if not wrapper or wrapper.isdigit() or any(parent == around for parent, _, _ in others):
        return around
    wrapped = any(leaf == name and parent.rpartition(".")[0] == outer for parent, _, leaf in others)
    return outer if wrapped else around


class QKV(GroupRule):
    """Linears on parameters that read the same value inside one module (an attention block, an expert, an MLP)."""

    name = "qkv"
    stage = Stage.FUSE
    targets = frozenset([aten.linear.default])

    def key(self, node: fx.Node) -> Hashable | None:
        given = arguments(node)
        weight, x = given["weight"], given["input"]
        if not is_weight(weight) or (given["bias"] is not None and not is_weight(given["bias"])):
            return None
        return x, _owner(node), weight.meta["val"].dtype

    def check(self, group: Sequence[fx.Node]) -> Reject | None:
        weights = [arguments(n)["weight"] for n in group]
        if len(set(weights)) < len(weights):
            return Reject("two of the linears share one weight", group[0])
        for weight in weights:
            if any(user.target is aten.cat.default for user in weight.users):
                return Reject(f"{weight.name} is already part of another fused weight", group[0])
        biases = [arguments(n)["bias"] for n in group]
        given = [b for b in biases if b is not None]
        if len({b.meta["val"].dtype for b in given}) > 1:
            return Reject("biases of different dtypes", group[0])
        return None

    def emit(self, group: Sequence[fx.Node], g: Emitter) -> tuple[fx.Node, ...]:
        given = [arguments(n) for n in group]
        weight = g.cat([a["weight"] for a in given], 0)
        sizes = [int(a["weight"].meta["val"].shape[0]) for a in given]
        y = g.linear(given[0]["input"], weight, _joined_bias(given, sizes, g))
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        return tuple(g.slice(y, -1, start, start + size) for start, size in zip(starts, sizes))

    def describe(self, group: Sequence[fx.Node]) -> str:
        names = [module_of(n).rpartition(".")[2] or n.name for n in group]
        return f"{' + '.join(names)} -> one linear"


def _joined_bias(given: Sequence[dict[str, fx.Node]], sizes: Sequence[int], g: Emitter) -> fx.Node | None:
    """The biases one behind the other, zeros where a linear has none; None where none has."""
    present = [a["bias"] for a in given if a["bias"] is not None]
    if not present:
        return None
    parts = [
        a["bias"] if a["bias"] is not None else g.call(aten.new_zeros.default, present[0], [size])
        for a, size in zip(given, sizes)
    ]
    return g.cat(parts, 0)


RULES = (QKV(),)
