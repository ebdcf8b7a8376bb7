"""`torch.nn.RMSNorm` is raised with PyTorch's epsilon and rounding, and fused with the sum before it."""

from __future__ import annotations

import collections

import pytest
import torch
import torch.nn.functional as F
from small_graphs import Small, aten
from torch import nn

import regraft
from regraft.compiler.rule import Stage
from regraft.passes.add_norm import AddRMSNorm
from regraft.passes.rms_norm import ATenRMSNorm


def wide(x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    """The definition in float64."""
    y = x.double() / (x.double().square().mean(-1, keepdim=True) + eps).sqrt()
    return y if weight is None else y * weight.double()


@pytest.mark.parametrize("eps", [None, 1e-5])
@pytest.mark.parametrize("weight_dtype", [None, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_it_is_pytorchs(dtype: torch.dtype, weight_dtype: torch.dtype | None, eps: float | None) -> None:
    """On values so small that epsilon decides: that of float32 for bf16, whose own is a million times larger."""
    small = Small()
    x = small.input("x", (torch.randn(3, 5, 9, dtype=torch.float64) * 3e-4).to(dtype))
    w = None if weight_dtype is None else small.weight("w", torch.randn(9).to(weight_dtype))
    small.program(small.call(aten.rms_norm.default, x, [9], w, eps))
    before = small.run()[0]
    assert len(small.apply(ATenRMSNorm()).rewrites) == 1
    assert small.targets() == ["regraft.rms_norm.default"]
    after = small.run()[0]
    assert after.dtype is dtype
    computed = torch.finfo(torch.float64 if dtype is torch.float64 else torch.float32).eps
    truth = wide(small.values["x"], small.values.get("w"), computed if eps is None else eps)
    error, allowed = (after.double() - truth).abs().max(), (before.double() - truth).abs().max()
    assert allowed <= 8 * torch.finfo(dtype).eps * truth.abs().max(), "PyTorch's own follows another definition"
    assert error <= 2 * allowed + 4 * torch.finfo(dtype).eps * truth.abs().max()


@pytest.mark.parametrize("sizes", [[5, 9], [3, 5, 9]])
def test_norms_over_several_dimensions_stay_and_say_why(sizes: list[int]) -> None:
    small = Small()
    small.program(small.call(aten.rms_norm.default, small.input("x", torch.randn(3, 5, 9)), sizes))
    result = small.apply(ATenRMSNorm())
    assert not result.rewrites
    assert [miss.found for miss in result.misses] == [f"normalises over {len(sizes)} dimensions"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_sum_before_is_fused(dtype: torch.dtype) -> None:
    small = Small()
    x, y = (small.input(n, torch.randn(3, 5, 9).to(dtype)) for n in "xy")
    total = small.call(aten.add.Tensor, x, y)
    normed = small.call(aten.rms_norm.default, total, [9], small.weight("w", torch.randn(9).to(dtype)))
    small.program(total, normed)
    before = small.run()
    small.apply(ATenRMSNorm())
    assert len(small.apply(AddRMSNorm(), stage=Stage.FUSE).rewrites) == 1
    assert "regraft.add_rms_norm.default" in small.targets() and "add.Tensor" not in small.targets()
    assert all(torch.equal(a, b) for a, b in zip(before, small.run(), strict=True))


class Blocks(nn.Module):
    """Pre-norm blocks on PyTorch's own norm, and one without weight behind them."""

    def __init__(self, layers: int, width: int = 24) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.RMSNorm(width) for _ in range(layers))
        self.linears = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for norm, linear in zip(self.norms, self.linears, strict=True):
            x = x + linear(norm(x))
        return F.rms_norm(x, x.shape[-1:], eps=1e-6)


@pytest.mark.parametrize("layers", [1, 3])
def test_a_model_of_such_norms(layers: int) -> None:
    torch.manual_seed(0)
    model = Blocks(layers).eval()
    inputs = [torch.randn(2, n, 24) for n in (7, 11)]
    with torch.no_grad():
        plain = [model(x) for x in inputs]
        truth = [model.double()(x.double()) for x in inputs]
    model.float()
    model = regraft.optimize(model, example_inputs={"x": inputs[0]}, verbose=False)
    for x, before, exact in zip(inputs, plain, truth, strict=True):
        error, allowed = (model(x) - exact).abs().max(), (before - exact).abs().max()
        assert error <= 2 * allowed + 4 * torch.finfo(torch.float32).eps * exact.abs().max()
    found = collections.Counter(r.rule for p in model.report.passes for r in p.rewrites)
    assert (found["aten_rms_norm"], found["add_rms_norm"]) == (layers + 1, layers)
    assert model.report.calls == {"graph": 2, "original": 0}
