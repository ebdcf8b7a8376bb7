"""What a node of a graph costs: FLOPs and bytes in the symbolic sizes, and from them a time on a device.

The time is a roofline: the larger of arithmetic and traffic at the device's rates, plus a launch. It ranks rewrites and
says how far a measured time is from what the device could do; it does not predict what a bad kernel takes.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from ..kernels.cost import Cost, nbytes, numel, sizes
from ..kernels.op import Op
from ..kernels.table import OPS, PROVIDERS, op_of
from .device import Device
from .provenance import module_of
from .shapes import evaluate

aten = torch.ops.aten
Hints = Mapping[sympy.Symbol, int]
FREE = Cost()
UNKNOWN_SIZE = 1024
"""What a size that depends on data counts as, where a number is needed."""

_COPIES = frozenset(["contiguous", "reshape", "flatten", "to", "type_as", "_to_copy", "_reshape_alias"])
_LOOKUPS = frozenset(["embedding", "index_select", "gather", "index", "take_along_dim"])
_CONVOLUTIONS = frozenset(["convolution", "conv1d", "conv2d", "conv3d"])
_SDPA = frozenset(
    [
        "scaled_dot_product_attention",
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
        "_scaled_dot_product_fused_attention_overrideable",
    ]
)


def node_cost(node: fx.Node) -> Cost:
    """FLOPs and bytes of one node, which must carry `meta["val"]`.

    Our own ops know their cost; matrix products, convolutions, attention and lookups are exact; views, symbolic sizes
    and constants are free; everything else reads its inputs and writes its outputs once, one FLOP an output element.
    A higher-order op costs what the graphs it calls cost.
    """
    if node.op in ("call_module", "call_method"):
        raise ValueError(f"{node.op} {node.target} has no cost: not a functional ATen graph")
    if node.op != "call_function" or node.target is operator.getitem:
        return FREE
    if isinstance(node.target, torch._ops.HigherOrderOperator):
        called = [_attribute(node, a) for a in node.args if isinstance(a, fx.Node) and a.op == "get_attr"]
        return total(node_cost(n) for sub in called if isinstance(sub, fx.GraphModule) for n in sub.graph.nodes)
    outputs = _tensors(node.meta.get("val"))
    own = called_op(node.target)
    if not outputs or (own is None and not isinstance(node.target, torch._ops.OpOverload)):
        return FREE
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: n.meta.get("val"))
    if own is not None:
        return own.cost(*args, **kwargs)
    assert isinstance(node.target, torch._ops.OpOverload)
    name = node.target._schema.name.removeprefix("aten::")
    inputs = _tensors((args, kwargs))
    if _is_view(node.target, name, inputs, outputs):
        return FREE
    moved = nbytes(*outputs)
    if name in _LOOKUPS:
        return Cost(sympy.S.Zero, 2 * moved + nbytes(*inputs[1:]))
    moved += nbytes(*inputs)
    return Cost(_flops(name, args, kwargs, inputs, outputs), moved)


def called_op(target: Any) -> Op | None:
    """The op of ours that a node's target computes: the op itself, its reference, or its kernels, bound or not."""
    if not callable(target):
        return None
    return op_of(target) or _implementations().get(getattr(target, "__wrapped__", target))


@functools.cache
def _implementations() -> Mapping[Any, Op]:
    kernels = {kernel.run: kernel.op for providers in PROVIDERS.values() for kernel in providers}
    return kernels | {op.reference: op for op in OPS.values()}


def _flops(name: str, args: Any, kwargs: Any, inputs: list[torch.Tensor], outputs: list[torch.Tensor]) -> sympy.Expr:
    out = numel(outputs[0])
    if name in ("linear", "mm", "bmm", "matmul"):
        return 2 * out * sizes(inputs[0])[-1] + (out if len(inputs) > 2 else 0)
    if name in ("addmm", "baddbmm", "addbmm"):
        return 2 * out * sizes(inputs[1])[-1] + out
    if name in _CONVOLUTIONS:
        return 2 * out * sympy.prod(sizes(inputs[1])[1:])  # weight [out channels, in channels / groups, *kernel]
    if name.startswith("conv_transpose"):
        return 2 * numel(inputs[0]) * sympy.prod(sizes(inputs[1])[1:])  # [in channels, out channels / groups, *kernel]
    if name in _SDPA:
        (batch, heads, queries, width), keys = sizes(inputs[0]), sizes(inputs[1])[2]
        pairs = batch * heads * queries * keys
        causal = kwargs.get("is_causal", len(args) > 5 and args[5] is True)
        return pairs * 2 * (width + sizes(inputs[2])[3]) / (2 if causal else 1)
    if name in ("arange", "full", "zeros", "ones", "empty", "clone", "copy", "cat", "stack", "_to_copy"):
        return sympy.S.Zero
    if name in ("softmax", "_softmax", "log_softmax", "_log_softmax", "layer_norm", "native_layer_norm", "group_norm"):
        return 5 * out
    largest = max(map(numel, inputs), key=lambda n: evaluate(n, {}, UNKNOWN_SIZE), default=out)
    return largest if name in ("mean", "sum", "amax", "amin", "var", "cumsum", "any", "all", "prod") else out


