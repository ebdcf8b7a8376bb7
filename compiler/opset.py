"""Facts about operators that patterns, the matcher and the clean-up passes share: one table.

An `OpSpec` gathers the spellings of one idea (`aten.view`, `aten._unsafe_view` and `aten.reshape` are all "reshape"),
says whether its first two operands commute, and what role it plays.
"""

from __future__ import annotations

import enum
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import fx

aten = torch.ops.aten


class Role(enum.Enum):
    """What an operator does to its first operand, as far as moving or repeating it is concerned."""

    PURE = "pure"
    VIEW = "view"
    """Changes only shape or strides: free to repeat."""
    CAST = "cast"
    """Changes only the dtype."""
    MUTATE = "mutate"
    """Writes to an operand: nothing is matched across it."""


@dataclass(frozen=True)
class OpSpec:
    """One idea and all its overloads; `commutative` speaks of the first two operands."""

    name: str
    targets: frozenset[Any]
    commutative: bool = False
    role: Role = Role.PURE


def _spec(name: str, *targets: Any, commutative: bool = False, role: Role = Role.PURE) -> OpSpec:
    return OpSpec(name, frozenset(targets), commutative, role)


_SPECS = (
    _spec("add", aten.add.Tensor, aten.add.Scalar, commutative=True),
    _spec("sub", aten.sub.Tensor, aten.sub.Scalar),
    _spec("mul", aten.mul.Tensor, aten.mul.Scalar, commutative=True),
    _spec("div", aten.div.Tensor, aten.div.Scalar),
    _spec("neg", aten.neg.default),
    _spec("pow", aten.pow.Tensor_Scalar),
    _spec("square", aten.square.default),
    _spec("sqrt", aten.sqrt.default),
    _spec("rsqrt", aten.rsqrt.default),
    _spec("reciprocal", aten.reciprocal.default),
    _spec("mean", aten.mean.dim),
    _spec("sum", aten.sum.dim_IntList),
    _spec("var", aten.var.correction),
    _spec("tanh", aten.tanh.default),
    _spec("exp", aten.exp.default),
    _spec("erf", aten.erf.default),
    _spec("sigmoid", aten.sigmoid.default),
    _spec("relu", aten.relu.default),
    _spec("silu", aten.silu.default),
    _spec("gelu", aten.gelu.default),
    _spec("clamp", aten.clamp.default),
    _spec("clamp_max", aten.clamp_max.default),
    _spec("matmul", aten.matmul.default, aten.bmm.default, aten.mm.default),
    _spec("maximum", aten.maximum.default, aten.max.other),
    _spec("amax", aten.amax.default),
    _spec("max_dim", aten.max.dim),
    _spec("nan_to_num", aten.nan_to_num.default),
    _spec("getitem", operator.getitem),
    _spec("baddbmm", aten.baddbmm.default),
    _spec("addmm", aten.addmm.default),
    _spec("linear", aten.linear.default),
    _spec(
        "conv", *(overload for op in (aten.conv1d, aten.conv2d, aten.conv3d) for overload in (op.default, op.padding))
    ),
    _spec("softmax", aten.softmax.int, aten._softmax.default),
    _spec("sdpa", aten.scaled_dot_product_attention.default),
    _spec("layer_norm", aten.layer_norm.default),
    _spec("rms_norm_aten", aten.rms_norm.default),
    _spec("where", aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf),
    _spec("masked_fill", aten.masked_fill.Scalar, aten.masked_fill.Tensor),
    _spec("cat", aten.cat.default),
    _spec("stack", aten.stack.default),
    _spec("dropout", aten.dropout.default),
    _spec("glu_aten", aten.glu.default),
    _spec("clone", aten.clone.default),
    _spec("embedding", aten.embedding.default),
    _spec("repeat_interleave", aten.repeat_interleave.self_int),
    _spec("cast", aten._to_copy.default, aten.to.dtype, aten.to.dtype_layout, aten.type_as.default, role=Role.CAST),
    _spec("reshape", aten.view.default, aten._unsafe_view.default, aten.reshape.default, role=Role.VIEW),
    _spec("view_as_complex", aten.view_as_complex.default, role=Role.VIEW),
    _spec("view_as_real", aten.view_as_real.default, role=Role.VIEW),
    _spec("flatten", aten.flatten.using_ints, role=Role.VIEW),
    _spec("unflatten", aten.unflatten.int, role=Role.VIEW),
    _spec("transpose", aten.transpose.int, role=Role.VIEW),
    _spec("permute", aten.permute.default, role=Role.VIEW),
    _spec("t", aten.t.default, role=Role.VIEW),
    _spec("unsqueeze", aten.unsqueeze.default, role=Role.VIEW),
    _spec("squeeze", aten.squeeze.dim, role=Role.VIEW),
    _spec("expand", aten.expand.default, role=Role.VIEW),
    _spec("slice", aten.slice.Tensor, role=Role.VIEW),
    _spec("select", aten.select.int, role=Role.VIEW),
    _spec("narrow", aten.narrow.default, role=Role.VIEW),
    _spec("chunk", aten.chunk.default, role=Role.VIEW),
    _spec("split", aten.split.Tensor, aten.split_with_sizes.default, role=Role.VIEW),
    _spec("alias", aten.alias.default, aten.detach.default, role=Role.VIEW),
)

