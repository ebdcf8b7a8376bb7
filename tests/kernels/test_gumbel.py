"""Gumbel noise in Triton: the integers of the reference, and its noise to the last bits."""

from __future__ import annotations

import pytest
import torch
from kernel_checks import on_devices

from regraft.kernels.gumbel_triton import launch
from regraft.runtime.decoding.noise import gumbel, philox


@on_devices
@pytest.mark.parametrize("count", [1, 131, 1024, 3001])
def test_triton_noise_is_that_of_the_reference(count: int, device: str) -> None:
    """Seeds of 63 bits, steps beyond 2^31, settings that are columns of a table, rows that are not drawn."""
    table = torch.tensor([[3, 0, 1], [2**62 + 12345, 70000, 1], [7, 2**31 + 5, 1], [7, 5, 0]], device=device)
    seed, step, drawn = table.unbind(1)
    scores = torch.randn(4, count + 3, device=device)[:, :count]
    noise = gumbel(philox(seed.cpu(), step.cpu(), count))
    expected = scores.cpu() + noise * drawn.cpu()[:, None]
    torch.testing.assert_close(launch(scores, seed, step, drawn.bool()).cpu(), expected, rtol=1e-5, atol=1e-5)