def _is_view(target: torch._ops.OpOverload, name: str, inputs: list[torch.Tensor], outputs: list[torch.Tensor]) -> bool:
    """True where the node moves no data. An aliasing op that may copy (`reshape`, `to`) does where it has to."""
    aliases = any(r.alias_info is not None and not r.alias_info.is_write for r in target._schema.returns)
    if name == "_unsafe_view":
        return True
    if not aliases or not inputs:
        return False
    if name not in _COPIES:
        return True
    if name in ("to", "type_as", "_to_copy"):
        return inputs[0].dtype == outputs[0].dtype and inputs[0].device == outputs[0].device
    try:
        return inputs[0].is_contiguous()
    except GuardOnDataDependentSymNode:  # sizes are numbers that the graph computes
        return False


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, Mapping):
        return [t for v in value.values() for t in _tensors(v)]
    if isinstance(value, list | tuple):
        return [t for v in value for t in _tensors(v)]
    return []


def _attribute(node: fx.Node, called: fx.Node) -> Any:
    value: Any = node.graph.owning_module
    for part in str(called.target).split("."):
        value = getattr(value, part, None)
    return value


def total(costs: Iterable[Cost]) -> Cost:
    """The sum, added up once: sympy sorts a sum's terms each time it is built."""
    listed = list(costs)
    return Cost(sympy.Add(*(c.flops for c in listed)), sympy.Add(*(c.bytes for c in listed)))


def node_dtype(node: fx.Node) -> torch.dtype | None:
    """The dtype that decides how fast a node computes: that of its first floating-point operand, else of its result."""
    values = [*(n.meta.get("val") for n in node.all_input_nodes), node.meta.get("val")]
    return next((t.dtype for v in values for t in _tensors(v) if t.dtype.is_floating_point), None)


def roofline(cost: Cost, device: Device, dtype: torch.dtype | None, hints: Hints | None = None) -> float:
    """Microseconds: the larger of arithmetic and traffic, plus one launch; nothing for what costs nothing."""
    flops = evaluate(cost.flops, hints or {}, UNKNOWN_SIZE)
    moved = evaluate(cost.bytes, hints or {}, UNKNOWN_SIZE)
    if not flops and not moved:
        return 0.0
    return max(flops / device.flops_of(dtype), moved / device.bytes_per_s) * 1e6 + device.launch_us


def node_us(node: fx.Node, device: Device, hints: Hints) -> float:
    """Roofline time of one node run as a kernel of its own, in microseconds."""
    return roofline(node_cost(node), device, node_dtype(node), hints)


def subgraph_us(nodes: Iterable[fx.Node], device: Device, hints: Hints) -> float:
    """Roofline time of nodes run one after the other: a matched subgraph as it is, or the nodes that would replace it.

    New nodes need `meta["val"]`. What a single fused kernel would take is the cost of the node that stands for it.
    """
    return sum(node_us(n, device, hints) for n in nodes)


def rewriting_us(node: fx.Node, device: Device, hints: Hints) -> float:
    """`node_us` as rewrites are judged by it: libraries compute a convolution with channels last, and turn its input
    and its result in a pass of their own (16 x 16 patches of 64 images take nine times as long as the product)."""
    us = node_us(node, device, hints)
    schema = getattr(node.target, "_schema", None)
    if us and schema is not None and schema.name.removeprefix("aten::") in _CONVOLUTIONS:
        image = node.all_input_nodes[0]
        us += sum(roofline(Cost(sympy.S.Zero, 2 * nbytes(n.meta["val"])), device, None, hints) for n in (image, node))
    return us


@dataclass(frozen=True)
class Share:
    """What the nodes of one op, or of one module, cost together."""

    name: str
    count: int
    cost: Cost
    us: float


@dataclass(frozen=True)
class GraphCost:
    """The cost of a graph at given sizes."""

    total: Cost
    us: float
    by_op: tuple[Share, ...] = field(default=())
    """Longest first."""
    by_module: tuple[Share, ...] = field(default=())


def op_name(node: fx.Node) -> str:
    """`regraft.rms_norm`, `aten.linear`: what a table of ops calls a node, also after kernels were chosen."""
    own = called_op(node.target)
    if own is not None:
        return f"regraft.{own.name}"
    schema = getattr(node.target, "_schema", None)
    return schema.name.replace("::", ".") if schema is not None else str(getattr(node.target, "__name__", node.target))


def graph_cost(graph: fx.Graph, device: Device, hints: Hints) -> GraphCost:
    """Every node's cost, added up and grouped by op and by module (layer indices as `*`)."""
    by_op: dict[str, list[tuple[Cost, float]]] = {}
    by_module: dict[str, list[tuple[Cost, float]]] = {}
    for node in graph.nodes:
        cost = node_cost(node)
        us = roofline(cost, device, node_dtype(node), hints)
        if us:
            by_op.setdefault(op_name(node), []).append((cost, us))
            by_module.setdefault(over_layers(module_of(node)), []).append((cost, us))
    everything = [pair for pairs in by_op.values() for pair in pairs]
    return GraphCost(
        total(c for c, _ in everything), sum(us for _, us in everything), _shares(by_op), _shares(by_module)
    )


def _shares(groups: Mapping[str, list[tuple[Cost, float]]]) -> tuple[Share, ...]:
    shares = (Share(k, len(v), total(c for c, _ in v), sum(us for _, us in v)) for k, v in groups.items())
    return tuple(sorted(shares, key=lambda s: -s.us))


def over_layers(module: str) -> str:
    """`model.layers.3.mlp` as `model.layers.*.mlp`: the same place in every layer."""
    return ".".join("*" if part.isdigit() else part for part in module.split("."))
