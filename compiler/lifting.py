"""From torch's `ExportedProgram` to `Program`: what each placeholder is, without noise and without copying weights."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import sympy
import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind as ExportKind

from .program import Guard, Input, InputKind, Limits
from .strided import keep_layouts

_CHECKS = {
    torch.ops.aten._assert_tensor_metadata.default,
    torch.ops.aten._assert_scalar.default,
    torch.ops.aten.sym_constrain_range_for_size.default,
    torch.ops.aten.sym_constrain_range.default,
}


def lift(exported: ExportedProgram, prefix: str, model: nn.Module) -> tuple[fx.GraphModule, list[Input]]:
    """The graph and its inputs. Names lose `prefix` (the wrapper that was exported); tied weights become one input.

    Checks on sizes go: `Limits` has them. Raises `ValueError` where the forward writes to an input or a buffer, or
    where it reads memory that no graph can lay out.
    """
    signature = exported.graph_signature
    if signature.buffers_to_mutate or signature.user_inputs_to_mutate:
        written = [*signature.buffers_to_mutate.values(), *signature.user_inputs_to_mutate.values()]
        names = [str(w).removeprefix(prefix).removeprefix("tensors_") for w in written]
        raise ValueError(f"the forward writes to {', '.join(names)}")
    graph = exported.graph_module.graph
    _drop_size_checks(graph)
    keep_layouts(graph)
    tensors = _named_tensors(model)
    specs = {getattr(spec.arg, "name", ""): spec for spec in signature.input_specs}
    first: dict[int, fx.Node] = {}
    inputs: list[Input] = []
    for node in [n for n in graph.nodes if n.op == "placeholder"]:
        made = _input(node, specs[node.name], prefix, exported)
        inputs.append(made)
        if made.kind in (InputKind.PARAMETER, InputKind.BUFFER) and node.users:  # by a name that the graph reads
            kept = first.setdefault(id(tensors[made.target]), node)
            if kept is not node:
                node.replace_all_uses_with(kept)
    _drop_dead(graph)
    inputs = _drop_unused(graph, inputs)
    for node in graph.nodes:
        _strip_modules(node, prefix)
    module = fx.GraphModule(exported.graph_module, graph)
    return module, inputs


def _input(node: fx.Node, spec: Any, prefix: str, exported: ExportedProgram) -> Input:
    target = str(spec.target or "")
    if spec.kind is ExportKind.USER_INPUT:
        return Input(node.name, InputKind.USER, node.name.removeprefix("tensors_"))
    if spec.kind is ExportKind.PARAMETER:
        return Input(node.name, InputKind.PARAMETER, target.removeprefix(prefix))
    if spec.kind is ExportKind.BUFFER:
        return Input(node.name, InputKind.BUFFER, target.removeprefix(prefix))
    if spec.kind is ExportKind.CONSTANT_TENSOR:
        return Input(node.name, InputKind.CONSTANT, target, value=exported.constants[target])
    raise ValueError(f"the graph has an input of kind {spec.kind}")


def _named_tensors(model: nn.Module) -> dict[str, Tensor]:
    named: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    named.update(model.named_buffers(remove_duplicate=False))
    return named


def _drop_dead(graph: fx.Graph) -> None:
    """Nodes that nobody reads; random numbers among them, but no write and no check."""
    for node in reversed(list(graph.nodes)):
        if node.op not in ("call_function", "get_attr") or node.users:
            continue
        if node.target in _CHECKS or getattr(getattr(node.target, "_schema", None), "is_mutable", False):
            continue
        if isinstance(node.target, torch._ops.OpOverload) and "assert" in node.target.name():
            continue
        graph.erase_node(node)


def _drop_unused(graph: fx.Graph, inputs: list[Input]) -> list[Input]:
    kept = []
    for node, made in zip([n for n in graph.nodes if n.op == "placeholder"], inputs, strict=True):
        if not node.users and made.kind is not InputKind.USER:
            graph.erase_node(node)
        else:
            kept.append(made)
    return kept


def _drop_size_checks(graph: fx.Graph) -> None:
    """Remove assertions that read nothing but sizes, dtypes and constants; those on values stay."""
    for node in reversed(list(graph.nodes)):
        if node.target in _CHECKS and not node.users and not _reads_values(node):
            graph.erase_node(node)


def _reads_values(node: fx.Node) -> bool:
    if node.target is torch.ops.aten._assert_tensor_metadata.default:
        return False
    stack, seen = list(node.all_input_nodes), set()
    while stack:
        current = stack.pop()
        if current in seen or current.target is torch.ops.aten.sym_size.int:
            continue
        seen.add(current)
        if isinstance(current.meta.get("val"), Tensor):
            return True
        stack += current.all_input_nodes
    return False


def _strip_modules(node: fx.Node, prefix: str) -> None:
    stack = node.meta.get("nn_module_stack")
    if stack:
        name = prefix.removesuffix(".")
        entries = {}
        for key, (path, kind) in stack.items():
            if path == "" and kind != "":  # the wrapper
                continue
            entries[key] = ("" if path == name else path.removeprefix(prefix), kind)
        node.meta["nn_module_stack"] = entries


def limits_of(exported: ExportedProgram, module: fx.GraphModule, inputs: list[Input]) -> Limits:
    """Sizes, ranges and relations under which the exported graph holds.

    Export assumes sizes of at least 2 for dynamic dimensions and says so as a lower bound of 2; a graph without a
    relation that breaks at 1 holds there too, so the bound is lowered.
    """
    limits = Limits()
    placeholders = [n for n in module.graph.nodes if n.op == "placeholder"]
    for node, made in zip(placeholders, inputs, strict=True):
        if made.kind is InputKind.USER:
            value = node.meta["val"]
            shape = tuple(map(_size, value.shape))
            limits.tensors[made.target] = Guard(value.dtype, shape)
    for symbol, bounds in exported.range_constraints.items():
        low, high = _finite(bounds.lower), _finite(bounds.upper)
        limits.ranges[str(symbol)] = (1 if low is None or low <= 2 else low, high)
    for text in getattr(exported, "_guards_code", None) or []:
        limits.conditions.append((_readable(text), _compiled(text)))
    return limits


def _finite(bound: Any) -> int | None:
    return int(bound) if isinstance(bound, sympy.Integer | int) and abs(int(bound)) < 2**62 else None


def _size(size: Any) -> int | str:
    """A size, or the text of a symbol; export leaves a dimension that it fixed as a constant expression."""
    if isinstance(size, int):
        return size
    expression = size.node.expr
    return int(expression) if isinstance(expression, sympy.Integer) else str(expression)


def _readable(text: str) -> str:
    return text.replace("L['tensors']", "").replace("['", "").replace("']", "")


def _compiled(text: str) -> Callable[[dict[str, Tensor]], bool]:
    """torch's own Python text of a guard, over `L['tensors'][name].size()[dim]`."""
    code = compile(text, "<guard>", "eval")
    scope = {"torch": torch, "operator": operator, "min": min, "max": max}

    def holds(tensors: dict[str, Tensor]) -> bool:
        return bool(eval(code, {"__builtins__": {}, **scope}, {"L": {"tensors": tensors}}))

    return holds
