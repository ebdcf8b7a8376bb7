"""Samples of tensors by their addresses: the bytes of evenly spaced elements, first and last among them."""

from __future__ import annotations

import pytest
import torch
from kernel_checks import on_devices
from torch import Tensor

from regraft.kernels.samples_triton import BYTES, samples

KINDS = [torch.bfloat16, torch.float32, torch.float64, torch.int64, torch.int8, torch.bool]


def expected(flat: Tensor, count: int) -> Tensor:
    """What stands in `[count, 8]` for one tensor."""
    out = torch.zeros(count, BYTES, dtype=torch.uint8)
    if len(flat):
        element = torch.arange(count) * (len(flat) - 1) // (count - 1)
        bytes_ = flat.cpu()[element].view(torch.uint8).view(count, -1)
        out[:, : bytes_.shape[1]] = bytes_
    return out


@on_devices
@pytest.mark.parametrize("dtype", KINDS, ids=str)
def test_bytes_of_evenly_spaced_elements(dtype: torch.dtype, device: str) -> None:
    made = torch.Generator().manual_seed(0)
    whole = torch.randint(-99, 99, (5003,), generator=made).to(dtype).to(device)
    parts = [whole, whole[7:70], whole[3:5], whole[11:12], whole[:0]]  # the second begins at an odd element
    places = torch.tensor([(t.data_ptr(), t.numel(), t.element_size()) for t in parts], device=device)
    for count in (2, 64):
        found = samples(places, count).cpu()
        assert found.shape == (len(parts), count, BYTES)
        for one, tensor in zip(found, parts, strict=True):
            assert torch.equal(one, expected(tensor, count))


@on_devices
def test_no_tensors(device: str) -> None:
    assert samples(torch.empty(0, 3, dtype=torch.int64, device=device), 64).shape == (0, 64, BYTES)


@pytest.mark.gpu
def test_elements_beyond_two_gigabytes() -> None:
    large = torch.zeros(3 << 30, dtype=torch.int8, device="cuda")
    places = torch.tensor([(large.data_ptr(), large.numel(), 1)], device="cuda")
    before = samples(places, 64)
    large[-1] = 5
    assert samples(places, 64)[0, -1, 0] == 5 and torch.equal(before[0, :-1], samples(places, 64)[0, :-1])
