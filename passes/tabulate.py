"""Tables in place of what a step computes of positions alone.

    cos(cat(inv_freq @ position_ids, ...))  [1, T, D]    ->    embedding(table, position_ids)[..., a:b]

The rows of rotary embeddings take eight small kernels for a token as for a thousand. The table is a packed weight: its
recipe is the graph's own code, run once for all positions that a sequence may have, so that its rows are the same
numbers bit for bit, and change with the buffers that they are made of. Where the code gives other bits for other
company (which is tried), where the table would be large, or where nothing is saved, the graph stays as it is.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Final

import torch
from torch import Tensor, fx, nn

from ..compiler.apart import by_position
from ..compiler.opset import Role, is_free, role_of
from ..compiler.pipeline import Context
from ..compiler.program import Input, InputKind, Program, Recipe
from ..compiler.provenance import module_of, source_of
from ..compiler.records import PassResult, Rewrite
from ..compiler.rule import Stage
from ..compiler.slices import Slice, SliceError

aten = torch.ops.aten
log = logging.getLogger("regraft")

LARGEST_TABLE: Final = 128 << 20
"""Bytes of all tables of a program."""
LEAST: Final = 256
"""Positions of every table: more than a program is checked with, whatever the user wants."""
_FEW: Final = 7
"""Positions that are computed by themselves and compared with the table's."""


def tabulate(program: Program, context: Context) -> PassResult:
    """Look values of positions up, in place, where they are rows of as many positions as a sequence may have."""
    started = time.perf_counter()
    graph = program.graph
    result = PassResult("tabulate", Stage.CACHE.name, nodes_before=len(graph.nodes))
    longest, model = _longest(program, context), context.settings.model
    nodes = _values(program, model) if longest is not None and model is not None else {}
    if nodes and longest is not None:
        try:
            piece = Slice.of(program, list(nodes), model)
            if not _is_worth(piece, nodes, longest):
                log.debug("a table of %d positions is not worth its memory", longest)
            elif not _are_rows(piece, program, longest):
                log.debug("values of positions are other bits beside others, and stay computed")
            else:
                _look_up(program, piece, nodes, longest, context, result)
        except SliceError as error:
            log.debug("values of positions stay computed: %s", error)
    graph.lint()
    result.nodes_after = len(graph.nodes)
    result.time_s = time.perf_counter() - started
    return result


def _longest(program: Program, context: Context) -> int | None:
    """What the user and the program say, else the model's config."""
    wanted, end = context.settings.positions, program.longest[0] if program.longest is not None else None
    if wanted is None and end is None:
        config: Any = getattr(context.settings.model, "config", None)
        text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else None
        wanted = getattr(text, "max_position_embeddings", None)
    wanted = max(wanted, LEAST) if wanted is not None else end
    return wanted if end is None or wanted is None else min(wanted, end)


@dataclass(frozen=True)
class _Form:
    """How rows lie in a value: `before` dimensions of one, positions, and `width` numbers (None: no dimension)."""

    before: int
    width: int | None


def _values(program: Program, model: nn.Module) -> dict[fx.Node, _Form]:
    """What is computed of positions and read by others, before the views in between; `[..., T]` or `[..., T, D]`."""
    found: dict[fx.Node, _Form | None] = {}
    known = by_position(program)
    for node in _read_by_others(program, known):
        while role_of(node) is Role.VIEW and node.args[0] in known and node.args[0].op != "placeholder":  # type: ignore[union-attr]
            node = node.args[0]  # type: ignore[assignment]
        if node not in found:
            value = node.meta["val"]
            numbers = value.is_floating_point() or value.is_complex()
            found[node] = _form_of(program, node, model) if numbers else None
    return {node: form for node, form in found.items() if form is not None}


def _form_of(program: Program, node: fx.Node, model: nn.Module) -> _Form | None:
    """None unless the last dimension, or the one before it, counts positions, and those before are of size one."""
    try:
        piece = Slice.of(program, [node], model)
        shapes = [list(_run(piece, program, range(n))[0].shape) for n in (_FEW, _FEW + 4)]
    except SliceError as error:
        log.debug("%s stays computed: %s", node.name, error)
        return None
    places = [d for d, (few, more) in enumerate(zip(*shapes, strict=True)) if few != more]
    shape = shapes[0]
    if piece.users_by_value != ("position_ids",) or len(places) != 1 or places[0] < len(shape) - 2:
        return None
    if shape[places[0]] != _FEW or any(size != 1 for size in shape[: places[0]]):
        return None
    return _Form(places[0], shape[-1] if places[0] < len(shape) - 1 else None)


def _read_by_others(program: Program, known: Sequence[fx.Node]) -> Iterator[fx.Node]:
    inside = set(known)
    for node in known:
        if node.op != "placeholder" and any(u not in inside for u in node.users):
            yield node


def _is_worth(piece: Slice, nodes: Mapping[fx.Node, _Form], longest: int) -> bool:
    """Whether fewer kernels run, for tables that are small."""
    computed = [n for n in piece.module.graph.nodes if n.op == "call_function" and not is_free(n)]
    row = sum((form.width or 1) * n.meta["val"].element_size() for n, form in nodes.items())
    return len(computed) > len({n.meta["val"].dtype for n in nodes}) and longest * row <= LARGEST_TABLE


