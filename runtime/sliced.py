"""Distances of large tensors, a slice at a time, so that comparing takes little memory."""

from __future__ import annotations

import torch

from ..compiler.verify import Distance, bound_for, distance, magnitude

ELEMENTS = 1 << 26
"""How many are compared at once."""


def distance_of(value: torch.Tensor, oracle: torch.Tensor) -> Distance:
    """As `verify.distance`, for one tensor."""
    if value.shape != oracle.shape:
        return Distance(float("inf"), float("inf"))
    a, b = value.reshape(-1), oracle.reshape(-1)
    return _together([(distance(x, y), x.numel()) for x, y in zip(a.split(ELEMENTS), b.split(ELEMENTS), strict=True)])


def bound_of(error: Distance, oracle: torch.Tensor, dtype: torch.dtype) -> Distance:
    """As `verify.bound_for`: twice the error of PyTorch in `dtype`, plus a few ulp of the oracle."""
    parts = oracle.reshape(-1).split(ELEMENTS)
    if len(parts) == 1:
        return bound_for(error, oracle, dtype)
    scale = _together([(magnitude(p), p.numel()) for p in parts])
    one = torch.tensor([scale.largest, scale.rms], dtype=torch.float64)
    return Distance(bound_for(error, one[:1], dtype).largest, bound_for(error, one[1:], dtype).rms)


def _together(parts: list[tuple[Distance, int]]) -> Distance:
    count = sum(n for _, n in parts)
    if not count:
        return Distance(0.0, 0.0)
    squares = sum(d.rms**2 * n for d, n in parts)
    return Distance(max(d.largest for d, _ in parts), (squares / count) ** 0.5)