OPS: Mapping[str, OpSpec] = {spec.name: spec for spec in _SPECS}
BY_TARGET: Mapping[Any, OpSpec] = {target: spec for spec in _SPECS for target in spec.targets}

CASTS = OPS["cast"].targets
RESHAPES = OPS["reshape"].targets
VIEWS = frozenset(target for spec in _SPECS if spec.role is Role.VIEW for target in spec.targets)


def spec_of(name: str) -> OpSpec:
    """The spec for a builder attribute: an entry of the table, or a semantic op of namespace `regraft`.

    Where ATen has the same name (`layer_norm`), `regraft_layer_norm` is ours.
    """
    if name in OPS:
        return OPS[name]
    overload = getattr(getattr(torch.ops.regraft, name.removeprefix("regraft_"), None), "default", None)
    if overload is None:
        raise AttributeError(
            f"unknown operator {name!r} in a pattern; known: {', '.join(sorted(OPS))} and the ops of torch.ops.regraft"
        )
    return OpSpec(name, frozenset([overload]))


def role_of(node: fx.Node) -> Role:
    """The role of a node; operators outside the table are pure unless their schema writes to an operand."""
    spec = BY_TARGET.get(node.target)
    if spec is not None:
        return spec.role
    schema = getattr(node.target, "_schema", None)
    return Role.MUTATE if schema is not None and schema.is_mutable else Role.PURE


def is_free(node: fx.Node) -> bool:
    """True where computing the node twice costs nothing, so that it may stay beside a fused copy of it."""
    return role_of(node) in (Role.VIEW, Role.CAST) or node.target is aten.sym_size.int


@lru_cache(maxsize=1024)
def _schema_args(target: Any) -> tuple[tuple[str, Any, bool], ...] | None:
    schema = getattr(target, "_schema", None)
    if schema is None:
        return None
    return tuple(
        (a.name, a.default_value if a.has_default_value() else None, a.has_default_value()) for a in schema.arguments
    )


_DIM_NAMES = frozenset(["dim", "dim0", "dim1", "start_dim", "end_dim"])


def arguments(node: fx.Node) -> dict[str, Any]:
    """The node's arguments by schema name, defaults filled in, and dims counted from the end (always negative).

    `transpose` gets its two dims in ascending order, since their order means nothing.
    """
    described = _schema_args(node.target)
    if described is None:
        return {str(i): a for i, a in enumerate(node.args)} | dict(node.kwargs)
    result: dict[str, Any] = {}
    for i, (name, default, _) in enumerate(described):
        result[name] = node.args[i] if i < len(node.args) else node.kwargs.get(name, default)
    if _DIM_NAMES & result.keys():
        _normalize_dims(node, result)
    return result


def _normalize_dims(node: fx.Node, result: dict[str, Any]) -> None:
    first = next((v for v in result.values() if isinstance(v, fx.Node)), None)
    if first is None:
        first = next(
            (u for v in result.values() if isinstance(v, list | tuple) for u in v if isinstance(u, fx.Node)), None
        )
    value = first.meta.get("val") if first is not None else None
    if not isinstance(value, torch.Tensor):
        return
    rank = value.dim() + (1 if node.target in (aten.unsqueeze.default, aten.stack.default) else 0)

    def negative(dim: Any) -> Any:
        return dim - rank if isinstance(dim, int) and dim >= 0 else dim

    for name in _DIM_NAMES & result.keys():
        dim = result[name]
        result[name] = [negative(d) for d in dim] if isinstance(dim, list | tuple) else negative(dim)
    if node.target is aten.transpose.int:
        result["dim0"], result["dim1"] = sorted((result["dim0"], result["dim1"]))


def scalar_of(value: Any) -> float | int | bool | None:
    """The number behind a Python scalar, a `full([], c)` or a lifted one-element constant; None for everything else."""
    if isinstance(value, bool | int | float):
        return value
    if not isinstance(value, fx.Node):
        return None
    if value.target is aten.full.default and list(value.args[0]) == []:  # type: ignore[arg-type]
        filled = value.args[1]
        return filled if isinstance(filled, bool | int | float) else None
    if value.target is aten.scalar_tensor.default:
        return value.args[0] if isinstance(value.args[0], bool | int | float) else None
    if value.target in (aten.lift_fresh_copy.default, aten.clone.default) or value.target in CASTS:
        return scalar_of(value.args[0])
    constant = value.meta.get("constant")
    return constant if isinstance(constant, bool | int | float) else None
