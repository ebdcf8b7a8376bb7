"""What should have been found, against what was: a model with 32 layers has 32 attentions, not 31.

The counts come from three independent sides. The graph: a softmax between two matrix products, a mean or variance under
a reciprocal root, linears that read the same value and end in the same attention or product, all still there after the
passes, are what the passes left behind. The model's structure: layers that are equal, module for module, should have
been treated equally. The config: a model with attention heads has as many attentions as it has equal layers (or entries
of `layer_types` that name one), whatever form they came in.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import fx, nn

from ..kernels.linear_act import linear_act
from ..kernels.norm_products import PARTS
from ..kernels.qkv_rope import qkv_rope
from .cost import called_op
from .opset import CASTS, Role, arguments, role_of
from .program import Program
from .provenance import module_of, source_of

aten = torch.ops.aten

NORMS: Final = frozenset(["rms_norm", "add_rms_norm", "layer_norm", "add_layer_norm", "norm_rope"])
QKV_ROPE: Final = qkv_rope.name
"""The projection to q, k and v with both rotations and, where it has them, both norms."""
ATTENTION: Final = frozenset(["attention"])
ROPES: Final = frozenset(["rope", "norm_rope"])
LINEARS: Final = frozenset([aten.linear.default, aten.addmm.default, aten.mm.default])
PRODUCTS: Final = frozenset([aten.matmul.default, aten.bmm.default, aten.baddbmm.default])
SOFTMAX: Final = frozenset([aten.softmax.int, aten._softmax.default])
SDPA: Final = frozenset([aten.scaled_dot_product_attention.default])
ATEN_NORMS: Final = frozenset([aten.layer_norm.default, aten.native_layer_norm.default, aten.rms_norm.default])
ELEMENTWISE: Final = frozenset(
    ["add", "sub", "mul", "div", "where", "masked_fill", "dropout", "neg", "clamp", "clamp_min", "maximum", "tanh"]
)
ATTENDING_LAYERS: Final = frozenset(["full_attention", "sliding_attention", "chunked_attention"])
"""Entries of `config.layer_types` that are softmax attention; others name state-space or convolution layers."""

PASS_OF: Final[Mapping[str, str]] = {
    "attention": "attention",
    "norm": "rms_norm",
    "rope": "rope",
    "qkv": "qkv",
    "gate_up": "gate_up",
}
"""The pass that a user switches off to do without."""


@dataclass(frozen=True)
class Expectation:
    """One kind of thing: how many there should be, and how many there are."""

    what: str
    expected: int
    found: int
    missing: tuple[str, ...] = ()
    """Where, with the reason: `model.layers.3.self_attn: softmax left as it was (modeling_x.py:88 ...)`."""

    @property
    def met(self) -> bool:
        return self.found >= self.expected and not self.missing


def expectations(
    program: Program, config: Any = None, model: nn.Module | None = None, disabled: Collection[str] = ()
) -> tuple[Expectation, ...]:
    """Counts of a rewritten program against what its graph, the model's structure and its config say.

    `disabled` names passes that were switched off: what they would have found is not expected. Kinds that the model
    does not have at all are left out.
    """
    nodes = [n for n in program.graph.nodes if n.op == "call_function"]
    made = [
        _attention(nodes, config, model),
        _kind(
            "norm",
            [*_ops(nodes, NORMS), *_heads(nodes, normalised=True)],
            [n for n in nodes if _is_norm_left(n)],
            "a norm left as it was",
        ),
        _kind(
            "rope",
            [*_ops(nodes, ROPES), *_heads(nodes, normalised=False)],
            [n for n in nodes if _is_rotation_left(n)],
            "a rotation left as it was",
        ),
        _siblings("qkv", _ops(nodes, ATTENTION), ("q", "k", "v")),
        _siblings("gate_up", _ops(nodes, frozenset(["glu", "gate_up"])), ("gate", "up")),
    ]
    return tuple(e for e in made if (e.expected or e.found) and PASS_OF[e.what] not in disabled)


def layer_count(config: Any) -> int:
    """Layers that a config promises, towers and sub-configs added up; 0 where it does not say."""
    subs = [v for v in getattr(config, "__dict__", {}).values() if hasattr(v, "to_dict") and hasattr(v, "model_type")]
    inner = sum(layer_count(s) for s in subs)
    if inner:
        return inner
    both = (_number(config, "encoder_layers"), _number(config, "decoder_layers"))
    if all(both):
        return sum(both)
    own = next((c for c in (_number(config, n) for n in ("num_hidden_layers", "num_layers", "n_layer")) if c), 0)
    return own + (_number(config, "num_decoder_layers") if getattr(config, "is_encoder_decoder", False) else 0)


def _number(config: Any, name: str) -> int:
    value = getattr(config, name, 0)
    return value if isinstance(value, int) and not isinstance(value, bool) else 0


def _ops(nodes: Iterable[fx.Node], names: frozenset[str]) -> list[fx.Node]:
    return [n for n in nodes if not names.isdisjoint(_names(n))]


def _names(node: fx.Node) -> frozenset[str]:
    """The op of ours that a node computes; both where it is a joint one."""
    op = called_op(node.target)
    return frozenset() if op is None else frozenset(PARTS.get(op.name, (op.name,)))


def _heads(nodes: Iterable[fx.Node], *, normalised: bool) -> list[fx.Node]:
    """Fused projections, each once for q and once for k; with `normalised` those that have norms."""
    fused = _ops(nodes, frozenset([QKV_ROPE]))
    return [n for n in fused for _ in range(2) if not normalised or _given(n)["norm"]]


def _given(node: fx.Node) -> dict[str, Any]:
    """The arguments of a node of ours by name; kernels take those of their op."""
    op = called_op(node.target)
    assert op is not None
    names = [a.name for a in op.overload._schema.arguments]
    return dict(zip(names, node.args, strict=False)) | dict(node.kwargs)


def _kind(what: str, found: list[fx.Node], left: list[fx.Node], why: str) -> Expectation:
    return Expectation(what, len(found) + len(left), len(found), tuple(_place(n, why) for n in left))


def _place(node: fx.Node, why: str) -> str:
    source = source_of(node)
    return f"{module_of(node) or 'the model'}: {why}" + (f" ({source})" if source else "")


# -- attention ---------------------------------------------------------------------------------------------------------


def _attention(nodes: list[fx.Node], config: Any, model: nn.Module | None) -> Expectation:
    found = _ops(nodes, ATTENTION)
    raised = set(_ops(nodes, frozenset(["softmax"])))
    left = [n for n in nodes if n.target in SDPA or ((n.target in SOFTMAX or n in raised) and _is_between_products(n))]
    missing = [_place(n, "attention left as it was") for n in left]
    missing += _unequal_layers(found, model)
    seen = len(found) + len(left)
    promised = _promised_attentions(config, model)
    if promised > seen:
        missing.append(f"the config promises at least {promised} attentions, {seen} were recognised")
    return Expectation("attention", max(seen, promised), len(found), tuple(missing))


def _promised_attentions(config: Any, model: nn.Module | None) -> int:
    """At least how many attentions the config promises. Where layers differ, and no `layer_types` says how: unknown."""
    if config is None or model is None or not any(_number(config, n) for n in ("num_attention_heads", "n_head")):
        return 0
    kinds = getattr(config, "layer_types", None)
    if isinstance(kinds, list | tuple) and kinds:
        return sum(k in ATTENDING_LAYERS for k in kinds)
    layers = layer_count(config)
    stacks = equal_layers(model)
    return layers if sum(len(s) for s in stacks.values()) == layers and len(stacks) == 1 else 0


def _is_between_products(softmax: fx.Node) -> bool:
    """softmax(q @ k^T ...) @ v, with anything elementwise on either side."""
    above = _walk([softmax.args[0]], lambda n: list(n.all_input_nodes))
    below = _walk(list(softmax.users), lambda n: list(n.users))
    return any(n.target in PRODUCTS for n in above) and any(n.target in PRODUCTS for n in below)


def _walk(start: list[Any], step: Any) -> set[fx.Node]:
    """Everything reached through views, casts and elementwise operators, and the first node that is none of them."""
    seen: set[fx.Node] = set()
    stack = [n for n in start if isinstance(n, fx.Node)]
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if role_of(node) in (Role.VIEW, Role.CAST) or getattr(node.target, "_opname", "") in ELEMENTWISE:
            stack.extend(step(node))
    return seen


def equal_layers(model: nn.Module) -> dict[tuple[str, Any], list[str]]:
    """Elements of each list of modules, grouped by structure: same classes below, same shapes of parameters."""
    groups: dict[tuple[str, Any], list[str]] = defaultdict(list)
    for name, container in model.named_modules():
        if not isinstance(container, nn.ModuleList):
            continue
        for index, layer in container.named_children():
            parts = tuple((n, type(m).__name__) for n, m in layer.named_modules())
            shapes = tuple((n, tuple(p.shape)) for n, p in layer.named_parameters())
            if len(parts) > 2:
                groups[name, (parts, shapes)].append(f"{name}.{index}")
    return dict(groups)


def _unequal_layers(found: list[fx.Node], model: nn.Module | None) -> list[str]:
    """Layers without attention among equal ones that have it."""
    if model is None:
        return []
    modules = [module_of(n) for n in found]
    missing = []
    for (container, _), layers in equal_layers(model).items():
        having = [layer for layer in layers if any(m == layer or m.startswith(layer + ".") for m in modules)]
        ran = _layers_seen(found, layers)
        if having and len(having) < len(ran):
            lacking = sorted(set(ran) - set(having))
            missing.append(f"{container}: attention in {len(having)} of {len(ran)} equal layers, not in {lacking[0]}")
    return missing


def _layers_seen(found: list[fx.Node], layers: list[str]) -> list[str]:
    """Those of the layers that the graph computes at all."""
    graph = found[0].graph if found else None
    modules = {module_of(n) for n in graph.nodes if n.op == "call_function"} if graph is not None else set()
    return [layer for layer in layers if any(m == layer or m.startswith(layer + ".") for m in modules)]


# -- norms and rotations -----------------------------------------------------------------------------------------------


def _is_norm_left(node: fx.Node) -> bool:
    """A norm over the last dimension in ATen's own form: `layer_norm`, or 1 / sqrt(mean or variance + eps)."""
    if node.target in ATEN_NORMS:
        return True
    if getattr(node.target, "_opname", "") != "rsqrt":
        return False
    value = node.args[0]
    while isinstance(value, fx.Node) and (getattr(value.target, "_opname", "") == "add" or value.target in CASTS):
        value = value.args[0]
    if not isinstance(value, fx.Node) or getattr(value.target, "_opname", "") not in ("mean", "var"):
        return False
    dims = arguments(value).get("dim")
    return dims in ([-1], -1, (-1,))


