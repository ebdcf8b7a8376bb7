"""An exported graph brought to functional ATen, node by node.

`ExportedProgram.run_decompositions({})` traces the whole program again, twice, with symbolic shapes: two thirds of the
time of a capture. With an empty table all it does is this, which needs no second look at the other nodes:

* composite ops that may return an alias of their input (`to`, `reshape`, `contiguous`, `flatten`, `chunk`, dropout in
  eval mode) become what they dispatch to for these shapes: a copy, a view, or nothing;
* an in-place op on a fresh tensor becomes its functional form.

Layers repeat, so each distinct call is traced once. A graph with anything else in it (writes through views, nested
graphs) goes through `run_decompositions`.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.export import ExportedProgram
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

aten = torch.ops.aten
_IDENTITIES = (aten.detach.default, aten.detach_.default, aten.lift_fresh.default)
_PROVENANCE = ("nn_module_stack", "stack_trace", "source_fn_stack", "torch_fn", "from_node")


class _Whole(Exception):
    """This graph needs the whole program to be traced again; the message says why."""


def functional(exported: ExportedProgram) -> ExportedProgram:
    """The program in functional ATen. Where it can be done node by node, in place."""
    graph = exported.graph_module.graph
    try:
        _refuse_hard_cases(graph)
    except _Whole:
        return exported.run_decompositions({})
    known: dict[Any, _Piece] = {}
    symbols: dict[str, fx.Node] = {}
    for node in list(graph.nodes):
        if node.op == "call_function" and isinstance(node.meta.get("val"), torch.SymInt):
            symbols.setdefault(str(node.meta["val"].node.expr), node)
        if node.op != "call_function" or not isinstance(node.target, OpOverload):
            continue
        if node.target in _IDENTITIES:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
        elif node.target is aten.lift_fresh_copy.default:
            node.target = aten.clone.default
        elif node.target._schema.is_mutable:
            _make_functional(node)
        elif is_aliasing_composite(node.target):
            _expand(node, known, symbols)
    return exported


def is_aliasing_composite(op: OpOverload) -> bool:
    """Composite ops that functional ATen does not keep: those that return their input, or a view of it, at times."""
    composite = torch._C._dispatch_has_kernel_for_dispatch_key(op.name(), "CompositeImplicitAutograd")
    if not (composite or torch._C.DispatchKey.CompositeImplicitAutograd in op.py_kernels):
        return False
    unsafe = torch.Tag.maybe_aliasing_or_mutating in op.tags
    return unsafe or op in FunctionalTensor.metadata_fns or any(a.alias_info for a in op._schema.arguments)


def _refuse_hard_cases(graph: fx.Graph) -> None:
    order = {node: i for i, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        if node.op == "get_attr":
            raise _Whole("a nested graph")
        if node.op != "call_function":
            continue
        if not isinstance(node.target, OpOverload):
            if isinstance(node.target, torch._ops.HigherOrderOperator):
                raise _Whole("a nested graph")
            continue
        if node.target in _IDENTITIES or not node.target._schema.is_mutable:
            continue
        _functional_form(node)
        written = node.args[0]
        if not isinstance(written, fx.Node) or written.op == "placeholder" or _may_alias(written):
            raise _Whole("a write through a view or to an input")
        if any(order[user] < order[node] and _may_alias(user) for user in written.users):
            raise _Whole("a write to a tensor with views")


def _may_alias(node: fx.Node) -> bool:
    """Whether a node's value may share memory with one of its operands."""
    if node.op != "call_function":
        return node.op != "output"
    if not isinstance(node.target, OpOverload):
        return node.target is operator.getitem
    schema = node.target._schema
    if node.target is aten.lift_fresh_copy.default:
        return False
    if schema.is_mutable:
        return node.target in _IDENTITIES
    return is_aliasing_composite(node.target) or any(r.alias_info for r in schema.returns)


