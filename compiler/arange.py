"""Positions that a model's code counts by itself, as an input: `arange(tokens)` -> `position_ids[0]`.

    arange(sym_size(input_ids, 1))  int64 [T]                ->    select(position_ids, 0, 0)
    slice(0, 1, 2, ... in a buffer, 1, 0, T)  [1, T]         ->    unsqueeze(select(position_ids, 0, 0), 0)
    cumsum(input_ids != c, 1)  [B, T], beside an encoder     ->    position_ids + 1

Of one sequence they are the same. Where the tokens of several sequences lie one behind the other, only the latter can
be right; whether it is, is measured (a ragged batch against each sequence alone).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, fx, nn

from .program import Guard, Input, InputKind, Program
from .slices import Slice, SliceError

aten = torch.ops.aten

_COUNTS = (aten.arange.default, aten.arange.start, aten.arange.start_step)


def positions_as_input(
    program: Program, positions: Tensor, model: nn.Module | None = None, beside: bool = False
) -> bool:
    """Let a captured graph that takes no `position_ids` take them, in place; returns whether it counts tokens at all.

    `positions`: int64 `[1, T]`, those of the program's example. `model` has the buffers that may hold positions.
    `beside` an encoder tokens of one number may not count (`program.uncounted`): no prompt may have them then.
    """
    tokens = next(n for n, made in program.placeholder_inputs().items() if made.target == "input_ids")
    found = {
        n: make for n in program.graph.nodes if (make := _positions(program, model, n, tokens, beside)) is not None
    }
    if not found:
        return False
    graph = program.graph
    last = [n for n in graph.nodes if n.op == "placeholder"][-1]
    with graph.inserting_after(last):
        node = graph.placeholder("position_ids")
    node.meta = {"val": tokens.meta["val"]}
    for count, make in found.items():
        with tokens.meta["val"].fake_mode, graph.inserting_before(count):
            made = make(node)
            made.meta = {**count.meta, **made.meta}
        count.replace_all_uses_with(made)
        graph.erase_node(count)
    program.inputs.append(Input(node.name, InputKind.USER, "position_ids"))
    program.limits.tensors["position_ids"] = Guard(torch.int64, program.limits.tensors["input_ids"].shape)
    program.example = {**program.example, "position_ids": positions}
    graph.lint()
    program.gm.recompile()
    return True


def _positions(
    program: Program, model: nn.Module | None, node: fx.Node, tokens: fx.Node, beside: bool
) -> Callable[[fx.Node], fx.Node] | None:
    """What puts an equal of `node` in its place, given the input of positions; None where it counts no tokens."""
    length = tokens.meta["val"].shape[1]
    if node.target in _COUNTS and _counts(node, length):
        return _row
    if node.target is aten.slice.Tensor and _counted(program, model, node, length):
        return lambda given: _call(aten.unsqueeze.default, _row(given), 0)
    if beside and node.target is aten.cumsum.default and node.args[1] in (1, -1):
        skipped = _skipped(node.args[0], tokens)
        if skipped is not None and program.uncounted in (None, skipped):
            program.uncounted = skipped
            dtype = node.meta["val"].dtype
            return lambda given: _call(aten._to_copy.default, _call(aten.add.Tensor, given, 1), dtype=dtype)
    return None


def _row(given: fx.Node) -> fx.Node:
    return _call(aten.select.int, given, 0, 0)


def _call(target: torch._ops.OpOverload, *args: object, **kwargs: object) -> fx.Node:
    """A node behind its first argument, with its value."""
    first = args[0]
    assert isinstance(first, fx.Node)
    node = first.graph.call_function(target, args, kwargs)  # type: ignore[arg-type]
    node.meta = {"val": target(first.meta["val"], *args[1:], **kwargs)}
    return node


def _counted(program: Program, model: nn.Module | None, node: fx.Node, length: object) -> bool:
    """Whether it is 0, 1, ... for as many tokens as there are, out of a buffer `[1, most]`."""
    table, value = node.args[0], node.meta["val"]
    if not isinstance(table, fx.Node) or node.args[1:3] != (1, 0) or len(node.args) > 4:
        return False
    held = program.placeholder_inputs().get(table)
    if held is None or held.kind is not InputKind.BUFFER or value.dtype != torch.int64:
        return False
    if value.dim() != 2 or str(value.shape[1]) != str(length):
        return False
    try:
        (whole,) = Slice.of(program, [table], model)({})
    except SliceError:
        return False
    return torch.equal(whole.cpu(), torch.arange(whole.shape[1])[None])


def _skipped(node: object, tokens: fx.Node) -> int | None:
    """The number whose tokens are zeros, where those of all others are ones."""
    while isinstance(node, fx.Node) and node.target is aten._to_copy.default:
        node = node.args[0]
    if isinstance(node, fx.Node) and node.target is aten.ne.Scalar and node.args[0] is tokens:
        return node.args[1] if isinstance(node.args[1], int) else None
    return None


def _counts(node: fx.Node, length: object) -> bool:
    """Whether the values are 0, 1, ... for as many tokens as there are."""
    value = node.meta["val"]
    if value.dtype != torch.int64 or str(value.shape[0]) != str(length):
        return False
    start = 0 if node.target is aten.arange.default else node.args[0]
    step = node.args[2] if node.target is aten.arange.start_step and len(node.args) > 2 else 1
    return bool(start == 0 and step == 1)
