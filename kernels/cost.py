"""What an op costs: FLOPs and bytes moved, as sympy expressions in the symbolic sizes."""

from __future__ import annotations

from dataclasses import dataclass

import sympy
import torch


@dataclass(frozen=True)
class Cost:
    """`flops`: each multiplication and addition counted as one. `bytes`: inputs read once, outputs written once."""

    flops: sympy.Expr = sympy.S.Zero
    bytes: sympy.Expr = sympy.S.Zero

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.bytes + other.bytes)


def size(value: int | torch.SymInt) -> sympy.Expr:
    """One size as a sympy expression."""
    return value.node.expr if isinstance(value, torch.SymInt) else sympy.Integer(value)


def sizes(tensor: torch.Tensor) -> tuple[sympy.Expr, ...]:
    """The shape of a real, fake or meta tensor."""
    return tuple(size(s) for s in tensor.shape)


def numel(tensor: torch.Tensor) -> sympy.Expr:
    """How many elements."""
    return sympy.prod(sizes(tensor))


def nbytes(*tensors: torch.Tensor | None) -> sympy.Expr:
    """Bytes of all elements, of the tensors that are there; a broadcast (stride 0) dimension counts once."""
    total = sympy.Integer(0)
    for tensor in tensors:
        if tensor is not None:
            stored = (size(s) for s, step in zip(tensor.shape, tensor.stride(), strict=True) if not _is_zero(step))
            total += sympy.prod(stored) * tensor.element_size()
    return total


def _is_zero(step: int | torch.SymInt) -> bool:
    return isinstance(step, int) and step == 0
