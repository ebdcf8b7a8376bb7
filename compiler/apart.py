"""Whether what a graph makes of positions stays apart: that of one sequence must not depend on another's.

Sequences lie one behind the other in a flat batch. Rotations whose frequencies depend on the longest position of the
batch (dynamic NTK, longrope) would let a long sequence change a short one. The parts of the graph that read positions
and no activations are run for a sequence beside short and beside very long others, and their rows compared. Often they
only change beyond the length that the model was first trained for; up to there they are of use.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

from .causal import CacheError
from .masks import config_sizes
from .program import InputKind, Program
from .provenance import module_of
from .slices import Slice, SliceError

LEAST = 64
"""Fewer tokens than that are of no use."""
_OWN, _OTHER = 6, 11
"""Tokens of the sequence that is looked at, and of the one beside it."""


def apart_until(program: Program, model: nn.Module) -> int | None:
    """How long sequences may be for their positions to stay apart: any length (None), or a number of tokens.

    Raises `CacheError` where they never do.
    """
    found: list[int] = []
    config = [n for n in config_sizes(model) if n <= 1 << 22]
    starts = sorted({*config, *(n + 1 for n in config), 2 * max(config, default=64)})
    for node in _frontier(program):
        try:
            piece = Slice.of(program, [node], model)
        except SliceError:  # a large table: its rows are looked up one by one
            continue
        beside_short = _rows(piece, program, 0)

        def same(start: int, piece: Slice = piece, wanted: Tensor | None = beside_short) -> bool:
            try:
                rows = _rows(piece, program, start)
            except SliceError:  # beyond a table of positions: no sequence is that long
                return True
            return wanted is not None and rows is not None and torch.equal(rows, wanted)

        bad = next((start for start in starts if not same(start)), None)
        if bad is None:
            continue
        good = max((start for start in starts if start < bad), default=0)
        while bad - good > 1:
            middle = (good + bad) // 2
            good, bad = (middle, bad) if same(middle) else (good, middle)
        if not same(good) or good + _OTHER < LEAST:
            where = module_of(node) or node.name
            raise CacheError(f"values of {where} at one position depend on how long other sequences are")
        found.append(good + _OTHER)
    return min(found, default=None)


def by_position(program: Program) -> list[fx.Node]:
    """`position_ids` and the nodes whose values are computed of it and of buffers alone."""
    apart: set[fx.Node] = set()
    found: dict[fx.Node, None] = {}
    meaning = program.placeholder_inputs()
    for node in program.graph.nodes:
        if node.op == "placeholder":
            made = meaning[node]
            if made.kind is InputKind.USER and made.target == "position_ids":
                found[node] = None
                apart.add(node)
            elif made.kind in (InputKind.BUFFER, InputKind.CONSTANT):
                apart.add(node)
        elif node.op != "output":
            size = isinstance(node.meta.get("val"), torch.SymInt | int)
            if size or all(i in apart for i in node.all_input_nodes):
                apart.add(node)
                if not size and any(i in found for i in node.all_input_nodes):
                    found[node] = None
    return list(found)


def _frontier(program: Program) -> list[fx.Node]:
    """Nodes computed from positions alone by value, and read by others."""
    inside = dict.fromkeys(by_position(program))
    found: dict[fx.Node, None] = {}
    for node in program.graph.nodes:
        size = isinstance(node.meta.get("val"), torch.SymInt | int)
        if node.op not in ("placeholder", "output") and node not in inside and not size:
            found |= dict.fromkeys(i for i in node.all_input_nodes if i in inside and i.op != "placeholder")
    return list(found)


def _rows(piece: Slice, program: Program, start: int) -> Tensor | None:
    """The rows of a sequence of `_OWN` tokens, which another follows whose positions begin at `start`."""
    positions = [*range(_OWN), *range(start, start + _OTHER)]
    device = next((t.device for t in program.example.values()), torch.device("cpu"))
    given = torch.tensor([positions], device=device)
    tensors = {name: given if name == "position_ids" else torch.zeros_like(given) for name in program.limits.tensors}
    value = piece(tensors)[0]
    dims = [d for d, size in enumerate(value.shape) if size == _OWN + _OTHER]
    return value.narrow(dims[0], 0, _OWN) if dims else None