def _run(piece: Slice, program: Program, positions: Sequence[int]) -> tuple[Tensor, ...]:
    device = next((t.device for t in program.example.values()), torch.device("cpu"))
    return piece(dict.fromkeys(piece.users, torch.tensor([list(positions)], device=device)))


def _rows(piece: Slice, program: Program, positions: Sequence[int]) -> list[Tensor]:
    """Of each value its rows, `[T, width]`."""
    return [value.reshape(len(positions), -1) for value in _run(piece, program, positions)]


def _are_rows(piece: Slice, program: Program, longest: int) -> bool:
    """Whether the value of a position is the same bits in whatever company it is computed."""
    every = _rows(piece, program, range(longest))
    some = torch.randint(longest, (_FEW,), generator=torch.Generator().manual_seed(0)).tolist()
    trials = ([0], [longest - 1], [longest // 2], [*range(min(_FEW, longest)), longest - 1], some)
    return all(
        torch.equal(table[positions], rows)
        for positions in trials
        for table, rows in zip(every, _rows(piece, program, positions), strict=True)
    )


def _look_up(
    program: Program, piece: Slice, nodes: Mapping[fx.Node, _Form], longest: int, context: Context, result: PassResult
) -> None:
    graph = program.graph
    positions = next(n for n, made in program.placeholder_inputs().items() if made.target == "position_ids")
    first = next(n for n in graph.nodes if n.op != "placeholder")
    for dtype in dict.fromkeys(n.meta["val"].dtype for n in nodes):
        members = [n for n in nodes if n.meta["val"].dtype == dtype]
        recipe = _recipe(piece, [list(nodes).index(n) for n in members], longest, context.settings.device)
        ends = list(accumulate(nodes[n].width or 1 for n in members))
        with positions.meta["val"].fake_mode, graph.inserting_before(first):
            node = graph.placeholder(f"table_of_positions_{len(program.inputs)}")
            empty = torch.empty(longest, ends[-1], dtype=dtype, device=context.settings.device)
            node.meta = {"val": empty, "weight": True}
            rows = _call(graph, members[0], aten.embedding.default, node, positions)
            for member, end in zip(members, ends, strict=True):
                part = _call(graph, member, aten.slice.Tensor, rows, -1, end - (nodes[member].width or 1), end)
                member.replace_all_uses_with(_in_shape(graph, part, member, nodes[member]))
        program.inputs.append(Input(node.name, InputKind.PACKED, f"model.{node.name}", recipe=recipe))
        label = f"{len(members)} values of positions -> a table of {longest} rows"
        names = tuple(m.name for m in members)
        result.rewrites.append(
            Rewrite("tabulate", module_of(members[0]), source_of(members[0]), label, names, (rows.name,))
        )
    graph.eliminate_dead_code()
    program.tabulated = longest


def _in_shape(graph: fx.Graph, part: fx.Node, member: fx.Node, form: _Form) -> fx.Node:
    """`[1, T, D]` with the node's dimensions: others of size one before T, or none; D left out where it has none."""
    if form.width is None:
        part = _call(graph, member, aten.select.int, part, -1, 0)
    if form.before == 0:
        return _call(graph, member, aten.select.int, part, 0, 0)
    for d in range(1, form.before):
        part = _call(graph, member, aten.unsqueeze.default, part, d)
    return part


def _recipe(piece: Slice, chosen: Sequence[int], longest: int, device: torch.device) -> Recipe:
    """The chosen values of the slice at every position, side by side: `[longest, width]`."""
    graph, holder = fx.Graph(), torch.nn.Module()
    copies: dict[fx.Node, fx.Node] = {}
    sources: list[str] = []
    placeholders = [n for n in piece.module.graph.nodes if n.op == "placeholder"]
    meanings = list(zip(placeholders, piece.inputs, strict=True))
    for node, made in meanings:
        if made.kind in (InputKind.PARAMETER, InputKind.BUFFER):
            copies[node] = graph.placeholder(f"weight_{len(sources)}")
            sources.append(made.target)
        elif made.kind is not InputKind.USER:
            holder.register_buffer(made.name, made.value)
            copies[node] = graph.get_attr(made.name)
    line = graph.call_function(aten.arange.default, (longest,), {"device": device})
    everything = graph.call_function(aten.unsqueeze.default, (line, 0))
    copies |= {node: everything for node, made in meanings if made.kind is InputKind.USER}  # of others, the sizes
    for node in piece.module.graph.nodes:
        if node.op == "call_function":
            copies[node] = graph.node_copy(node, copies.__getitem__)
            copies[node].name = f"step_{len(copies)}"
    output: Any = next(n for n in piece.module.graph.nodes if n.op == "output").args[0]
    rows = [graph.call_function(aten.reshape.default, (copies[output[i]], [longest, -1])) for i in chosen]
    graph.output(graph.call_function(aten.cat.default, (rows, 1)))
    return Recipe(fx.GraphModule(holder, graph), tuple(sources))


def _call(graph: fx.Graph, like: fx.Node, target: Any, *args: Any) -> fx.Node:
    node = graph.call_function(target, args)
    node.meta = {**like.meta, "val": target(*fx.map_arg(args, lambda n: n.meta["val"]))}
    return node
