"""Softmaxes that are no attention's are raised with their precision, bit for bit; others stay."""

from __future__ import annotations

import pytest
import torch
from small_graphs import Small, aten

from regraft.compiler.expected import expectations
from regraft.kernels.softmax import softmax
from regraft.passes.attention import SDPA
from regraft.passes.eager_attention import EagerAttention
from regraft.passes.pipeline import PASSES
from regraft.passes.softmax import Softmax


@pytest.mark.parametrize("form", ["cast", "plain", "bool"])
def test_precision_is_kept(form: str) -> None:
    small = Small()
    x = small.input("x", torch.randn(3, 5, 9, dtype=torch.float32 if form == "bool" else torch.bfloat16) * 3)
    if form == "bool":
        y = small.call(aten._softmax.default, x, 2, False)
    else:
        y = small.call(aten.softmax.int, x, -1, torch.float32 if form == "cast" else None)
    if form == "cast":
        y = small.call(aten._to_copy.default, y, dtype=torch.bfloat16)
    small.program(y)
    before = small.run()
    assert len(small.apply(Softmax()).rewrites) == 1
    assert small.targets() == [str(softmax.overload)]
    assert torch.equal(before[0], small.run()[0]) and before[0].dtype == small.run()[0].dtype


def test_others_stay() -> None:
    small = Small()
    x = small.input("x", torch.randn(3, 5, 9))
    across = small.call(aten.softmax.int, x, 1)
    counted = small.call(aten._to_copy.default, small.call(aten.softmax.int, x, -1), dtype=torch.int64)
    small.program(across, counted)
    small.apply(Softmax())
    assert str(aten.softmax.int).removeprefix("aten.") in small.targets()
    assert small.run()[1].dtype == torch.int64


def test_attention_comes_first_and_is_missed_where_it_is_left() -> None:
    order = [p.name for p in PASSES]
    assert order.index("attention") < order.index("softmax")
    assert {type(r) for p in PASSES if p.name == "attention" for r in p.rules} >= {SDPA, EagerAttention}
    small = Small()
    q, k, v = (small.input(n, torch.randn(2, 3, 5, 8)) for n in "qkv")
    scores = small.call(aten.matmul.default, q, small.call(aten.transpose.int, k, -1, -2))
    y = small.call(aten.matmul.default, small.call(aten.softmax.int, scores, -1), v)
    program = small.program(y)
    assert len(small.apply(Softmax()).rewrites) == 1
    (attention,) = [e for e in expectations(program) if e.what == "attention"]
    assert not attention.met and "attention left as it was" in attention.missing[0]
