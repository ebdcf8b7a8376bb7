"""Softmax over the last dimension, in whichever precision the model computes and rounds it."""

from __future__ import annotations

import torch
from torch import Tensor

from .cost import Cost, nbytes, numel
from .op import define


def result_dtype(x: torch.dtype, compute_dtype: torch.dtype | None, out_dtype: torch.dtype | None) -> torch.dtype:
    """The dtype `softmax` returns."""
    return out_dtype or compute_dtype or x


def _softmax_cost(x: Tensor, compute_dtype: torch.dtype | None = None, out_dtype: torch.dtype | None = None) -> Cost:
    return Cost(5 * numel(x), nbytes(x) + numel(x) * result_dtype(x.dtype, compute_dtype, out_dtype).itemsize)


@define(cost=_softmax_cost)
def softmax(x: Tensor, compute_dtype: torch.dtype | None = None, out_dtype: torch.dtype | None = None) -> Tensor:
    """`exp(x - max(x)) / sum(exp(x - max(x)))` over the last dimension; x `[..., D]`.

    `torch.softmax(x, -1, dtype=compute_dtype).to(out_dtype)`: sums in fp32 at least, rounded to `compute_dtype` (where
    absent that of x) and then to `out_dtype` where it is given.
    """
    y = torch.softmax(x, -1, dtype=compute_dtype)
    return y if out_dtype is None else y.to(out_dtype)
