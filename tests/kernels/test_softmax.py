"""Softmax: the definition in fp64, and the Triton kernels as good as PyTorch."""

from __future__ import annotations

import math

import pytest
import torch
from kernel_checks import check_kernel, in_dtypes, on_devices, refusal

from regraft.kernels import softmax_triton
from regraft.kernels.softmax import softmax
from regraft.kernels.table import PROVIDERS


def test_reference_is_the_definition() -> None:
    x = torch.randn(3, 7, dtype=torch.float64) * 5
    for row, out in zip(x.tolist(), softmax(x).tolist(), strict=True):
        total = math.fsum(math.exp(v) for v in row)
        assert out == pytest.approx([math.exp(v) / total for v in row], rel=1e-12)
    half = x.bfloat16()
    assert torch.equal(softmax(half, torch.float32, torch.float16), torch.softmax(half.float(), -1).half())


@on_devices
@in_dtypes
@pytest.mark.parametrize("shape", [(3, 5, 77), (4, 1), (9, 1024), (2, 2500), (130,), (0, 4)], ids=str)
def test_triton_softmax(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    x = (torch.randn(shape, device=device) * 4).to(dtype)
    if x.numel():
        check_kernel(softmax, x)
        check_kernel(softmax, x, torch.float32, dtype)
        check_kernel(softmax, x, torch.float32)
    else:
        assert PROVIDERS["softmax"][0].run(x).shape == shape


@on_devices
@in_dtypes
def test_rows_that_are_read_in_pieces(dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(softmax_triton, "WHOLE", 256)
    x = (torch.randn(2, 3, 1001, device=device) * 4).to(dtype)
    x[0, 0, :400] = -torch.inf  # lanes that see nothing finite in their first pieces
    x[1, 2, 777] = 30.0
    check_kernel(softmax, x, torch.float32, dtype)
    check_kernel(softmax, x.transpose(0, 1))


@on_devices
@in_dtypes
def test_triton_views(dtype: torch.dtype, device: str) -> None:
    x = torch.randn(2, 5, 3, 4, 24, device=device).to(dtype)
    check_kernel(softmax, x[:, :, 1].transpose(1, 2))
    check_kernel(softmax, x.permute(3, 0, 2, 1, 4)[:, :, :2])  # needs a copy
    check_kernel(softmax, torch.randn(24, 7, device=device).to(dtype).t())


@on_devices
@pytest.mark.parametrize("whole", [256, 16384])
def test_infinities_and_nan_are_as_in_pytorch(device: str, whole: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(softmax_triton, "WHOLE", whole)
    x = torch.randn(5, 600, device=device)
    x[0] = -torch.inf
    x[1, 17] = torch.inf
    x[2, 555] = torch.nan
    x[3, 1:] = -torch.inf
    found = PROVIDERS["softmax"][0].run(x)
    assert torch.allclose(found, softmax.reference(x), equal_nan=True)


@on_devices
def test_triton_refuses(device: str) -> None:
    x = torch.randn(2, 8, device=device)
    assert "float64" in refusal(softmax, x.double())
    assert "rounded" in refusal(softmax, x, torch.float16)
    assert "no dimensions" in refusal(softmax, x[0, 0])
