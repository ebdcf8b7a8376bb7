"""Linears on one value are one where one module has them, or wrappers of one module each have one."""

from __future__ import annotations

import pytest
import torch
from small_graphs import Small, aten

from regraft.compiler.rule import Stage
from regraft.passes.qkv import QKV


@pytest.mark.parametrize(
    ("modules", "linears"),
    [
        (["a.q", "a.k", "a.v"], 1),
        (["a.q.linear", "a.k.linear", "a.v.linear"], 1),
        (["h.attention.qkv", "h.mlp.up"], 2),
        (["h.attention.q", "h.attention.k", "h.mlp.up"], 2),
        (["experts.0.up", "experts.1.up"], 2),
        (["a.q.inner.linear", "a.k.linear"], 2),
        (["a.q.linear", "b.k.linear"], 2),
    ],
)
def test_which_belong_together(modules: list[str], linears: int) -> None:
    small = Small()
    x = small.input("x", torch.randn(3, 8))
    weights = [small.weight(f"w{i}", torch.randn(4 + i, 8)) for i in range(len(modules))]
    small.program(*[small.call(aten.linear.default, x, w, module=m) for w, m in zip(weights, modules, strict=True)])
    before = small.run()
    small.apply(QKV(), stage=Stage.FUSE)
    assert small.targets().count("linear.default") == linears
    for a, b in zip(small.run(), before, strict=True):
        torch.testing.assert_close(a, b)
