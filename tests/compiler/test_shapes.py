"""Symbolic sizes: unified by name, equal by algebra and not by the value they had at capture."""

from __future__ import annotations

import pytest
import sympy
import torch
from torch.export import Dim

from regraft.compiler.shapes import evaluate, hints_of, same, sizes, to_expr, unify


class Reshaping(torch.nn.Module):
    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        b, s, d = x.shape
        return x.reshape(b * s, d) @ y.new_ones(d, 3) + y.sum()


def exported() -> torch.fx.Graph:
    # both dynamic sizes of x have the same value on purpose: equality must come from the symbols
    program = torch.export.export(
        Reshaping(),
        (torch.randn(5, 5, 8), torch.randn(7)),
        dynamic_shapes=({0: Dim("b", min=1), 1: Dim("s", min=1)}, {0: Dim("t", min=1)}),
        strict=False,
    )
    return program.graph


def value_of(graph: torch.fx.Graph, name: str) -> torch.Tensor:
    return next(n.meta["val"] for n in graph.nodes if n.name == name)


def test_unify_binds_names_and_insists_on_equal_sizes() -> None:
    assert unify(torch.empty(2, 3, 4), "B S D") == {"B": 2, "S": 3, "D": 4}
    assert unify(torch.empty(4, 4), "D D") == {"D": 4}
    assert unify(torch.empty(4, 5), "D D") is None
    assert unify(torch.empty(2, 3), "B S D") is None
    assert unify([2, 3], "B 3", {"B": sympy.Integer(2)}) == {"B": 2}
    assert unify([2, 3], "B 3", {"B": sympy.Integer(5)}) is None
    assert unify([2, 3], "B 4") is None
    assert unify([2, 3], "_ _") == {}


def test_unify_leading_dots_take_any_number_of_dimensions() -> None:
    for leading in ((), (2,), (2, 3)):
        assert unify([*leading, 5, 8], "... S D") == {"S": 5, "D": 8}
    assert unify([8], "... S D") is None
    with pytest.raises(ValueError, match="leading"):
        unify([2, 3], "S ...")


def test_unify_leaves_earlier_bindings_alone() -> None:
    bindings = {"B": sympy.Integer(2)}
    assert unify([2, 9], "B S", bindings) == {"B": 2, "S": 9}
    assert bindings == {"B": 2}


def test_unify_rejects_what_is_not_a_name() -> None:
    with pytest.raises(ValueError, match="S\\+1"):
        unify([2, 3], "B S+1")


def test_symbolic_sizes_are_equal_by_symbol_not_by_hint() -> None:
    graph = exported()
    x = value_of(graph, "x")
    batch, length, width = sizes(x)
    assert batch != length and batch.is_Symbol and length.is_Symbol and width == 8
    assert unify(x, "A A D") is None, "two dynamic sizes that were both 5 at capture are not the same dimension"
    flat = next(n.meta["val"] for n in graph.nodes if "reshape" in n.name or n.name == "view")
    bound = unify(x, "B S D")
    assert bound is not None and same(sizes(flat)[0], bound["S"] * bound["B"])
    assert not same(sizes(flat)[0], bound["B"])
    assert same(to_expr(x.shape[0]) * 2 + batch, 3 * batch)


def test_hints_and_evaluation() -> None:
    graph = exported()
    hints = hints_of(graph)
    batch, length, _ = sizes(value_of(graph, "x"))
    (other,) = sizes(value_of(graph, "y"))
    assert hints == {batch: 5, length: 5, other: 7}
    assert evaluate(batch * length + 1, hints) == 26
    assert evaluate(batch / 2, {batch: 5}) == 2.5
    assert evaluate(sympy.Min(batch, 3), {batch.name: 9}) == 3
    with pytest.raises(KeyError, match=str(other)):
        evaluate(other + 1, {batch: 1})
    assert evaluate(other + 1, {}, unknown=10) == 11
