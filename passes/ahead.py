"""Kernels that are about to be compared with what they replace, compiled several at a time before the first of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from ..compiler.verify import Evaluator
from ..kernels.op import Kernel

Wanted = tuple[Kernel, Sequence[Any], Mapping[str, Any]]
"""A kernel with arguments as a node has them."""


def compile_ahead(wanted: Sequence[Wanted], evaluator: Evaluator, device: torch.device) -> None:
    """Have these kernels on a GPU; one that cannot be compiled says so when it is compared."""
    if device.type != "cuda" or not wanted:
        return
    from ..kernels.compiling import ahead  # Triton is there where there are kernels

    known = [w for w in wanted if _computed(w, evaluator)]  # now: later nothing is computed
    ahead([lambda kernel=k, a=args, kw=kwargs: _run(kernel, a, kw, evaluator) for k, args, kwargs in known])  # type: ignore[misc]


def _computed(wanted: Wanted, evaluator: Evaluator) -> bool:
    """Compute the arguments; where memory does not reach, the comparison says so."""
    _, args, kwargs = wanted
    try:
        fx.node.map_arg((tuple(args), dict(kwargs)), lambda n: evaluator.is_packed(n) or evaluator.value(n))
    except torch.OutOfMemoryError:
        return False
    return True


def _run(kernel: Kernel, args: Sequence[Any], kwargs: Mapping[str, Any], evaluator: Evaluator) -> None:
    """On the values of the arguments; packed weights, which are made anew each time, are memory of their form."""

    def read(node: fx.Node) -> Any:
        if not evaluator.is_packed(node):
            return evaluator.value(node)
        like = node.meta["val"]
        return torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=like.device)

    values, named = fx.node.map_arg((tuple(args), dict(kwargs)), read)
    kernel.run(*values, **named)
