"""Remove what model code and export leave behind, so that each idea has one spelling before rules look for it.

    _assert_*, no-op cast / expand / slice / view / clone / dropout, x + 0, x * 1      -> gone
    view, _unsafe_view, flatten                                                        -> reshape, past a clone
    split, chunk, unbind with numbers for sizes                                        -> slices and selects
    permute of two dims, t, transposes of transposes                                   -> one transpose, or nothing
    to.dtype, type_as                                                                  -> _to_copy(dtype=)
    einsum of two operands with one contracted index                                   -> matmul
    equal nodes                                                                        -> one node
    views, once no pattern of RAISE looks for them                                     -> right before their first user

A number that is computed from numbers (the square root of a head size, as a tensor) is noted as such, for rules.

What the assertions guarded (sizes and their equality) is checked at the runtime's entry instead.
"""

from __future__ import annotations

import operator
import time
from collections import Counter
from typing import Any

import torch
from torch import fx

from ..compiler.opset import CASTS, RESHAPES, Role, role_of
from ..compiler.program import Program
from ..compiler.records import PassResult
from ..compiler.rule import Stage

aten = torch.ops.aten

_ASSERTIONS = frozenset(
    [
        aten._assert_tensor_metadata.default,
        aten._assert_scalar.default,
        aten._assert_async.msg,
        aten.sym_constrain_range.default,
        aten.sym_constrain_range_for_size.default,
    ]
)
_PASS_THROUGH = frozenset(
    [aten.alias.default, aten.detach.default, aten.lift_fresh_copy.default, aten.contiguous.default]
)
_SPLITS = frozenset([aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.unbind.int])
_DROPOUTS = frozenset([aten.dropout.default, aten.native_dropout.default, aten.feature_dropout.default])


def canonicalize(program: Program, name: str = "canonicalize") -> PassResult:
    """Clean the program's graph in place (the caller recompiles); `removed` counts what went, by kind."""
    started = time.perf_counter()
    graph, removed = program.graph, Counter[str]()
    stage = Stage.CANONICALIZE if name == "canonicalize" else Stage.RAISE
    result = PassResult(name, stage.name, nodes_before=len(graph.nodes))
    note_numbers(program)
    functional = all(role_of(n) is not Role.MUTATE for n in graph.nodes if n.op == "call_function")
    for node in list(graph.nodes):
        if node.op == "call_function" and not node._erased:
            _simplify(graph, node, removed, functional)
    for _ in range(4):
        if not _merge_equal(graph, removed) + _merge_reshapes(graph, removed) + _merge_transposes(graph, removed):
            break
    graph.eliminate_dead_code()
    if functional and stage is Stage.RAISE:
        _delay_views(graph)
    graph.lint()
    result.removed = dict(removed)
    result.nodes_after = len(graph.nodes)
    result.time_s = time.perf_counter() - started
    return result


def note_numbers(program: Program) -> None:
    """Give `meta["constant"]` to nodes that are one number in every call: lifted constants and what is made of them.

    Equal lifted constants (each layer has its own) become one.
    """
    known: dict[fx.Node, torch.Tensor] = {}
    first: dict[Any, fx.Node] = {}
    for node, meaning in program.placeholder_inputs().items():
        if meaning.value is not None and meaning.value.dim() == 0 and not meaning.value.is_meta:
            known[node] = meaning.value
            number = node.meta["constant"] = meaning.value.item()
            same = first.setdefault((meaning.value.dtype, meaning.value.device, number), node)
            if same is not node:
                node.replace_all_uses_with(same)
    for node in program.graph.nodes:
        value = node.meta.get("val")
        if node.op != "call_function" or not isinstance(value, torch.Tensor) or value.dim() or not _is_pure(node):
            continue
        if all(i in known for i in node.all_input_nodes):
            args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), known.__getitem__)
            known[node] = node.target(*args, **kwargs)  # type: ignore[operator]
            node.meta["constant"] = known[node].item()


