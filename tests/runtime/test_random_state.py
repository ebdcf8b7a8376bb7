"""Models that draw random numbers at inference: a capture takes none of the caller's, and a graph draws as eager."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from runtime_models import tiny_llama, tokens
from torch import nn

import regraft
from regraft.runtime.random_state import alike


class Noisy(nn.Module):
    """Dropout that is never switched off, twice on the same values."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.gelu(self.linear(x))
        return F.dropout(y, 0.5, training=True) + F.dropout(y, 0.5, training=True)


@pytest.mark.parametrize("ahead", [True, False], ids=["ahead", "at the first call"])
def test_seeded_calls_are_eagers(ahead: bool) -> None:
    torch.manual_seed(0)
    plain, x = Noisy().eval(), torch.randn(40, 16)
    torch.manual_seed(3)
    with torch.no_grad():
        expected = [plain(x), plain(x)]
        exact = copy.deepcopy(plain).double()
        torch.manual_seed(3)
        assert not torch.allclose(exact(x.double()).float(), expected[1]), "nothing was drawn"
    model = regraft.optimize(plain, example_inputs={"x": x} if ahead else None, verbose=False)
    torch.manual_seed(3)
    found = [model(x), model(x)]
    assert model.report.calls == {"graph": 2, "original": 0}
    for a, b in zip(found, expected, strict=True):
        assert (a - b).abs().max() <= 8 * torch.finfo(torch.float32).eps * b.abs().max()
    assert model.report.certificate.passed
    worst = max(m.error_original for m in model.report.certificate.measured)
    assert worst < 1e-4, "original and oracle drew different numbers"


def test_optimize_and_generate_draw_nothing() -> None:
    model = tiny_llama()
    torch.manual_seed(5)
    expected = torch.rand(4)
    torch.manual_seed(5)
    model = regraft.optimize(model, verbose=False)
    model.generate(tokens(), max_new_tokens=2)
    assert torch.equal(torch.rand(4), expected)


def test_only_the_models_own_device_is_seeded(monkeypatch: pytest.MonkeyPatch) -> None:
    """`torch.manual_seed` would seed all of them, and one alone is put back."""

    def forbidden(_: int) -> None:
        raise AssertionError("every device is seeded")

    monkeypatch.setattr(torch, "manual_seed", forbidden)
    before = torch.random.get_rng_state()
    with alike(torch.device("cpu")):
        first = torch.rand(3)
    with alike(torch.device("cpu")):
        assert torch.equal(torch.rand(3), first)
    assert torch.equal(torch.random.get_rng_state(), before)
