"""Raise the other spellings of a linear layer.

reshape(addmm(b, reshape(x, [-1, K]), W), [..., N])   ->  linear(x, W.T, b)       (GPT-2's Conv1D)
matmul(x, w.T)                                        ->  linear(x, w)            (Falcon)
mm, addmm on matrices                                 ->  linear
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ..compiler.match import Match
from ..compiler.pattern import Builder
from ..compiler.rule import Emitter, Reject, Rule, Stage

aten = torch.ops.aten


def is_weight(node: Any) -> bool:
    """A placeholder that is not an argument of the call: parameter, buffer or constant."""
    return isinstance(node, fx.Node) and node.op == "placeholder" and bool(node.meta.get("weight"))


class AddmmLinear(Rule):
    """Conv1D: the weight lies [in, out], the input is flattened to rows and back."""

    stage = Stage.RAISE
    label = "Conv1D -> linear"

    def pattern(self, p: Builder, x: Any, w: Any, b: Any) -> Any:
        return p.view(p.addmm(b, p.view(x, "rows"), w), "sizes")

    def check(self, m: Match) -> Reject | None:
        return _check_rows(m) or (
            None if m.val(m.b).dim() == 1 else Reject("the added tensor is not a bias vector", m.b)
        )

    def emit(self, m: Match, g: Emitter) -> fx.Node:
        return g.linear(m.x, g.transpose(m.w, 0, 1), m.b)


class MmLinear(Rule):
    """The same without a bias."""

    stage = Stage.RAISE
    label = "mm -> linear"

    def pattern(self, p: Builder, x: Any, w: Any) -> Any:
        return p.view(p.matmul(p.view(x, "rows"), w), "sizes")

    def check(self, m: Match) -> Reject | None:
        return _check_rows(m)

    def emit(self, m: Match, g: Emitter) -> fx.Node:
        return g.linear(m.x, g.transpose(m.w, 0, 1), None)


class FlatAddmmLinear(Rule):
    """addmm on rows that were never anything else."""

    stage = Stage.RAISE
    label = "addmm -> linear"

    def pattern(self, p: Builder, x: Any, w: Any, b: Any) -> Any:
        return p.addmm(b, x, w)

    def check(self, m: Match) -> Reject | None:
        if not is_weight(_untransposed(m.w)):
            return Reject("the matrix is not a weight", m.w, quiet=True)
        return None if m.val(m.b).dim() == 1 else Reject("the added tensor is not a bias vector", m.b)

    def emit(self, m: Match, g: Emitter) -> fx.Node:
        return g.linear(m.x, g.transpose(m.w, 0, 1), m.b)


class MatmulLinear(Rule):
    """x @ W with a weight matrix."""

    stage = Stage.RAISE
    label = "matmul -> linear"

    def pattern(self, p: Builder, x: Any, w: Any) -> Any:
        return p.matmul(x, w)

    def check(self, m: Match) -> Reject | None:
        if m.val(m.w).dim() != 2 or not is_weight(_untransposed(m.w)):
            return Reject("the matrix is not a weight", m.w, quiet=True)
        return None

    def emit(self, m: Match, g: Emitter) -> fx.Node:
        return g.linear(m.x, g.transpose(m.w, 0, 1), None)


def _untransposed(node: Any) -> Any:
    if isinstance(node, fx.Node) and node.target in (aten.transpose.int, aten.t.default, aten.permute.default):
        return node.args[0]
    return node


def _check_rows(m: Match) -> Reject | None:
    """The input's last dimension is what is multiplied, and only the others were folded and unfolded."""
    if not is_weight(_untransposed(m.w)):
        return Reject("the matrix is not a weight", m.w, quiet=True)
    inner, outer = m.val(m.w).shape
    x, y = m.val(m.x), m.anchor.meta["val"]
    fitting = (
        x.shape[-1] == inner
        and y.shape[-1] == outer
        and [str(s) for s in x.shape[:-1]] == [str(s) for s in y.shape[:-1]]
    )
    return (
        None
        if fitting
        else Reject(f"{list(x.shape)} is folded to rows of {inner}, and unfolded to {list(y.shape)}", m.x)
    )


RULES = (AddmmLinear(), MmLinear(), FlatAddmmLinear(), MatmulLinear())