def _functional_form(node: fx.Node) -> OpOverload:
    assert isinstance(node.target, OpOverload)
    schema = node.target._schema
    written = [a for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    name = schema.name.split("::")[1]
    packet = getattr(aten, name.removesuffix("_"), None) if name.endswith("_") else None
    overload = getattr(packet, schema.overload_name or "default", None) if packet is not None else None
    if overload is None or len(written) != 1 or schema.arguments[0] is not written[0] or schema.name[:4] != "aten":
        raise _Whole(f"{schema.name} has no functional form")
    source = node.args[0]
    before = source.meta.get("val") if isinstance(source, fx.Node) else None
    others = [a.meta.get("val") for a in node.all_input_nodes if a is not source]
    if not isinstance(before, Tensor) or any(
        isinstance(o, Tensor) and o.dtype != before.dtype and o.dtype not in (torch.bool, torch.int64) for o in others
    ):
        raise _Whole("an in-place op that casts")
    if any(isinstance(o, Tensor) and o.dim() > before.dim() for o in others):
        raise _Whole("an in-place op that broadcasts")
    return overload  # type: ignore[no-any-return]


def _make_functional(node: fx.Node) -> None:
    """`x.op_(y)` -> `z = x.op(y)`, and everything later that read x reads z."""
    written = node.args[0]
    assert isinstance(written, fx.Node)
    node.target = _functional_form(node)
    later = False
    users = set(written.users)
    for other in node.graph.nodes:
        if other is node:
            later = True
        elif later and other in users:
            other.replace_input_with(written, node)


@dataclass(frozen=True)
class _Piece:
    """What one call dispatches to: a graph whose placeholders are the call's tensors and symbols."""

    graph: fx.Graph


def _expand(node: fx.Node, known: dict[Any, _Piece], symbols: dict[str, fx.Node]) -> None:
    leaves, spec = tree_flatten((list(node.args), dict(node.kwargs)))
    positions = [i for i, leaf in enumerate(leaves) if isinstance(leaf, fx.Node)]
    values = [leaves[i].meta["val"] for i in positions]
    key = (node.target, tuple(map(_described, values)), tuple(repr(x) for x in leaves if not isinstance(x, fx.Node)))
    if key not in known:

        def call(*given: Any) -> Any:
            filled = list(leaves)
            for i, value in zip(positions, given, strict=True):
                filled[i] = value
            args, kwargs = tree_unflatten(filled, spec)
            return node.target(*args, **kwargs)  # type: ignore[operator]

        with _mode_of(values):
            known[key] = _Piece(make_fx(call, tracing_mode="real", _allow_non_fake_inputs=True)(*values).graph)
    _inline(node, known[key].graph, [leaves[i] for i in positions], symbols)


def _inline(node: fx.Node, piece: fx.Graph, operands: list[fx.Node], symbols: dict[str, fx.Node]) -> None:
    """Put the piece in the node's place; a size that the graph has already computed is not computed again."""
    graph = node.graph
    env: dict[fx.Node, fx.Node] = {}
    given = iter(operands)
    result: Any = None
    with graph.inserting_before(node):
        for old in piece.nodes:
            if old.op == "placeholder":
                env[old] = next(given)
            elif old.op == "output":
                result = tree_map(lambda x: env[x] if isinstance(x, fx.Node) else x, old.args[0])
            elif _expression(old) in symbols:
                env[old] = symbols[_expression(old)]
            else:
                env[old] = graph.node_copy(old, lambda n: env[n])
                env[old].meta = {k: v for k, v in old.meta.items() if k in ("val", "tensor_meta")}
                env[old].meta.update({k: node.meta[k] for k in _PROVENANCE if k in node.meta})
    if isinstance(result, fx.Node):
        node.replace_all_uses_with(result)
    else:
        for user in list(node.users):
            user.replace_all_uses_with(result[user.args[1]])
            graph.erase_node(user)
    graph.erase_node(node)


def _expression(node: fx.Node) -> str:
    value = node.meta.get("val")
    return str(value.node.expr) if isinstance(value, torch.SymInt) else ""


def _described(value: Any) -> Any:
    if isinstance(value, Tensor):
        return (value.dtype, value.device, str(tuple(value.shape)), str(value.stride()), value.storage_offset() == 0)
    return (type(value).__name__, str(value))


@contextmanager
def _mode_of(values: list[Any]) -> Iterator[None]:
    mode = next((v.fake_mode for v in values if isinstance(v, torch._subclasses.FakeTensor)), None)
    if mode is None:
        yield
        return
    with mode, torch.no_grad():
        yield
