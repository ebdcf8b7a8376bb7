"""Fold a power of two that scales the queries into attention's own scale: the same bits, without a pass over q.

    attention(view(q * 0.125), k, v, scale=1.0)    ->    attention(view(q), k, v, scale=0.125)

Whisper, BART, OPT and their kin scale after the projection. Other factors round q, and are left where they are.
"""

from __future__ import annotations

import math
import time

import torch
from torch import fx

from ..compiler.opset import Role, role_of
from ..compiler.pipeline import Context
from ..compiler.program import Program
from ..compiler.provenance import module_of, source_of
from ..compiler.records import PassResult, Rewrite
from ..compiler.rule import Stage
from ..kernels.attention import attention

aten = torch.ops.aten

SCALE = next(i for i, a in enumerate(attention.overload._schema.arguments) if a.name == "scale")


def attention_scale(program: Program, context: Context) -> PassResult:
    """Fold what can be folded, in place."""
    started = time.perf_counter()
    graph = program.graph
    result = PassResult("attention_scale", Stage.RAISE.name, nodes_before=len(graph.nodes))
    for node in graph.find_nodes(op="call_function", target=attention.overload):
        product = _scaled(node)
        if product is None:
            continue
        x, factor = product.args[0], _number(product.args[1])
        assert isinstance(x, fx.Node) and factor is not None
        if len(node.args) > SCALE:
            node.update_arg(SCALE, node.args[SCALE] * factor)  # type: ignore[operator]
        else:
            node.update_kwarg("scale", node.kwargs.get("scale", 1.0) * factor)  # type: ignore[operator]
        product.replace_all_uses_with(x)
        graph.erase_node(product)
        result.rewrites.append(
            Rewrite(
                "attention_scale", module_of(node), source_of(node), "q * c -> scale", (product.name,), (node.name,)
            )
        )
    result.nodes_after = len(graph.nodes)
    result.time_s = time.perf_counter() - started
    return result


def _scaled(node: fx.Node) -> fx.Node | None:
    """The product with a power of two that the queries are, seen through views that nothing else reads."""
    q = node.args[0]
    user = node
    while _read_once(q, user) and role_of(q) is Role.VIEW:  # type: ignore[arg-type]
        user, q = q, q.args[0]  # type: ignore[assignment, union-attr]
    if not _read_once(q, user) or not isinstance(q, fx.Node) or q.target is not aten.mul.Tensor:
        return None
    factor = _number(q.args[1])
    x = q.args[0]
    alike = isinstance(x, fx.Node) and x.meta["val"].dtype == q.meta["val"].dtype
    return q if alike and factor is not None and factor > 0 and math.frexp(factor)[0] == 0.5 else None


def _read_once(q: object, user: fx.Node) -> bool:
    """Whether `user`, and it alone, reads q, in one place: not as keys or values too."""
    return isinstance(q, fx.Node) and list(q.users) == [user] and [*user.args, *user.kwargs.values()].count(q) == 1


def _number(value: object) -> float | None:
    """A Python number, as it stands or as a constant that export made of it."""
    constant = value.meta.get("constant") if isinstance(value, fx.Node) else value
    return float(constant) if isinstance(constant, (int, float)) and not isinstance(constant, bool) else None
