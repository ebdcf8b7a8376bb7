"""Bring the graph that Dynamo hands to a backend to the form that capture makes: functional ATen with named inputs.

Dynamo's graph is written with torch functions, takes sizes as integers beside the tensors they belong to, and the
weights of every module as arguments. Here sizes are read from the tensors instead, the graph is exported again
(`run_decompositions({})` makes it functional and leaves `linear` whole), and arguments that live in a module's
`_parameters` or `_buffers` become weights under their qualified names.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import Tensor, fx, nn
from torch._guards import tracing
from torch.export import Dim
from torch.export.graph_signature import InputKind as ExportKind
from torch.fx.traceback import preserve_node_meta

from .errors import CaptureError, first_lines
from .one_tracer import tracing_alone
from .program import Input, InputKind, Program
from .quiet import quiet
from .strided import keep_layouts

_ATTRIBUTE = re.compile(r"\['([^']+)'\]|\.([A-Za-z_]\w*)")


@dataclass(frozen=True)
class Argument:
    """One placeholder of Dynamo's graph: its position among the arguments, and what it is."""

    position: int
    name: str
    kind: InputKind
    target: str


@dataclass(frozen=True)
class DynamoProgram:
    """A program whose USER, PARAMETER and BUFFER inputs are all arguments of the call, found by `arguments`."""

    program: Program
    arguments: tuple[Argument, ...]
    numbers: tuple[tuple[int, float], ...] = ()
    """Positions of arguments that are numbers, and their values: the program holds for these alone."""


class _Interpreted(nn.Module):
    """Runs a graph node by node, so that each new node inherits module and source of the one it comes from."""

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__()
        self.gm = gm

    def forward(self, *tensors: Tensor) -> Any:
        return fx.Interpreter(self.gm).run(*tensors)


def from_dynamo(gm: fx.GraphModule, examples: Sequence[Any]) -> DynamoProgram:
    """The program of a Dynamo graph.

    `examples` are the arguments it was traced with, sizes included. Raises CaptureError where the graph cannot be
    exported again with the same sizes left open.
    """
    graph_module, arguments, numbers = _without_sizes(gm, examples)
    if not arguments:
        raise CaptureError("", "Dynamo's graph takes no tensors")
    tensors = tuple(examples[a.position].detach() for a in arguments)
    dynamic = tuple(_dynamic_dims(n) for n in graph_module.graph.nodes if n.op == "placeholder")
    try:
        # outside Dynamo's own tracing: sizes made here must not become guards of the frame it compiles
        with torch.no_grad(), tracing(None), preserve_node_meta(), tracing_alone(), quiet():
            exported = torch.export.export(
                _Interpreted(graph_module), tensors, dynamic_shapes=(dynamic,), strict=False
            ).run_decompositions({})
    except Exception as error:
        raise CaptureError("", f"Dynamo's graph cannot be exported: {first_lines(error)}") from error
    try:
        keep_layouts(exported.graph_module.graph)
    except ValueError as error:
        raise CaptureError("", str(error)) from error
    signature = exported.graph_signature
    if signature.buffers_to_mutate or signature.user_inputs_to_mutate:
        raise CaptureError("", "the graph writes to its inputs")
    inputs: list[Input] = []
    users = iter(arguments)
    for spec in signature.input_specs:
        name = getattr(spec.arg, "name", "")
        if spec.kind is ExportKind.USER_INPUT:
            argument = next(users)
            inputs.append(Input(name, argument.kind, argument.target))
        elif spec.kind is ExportKind.CONSTANT_TENSOR:
            inputs.append(Input(name, InputKind.CONSTANT, str(spec.target), value=exported.constants[str(spec.target)]))
        else:
            held = exported.state_dict.get(str(spec.target), exported.constants.get(str(spec.target)))
            inputs.append(Input(name, InputKind.CONSTANT, str(spec.target), value=held))
    module = fx.GraphModule(exported.graph_module, exported.graph_module.graph)
    example = {a.target: t for a, t in zip(arguments, tensors) if a.kind is InputKind.USER}
    return DynamoProgram(Program(module, inputs, rebuild=tuple, example=example), tuple(arguments), tuple(numbers))


