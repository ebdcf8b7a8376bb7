"""Linear layers with an epilogue: the definition, and the Triton kernel as good as PyTorch over odd sizes."""

from __future__ import annotations

import pytest
import torch
from kernel_checks import check_kernel, in_dtypes, on_devices, refusal

from regraft.kernels.activation import ACTIVATIONS, activation
from regraft.kernels.linear_act import gate_up, linear_act

SIZES = [(1, 1, 1), (1, 77, 130), (5, 33, 64), (19, 96, 17), (67, 70, 150)]
"""Rows, columns, depth."""


def test_reference_is_the_definition() -> None:
    x, weight, bias = torch.randn(2, 3, 5), torch.randn(8, 5), torch.randn(8)
    x, weight, bias = x.double(), weight.double(), bias.double()
    product = torch.einsum("bsk,nk->bsn", x, weight) + bias
    gate, up = product[..., :4], product[..., 4:]
    for kind in ACTIVATIONS:
        assert torch.allclose(linear_act(x, weight, bias, kind), activation(product, kind), rtol=1e-12, atol=1e-12)
        assert torch.allclose(gate_up(x, weight, bias, kind), activation(gate, kind) * up, rtol=1e-12, atol=1e-12)


def linear(rows: int, columns: int, depth: int, dtype: torch.dtype, device: str) -> tuple[torch.Tensor, ...]:
    x = torch.randn(rows, depth, device=device).to(dtype)
    weight = (torch.randn(columns, depth, device=device) / depth**0.5).to(dtype)
    return x, weight, torch.randn(columns, device=device).to(dtype)


@on_devices
@in_dtypes
@pytest.mark.parametrize(("rows", "columns", "depth"), SIZES)
def test_triton_linear_act(rows: int, columns: int, depth: int, dtype: torch.dtype, device: str) -> None:
    x, weight, bias = linear(rows, columns, depth, dtype, device)
    check_kernel(linear_act, x, weight, bias, "gelu")
    check_kernel(linear_act, x, weight, None, "identity")


@on_devices
@in_dtypes
@pytest.mark.parametrize(("rows", "columns", "depth"), SIZES)
def test_triton_gate_up(rows: int, columns: int, depth: int, dtype: torch.dtype, device: str) -> None:
    x, weight, bias = linear(rows, 2 * columns, depth, dtype, device)
    check_kernel(gate_up, x, weight, bias, "silu")
    check_kernel(gate_up, x, weight, None, "gelu_tanh")


@on_devices
@in_dtypes
def test_triton_views(dtype: torch.dtype, device: str) -> None:
    x, weight, bias = linear(30, 36, 21, dtype, device)
    transposed = weight.t().contiguous().t()  # as Conv1D stores it
    check_kernel(linear_act, x, transposed, bias, "gelu_new")
    check_kernel(gate_up, x, transposed, bias, "silu")
    check_kernel(linear_act, x.view(5, 6, 21).transpose(0, 1), weight, bias[:, None].expand(36, 2)[:, 0], "relu")
    wide = torch.randn(5, 6, 50, device=device).to(dtype)
    check_kernel(linear_act, wide[..., 7:28], weight, None, "silu")
    check_kernel(gate_up, wide[:, 0, ::2][:, :21], weight[::2], None, "silu")
    check_kernel(linear_act, x[0], weight, bias, "tanh")


@on_devices
def test_triton_fp32_is_not_tf32(device: str) -> None:
    """tf32 keeps 10 bits of the inputs: an error of about 5e-4 where fp32 has 1e-6."""
    x, weight, _ = linear(33, 65, 1030, torch.float32, device)
    check_kernel(linear_act, x, weight, None, "identity")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [3, 40, 700])
def test_each_configuration_on_the_gpu(rows: int, dtype: torch.dtype) -> None:
    x, weight, bias = linear(rows, 1030, 520, dtype, "cuda")
    check_kernel(linear_act, x, weight, bias, "gelu_tanh")
    check_kernel(gate_up, x, weight, bias, "silu")


@on_devices
def test_triton_refuses(device: str) -> None:
    x, weight, bias = linear(3, 5, 8, torch.float32, device)
    assert "dtypes differ" in refusal(linear_act, x, weight.half(), bias, "relu")
    assert "odd" in refusal(gate_up, x, weight, bias, "relu")
    assert "takes 8" in refusal(linear_act, x[:, :4], weight, bias, "relu")
    assert "not one number" in refusal(linear_act, x, weight, bias[:1], "relu")
    assert "relu9" in refusal(linear_act, x, weight, bias, "relu9")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 70, 130])
def test_many_sizes_on_the_gpu(rows: int, dtype: torch.dtype) -> None:
    """Rows that 16 bytes divide and rows that they do not: other code, other shared memory."""
    for columns in (8, 33, 64, 130, 136):
        for depth in (8, 24, 31, 64, 66, 72, 200, 256):
            x, weight, bias = linear(rows, 2 * columns, depth, dtype, "cuda")
            check_kernel(linear_act, x, weight, bias, "silu")
            check_kernel(gate_up, x, weight.t().contiguous().t(), None, "silu")
