"""Calls that are timed on copies of their arguments: random tensors like those of a model, compared, cold."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch

from .sliced import distance_of
from .timing import measure_kernels

COPIES_BYTES: Final = 320 << 20

Measure = Callable[[Mapping[str, Sequence[Callable[[], Any]]], bool], Mapping[str, float]]
"""Milliseconds of each candidate, given as a call for each copy of the arguments; whether all copies are small."""


@dataclass(frozen=True)
class Likeness:
    """A floating-point tensor without its numbers: `make` gives random ones of the same spread."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    mean: float
    spread: float

    @classmethod
    def of(cls, value: Any) -> Any:
        """The likeness of such a tensor; anything else as it is, tensors of indices and infinities among them."""
        if not isinstance(value, torch.Tensor) or not value.is_floating_point() or value.numel() < 2:
            return value
        once = value[tuple(slice(0, 1) if step == 0 else slice(None) for step in value.stride())]
        if once.numel() < 2:
            return value
        spread, mean = (float(t) for t in torch.std_mean(once.detach().float()))
        if not math.isfinite(spread + mean):
            return value
        return cls(tuple(value.shape), value.stride(), value.dtype, value.device, mean, spread)

    @property
    def nbytes(self) -> int:
        """As of the tensor."""
        return math.prod(self.shape) * self.dtype.itemsize

    def make(self) -> torch.Tensor:
        """A tensor with memory of its own; elements that shared memory share it again."""
        span = 1 + sum((size - 1) * step for size, step in zip(self.shape, self.strides, strict=True))
        numbers = torch.empty(span, dtype=self.dtype, device=self.device).normal_(self.mean, self.spread)
        return numbers.as_strided(self.shape, self.strides)


def copied(value: Any) -> Any:
    """A tensor with the same sizes, strides and numbers in memory of its own; other values as they are."""
    if isinstance(value, Likeness):
        return value.make()
    if not isinstance(value, torch.Tensor) or value.numel() == 0:
        return value
    span = 1 + sum((size - 1) * step for size, step in zip(value.shape, value.stride(), strict=True))
    made = value.new_empty(span).as_strided(value.shape, value.stride())
    once = tuple(slice(0, 1) if step == 0 else slice(None) for step in value.stride())
    made[once].copy_(value[once])
    return made


def copies(args: Sequence[Any], device: torch.device) -> tuple[list[tuple[Any, ...]], bool]:
    """As many copies of the arguments as the L2 does not hold, and whether even all of them are small."""
    nbytes = sum(t.nbytes for t in args if isinstance(t, torch.Tensor | Likeness))
    count = min(24, max(2, math.ceil(COPIES_BYTES / max(nbytes, 1)))) if device.type == "cuda" else 1
    return [tuple(copied(a) for a in args) for _ in range(count)], nbytes * count < COPIES_BYTES


def same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether two results differ by the order of sums and roundings only."""
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return False
    if not found.is_floating_point():
        return torch.equal(found, expected)
    scale = distance_of(expected, torch.zeros_like(expected))
    apart, eps = distance_of(found, expected), torch.finfo(found.dtype).eps
    return apart.rms <= 4 * eps * scale.rms and apart.largest <= 16 * eps * scale.largest


def tensors(value: Any) -> list[torch.Tensor]:
    """Those among what a call returned."""
    return [value] if isinstance(value, torch.Tensor) else [v for v in value if isinstance(v, torch.Tensor)]


def measure_on(device: torch.device) -> Measure:
    """Medians of three rounds of twelve calls."""

    def measure(calls: Mapping[str, Sequence[Callable[[], Any]]], small: bool) -> dict[str, float]:
        timings = measure_kernels(calls, device, small=small, rounds=3, calls=12)
        return {name: timing.median_ms for name, timing in timings.items()}

    return measure
