"""One thing to measure: an op on sizes of a model in use, its peers, and small parts of it to compare exactly."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from .op import Op

Arguments = dict[str, Any]
Peer = Callable[[Arguments], Callable[[], Any]]
"""Prepares what depends on shapes alone, and returns what is timed."""

Part = tuple[Arguments, Callable[[Tensor], Tensor]]
"""Arguments of a smaller call, and what its outputs are of the outputs of the whole."""

EPS: Final = 1e-6
FEW: Final = 32
"""Rows of one part."""


@dataclass(frozen=True)
class Case:
    """One measurement of an op.

    `arguments(device)` makes the op's keyword arguments, tensors filled with random numbers. `parts(arguments)` cuts
    out calls whose results are parts of the whole result: what is compared with a higher precision, which the whole
    would take too much memory for.
    """

    op: Op
    name: str
    dtype: torch.dtype
    arguments: Callable[[torch.device], Arguments]
    peers: Mapping[str, Peer]
    parts: Callable[[Arguments], list[Part]]

    def cost(self) -> tuple[int, int]:
        """FLOPs and bytes, from the op's cost on meta tensors."""
        cost = self.op.cost(**self.arguments(torch.device("meta")))
        return int(cost.flops), int(cost.bytes)


def plain(run: Callable[..., Any]) -> Peer:
    """A peer that takes the op's own arguments and prepares nothing."""
    return lambda arguments: lambda: run(**arguments)


def whole(arguments: Arguments) -> list[Part]:
    """The call itself, for small ones."""
    return [(arguments, lambda out: out)]


def some_rows(*names: str) -> Callable[[Arguments], list[Part]]:
    """A few rows from the beginning, the middle and the end of these tensors `[..., D]`, and of the results."""

    def cut(arguments: Arguments) -> list[Part]:
        count = arguments[names[0]].flatten(0, -2).shape[0]
        parts: list[Part] = []
        for start in sorted({0, max(0, count // 2 - FEW // 2), max(0, count - FEW)}):
            rows = slice(start, min(start + FEW, count))
            small = {n: arguments[n].flatten(0, -2)[rows] for n in names}
            parts.append(({**arguments, **small}, functools.partial(rows_of, rows)))
        return parts

    return cut


def rows_of(rows: slice, out: Tensor) -> Tensor:
    """Those rows of a result `[..., D]`."""
    return out.flatten(0, -2)[rows]


def randn(dtype: torch.dtype, device: torch.device, *shape: int, scale: float = 1.0) -> Tensor:
    """Random numbers of that standard deviation."""
    return torch.randn(shape, dtype=dtype, device=device).mul_(scale)
