"""Activations by name, and the gated linear unit.

Each function keeps the order of operations of the spelling it stands for, so that replacing the spelling by the op
changes no bit. Names are those of `transformers.activations.ACT2FN`, except that spellings which differ in bits have
names of their own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional as F

from .cost import Cost, nbytes, numel
from .op import define

_SQRT_2_OVER_PI: Final = math.sqrt(2.0 / math.pi)

ACTIVATIONS: Final[Mapping[str, Callable[[Tensor], Tensor]]] = MappingProxyType(
    {
        "identity": torch.clone,
        "relu": F.relu,
        "relu2": lambda x: torch.square(F.relu(x)),
        "relu6": F.relu6,
        "leaky_relu": F.leaky_relu,
        "sigmoid": torch.sigmoid,
        "tanh": torch.tanh,
        "silu": F.silu,
        "mish": F.mish,
        "hardswish": F.hardswish,
        "softplus": F.softplus,
        "sqrtsoftplus": lambda x: F.softplus(x).sqrt(),
        "laplace": lambda x: 0.5 * (1.0 + torch.erf((x - 0.707107).div(0.282095 * math.sqrt(2.0)))),
        # gelu by erf: one ATen op, clipped, and written out
        "gelu": F.gelu,
        "gelu_10": lambda x: torch.clip(F.gelu(x), -10, 10),
        "gelu_python": lambda x: x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0))),
        # gelu by tanh: one ATen op, and written out in three ways
        "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
        "gelu_new": lambda x: 0.5 * x * (1.0 + torch.tanh(_SQRT_2_OVER_PI * (x + 0.044715 * torch.pow(x, 3.0)))),
        "gelu_fast": lambda x: 0.5 * x * (1.0 + torch.tanh(x * 0.7978845608 * (1.0 + 0.044715 * x * x))),
        "gelu_fast8": lambda x: x * 0.5 * (1.0 + torch.tanh(0.79788456 * x * (1 + 0.044715 * x * x))),
        "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    }
)
"""By kind. "gelu_fast8" is "gelu_fast" with sqrt(2/pi) at eight digits, as Megatron's `bias_gelu` has it."""


SOFTCAP: Final = "softcap:"
"""Before a number c: the kind `c * tanh(x / c)`, as in "softcap:30.0"."""


def cap_of(kind: str) -> float:
    """The number in "softcap:30.0"; 0.0 for every other kind."""
    try:
        cap = float(kind[len(SOFTCAP) :]) if kind.startswith(SOFTCAP) else 0.0
    except ValueError:
        return 0.0
    return cap if 0.0 < cap < math.inf else 0.0


def is_known(kind: str) -> bool:
    """Whether `activation` computes it."""
    return kind in ACTIVATIONS or cap_of(kind) > 0.0


def activate(x: Tensor, kind: str) -> Tensor:
    """The reference of `activation` as a plain function, for the ops that contain it."""
    if not is_known(kind):
        raise ValueError(f"activation is {SOFTCAP}<number> or one of {', '.join(ACTIVATIONS)}; got {kind!r}")
    cap = cap_of(kind)
    return torch.tanh(x / cap) * cap if cap else ACTIVATIONS[kind](x)


def _activation_cost(x: Tensor, kind: str) -> Cost:
    return Cost(8 * numel(x), 2 * nbytes(x))


@define(cost=_activation_cost)
def activation(x: Tensor, kind: str) -> Tensor:
    """`f(x)`, elementwise, of x's shape and dtype; `kind` is a key of `ACTIVATIONS` or "softcap:30.0", otherwise
    `ValueError`."""
    return activate(x, kind)


def _glu_cost(gate: Tensor, up: Tensor, kind: str) -> Cost:
    return Cost(9 * numel(gate), nbytes(gate, up) + numel(gate) * gate.element_size())


@define(cost=_glu_cost)
def glu(gate: Tensor, up: Tensor, kind: str) -> Tensor:
    """`activation(gate, kind) * up` (Shazeer, arXiv 2002.05202); gate and up of the same shape."""
    return activate(gate, kind) * up
