"""A linear layer with its bias and activation, and the two projections of a gated MLP in one."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from .activation import activate
from .cost import Cost, nbytes, numel, sizes
from .op import define


def _linear_act_cost(x: Tensor, weight: Tensor, bias: Tensor | None, kind: str) -> Cost:
    n, k = sizes(weight)
    rows = numel(x) / k
    return Cost(2 * rows * n * k + 8 * rows * n, nbytes(x, weight, bias) + rows * n * x.element_size())


@define(cost=_linear_act_cost)
def linear_act(x: Tensor, weight: Tensor, bias: Tensor | None, kind: str) -> Tensor:
    """`activation(x @ weight.T + bias, kind)`; x `[..., K]`, weight `[N, K]` of any strides, bias `[N]` or absent."""
    y = F.linear(x, weight, bias)
    return y if kind == "identity" else activate(y, kind)


def _gate_up_cost(x: Tensor, weight: Tensor, bias: Tensor | None, kind: str) -> Cost:
    n, k = sizes(weight)
    rows = numel(x) / k
    return Cost(2 * rows * n * k + 9 * rows * n / 2, nbytes(x, weight, bias) + rows * n / 2 * x.element_size())


@define(cost=_gate_up_cost)
def gate_up(x: Tensor, weight: Tensor, bias: Tensor | None, kind: str) -> Tensor:
    """`glu(gate, up, kind)` of `gate, up = (x @ weight.T + bias).chunk(2, -1)`.

    x `[..., K]`; weight `[2I, K]`, the rows of gate before the rows of up; bias `[2I]` or absent; result `[..., I]`.
    """
    gate, up = F.linear(x, weight, bias).chunk(2, dim=-1)
    return activate(gate, kind) * up
