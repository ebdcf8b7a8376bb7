"""Graphs as text for a report: one line a node, grouped by layer, diffed by pass, traced back to source lines."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import fx

from ..compiler.cost import op_name
from ..compiler.program import Program
from ..compiler.provenance import module_of, source_of
from ..compiler.records import PassResult

_SHORT: Final = {
    torch.float32: "f32",
    torch.float64: "f64",
    torch.bfloat16: "bf16",
    torch.float16: "f16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.bool: "bool",
}
_RELEASE: Final = re.compile(r";  [\w =]+ = None$")
"""`;  x = y = None`, with which generated code drops values."""


def node_text(node: fx.Node) -> str:
    """`silu_3 = aten.silu(linear_9)  bf16[s43, s7, 112]`."""
    if node.op == "output":
        return f"return {_argument(node.args[0])}"
    if node.op == "placeholder":
        return f"{node.name}  {_value(node.meta.get('val'))}"
    given = [_argument(a) for a in node.args] + [f"{k}={_argument(v)}" for k, v in node.kwargs.items()]
    return f"{node.name} = {op_name(node)}({', '.join(given)})  {_value(node.meta.get('val'))}".rstrip()


def _argument(value: Any) -> str:
    if isinstance(value, fx.Node):
        return value.name
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_argument, value)) + "]"
    return str(value).removeprefix("torch.")


def _value(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        dtype = _SHORT.get(value.dtype, str(value.dtype).removeprefix("torch."))
        return f"{dtype}[{', '.join(map(str, value.shape))}]"
    if isinstance(value, list | tuple):
        return "(" + ", ".join(map(_value, value)) + ")"
    return "" if value is None else f"= {value}"


def by_place(program: Program) -> list[tuple[str, list[fx.Node]]]:
    """Runs of nodes in the same layer, in graph order: `[("model.layers.0", [...]), ...]`. Placeholders come first."""
    groups: list[tuple[str, list[fx.Node]]] = []
    for node in program.graph.nodes:
        place = "inputs and weights" if node.op == "placeholder" else _layer(module_of(node))
        if not groups or groups[-1][0] != place:
            groups.append((place, []))
        groups[-1][1].append(node)
    return groups


def _layer(module: str) -> str:
    """`model.layers.3.mlp.up_proj` -> `model.layers.3`; without an index, the whole path."""
    parts = module.split(".")
    index = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    return module if index is None else ".".join(parts[: index + 1])


def places(nodes: Iterable[fx.Node]) -> list[tuple[str, str]]:
    """Each node's text and the source line it came from."""
    return [(node_text(n), source_of(n) if n.op == "call_function" else "") for n in nodes]


def diff_lines(before: str, after: str) -> list[str]:
    """Unified diff of two printed graphs, without headers, comments and what only releases memory."""
    lines = difflib.unified_diff(_statements(before), _statements(after), lineterm="", n=1)
    return [line for line in lines if not line.startswith(("---", "+++"))]


def _statements(text: str) -> list[str]:
    stripped = (_RELEASE.sub("", line.strip()) for line in text.splitlines())
    return [s for s in stripped if s and not s.startswith(("#", "class ", "def "))]


@dataclass(frozen=True)
class SourceLine:
    """One line of the model's code: what it was captured as, and the rules that took part of it."""

    source: str
    nodes: int
    ops: tuple[str, ...]
    rules: tuple[str, ...]


def source_lines(program: Program, passes: Sequence[PassResult]) -> list[SourceLine]:
    """Every source line that made nodes, by file and line, over all layers together."""
    rules: dict[str, set[str]] = {}
    for result in passes:
        for rewrite in result.rewrites:
            if rewrite.rule != "lower":
                for name in rewrite.replaced:
                    rules.setdefault(name, set()).add(rewrite.rule)
    found: dict[str, list[fx.Node]] = {}
    for node in program.graph.nodes:
        source = source_of(node) if node.op == "call_function" else ""
        if source:
            found.setdefault(source, []).append(node)
    lines = []
    for source, nodes in sorted(found.items(), key=lambda item: _position(item[0])):
        ops = tuple(dict.fromkeys(op_name(n) for n in nodes))
        taken = sorted({rule for n in nodes for rule in rules.get(n.name, ())})
        lines.append(SourceLine(source, len(nodes), ops, tuple(taken)))
    return lines


def _position(source: str) -> tuple[str, int]:
    file, _, rest = source.partition(":")
    number = rest.split(" ", 1)[0]
    return file, int(number) if number.isdigit() else 0
