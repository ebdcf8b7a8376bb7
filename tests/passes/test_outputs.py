"""Outputs that are slices of something larger get memory of their own, and nothing else is copied."""

from __future__ import annotations

import operator

import torch
from small_graphs import Small, aten

from regraft.compiler.pipeline import Context, Settings
from regraft.passes.outputs import outputs


def test_only_parts_of_what_the_graph_computes_are_copied() -> None:
    small = Small()
    x = small.input("x", torch.randn(3, 4))
    y = small.call(aten.relu.default, x)
    parts = small.call(aten.split_with_sizes.default, y, [2, 2], -1)
    first, second = (small.call(operator.getitem, parts, i) for i in range(2))
    computed = small.call(aten.mul.Tensor, second, 2.0)
    turned = small.call(aten.transpose.int, y, 0, 1)
    head = small.call(aten.slice.Tensor, x, 0, 0, 1)
    program = small.program(small.call(aten.unsqueeze.default, first, 0), computed, turned, head)
    before = small.run()
    result = outputs(program, Context(Settings(torch.device("cpu")), None))
    after = small.run()
    assert len(result.rewrites) == 1
    assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True))
    assert after[0].untyped_storage().nbytes() == after[0].numel() * after[0].element_size()
    assert before[0].untyped_storage().nbytes() > before[0].numel() * before[0].element_size()
    assert after[3].data_ptr() == small.values["x"].data_ptr()


def test_copies_of_heads_keep_their_order_in_memory() -> None:
    """Rows of all heads are copied at once; what is returned looks as it did."""
    small = Small()
    x = small.input("x", torch.randn(2, 5, 24))
    qkv = small.call(aten.relu.default, x)
    heads = small.call(aten.reshape.default, qkv, [2, 5, 3, 4, 2])
    keys = small.call(aten.transpose.int, small.call(aten.select.int, heads, 2, 1), 1, 2)
    program = small.program(keys)
    (before,) = small.run()
    outputs(program, Context(Settings(torch.device("cpu")), None))
    (after,) = small.run()
    assert torch.equal(after, before)
    assert after.shape == (2, 4, 5, 2)
    assert after.stride() == (40, 2, 8, 1)