def _is_rotation_left(node: fx.Node) -> bool:
    """cat([-x[half:], x[:half]], -1), the rotation of a rotary embedding."""
    if node.target is not aten.cat.default or not isinstance(node.args[0], list | tuple) or len(node.args[0]) != 2:
        return False
    first, second = node.args[0]
    if not (isinstance(first, fx.Node) and isinstance(second, fx.Node)) or first.target is not aten.neg.default:
        return False
    negated = first.args[0]
    halves = (negated, second)
    return all(isinstance(h, fx.Node) and role_of(h) is Role.VIEW for h in halves) and _base(negated) is _base(second)


def _base(node: Any) -> Any:
    while isinstance(node, fx.Node) and (role_of(node) is Role.VIEW or node.target is operator.getitem):
        node = node.args[0]
    return node


# -- siblings ----------------------------------------------------------------------------------------------------------


def _siblings(what: str, consumers: list[fx.Node], operands: tuple[str, ...]) -> Expectation:
    """Operands of one consumer that come from several linears of one input count as left unfused."""
    found, missing = 0, []
    for node in consumers:
        if "gate_up" in _names(node):
            found += 1
            continue
        values = _given(node)
        origins = [_linears(values.get(name)) for name in operands]
        by_input: dict[Any, set[fx.Node]] = defaultdict(set)
        for linear in set().union(*origins):
            by_input[linear.args[1] if linear.target is aten.addmm.default else linear.args[0]].add(linear)
        apart = [group for group in by_input.values() if len(group) > 1]
        if apart:
            missing.append(_place(min(apart[0]), f"{len(apart[0])} linears of the same input left apart"))
        elif any(len(o) == 1 and sum(o == other for other in origins) > 1 for o in origins):
            found += 1
    return Expectation(what, found + len(missing), found, tuple(missing))


def _linears(value: Any) -> set[fx.Node]:
    """The linears that a value is made of without any other matrix product in between."""
    found: set[fx.Node] = set()
    seen: set[fx.Node] = set()
    stack = [value] if isinstance(value, fx.Node) else []
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        names = _names(node)
        if node.target in LINEARS or not names.isdisjoint({linear_act.name, QKV_ROPE}):
            found.add(node)
            continue
        passes_on = role_of(node) in (Role.VIEW, Role.CAST) or node.target in (operator.getitem, aten.cat.default)
        passes_on = passes_on or getattr(node.target, "_opname", "") in ELEMENTWISE
        if passes_on or not names.isdisjoint(NORMS | ROPES | {"activation"}):
            first = node.args[0]
            stack.extend(n for n in (first if isinstance(first, list | tuple) else [first]) if isinstance(n, fx.Node))
    return found
