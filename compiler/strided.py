"""`as_strided` reads memory, not values: what stood where when the model was captured must stand there in the graph.

    as_strided(x, size, stride)  ->  as_strided(clone(permute(x, order)), size, stride)

A graph promises the values of an operand and not how they lie: rules put other products in the place of those that were
captured, whose rows are slices of a wider one. `order` is that of the strides at capture, so that the copy lies as the
captured operand did.
"""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch import Tensor, fx

aten = torch.ops.aten


def keep_layouts(graph: fx.Graph) -> None:
    """Put a copy of known layout before each `as_strided`.

    Raises:
        ValueError: an operand whose elements do not fill its memory, which no copy of this kind reproduces.
    """
    for node in [n for n in graph.nodes if n.target is aten.as_strided.default]:
        source = node.args[0]
        value: Tensor = source.meta["val"]
        order = _dense_order(value)
        if order is None or (len(node.args) > 3 and node.args[3] not in (None, 0)) or node.kwargs.get("storage_offset"):
            raise ValueError("the forward calls as_strided on a tensor with gaps in its memory")
        with graph.inserting_before(node):
            permuted = _call(graph, node, aten.permute.default, (source, order), value.permute(order))
            laid = permuted.meta["val"].clone(memory_format=torch.contiguous_format)
            copy = _call(graph, node, aten.clone.default, (permuted,), laid)
            copy.kwargs = {"memory_format": torch.contiguous_format}
        node.replace_input_with(source, copy)


def _dense_order(value: Tensor) -> list[int] | None:
    """Dimensions from the widest stride to the narrowest, where elements lie without gaps in that order."""
    sizes, strides = [_expression(s) for s in value.shape], [_expression(s) for s in value.stride()]
    kept = [d for d, size in enumerate(sizes) if size != 1]
    order = sorted(kept, key=lambda d: -_hint(value.stride()[d]))
    wanted: Any = sympy.Integer(1)
    for dim in reversed(order):
        if sympy.simplify(strides[dim] - wanted) != 0:
            return None
        wanted = wanted * sizes[dim]
    return [d for d in range(value.dim()) if d not in kept] + order


def _expression(size: Any) -> Any:
    return size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(size)


def _hint(size: Any) -> int:
    return int(size.node.hint) if isinstance(size, torch.SymInt) else int(size)


def _call(graph: fx.Graph, like: fx.Node, target: Any, args: tuple[Any, ...], value: Tensor) -> fx.Node:
    made = graph.call_function(target, args)
    made.meta = {**like.meta, "val": value}
    return made
