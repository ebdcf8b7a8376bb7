"""Residual sum, norm and product of single rows in one launch: as good as the separate ops, over every epilogue."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernel_checks import as_tuple, assert_close, check_kernel, in_dtypes, on_devices
from torch import Tensor

from regraft.kernels import choice, norm_gemv_triton
from regraft.kernels.norm_products import norm_gate_up, norm_linear_act, norm_qkv_rope

SIZES = [(1, 1, 8), (1, 77, 136), (1, 130, 1096), (3, 19, 264), (1, 20, 2048)]
"""Rows, columns, depth: 16 bytes divide the rows of the matrices."""


def normed(rows: int, depth: int, dtype: torch.dtype, device: str, *, gain: bool = True, offset: float = 0.0,
           mid: torch.dtype | None = None) -> tuple[Any, ...]:  # fmt: skip
    """The arguments of the norm, x and residual `[1, rows, depth]`."""
    x, residual = (torch.randn(1, rows, depth, device=device).to(dtype) for _ in range(2))
    weight = (torch.rand(depth, device=device) + 0.5).to(dtype) if gain else None
    return x, residual, weight, 1e-6, offset, mid, dtype


def linear(columns: int, depth: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    weight = (torch.randn(columns, depth, device=device) / depth**0.5).to(dtype)
    return weight, torch.randn(columns, device=device).to(dtype)


@on_devices
@in_dtypes
@pytest.mark.parametrize(("rows", "columns", "depth"), SIZES)
def test_against_pytorch(rows: int, columns: int, depth: int, dtype: torch.dtype, device: str) -> None:
    norm = normed(rows, depth, dtype, device)
    weight, bias = linear(2 * columns, depth, dtype, device)
    check_kernel(norm_linear_act, *norm, weight, bias, "gelu", provider="gemv")
    check_kernel(norm_linear_act, *norm, weight[:columns], None, "identity", provider="gemv")
    check_kernel(norm_gate_up, *norm, weight, bias, "silu", provider="gemv")


@on_devices
@in_dtypes
def test_triton_every_norm(dtype: torch.dtype, device: str) -> None:
    weight, bias = linear(24, 72, dtype, device)
    check_kernel(norm_gate_up, *normed(1, 72, dtype, device, gain=False), weight, None, "silu", provider="gemv")
    check_kernel(norm_gate_up, *normed(1, 72, dtype, device, offset=1.0), weight, bias, "gelu_tanh", provider="gemv")
    check_kernel(norm_linear_act, *normed(1, 72, dtype, device, mid=dtype), weight, bias, "relu", provider="gemv")


@on_devices
@in_dtypes
@pytest.mark.parametrize(
    ("rows", "norm_heads", "rotary", "style"),
    [(1, False, 16, "half"), (3, False, 16, "interleaved"), (1, False, 8, "half"), (1, True, 16, "half")],
)
def test_projection_of_heads(
    rows: int, norm_heads: bool, rotary: int, style: str, dtype: torch.dtype, device: str
) -> None:
    weight, bias = linear(6 * 16, 40, dtype, device)
    angle = torch.rand(1, rows, rotary, device=device)
    cos, sin = angle.cos(), angle.sin()
    gains = [(torch.rand(16, device=device) + 0.5).to(dtype) if norm_heads else None for _ in range(2)]
    rest = (norm_heads, 1e-6 * norm_heads, 0.0, None, style)
    for table, compute in ((dtype, None), (torch.float32, torch.float32)):
        tables = (cos.to(table), sin.to(table))
        args = (*normed(rows, 40, dtype, device), weight, bias, *tables, *gains, 3, 2, 16, *rest, compute)
        check_kernel(norm_qkv_rope, *args, provider="gemv")


@on_devices
def test_views_and_what_does_not_fit(device: str) -> None:
    """Rows that cannot be read in wide loads, and none at all, are computed by the separate kernels."""
    dtype = torch.float16
    x, residual, *rest = normed(1, 64, dtype, device)
    weight, bias = linear(24, 64, dtype, device)
    run = norm_gemv_triton.norm_linear_act
    want = run(x, residual, *rest, weight, bias, "silu")
    wide = torch.randn(1, 1, 100, device=device).to(dtype)
    for start in (8, 9):
        view = wide[..., start : start + 64].copy_(x)
        for a, r, e in zip(
            run(view, residual, *rest, weight.t().contiguous().t(), bias, "silu"),
            want,
            as_tuple(norm_linear_act.reference(x.double(), residual.double(), rest[0].double(), 1e-6, 0.0, None, None,
                                               weight.double(), bias.double(), "silu")),
            strict=True,
        ):  # fmt: skip
            assert_close(a, r, e)
    product, total = run(x[:, :0], residual[:, :0], *rest, weight, bias, "silu")
    assert product.shape == (1, 0, 24) and total.shape == (1, 0, 64)


def test_a_grid_takes_as_many_rows_as_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel is compared on all rows of the first call; dimensions of a grid but the first end at 65535."""
    grids: list[tuple[int, ...]] = []
    monkeypatch.setattr(norm_gemv_triton, "launch", lambda kernel, grid, *_, **__: grids.append(grid))
    monkeypatch.setattr(norm_gemv_triton, "overlaps", lambda x: {"PDL": False})
    weight, _ = linear(24, 8, torch.float16, "cpu")
    norm_gemv_triton.norm_linear_act(*normed(70000, 8, torch.float16, "cpu"), weight, None, "silu")
    ((first, *others),) = grids
    assert first == 70000 and all(1 <= size < 65536 for size in others)


@on_devices
def test_triton_refuses(device: str) -> None:
    (kernel,) = (k for k in norm_gemv_triton.KERNELS if k.op is norm_gate_up)
    norm, (weight, bias) = normed(1, 64, torch.float16, device), linear(24, 64, torch.float16, device)
    signature = norm_gate_up.signature(*norm, weight, bias, "silu")
    assert kernel.supports(signature) is None
    assert "the norm makes" in str(kernel.supports({**signature, "norm_out_dtype": torch.float32}))
    assert "differ in shape" in str(kernel.supports({**signature, "residual": signature["weight"]}))
    assert "linear layer" in str(kernel.supports({**signature, "weight": signature["bias"]}))
    assert kernel.supports({**signature, "kind": "no such"}) is not None


@pytest.mark.gpu
def test_plans_repeat_the_launches() -> None:
    weight, bias = linear(6 * 16, 40, torch.bfloat16, "cuda")
    cos, sin = (torch.rand(1, 1, 16, device="cuda").bfloat16() for _ in range(2))
    for kernel in norm_gemv_triton.KERNELS:
        bound = choice.bind(kernel.op, [kernel])
        for _ in range(3):
            norm = normed(1, 40, torch.bfloat16, "cuda")
            rest: tuple[Any, ...] = (weight, bias, "silu")
            if kernel.op is norm_qkv_rope:
                rest = (weight, bias, cos, sin, None, None, 3, 2, 16, False, 0.0, 0.0, None, "half", None)
            for a, b in zip(bound(*norm, *rest), kernel.run(*norm, *rest), strict=True):
                assert torch.equal(a, b)
