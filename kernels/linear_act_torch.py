"""Linear layers by PyTorch's matrix product (cuBLAS on CUDA devices), the activation or the gate by our own kernel."""

from __future__ import annotations

from typing import Final

from torch import Tensor
from torch.nn import functional as F

from . import activation_triton, linear_act_triton
from . import linear_act as ops
from .launch import library
from .op import Kernel


def linear_act(x: Tensor, weight: Tensor, bias: Tensor | None, kind: str) -> Tensor:
    """As the op `linear_act`."""
    y = library(F.linear, x, weight, bias)
    return y if kind == "identity" else activation_triton.activation(y, kind)


def gate_up(x: Tensor, weight: Tensor, bias: Tensor | None, kind: str) -> Tensor:
    """As the op `gate_up`."""
    gate, up = library(F.linear, x, weight, bias).chunk(2, dim=-1)
    return activation_triton.glu(gate, up, kind)


KERNELS: Final = (
    Kernel(ops.linear_act, "cublas", linear_act, linear_act_triton.refuse_linear),
    Kernel(ops.gate_up, "cublas", gate_up, linear_act_triton.refuse_gate_up),
)