def _without_sizes(
    gm: fx.GraphModule, examples: Sequence[Any]
) -> tuple[fx.GraphModule, list[Argument], list[tuple[int, float]]]:
    """A copy whose placeholders are tensors only; each size is read from a tensor that has it.

    With `dynamic=True` Dynamo hands in a float (`eps`, say) as a tensor that is read by `item()`: it becomes a number.
    """
    copied = copy.deepcopy(gm)
    graph = copied.graph
    placeholders = [n for n in graph.nodes if n.op == "placeholder"]
    holders: dict[str, tuple[fx.Node, int]] = {}
    for node in placeholders:
        value = node.meta.get("example_value")
        if isinstance(value, Tensor):
            for dim, size in enumerate(value.shape):
                if _is_open(size):
                    holders.setdefault(str(size.node.expr), (node, dim))
    body = next(n for n in graph.nodes if n.op != "placeholder")
    arguments: list[Argument] = []
    numbers: list[tuple[int, float]] = []
    originals = [n for n in gm.graph.nodes if n.op == "placeholder"]  # a copied node forgets its source
    for position, (node, original) in enumerate(zip(placeholders, originals, strict=True)):
        value = node.meta.get("example_value")
        if _is_number(node, examples[position]):
            number = float(examples[position])
            for read in list(node.users):
                read.replace_all_uses_with(number)  # type: ignore[arg-type]
                graph.erase_node(read)
            graph.erase_node(node)
            numbers.append((position, number))
            continue
        if isinstance(value, Tensor):
            kind, target = _meaning(original)
            arguments.append(Argument(position, node.name, kind, target))
            continue
        if not isinstance(value, torch.SymInt | int):
            raise CaptureError("", f"the graph takes {node.name}, a {type(value).__name__}, as an argument")
        if not _is_open(value):
            node.replace_all_uses_with(int(value))  # type: ignore[arg-type]
        else:
            if str(value.node.expr) not in holders:
                raise CaptureError("", f"the graph takes the number {node.name}, which is no tensor's size")
            with graph.inserting_before(body):
                length = graph.call_function(torch.ops.aten.sym_size.int, holders[str(value.node.expr)])
            node.replace_all_uses_with(length)
        graph.erase_node(node)
    copied.recompile()
    return copied, arguments, numbers


def _is_number(node: fx.Node, example: object) -> bool:
    """Whether a placeholder is a Python float that Dynamo has made a tensor of."""
    float64 = type(example) is Tensor and example.dtype == torch.float64 and example.ndim == 0
    return float64 and all(u.op == "call_method" and u.target == "item" for u in node.users)


def _meaning(node: fx.Node) -> tuple[InputKind, str]:
    """What Dynamo's source of an argument says: a weight under its qualified name, or an argument of the user's."""
    source = getattr(node.meta.get("grapharg"), "source", None)
    text = source.name if source is not None else ""
    text = text() if callable(text) else str(text)
    parts = [a or b for a, b in _ATTRIBUTE.findall(text)]
    for kind, container in ((InputKind.PARAMETER, "_parameters"), (InputKind.BUFFER, "_buffers")):
        if len(parts) > 1 and parts[-2] == container:
            path = [p for p in parts[1:-2] if p != "_modules"] + parts[-1:]
            return kind, ".".join(path)
    return InputKind.USER, node.name


def _dynamic_dims(node: fx.Node) -> dict[int, Any]:
    value = node.meta["example_value"]
    return {dim: Dim.DYNAMIC for dim, size in enumerate(value.shape) if _is_open(size)}


def _is_open(size: int | torch.SymInt) -> TypeGuard[torch.SymInt]:
    """Whether a size may vary: a symbol may have become a number as Dynamo traced on (a new mask of fixed length)."""
    return isinstance(size, torch.SymInt) and not size.node.expr.is_number
