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
