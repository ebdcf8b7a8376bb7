"""Kernels that read weights before the kernels in front have ended: where they may stand, and how they are compared."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import fx

from ..compiler.opset import OPS
from ..kernels.op import Kernel, Op

_PARTS = frozenset(target for name in ("slice", "select", "narrow", "alias") for target in OPS[name].targets)
"""A part of a weight is as still as the weight, and its rows lie as the weight's do."""


def moving_of(node: fx.Node, op: Op, weights: Collection[fx.Node]) -> frozenset[str]:
    """The tensor arguments that are no weights: kernels shortly before the node's may write them."""
    names = [argument.name for argument in op.overload._schema.arguments]
    named = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    return frozenset(
        name for name, value in named.items() if isinstance(value, fx.Node) and not _is_weight(value, weights)
    )


def _is_weight(value: fx.Node, weights: Collection[fx.Node]) -> bool:
    while value.target in _PARTS and isinstance(value.args[0], fx.Node):
        value = value.args[0]
    return value in weights or value.op == "get_attr"


def at_rest(kernel: Kernel) -> Callable[..., Any]:
    """Its `run`, begun when what it reads early is written: packed weights are made right in front of a check."""
    if not kernel.early or not torch.cuda.is_available():
        return kernel.run

    def run(*args: Any, **kwargs: Any) -> Any:
        torch.cuda.synchronize()
        return kernel.run(*args, **kwargs)

    return run
