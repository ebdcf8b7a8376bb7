"""Biases that are looked up by distance: T5's buckets as a table, and look-ups that are none."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from regraft.compiler.capture import capture
from regraft.compiler.causal import one_sequence
from regraft.compiler.program import Program
from regraft.compiler.relative import Relative, relative_bias

ROWS = 9


class Biased(nn.Module):
    """The bias alone, as a model makes it."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.weight = kind, nn.Parameter(torch.randn(ROWS, 3))

    def forward(self, input_ids: Tensor) -> Tensor:
        places = torch.arange(input_ids.shape[1])
        apart = places[:, None] - places[None, :]
        if self.kind == "signed":
            apart = apart + 4
        if self.kind == "falling":
            apart = (2 * (ROWS - 1) - apart).clamp(min=0)
        if self.kind == "absolute":
            apart = apart * 0 + places
        if self.kind == "endless":
            apart = apart // 512
        bias = nn.functional.embedding(apart.clamp(0, ROWS - 1), self.weight).permute(2, 0, 1)[None]
        return bias * 2 if self.kind == "scaled" else bias


def found(kind: str) -> tuple[Relative | None, Program]:
    model: Any = Biased(kind).eval()
    program = capture(model, {"input_ids": torch.arange(7)[None]}, {}, cache=False)
    output = next(n for n in program.graph.nodes if n.op == "output")
    return relative_bias(program, model, output.args[0][0], partial(one_sequence, program)), program


@pytest.mark.parametrize(("kind", "buckets"), [("plain", list(range(ROWS))), ("signed", [4, 5, 6, 7, 8])])
def test_table(kind: str, buckets: list[int]) -> None:
    relative, program = found(kind)
    assert relative is not None
    assert relative.buckets.tolist() == buckets
    assert program.placeholder_inputs()[relative.weight].target == "weight"


@pytest.mark.parametrize("kind", ["falling", "absolute", "endless", "scaled"])
def test_no_table(kind: str) -> None:
    assert found(kind)[0] is None
