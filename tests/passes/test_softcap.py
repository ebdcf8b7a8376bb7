"""Soft caps are raised bit for bit, fused with the product before them, and left to the attention around them."""

from __future__ import annotations

import pytest
import torch
from small_graphs import Small, aten
from torch import fx

from regraft.compiler.rule import Stage
from regraft.passes.linear import RULES as LINEAR
from regraft.passes.linear_act import LinearAct
from regraft.passes.pipeline import PASSES
from regraft.passes.softcap import Softcap


def capped(small: Small, x: fx.Node, first: float, second: float) -> fx.Node:
    y = small.call(aten.tanh.default, small.call(aten.div.Tensor, x, first))
    return small.call(aten.mul.Tensor, y, second)


@pytest.mark.parametrize("cap", [30.0, 50])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_capped_logits(cap: float, dtype: torch.dtype) -> None:
    small = Small()
    x, weight = small.input("x", torch.randn(3, 8).to(dtype) * 40), small.weight("w", torch.randn(11, 8).to(dtype))
    logits = small.call(aten.linear.default, x, weight)
    small.program(capped(small, logits, cap, cap))
    before = small.run()[0]
    small.apply(*LINEAR)
    assert len(small.apply(Softcap()).rewrites) == 1
    assert torch.equal(small.run()[0], before)
    assert len(small.apply(LinearAct(), stage=Stage.FUSE).rewrites) == 1
    assert small.targets() == ["regraft.linear_act.default"]
    assert torch.equal(small.run()[0], before)


@pytest.mark.parametrize(("first", "second"), [(30.0, 15.0), (-30.0, -30.0)])
def test_others_stay(first: float, second: float) -> None:
    small = Small()
    x = small.input("x", torch.randn(3, 8))
    small.program(capped(small, x, first, second))
    assert not small.apply(Softcap()).rewrites


def test_attention_comes_first() -> None:
    order = [p.name for p in PASSES]
    assert order.index("attention") < order.index("softcap")
