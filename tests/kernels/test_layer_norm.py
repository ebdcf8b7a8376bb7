"""LayerNorm: the definition in fp64, and the Triton kernel as good as PyTorch."""

from __future__ import annotations

import math

import pytest
import torch
from kernel_checks import check_kernel, in_dtypes, on_devices, refusal

from regraft.kernels.layer_norm import add_layer_norm, layer_norm

EPS = 1e-5


def test_reference_is_the_definition() -> None:
    x = torch.randn(3, 7, dtype=torch.float64)
    weight, bias = torch.randn(2, 7, dtype=torch.float64)
    y, s = add_layer_norm(x, 2 * x, weight, bias, EPS)
    assert torch.equal(s, x + 2 * x)
    for row, out in zip(s.tolist(), y.tolist(), strict=True):
        mean = math.fsum(row) / 7
        scale = 1 / math.sqrt(math.fsum((v - mean) ** 2 for v in row) / 7 + EPS)
        for v, w, b, actual in zip(row, weight.tolist(), bias.tolist(), out, strict=True):
            assert actual == pytest.approx((v - mean) * scale * w + b, rel=1e-12, abs=1e-12)
    assert torch.equal(layer_norm(s, weight, bias, EPS), y)


@on_devices
@in_dtypes
@pytest.mark.parametrize("affine", ["weight and bias", "weight", "nothing"])
@pytest.mark.parametrize("shape", [(3, 5, 77), (4, 1), (9, 1024), (2, 2500), (130,)], ids=str)
def test_triton_layer_norm(shape: tuple[int, ...], affine: str, dtype: torch.dtype, device: str) -> None:
    x = (torch.randn(shape, device=device) * 2 + 3).to(dtype)
    weight, bias = torch.randn(2, shape[-1], device=device).to(dtype)
    arguments = {"weight and bias": (weight, bias), "weight": (weight, None), "nothing": (None, None)}[affine]
    check_kernel(layer_norm, x, *arguments, EPS)


@on_devices
@in_dtypes
def test_triton_add_layer_norm(dtype: torch.dtype, device: str) -> None:
    x, residual = torch.randn(2, 3, 5, 77, device=device).to(dtype)
    weight, bias = torch.randn(2, 77, device=device).to(dtype)
    check_kernel(add_layer_norm, x, residual, weight, bias, EPS)
    check_kernel(add_layer_norm, x.transpose(0, 1), residual.transpose(0, 1), weight, None, EPS)


@on_devices
@in_dtypes
def test_triton_large_mean(dtype: torch.dtype, device: str) -> None:
    """The variance is of the centred row: E[x^2] - E[x]^2 in fp32 would lose it here."""
    x = (torch.randn(6, 200, device=device) + 200).to(dtype)
    check_kernel(layer_norm, x, None, None, EPS)


@on_devices
@in_dtypes
def test_triton_views(dtype: torch.dtype, device: str) -> None:
    x = torch.randn(2, 5, 3, 4, 24, device=device).to(dtype)
    weight, bias = torch.randn(2, 24, device=device).to(dtype)
    check_kernel(layer_norm, x[:, :, 1].transpose(1, 2), weight, bias, EPS)
    check_kernel(layer_norm, x.permute(3, 0, 2, 1, 4)[:, :, :2], weight, bias, EPS)  # needs a copy
    check_kernel(layer_norm, torch.randn(24, 7, device=device).to(dtype).t(), weight, bias, EPS)


@on_devices
def test_triton_refuses(device: str) -> None:
    x = torch.randn(2, 8, device=device)
    assert "not one number" in refusal(layer_norm, x, torch.ones(8, device=device), torch.ones(1, device=device), EPS)
    assert "float64" in refusal(layer_norm, x.double(), None, None, EPS)
    assert "differ in shape" in refusal(add_layer_norm, x, x[:1], None, None, EPS)
