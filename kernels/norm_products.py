"""A product behind the norm of a sum: what stands in front of attention and of the MLP in most decoders.

    y, s = add_rms_norm(x, residual, norm_weight, norm_eps, ...);  product(y, weight, ...), s

Beside a product of many rows the norm is nothing; beside one of a single row its launch is not. So these ops stand in
no graph: `passes/pairs.py` finds the pairs of nodes that they are, and the number of rows decides, call by call. Their
arguments are those of `add_rms_norm`, with `norm_` in front of what is no tensor of rows, then the product's but for x.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final

import torch
from torch import Tensor

from .cost import Cost, nbytes
from .linear_act import gate_up, linear_act
from .op import Op, define
from .qkv_rope import qkv_rope
from .rms_norm import add_rms_norm, result_dtype

NORM: Final = 7
"""Arguments of a joint op that are those of `add_rms_norm`."""


def _joint(product: Op) -> Op:
    """The op of a norm and that product, its schema put together from theirs."""
    plain = inspect.Parameter.empty
    first = inspect.signature(add_rms_norm.reference).parameters.values()
    norm = [p.replace(name=p.name if i < 2 else f"norm_{p.name}", default=plain) for i, p in enumerate(first)]
    rest = [p.replace(default=plain) for p in inspect.signature(product.reference).parameters.values()][1:]
    signature = inspect.Signature([*norm, *rest], return_annotation="tuple[Tensor, Tensor]")

    def reference(*args: Any, **named: Any) -> tuple[Tensor, Tensor]:
        given = signature.bind(*args, **named).args
        y, s = add_rms_norm.reference(*given[:NORM])
        return product.reference(y, *given[NORM:]), s

    def cost(*args: Any, **named: Any) -> Cost:
        """The normalised rows are neither written nor read."""
        given = signature.bind(*args, **named).args
        x, residual, weight, _, offset, mid_dtype, out_dtype = given[:NORM]
        total = torch.promote_types(x.dtype, residual.dtype)
        y = x.to(result_dtype(total, None if weight is None else weight.dtype, offset, mid_dtype, out_dtype))
        return add_rms_norm.cost(*given[:NORM]) + product.cost(y, *given[NORM:]) + Cost(bytes=-2 * nbytes(y))

    reference.__name__ = f"norm_{product.name}"
    reference.__doc__ = f"`y, s = add_rms_norm(x, residual, norm_...)`, then `{product.name}(y, ...), s`."
    reference.__signature__ = signature  # type: ignore[attr-defined]
    return define(cost=cost)(reference)


norm_linear_act: Final = _joint(linear_act)
norm_gate_up: Final = _joint(gate_up)
norm_qkv_rope: Final = _joint(qkv_rope)

JOINT: Final[Mapping[str, Op]] = MappingProxyType(
    {linear_act.name: norm_linear_act, gate_up.name: norm_gate_up, qkv_rope.name: norm_qkv_rope}
)
"""The joint op by the product's name."""

PARTS: Final[Mapping[str, tuple[str, str]]] = MappingProxyType(
    {joint.name: (add_rms_norm.name, product) for product, joint in JOINT.items()}
)
"""The ops that a joint op stands for, by its name."""
