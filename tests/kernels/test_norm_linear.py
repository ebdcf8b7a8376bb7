"""RMSNorm as the prologue of a linear layer: the definition, the Triton kernel, and a cost that knows when it pays."""

from __future__ import annotations

import pytest
import torch
from kernel_checks import check_kernel, in_dtypes, on_devices

from regraft.kernels.linear_act import linear_act
from regraft.kernels.norm_linear import norm_linear
from regraft.kernels.rms_norm import rms_norm

EPS = 1e-5


def test_reference_is_the_definition() -> None:
    x, gain, weight, bias = (torch.randn(*shape).double() for shape in ((2, 3, 5), (5,), (7, 5), (7,)))
    normed = x / (x.square().mean(-1, keepdim=True) + EPS).sqrt()
    expected = torch.einsum("bsk,nk->bsn", normed * (gain + 1), weight) + bias
    assert torch.allclose(norm_linear(x, gain, weight, bias, EPS, 1.0), expected, rtol=1e-12, atol=1e-12)
    assert torch.allclose(
        norm_linear(x, None, weight, None, EPS), torch.einsum("bsk,nk->bsn", normed, weight), rtol=1e-12, atol=1e-12
    )


@on_devices
@in_dtypes
@pytest.mark.parametrize(("rows", "columns", "depth"), [(1, 1, 16), (5, 33, 64), (19, 96, 17), (67, 70, 150)])
def test_triton_norm_linear(rows: int, columns: int, depth: int, dtype: torch.dtype, device: str) -> None:
    x = torch.randn(rows, depth, device=device).to(dtype)
    gain = torch.randn(depth, device=device).to(dtype)
    weight = (torch.randn(columns, depth, device=device) / depth**0.5).to(dtype)
    bias = torch.randn(columns, device=device).to(dtype)
    check_kernel(norm_linear, x, gain, weight, bias, EPS, 0.0, dtype, None)
    check_kernel(norm_linear, x, gain, weight, None, EPS, 1.0, None, dtype)
    check_kernel(norm_linear, x[:, None].expand(rows, 2, depth), None, weight, bias, EPS, 0.0, dtype, None)


def test_cost_favours_few_rows_or_few_columns() -> None:
    def bytes_of(rows: int, columns: int) -> tuple[int, int]:
        shapes = ((rows, 4096), (4096,), (columns, 4096))
        x, gain, weight = (torch.empty(*s, dtype=torch.bfloat16, device="meta") for s in shapes)
        apart = rms_norm.cost(x, gain, EPS) + linear_act.cost(x, weight, None, "identity")
        return int(norm_linear.cost(x, gain, weight, None, EPS).bytes), int(apart.bytes)

    together, apart = bytes_of(4096, 32)
    assert together < apart
    together, apart = bytes_of(4096, 4096)
    assert together > apart
