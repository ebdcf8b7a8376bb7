"""The forward of a batch as that of flat tokens, without capturing it again: capture takes longer than all the rest.

    forward(input_ids, attention_mask) -> logits, keys, values    ->    forward(input_ids, position_ids) -> logits

No token is padding: the mask of padding is ones. Positions that the model's code counts are an input (`arange`). Where
it finds them in another way (from the mask, or in a table by the length) the graph is wrong for flat tokens; whether it
is right, is measured as for any other (a ragged batch against each sequence alone).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from .arange import positions_as_input
from .program import Program

aten = torch.ops.aten

_PADDING = "attention_mask"


def flattened(program: Program, tensors: Mapping[str, Tensor]) -> Program | None:
    """A copy of a captured forward for the flat tokens `input_ids` and `position_ids` of `tensors`, int64 `[1, T]`.

    None where it takes other arguments than tokens and their padding, returns no logits, counts no positions, or
    gathers by them.
    """
    taken = program.limits.tensors
    if not {"input_ids"} <= set(taken) <= {"input_ids", _PADDING} or program.guards:
        return None
    if _PADDING in taken and taken[_PADDING].shape != taken["input_ids"].shape:
        return None
    made = _copied(program)
    logits = _logits(made)
    if logits is None:
        return None
    output = next(n for n in made.graph.nodes if n.op == "output")
    output.args = ((logits,),)
    made.rebuild, made.cache = tuple, False
    if _PADDING in taken:
        _fill(made)
    made.graph.eliminate_dead_code()
    made.example = {"input_ids": tensors["input_ids"]}
    if not positions_as_input(made, tensors["position_ids"]):
        return None
    if any(n.target is aten.gather.default for n in made.graph.nodes):  # whose operands have the same batch
        return None
    _widen(made)
    made.gm.recompile()
    return made


def _copied(program: Program) -> Program:
    limits = replace(
        program.limits,
        tensors=dict(program.limits.tensors),
        ranges=dict(program.limits.ranges),
        reasons=dict(program.limits.reasons),
        conditions=[(text, partial(_holds, holds)) for text, holds in program.limits.conditions],
        _checked={},
    )
    gm = fx.GraphModule(program.gm, copy.deepcopy(program.graph))
    return replace(program, gm=gm, inputs=list(program.inputs), limits=limits, guards=[])


def _holds(condition: Callable[[dict[str, Tensor]], bool], tensors: dict[str, Tensor]) -> bool:
    """A condition of the forward for tokens without padding."""
    return condition({**tensors, _PADDING: torch.ones_like(tensors["input_ids"])})


def _logits(program: Program) -> fx.Node | None:
    """The node that the model returns as `logits`, where they are those of every token."""
    output: Any = next(n for n in program.graph.nodes if n.op == "output").args[0]
    values: list[Any] = [n.meta["val"] for n in output]
    found: Any = getattr(program.rebuild(values), "logits", None)
    length = program.limits.tensors["input_ids"].shape[-1]
    for node, value in zip(output, values, strict=True):
        if value is found and value is not None:
            return node if value.dim() == 3 and str(value.shape[1]) == length else None
    return None


def _widen(program: Program) -> None:
    """`unsqueeze(select(position_ids, 0, 0), 0)`, one row for any batch, is `position_ids`: of the batch's own size."""
    graph = program.graph
    node = next(n for n, made in program.placeholder_inputs().items() if made.target == "position_ids")
    rows = {n for n in node.users if n.target is aten.select.int}
    rows |= {u for n in rows for u in n.users if u.target is aten.add.Tensor and u.args == (n, 0)}
    changed = {node}
    for each in list(graph.nodes):
        if each.target is aten.unsqueeze.default and each.args[0] in rows and each.args[1] == 0:
            each.replace_all_uses_with(node)
            graph.erase_node(each)
        elif each.op == "call_function" and each not in rows and any(i in changed for i in each.all_input_nodes):
            args, kwargs = fx.map_arg((each.args, dict(each.kwargs)), lambda n: n.meta["val"])
            with node.meta["val"].fake_mode:
                value = each.target(*args, **kwargs)
            if str(getattr(value, "shape", value)) != str(getattr(each.meta["val"], "shape", each.meta["val"])):
                each.meta["val"] = value
                changed.add(each)
    graph.eliminate_dead_code()


def _fill(program: Program) -> None:
    """Ones in place of the mask of padding."""
    graph = program.graph
    nodes = {made.target: node for node, made in program.placeholder_inputs().items()}
    tokens, padding = nodes["input_ids"], nodes[_PADDING]
    first = next(n for n in graph.nodes if n.op != "placeholder")
    with tokens.meta["val"].fake_mode, graph.inserting_before(first):
        sizes = []
        for d in range(2):
            sizes.append(graph.call_function(aten.sym_size.int, (tokens, d)))
            sizes[-1].meta = {"val": tokens.meta["val"].shape[d]}
        options = {"dtype": padding.meta["val"].dtype, "device": padding.meta["val"].device}
        ones = graph.call_function(aten.ones.default, (sizes,), options)
        ones.meta = {"val": aten.ones.default([s.meta["val"] for s in sizes], **options)}
    padding.replace_all_uses_with(ones)
    program.inputs[:] = [made for made in program.inputs if made.target != _PADDING]
    graph.erase_node(padding)
    del program.limits.tensors[_PADDING]
