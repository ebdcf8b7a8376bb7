"""Values that were written through `.data` are seen, and nothing else is taken for a change."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from regraft.runtime.samples import Samples, elements_in_a_row

on_both = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])


def tensors(device: str) -> list[Tensor]:
    made = torch.Generator().manual_seed(0)
    found = [torch.randn(70, 33, generator=made), torch.randn(33, 70, generator=made).t().bfloat16()]
    found += [torch.tensor(3.5), torch.empty(0, 4), torch.arange(9), torch.ones(1000, dtype=torch.bool)]
    found = [t.to(device) for t in found]
    return [*found, found[0][::2, ::2]]


def double(t: Tensor) -> None:
    t.data.mul_(2)


def nudge(t: Tensor) -> None:
    t.data.add_(t.abs() * 0.01)


def negate_a_part(t: Tensor) -> None:
    t.data[len(t) // 2 : len(t) // 2 + len(t) // 20 + 1].neg_()


@on_both
@pytest.mark.parametrize("change", [double, nudge, negate_a_part])
@pytest.mark.parametrize("which", [0, 1])
def test_a_write_through_data_is_seen_once(which: int, change: Callable[[Tensor], None], device: str) -> None:
    given, samples = tensors(device), Samples()
    assert not samples.changed(given, 0), "there is nothing to compare the first with"
    assert not samples.changed(given, 0)
    version = given[which]._version
    change(given[which])
    assert given[which]._version == version
    assert samples.changed(given, 0) and not samples.changed(given, 0)


@on_both
def test_other_tensors_and_nan(device: str) -> None:
    given, samples = tensors(device), Samples()
    given[0][0, 0] = float("nan")
    samples.changed(given, 0)
    assert not samples.changed(given, 0), "NaN is the NaN that was there"
    elsewhere = [t.clone() for t in given[:-1]]
    elsewhere.append(elsewhere[0][::2, ::2])
    assert not samples.changed(elsewhere, 1), "the same values elsewhere are no change"
    elsewhere[2].fill_(1.0)
    assert samples.changed(elsewhere, 1)
    assert samples.changed(given, 2) and samples.changed(given[:-2], 3)


def test_tensors_without_memory_to_read_are_left_out() -> None:
    emptied = torch.randn(40)
    emptied.untyped_storage().resize_(0)
    odd = [emptied, torch.empty(3, device="meta"), torch.randn(3, 3).to_sparse()]
    given, samples = [*odd, torch.randn(9)], Samples()
    for _ in range(2):
        assert not samples.changed(given, 0)
    given[-1].data.neg_()
    assert samples.changed(given, 0)


@pytest.mark.parametrize(
    ("tensor", "count"),
    [
        (torch.empty(4, 6), 24),
        (torch.empty(4, 6).t(), 24),
        (torch.empty(2, 3, 4).permute(1, 2, 0), 24),
        (torch.empty(4, 6)[:, ::2], 1),
        (torch.empty(1, 6).expand(4, 6), 1),
        (torch.empty(4, 6)[:, :3], 1),
        (torch.empty(()), 1),
        (torch.empty(0, 3), 0),
        (torch.empty(4, 6)[:, 2:3], 1),
        (torch.empty(5, 1, 6).transpose(0, 1), 30),
    ],
)
def test_elements_in_a_row_stay_within_the_tensor(tensor: Tensor, count: int) -> None:
    assert elements_in_a_row(tensor) == count