def _is_pure(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and _is_deterministic(node)


def same_tensor(a: Any, b: Any) -> bool:
    """Equal dtype, device and shape, symbolic sizes compared by expression (the shape environment is not asked)."""
    if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor):
        return False
    return a.dtype == b.dtype and a.device == b.device and a.dim() == b.dim() and all(map(same_size, a.shape, b.shape))


def same_size(a: Any, b: Any) -> bool:
    """Two sizes that are the same number or the same expression."""
    if isinstance(a, torch.SymInt) and isinstance(b, torch.SymInt):
        return bool(a.node.expr == b.node.expr)
    return isinstance(a, int) and isinstance(b, int) and a == b


def _simplify(graph: fx.Graph, node: fx.Node, removed: Counter[str], functional: bool) -> None:
    """One node. Where something in the graph is written to, copies are not nothing: they stay."""
    target = node.target
    if target in _ASSERTIONS:
        graph.erase_node(node)
        removed["assertion"] += 1
        return
    if target is aten.einsum.default:
        _to_matmul(graph, node, removed)
        return
    if target is aten.cat.default and functional:
        _without_empty_parts(graph, node, removed)
        return
    if not node.args or not isinstance(node.args[0], fx.Node):
        return
    source = node.args[0]
    if target in CASTS and target is not aten._to_copy.default:
        _to_cast(node)
    elif target in RESHAPES or target is aten.flatten.using_ints:
        _to_reshape(graph, node)
    elif target in _SPLITS:
        _to_slices(graph, node, source, removed)
        return
    elif target in (aten.permute.default, aten.t.default):
        _to_transpose(node)
    kind = _no_op(node, source) if functional else None
    if kind is not None:
        node.replace_all_uses_with(source)
        graph.erase_node(node)
        removed[kind] += 1


def _without_empty_parts(graph: fx.Graph, node: fx.Node, removed: Counter[str]) -> None:
    """cat([a, b[..., n:]]) where nothing is left of b: a itself."""
    result, parts = node.meta["val"], node.args[0]
    assert isinstance(parts, list | tuple)
    dim = int(_argument(node, 1, "dim", 0)) % max(result.dim(), 1)
    values = [p.meta["val"] for p in parts if isinstance(p, fx.Node)]
    if len(values) < len(parts) or any(v.dtype != result.dtype or v.dim() != result.dim() for v in values):
        return
    kept = [p for p, v in zip(parts, values) if not _is_number(v.shape[dim], 0)]
    if kept and len(kept) < len(parts):
        removed["empty part"] += len(parts) - len(kept)
        node.args = (kept, *node.args[1:])
        if len(kept) == 1:
            node.replace_all_uses_with(kept[0])
            graph.erase_node(node)


def _to_cast(node: fx.Node) -> None:
    node.target = aten._to_copy.default
    node.args, node.kwargs = (node.args[0],), {"dtype": node.meta["val"].dtype}


def _to_slices(graph: fx.Graph, node: fx.Node, source: fx.Node, removed: Counter[str]) -> None:
    """Each part of a split along a dim of known size reads the source directly."""
    parts = node.meta.get("val")
    taken = [u for u in node.users if u.target is operator.getitem]
    if not isinstance(parts, list | tuple) or len(taken) != len(node.users):
        return
    rank = source.meta["val"].dim()
    position = 1 if node.target is aten.unbind.int else 2
    dim = int(_argument(node, position, "dim", 0)) % rank
    unbound = node.target is aten.unbind.int
    sizes = [1 if unbound else part.shape[dim] for part in parts]
    if not all(isinstance(size, int) for size in sizes):
        return
    for part in taken:
        i = int(part.args[1])  # type: ignore[arg-type]
        start = sum(sizes[:i])
        with graph.inserting_before(part):
            if unbound:
                view = graph.call_function(aten.select.int, (source, dim, start))
            else:
                view = graph.call_function(aten.slice.Tensor, (source, dim, start, start + sizes[i]))
        view.meta.update(part.meta)
        part.replace_all_uses_with(view)
        graph.erase_node(part)
    graph.erase_node(node)
    removed["split"] += 1


