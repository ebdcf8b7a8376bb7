"""Memory that a model reads by strides lies in the graph as it did when the model was captured."""

from __future__ import annotations

import copy

import pytest
import torch
from kernel_checks import assert_close
from torch import Tensor, nn

import regraft
from regraft.compiler.capture import capture
from regraft.compiler.errors import CaptureError
from regraft.runtime.backend import backend


class _Windows(nn.Module):
    """Each token beside the one before it, as sliding attention reads its keys."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(24, 24) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x.transpose(0, 1)).transpose(0, 1) for p in (self.q, self.k, self.v))  # [B, S, 24], S outermost
        strides = list(k.stride())
        windows = k.as_strided((k.shape[0], k.shape[1] - 1, 2, 24), (strides[0], strides[1], strides[1], 1))
        return torch.sigmoid(q[:, 1:, None] * windows).sum(2) + v[:, 1:]


class _Gaps(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[:, ::2].as_strided((x.shape[0], 2), (x.stride(0), 1)) + 1


def test_products_side_by_side_move_no_window() -> None:
    torch.manual_seed(0)
    module = _Windows().eval()
    inputs = [torch.randn(2, 9, 24), torch.randn(1, 6, 24), torch.randn(3, 12, 24)]
    with torch.no_grad():
        expected = [(module(x), copy.deepcopy(module).double()(x.double())) for x in inputs]
        compiled = torch.compile(module, backend=backend)
        for x, wanted in zip(inputs, expected, strict=True):
            assert_close(compiled(x), *wanted)
    module = regraft.optimize(module, example_inputs={"x": inputs[0]}, verify="off", verbose=False)
    assert any(group.rule == "qkv" for group in module.report.rewrites)
    for x, wanted in zip(inputs, expected, strict=True):
        assert_close(module(x), *wanted)
    assert module.report.calls["original"] == 0


def test_memory_with_gaps_is_refused() -> None:
    with pytest.raises(CaptureError, match="gaps in its memory"):
        capture(_Gaps().eval(), {"x": torch.randn(3, 8)}, {}, cache=False)
