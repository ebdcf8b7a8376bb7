"""Tables of rotations that are arguments, whose width is known to no rule."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor, nn

import regraft


class _Rotating(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(8, 8)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x, c, s = self.q(x), cos[..., : cos.shape[-1] // 2], sin[..., : sin.shape[-1] // 2]
        a, b = x[..., :4], x[..., 4:]
        return torch.cat([a * c - b * s, b * c + a * s], -1)


def test_tables_of_a_width_that_is_no_number(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    module = _Rotating().eval()
    inputs = {"x": torch.randn(2, 5, 8), "cos": torch.randn(2, 5, 9), "sin": torch.randn(2, 5, 9)}
    expected = module(**inputs).detach()
    with caplog.at_level(logging.WARNING, logger="regraft"):
        module = regraft.optimize(module, example_inputs=inputs, verbose=False)
    torch.testing.assert_close(module(**inputs), expected)
    assert module.report.calls == {"graph": 1, "original": 0}
    assert not [r for r in caplog.records if "check raised" in r.getMessage()]