def _to_matmul(graph: fx.Graph, node: fx.Node, removed: Counter[str]) -> None:
    """`bhqd,bhkd->bhqk` as a product of matrices; other equations stay."""
    equation, operands = str(node.args[0]).replace(" ", ""), node.args[1]
    left, arrow, out = equation.partition("->")
    parts = left.split(",")
    if not arrow or len(parts) != 2 or "." in equation or any(len(set(p)) < len(p) for p in (*parts, out)):
        return
    a, b = parts
    shared = [c for c in a if c in b]
    batch, summed = "".join(c for c in shared if c in out), [c for c in shared if c not in out]
    rows, columns = [c for c in a if c not in b], [c for c in b if c not in a]
    if not (len(summed) == len(rows) == len(columns) == 1) or set(out) != {*batch, *rows, *columns}:
        return
    with graph.inserting_before(node):
        x = _ordered(graph, operands[0], a, batch + rows[0] + summed[0])  # type: ignore[index, arg-type]
        y = _ordered(graph, operands[1], b, batch + summed[0] + columns[0])  # type: ignore[index, arg-type]
        product = graph.call_function(aten.matmul.default, (x, y))
        product.meta.update(node.meta)
        natural = batch + rows[0] + columns[0]
        product.meta["val"] = node.meta["val"].permute([out.index(c) for c in natural])
        node.replace_all_uses_with(_ordered(graph, product, natural, out))
    graph.erase_node(node)
    removed["einsum"] += 1


def _ordered(graph: fx.Graph, node: fx.Node, letters: str, wanted: str) -> fx.Node:
    """The tensor with its dimensions in another order."""
    if letters == wanted:
        return node
    order = [letters.index(c) for c in wanted]
    moved = graph.call_function(aten.permute.default, (node, order))
    moved.meta.update(node.meta)
    moved.meta["val"] = node.meta["val"].permute(order)
    _to_transpose(moved)
    return moved


def _to_transpose(node: fx.Node) -> None:
    rank = node.meta["val"].dim()
    order = [d % rank for d in node.args[1]] if node.target is aten.permute.default else [1, 0][:rank]  # type: ignore[union-attr]
    moved = [i for i, d in enumerate(order) if i != d]
    if len(moved) == 2:
        node.target, node.args, node.kwargs = aten.transpose.int, (node.args[0], *moved), {}


def _to_reshape(graph: fx.Graph, node: fx.Node) -> None:
    if node.target is aten.flatten.using_ints:
        sizes = _sizes_from(graph, node)
        if sizes is None:
            return
        node.args, node.kwargs = (node.args[0], sizes), {}
    node.target = aten.reshape.default


def _sizes_from(graph: fx.Graph, node: fx.Node) -> list[Any] | None:
    """Sizes of a flattened tensor with at most the flattened one (-1) unknown; None where two are symbolic there."""
    source, value = node.args[0].meta["val"], node.meta["val"]  # type: ignore[union-attr]
    rank = source.dim()
    start, end = (int(d) % rank for d in (*node.args[1:], *(0, -1)[len(node.args) - 1 :]))  # type: ignore[arg-type]
    if rank == 0 or value.dim() != rank - (end - start):
        return None
    sizes: list[Any] = []
    for i in range(value.dim()):
        if i == start and end > start:
            sizes.append(-1)
        elif isinstance(value.shape[i], int):
            sizes.append(value.shape[i])
        else:
            with graph.inserting_before(node):
                dim = graph.call_function(aten.sym_size.int, (node.args[0], i if i < start else i + end - start))
            dim.meta["val"] = value.shape[i]
            sizes.append(dim)
    return sizes


