"""The largest of each row: ties go to the first, NaN is the largest, in every dtype as in float32."""

from __future__ import annotations

import pytest
import torch
from kernel_checks import on_devices

from regraft.kernels.argmax_triton import argmax


def rows_of(count: int, dtype: torch.dtype) -> torch.Tensor:
    made = torch.Generator().manual_seed(count)
    x = torch.randn(9, count, generator=made)
    x[1] = x[1].round() / 2  # ties everywhere
    x[2, count // 3 :: 2] = float("nan")
    x[3] = float("-inf")
    x[4] = float("-inf")
    x[4, -1] = -3e38
    x[5] = torch.where(x[5] < 0, -1.0, -0.0)
    x[5, count // 2 :] = 0.0  # equal to -0
    x[6] = -x[6].abs() - 1
    x[7, count // 2] = float("inf")
    x[7, -1] = float("-nan")
    x[8] = 1.5
    return x.to(dtype)


@on_devices
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("count", [1, 5, 1024, 1025, 4099, 20001])
def test_triton_argmax_is_torchs(count: int, dtype: torch.dtype, device: str) -> None:
    x = rows_of(count, dtype).to(device)
    wide = torch.zeros(9, count + 3, dtype=dtype, device=device)
    wide[:, :count] = x
    arrived = torch.zeros(11, dtype=torch.int32, device=device)
    expected = x.float().argmax(-1)
    for given in (x, wide[:, :count], x):
        assert argmax(given, arrived).tolist() == expected.tolist()
    assert not arrived.any(), "the next launch begins where this one began"


@on_devices
def test_triton_argmax_of_many_rows(device: str) -> None:
    """Longer parts, where there are rows enough."""
    x = torch.randn(300, 5000, generator=torch.Generator().manual_seed(3)).to(device)
    arrived = torch.zeros(300, dtype=torch.int32, device=device)
    assert torch.equal(argmax(x, arrived), x.argmax(-1)) and not arrived.any()
