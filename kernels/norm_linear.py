"""A linear layer that normalises its input on the way in.

It saves a launch and a round trip of the normalised input, and pays by computing the statistics once in every block of
output columns. So it is cheaper for few rows or few columns only, and its cost says so.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .cost import Cost, nbytes, numel, sizes
from .op import define
from .rms_norm import normalize

COLUMNS_A_BLOCK = 64
"""Output columns of one program of the kernel: how often the input is read again."""


def _cost(
    x: Tensor,
    norm_weight: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    offset: float = 0.0,
    mid_dtype: torch.dtype | None = None,
    out_dtype: torch.dtype | None = None,
) -> Cost:
    n, k = sizes(weight)
    rows = numel(x) / k
    blocks = n / COLUMNS_A_BLOCK
    read = nbytes(x) * (1 + blocks) + nbytes(norm_weight, weight, bias)
    return Cost(2 * rows * n * k + 6 * numel(x) * (1 + blocks), read + rows * n * weight.element_size())


@define(cost=_cost)
def norm_linear(
    x: Tensor,
    norm_weight: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    offset: float = 0.0,
    mid_dtype: torch.dtype | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """`linear(rms_norm(x, norm_weight, eps, offset, mid_dtype, out_dtype), weight, bias)`.

    x `[..., K]`, norm_weight `[K]` or absent, weight `[N, K]`, bias `[N]` or absent; result `[..., N]`. The norm's
    result has the weight's dtype.
    """
    return F.linear(normalize(x, norm_weight, eps, offset, mid_dtype, out_dtype), weight, bias)