def _no_op(node: fx.Node, source: fx.Node) -> str | None:
    """What kind of nothing the node does, or None."""
    target = node.target
    if target in _DROPOUTS and not _argument(node, 2, "train", False):
        return "dropout"
    if not same_tensor(source.meta.get("val"), node.meta.get("val")):
        return None
    if target in _PASS_THROUGH:
        return "alias"
    if target in CASTS:
        return "no-op cast"
    if target is aten.clone.default and not any(u.target is aten.as_strided.default for u in node.users):
        return "clone"
    if target in RESHAPES:
        return "no-op reshape"
    if target is aten.expand.default:
        return "no-op expand"
    if target is aten.slice.Tensor and _argument(node, 4, "step", 1) == 1:
        return "no-op slice"
    if target in (aten.add.Tensor, aten.sub.Tensor) and len(node.args) > 1 and _is_number(node.args[1], 0):
        return "add 0"
    if (
        target in (aten.mul.Tensor, aten.div.Tensor)
        and len(node.args) == 2
        and not node.kwargs
        and _is_number(node.args[1], 1)
    ):
        return "multiply by 1"
    return None


def _argument(node: fx.Node, position: int, name: str, default: Any) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def _is_number(value: Any, number: int) -> bool:
    return isinstance(value, int | float) and value == number


def _merge_equal(graph: fx.Graph, removed: Counter[str]) -> int:
    """Common subexpressions: the later of two equal calls reads the earlier."""
    seen: dict[Any, fx.Node] = {}
    merged = 0
    for node in list(graph.nodes):
        if node.op != "call_function" or not _is_deterministic(node):
            continue
        key = (node.target, _frozen(node.args), _frozen(node.kwargs))
        first = seen.setdefault(key, node)
        if first is not node:
            node.replace_all_uses_with(first)
            graph.erase_node(node)
            merged += 1
    if merged:
        removed["common subexpression"] += merged
    return merged


def _is_deterministic(node: fx.Node) -> bool:
    if node.target in (operator.getitem, aten.sym_size.int) or getattr(node.target, "__module__", "") in (
        "_operator",
        "torch",
        "math",
    ):
        return True
    if not isinstance(node.target, torch._ops.OpOverload) or role_of(node) is Role.MUTATE:
        return False
    return torch.Tag.nondeterministic_seeded not in node.target.tags


def _frozen(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return tuple(_frozen(v) for v in value)
    if isinstance(value, dict):
        return tuple(sorted((k, _frozen(v)) for k, v in value.items()))
    if isinstance(value, slice):
        return ("slice", _frozen(value.start), _frozen(value.stop), _frozen(value.step))
    return (type(value).__name__, value) if isinstance(value, bool | int | float) else value


def _merge_reshapes(graph: fx.Graph, removed: Counter[str]) -> int:
    """A reshape of a reshape reads the first one's source; one that gives back its source's shape goes."""
    merged = 0
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target is not aten.reshape.default:
            continue
        source = node.args[0]
        if isinstance(source, fx.Node) and source.target is aten.reshape.default:
            node.update_arg(0, source.args[0])
            source = source.args[0]
            merged += 1
        if isinstance(source, fx.Node) and same_tensor(source.meta.get("val"), node.meta.get("val")):
            node.replace_all_uses_with(source)
            graph.erase_node(node)
            merged += 1
    if merged:
        removed["reshape of a reshape"] += merged
    return merged


def _merge_transposes(graph: fx.Graph, removed: Counter[str]) -> int:
    """A transpose that undoes the one before it."""
    merged = 0
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target is not aten.transpose.int or not isinstance(node.args[0], fx.Node):
            continue
        source = node.args[0]
        if source.target is not aten.transpose.int:
            continue
        rank = node.meta["val"].dim()
        if {int(d) % rank for d in node.args[1:]} == {int(d) % rank for d in source.args[1:]}:  # type: ignore[arg-type]
            node.replace_all_uses_with(source.args[0])  # type: ignore[arg-type]
            graph.erase_node(node)
            merged += 1
    if merged:
        removed["transpose of a transpose"] += merged
    return merged


def _delay_views(graph: fx.Graph) -> None:
    """Put each view right before its first user.

    A view of one output that stands before the inputs of another (v's heads before the rotation's tables, in a model's
    first layer) would keep the two from coming out of one node.
    """
    for node in reversed(list(graph.nodes)):
        if node.op == "call_function" and role_of(node) is Role.VIEW:
            min(node.users).prepend(node)
