"""Give outputs that are a small part of a larger tensor memory of their own, as soon as they are there.

    qkv = linear(x, W); k, v = slices of qkv -> outputs    ->    v' = activation(v, "identity")

A cache made of slices would keep every layer's whole product alive; with the copies each is freed after its layer. A
copy keeps the order of the dimensions in memory: whole rows are copied, not heads.
"""

from __future__ import annotations

import operator
import time

import torch
from torch import fx

from ..compiler.opset import Role, role_of
from ..compiler.pipeline import Context
from ..compiler.program import Program
from ..compiler.provenance import module_of, source_of
from ..compiler.records import PassResult, Rewrite
from ..compiler.rule import Stage
from ..kernels.activation import activation

aten = torch.ops.aten


def outputs(program: Program, context: Context) -> PassResult:
    """Insert the copies, in place."""
    started = time.perf_counter()
    graph = program.graph
    result = PassResult("outputs", Stage.LOWER.name, nodes_before=len(graph.nodes))
    output = next(n for n in graph.nodes if n.op == "output")
    for node in dict.fromkeys(output.all_input_nodes):
        if not is_part(node):
            continue
        with graph.inserting_after(node):
            copy = graph.call_function(activation.overload, (node, "identity"))
        copy.meta = {**node.meta, "val": node.meta["val"].clone()}
        node.replace_all_uses_with(copy, delete_user_cb=lambda user: user is output)
        result.rewrites.append(
            Rewrite("outputs", module_of(node), source_of(node), "view -> copy", (node.name,), (copy.name,))
        )
    graph.lint()
    result.nodes_after = len(graph.nodes)
    result.time_s = time.perf_counter() - started
    return result


def is_part(node: fx.Node) -> bool:
    """Whether the node is a view of fewer elements than what it is a view of, which this graph computes."""
    narrow = False
    while node.op == "call_function" and node.args and isinstance(node.args[0], fx.Node):
        if node.target is operator.getitem:
            if not _splits(node.args[0].target):
                return narrow
            narrow = True
        elif role_of(node) is not Role.VIEW:
            return narrow
        elif node.target is aten.expand.default:  # a copy may be larger than what it was cut from
            return False
        elif getattr(node.target, "overloadpacket", None) in _NARROW:
            narrow = True
        node = node.args[0]
    return narrow and node.op == "call_function"


_NARROW = frozenset({aten.slice, aten.select, aten.narrow})
_SPLIT = frozenset({aten.split, aten.split_with_sizes, aten.chunk, aten.unbind})


def _splits(target: object) -> bool:
    return getattr(target, "overloadpacket", None) in _SPLIT
