"""Activations: bit-exact with transformers, right in fp64, and the Triton kernel as good as PyTorch."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from kernel_checks import check_kernel, in_dtypes, on_devices, refusal

from regraft.kernels.activation import ACTIVATIONS, activation, glu
from regraft.kernels.table import select

SAME = {
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_new",
    "gelu_accurate": "gelu_new",
    "linear": "identity",
    "swish": "silu",
}
"""Names in transformers that have the bits of another kind."""

PARAMETRIC = {"prelu", "xielu"}
KINDS = [*ACTIVATIONS, "softcap:5.0"]


def samples() -> torch.Tensor:
    return torch.cat((torch.randn(2000) * 3, torch.linspace(-30, 30, 999), torch.tensor([0.0, -0.0, 1e-4, -1e-4])))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_kind_has_the_bits_of_transformers(dtype: torch.dtype) -> None:
    from transformers.activations import ACT2FN

    x = samples().to(dtype)
    for name in set(ACT2FN) - PARAMETRIC:
        assert torch.equal(activation(x, SAME.get(name, name)), ACT2FN[name](x.clone())), name


def test_short_constant_has_the_bits_of_its_spelling() -> None:
    from transformers.models.bloom.modeling_bloom import bloom_gelu_forward

    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        x = samples().to(dtype)
        assert torch.equal(activation(x, "gelu_fast8"), bloom_gelu_forward(x))
    x = samples().double()
    assert not torch.equal(activation(x, "gelu_fast8"), activation(x, "gelu_fast"))


def sigmoid(v: float) -> float:
    return 1 / (1 + math.exp(-v))


def softplus(v: float) -> float:
    return max(v, 0.0) + math.log1p(math.exp(-abs(v)))


def gelu(v: float) -> float:
    return 0.5 * v * math.erfc(-v / math.sqrt(2))


def gelu_tanh(v: float) -> float:
    return 0.5 * v * (1 + math.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3)))


DEFINITIONS: dict[str, Callable[[float], float]] = {
    "identity": lambda v: v,
    "relu": lambda v: max(v, 0.0),
    "relu2": lambda v: max(v, 0.0) ** 2,
    "relu6": lambda v: min(max(v, 0.0), 6.0),
    "leaky_relu": lambda v: v if v > 0 else 0.01 * v,
    "sigmoid": sigmoid,
    "tanh": math.tanh,
    "silu": lambda v: v * sigmoid(v),
    "mish": lambda v: v * math.tanh(softplus(v)),
    "hardswish": lambda v: v * min(max(v + 3, 0.0), 6.0) / 6,
    "softplus": softplus,
    "sqrtsoftplus": lambda v: math.sqrt(softplus(v)),
    "laplace": lambda v: 0.5 * (1 + math.erf((v - math.sqrt(0.5)) / math.sqrt(0.5 / math.pi))),
    "gelu": gelu,
    "gelu_10": lambda v: min(gelu(v), 10.0),
    "gelu_python": gelu,
    "gelu_tanh": gelu_tanh,
    "gelu_new": gelu_tanh,
    "gelu_fast": gelu_tanh,
    "gelu_fast8": gelu_tanh,
    "quick_gelu": lambda v: v * sigmoid(1.702 * v),
    "softcap:5.0": lambda v: 5 * math.tanh(v / 5),
}
ROUGH = {"laplace": 2e-6, "gelu_fast": 1e-9, "gelu_fast8": 1e-7, "softplus": 3e-9, "sqrtsoftplus": 1e-9}
"""Constants with few digits; softplus is the identity above 20."""


@pytest.mark.parametrize("kind", KINDS)
def test_reference_is_the_definition(kind: str) -> None:
    x = samples().double()
    expected = torch.tensor([DEFINITIONS[kind](v) for v in x.tolist()], dtype=torch.float64)
    assert torch.allclose(activation(x, kind), expected, rtol=1e-12, atol=ROUGH.get(kind, 1e-13))


def test_reference_never_returns_its_input() -> None:
    x = torch.rand(3) + 1
    for kind in KINDS:
        assert activation(x, kind).data_ptr() != x.data_ptr()


def test_an_unknown_kind_is_an_error() -> None:
    with pytest.raises(ValueError, match="gelu_new"):
        activation(torch.randn(3), "gelu_newer")
    for cap in ("", "0", "-1.0", "inf", "nan", "x"):
        with pytest.raises(ValueError, match="softcap:<number>"):
            activation(torch.randn(3), f"softcap:{cap}")


def test_glu_is_the_product() -> None:
    gate, up = torch.randn(2, 3, 5, dtype=torch.float64)
    for kind in KINDS:
        assert torch.equal(glu(gate, up, kind), activation(gate, kind) * up)


@on_devices
@in_dtypes
@pytest.mark.parametrize("kind", KINDS)
def test_triton_activation(kind: str, dtype: torch.dtype, device: str) -> None:
    check_kernel(activation, samples().to(device, dtype), kind)


@on_devices
@in_dtypes
@pytest.mark.parametrize("kind", ["tanh", "silu", "softplus", "quick_gelu", "softcap:5.0"])
def test_triton_is_exact_near_zero(kind: str, dtype: torch.dtype, device: str) -> None:
    """Small arguments alone: the bound is then relative to small results."""
    check_kernel(activation, torch.linspace(-0.01, 0.01, 500, device=device).to(dtype), kind)


@on_devices
@in_dtypes
def test_triton_views(dtype: torch.dtype, device: str) -> None:
    x = torch.randn(3, 5, 7, 154, device=device).to(dtype)
    check_kernel(activation, x.transpose(0, 2), "silu")
    check_kernel(activation, x[..., ::2], "gelu")
    check_kernel(activation, torch.randn(2, 3, 2, 3, 2, 3, device=device).to(dtype).permute(5, 3, 1, 4, 2, 0), "relu")
    gate, up = x.chunk(2, dim=-1)
    check_kernel(glu, gate, up, "silu")
    check_kernel(glu, gate.transpose(1, 2), up.transpose(1, 2), "gelu_tanh")
    check_kernel(activation, torch.randn((), device=device).to(dtype), "tanh")


LIMITS = {"sigmoid": 1.0, "tanh": 1.0, "laplace": 1.0, "relu6": 6.0, "gelu_10": 10.0, "softcap:5.0": 5.0}


@on_devices
def test_triton_keeps_nan_and_infinity(device: str) -> None:
    x = torch.tensor([math.nan, math.inf], device=device)
    for kind in KINDS:
        kernel, _ = select(activation, activation.signature(x, kind))
        assert kernel is not None
        y = kernel.run(x, kind)
        assert bool(y[0].isnan()), kind
        assert y[1].item() == LIMITS.get(kind, math.inf), kind


@pytest.mark.gpu
def test_offsets_beyond_32_bits() -> None:
    x = torch.zeros(2**31 + 7, device="cuda", dtype=torch.float16)
    x[-5:] = torch.arange(5, device="cuda") - 2
    kernel, _ = select(activation, activation.signature(x, "relu2"))
    assert kernel is not None
    assert kernel.run(x, "relu2")[-5:].tolist() == [0, 0, 0, 1, 4]


@on_devices
def test_triton_refuses(device: str) -> None:
    x = torch.randn(2, 8, device=device)
    assert "gelu_newer" in refusal(activation, x, "gelu_newer")
    assert "differ in shape" in refusal(glu, x, x[:1], "silu")
    assert "float64" in refusal(activation, x.double(), "relu")
