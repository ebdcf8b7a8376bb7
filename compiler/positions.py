"""How long a sequence the model's learned positions allow.

A lookup in a table of positions has an index that no token decides: it is computed from shapes, masks, or (RoBERTa) by
counting tokens that are no padding. Its backward slice is evaluated at a few lengths; where the largest index grows
by one a token until it leaves the table, the table's rows bound the length.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor, fx, nn

from .program import InputKind, Program
from .slices import Slice, SliceError, sample

log = logging.getLogger(__name__)

_SHORT, _LONG = 3, 7


def bound_lengths(program: Program, model: nn.Module) -> None:
    """Lower the upper end of a symbol's range to what position tables allow, with the reason."""
    rows = _table_rows(program)
    for symbol in _length_symbols(program):
        for node, size, name in rows:
            longest = _longest(program, model, node, size, symbol)
            if longest is None:
                continue
            low, high = program.limits.ranges.get(symbol, (1, None))
            if high is None or longest <= high:
                program.limits.ranges[symbol] = (low, longest)
                program.limits.reasons[symbol] = f"the {size} learned positions of {name}"
        _blame_buffers(program, symbol)


def _blame_buffers(program: Program, symbol: str) -> None:
    """An upper bound that export itself found comes from slicing a table of fixed length."""
    high = program.limits.ranges.get(symbol, (1, None))[1]
    if high is None or symbol in program.limits.reasons:
        return
    for node, made in program.placeholder_inputs().items():
        fixed = made.kind in (InputKind.PARAMETER, InputKind.BUFFER)
        if fixed and high in tuple(node.meta["val"].shape) and _is_sliced(node):
            program.limits.reasons[symbol] = f"the {high} positions of {made.target}"


def _is_sliced(node: fx.Node) -> bool:
    return any(user.target is torch.ops.aten.slice.Tensor for user in node.users)


def _table_rows(program: Program) -> list[tuple[fx.Node, int, str]]:
    """(index node, rows, name of the table) of each lookup whose index is computed."""
    meaning = program.placeholder_inputs()
    found: dict[tuple[fx.Node, int], str] = {}
    for node in program.graph.nodes:
        if node.target is torch.ops.aten.embedding.default:
            table, index = node.args[0], node.args[1]
        elif node.target is torch.ops.aten.index.Tensor and len(node.args[1]) == 1:
            table, index = node.args[0], node.args[1][0]
        else:
            continue
        made = meaning.get(table)
        if made is None or made.kind not in (InputKind.PARAMETER, InputKind.BUFFER):
            continue
        if isinstance(index, fx.Node) and index not in meaning:
            found.setdefault((index, int(table.meta["val"].shape[0])), made.target)
    return [(index, rows, name) for (index, rows), name in found.items()]


def _length_symbols(program: Program) -> list[str]:
    """Symbols of dimension 1 of integer inputs."""
    symbols = [
        guard.shape[1]
        for guard in program.limits.tensors.values()
        if len(guard.shape) == 2 and not guard.dtype.is_floating_point and isinstance(guard.shape[1], str)
    ]
    return list(dict.fromkeys(symbols))


def _longest(program: Program, model: nn.Module, node: fx.Node, rows: int, symbol: str) -> int | None:
    try:
        piece = Slice.of(program, [node], model)
        largest = [_largest(piece, program, symbol, length) for length in (_SHORT, _LONG)]
    except SliceError as error:
        log.debug("positions %s: %s", node.name, error)
        return None
    if largest[1] - largest[0] != _LONG - _SHORT:  # another length decides
        return None
    longest = rows - 1 - (largest[0] - _SHORT)
    if longest < _SHORT:
        return None
    # relative buckets grow by one a token at first and saturate below the number of rows
    high = program.limits.ranges.get(symbol, (1, None))[1]
    beyond = longest + 1 if high is None else min(longest + 1, high)
    try:
        if len(node.meta["val"].shape) > 2 or _largest(piece, program, symbol, beyond) != largest[0] - _SHORT + beyond:
            return None
    except SliceError as error:  # a table of positions of another kind ends there too
        log.debug("positions %s at %d: %s", node.name, beyond, error)
    return longest


def _largest(piece: Slice, program: Program, symbol: str, length: int) -> int:
    values: dict[str, Tensor] = sample(program, {symbol: length})
    return int(piece(values)[0].max())


def positions_allowed(program: Program, model: nn.Module) -> int | None:
    """How many positions the tables have that are looked up by `position_ids`; None where there is no such table."""
    found: list[int] = []
    for node in program.graph.nodes:
        if node.target is torch.ops.aten.embedding.default:
            table, index, dim = node.args[0], node.args[1], 0
        elif node.target is torch.ops.aten.gather.default or node.target is torch.ops.aten.index_select.default:
            table, dim, index = node.args[:3]
        elif node.target is torch.ops.aten.index.Tensor and len(node.args[1]) == 1:
            table, index, dim = node.args[0], node.args[1][0], 0
        else:
            continue
        rows = table.meta["val"].shape[dim]
        if not isinstance(rows, int) or not isinstance(index, fx.Node):
            continue
        try:
            piece = Slice.of(program, [index], model)
            if piece.users_by_value != ("position_ids",) and index.target != "position_ids":
                continue
            first, second = (_index_at(piece, program, start) for start in (0, _LONG))
        except SliceError as error:
            log.debug("positions %s: %s", node.name, error)
            continue
        if second - first == _LONG:
            found.append(rows - first)
    return min(found, default=None)


def _index_at(piece: Slice, program: Program, position: int) -> int:
    """The largest index for tokens that all stand at one position."""
    tensors = sample(program, {})
    tensors["position_ids"] = torch.full_like(tensors["position_ids"], position)
    return int(piece(tensors)[0].max())
