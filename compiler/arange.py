"""Positions that a model's code counts by itself, as an input: `arange(tokens)` -> `position_ids[0]`.

    arange(sym_size(input_ids, 1))  int64 [T]    ->    select(position_ids, 0, 0)

Of one sequence they are the same. Where the tokens of several sequences lie one behind the other, only the latter can
be right; whether it is, is measured (a ragged batch against each sequence alone).
"""

from __future__ import annotations

import torch
from torch import fx

from .program import Guard, Input, InputKind, Program

aten = torch.ops.aten

_COUNTS = (aten.arange.default, aten.arange.start, aten.arange.start_step)


def positions_as_input(program: Program, positions: torch.Tensor) -> bool:
    """Let a captured graph that takes no `position_ids` take them, in place; returns whether it counts tokens at all.

    `positions`: int64 `[1, T]`, those of the program's example.
    """
    tokens = next(n for n, made in program.placeholder_inputs().items() if made.target == "input_ids")
    length = tokens.meta["val"].shape[1]
    counts = [n for n in program.graph.nodes if n.target in _COUNTS and _counts(n, length)]
    if not counts:
        return False
    graph = program.graph
    last = [n for n in graph.nodes if n.op == "placeholder"][-1]
    with graph.inserting_after(last):
        node = graph.placeholder("position_ids")
    node.meta = {"val": tokens.meta["val"]}
    with tokens.meta["val"].fake_mode, graph.inserting_before(counts[0]):
        row = graph.call_function(aten.select.int, (node, 0, 0))
        row.meta = {**counts[0].meta, "val": aten.select.int(node.meta["val"], 0, 0)}
    for count in counts:
        count.replace_all_uses_with(row)
        graph.erase_node(count)
    program.inputs.append(Input(node.name, InputKind.USER, "position_ids"))
    program.limits.tensors["position_ids"] = Guard(torch.int64, program.limits.tensors["input_ids"].shape)
    program.example = {**program.example, "position_ids": positions}
    graph.lint()
    program.gm.recompile()
    return True


def _counts(node: fx.Node, length: object) -> bool:
    """Whether the values are 0, 1, ... for as many tokens as there are."""
    value = node.meta["val"]
    if value.dtype != torch.int64 or str(value.shape[0]) != str(length):
        return False
    start = 0 if node.target is aten.arange.default else node.args[0]
    step = node.args[2] if node.target is aten.arange.start_step and len(node.args) > 2 else 1
    return bool(start == 0 and step == 1)
