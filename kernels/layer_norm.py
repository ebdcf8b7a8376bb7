"""LayerNorm over the last dimension, and LayerNorm after a residual addition (Ba et al., arXiv 1607.06450)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .cost import Cost, nbytes, numel
from .op import define


def _layer_norm_cost(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Cost:
    return Cost(8 * numel(x), nbytes(x, weight, bias) + numel(x) * x.element_size())


@define(cost=_layer_norm_cost)
def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """`(x - mean) / sqrt(var + eps) * weight + bias`; x `[..., D]`, weight and bias `[D]` or absent."""
    return F.layer_norm(x, (x.shape[-1],), weight, bias, eps)


def _add_layer_norm_cost(x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Cost:
    added = Cost(numel(x), nbytes(residual) + numel(x) * torch.promote_types(x.dtype, residual.dtype).itemsize)
    return _layer_norm_cost(x, weight, bias, eps) + added


@define(cost=_add_layer_norm_cost)
def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """`s = x + residual; (layer_norm(s, ...), s)`; x and residual of the same shape `[..., D]`."""
    s = x + residual
    return F.layer_norm(s, (s.shape[-1],), weight, bias, eps), s
