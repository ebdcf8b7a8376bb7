"""Clean-up: what goes, what stays, and that no bit of the result changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_graphs import Small, aten
from torch import Tensor, fx, nn

from regraft.compiler.lifting import lift
from regraft.compiler.program import InputKind, Program
from regraft.passes.canonicalize import canonicalize


class Function(nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *tensors: Tensor) -> Any:
        return self.function(*tensors)


def exported(function: Callable[..., Any], *tensors: Tensor, dynamic: bool = True) -> Program:
    """The function as a program, its first two dimensions dynamic."""
    auto = torch.export.Dim.AUTO
    shapes = (tuple(dict.fromkeys(range(min(2, t.dim())), auto) for t in tensors),) if dynamic else None
    ep = torch.export.export(Function(function), tensors, dynamic_shapes=shapes, strict=False).run_decompositions({})
    module, inputs = lift(ep, "", Function(function))
    return Program(module, inputs, rebuild=tuple)


def run(program: Program, *tensors: Tensor) -> tuple[Tensor, ...]:
    program.gm.recompile()
    given = iter(tensors)
    values = [next(given) if i.kind is InputKind.USER else i.value for i in program.inputs]
    with torch.no_grad():
        return tuple(program.gm(*values))


def targets(program: Program) -> list[str]:
    calls = [n for n in program.graph.nodes if n.op == "call_function"]
    return [str(n.target).replace("aten.", "") for n in calls if n.target is not aten.sym_size.int]


X = torch.randn(3, 5, 8)


@pytest.mark.parametrize(
    ("function", "left"),
    [
        (lambda x: (x.to(torch.float32) + 0.0, x * 1), []),
        (lambda x: (x.float().double(),), ["_to_copy.default"]),
        (lambda x: (x.contiguous().view(x.shape).exp(),), ["exp.default"]),
        (lambda x: (torch.dropout(x, 0.3, False).clone().exp(),), ["exp.default"]),
        (lambda x: (x[:, :, :].expand(x.shape).exp(),), ["exp.default"]),
        (lambda x: (x.transpose(1, 2).transpose(2, 1).exp(),), ["exp.default"]),
        (lambda x: (torch.cat((x.sin(), x[..., 8:]), dim=-1).exp(),), ["sin.default", "exp.default"]),
        (lambda x: (torch.cat((x, x[..., 8:], x), dim=2),), ["cat.default"]),
        (lambda x: (x.permute(0, 2, 1).exp(),), ["transpose.int", "exp.default"]),
        (lambda x: (x.flatten(0, 1).unflatten(0, (-1, x.shape[1])).exp(),), ["exp.default"]),
        (lambda x: (x.view(-1, 8).view(-1, 4, 2).exp(),), ["reshape.default", "exp.default"]),
        (lambda x: (x.type_as(x).exp(),), ["exp.default"]),
    ],
)
def test_what_does_nothing_goes(function: Callable[..., Any], left: list[str]) -> None:
    program = exported(function, X)
    before = run(program, X)
    canonicalize(program)
    assert targets(program) == left
    for other in (X, torch.randn(2, 7, 8)):
        for a, b in zip(function(other), run(program, other), strict=True):
            assert a.dtype is b.dtype and torch.equal(a, b)
    assert all(torch.equal(a, b) for a, b in zip(before, run(program, X), strict=True))


@pytest.mark.parametrize(
    ("function", "left"),
    [
        (lambda x: (x + 1,), ["add.Tensor"]),
        (lambda x: (x.to(torch.bfloat16).to(torch.float32),), ["_to_copy.default"] * 2),
        (lambda x: (x[:, ::2],), ["slice.Tensor"]),
        (lambda x: (x[:, 1:],), ["slice.Tensor"]),
        (lambda x: (x.expand(4, *x.shape),), ["expand.default"]),
        (lambda x: (torch.add(x, x, alpha=0),), ["add.Tensor"]),
        (lambda x: (x.transpose(0, 1).transpose(1, 2),), ["transpose.int"] * 2),
        (lambda x: (x - 0.5, x * 1.5, x / 2), ["sub.Tensor", "mul.Tensor", "div.Tensor"]),
    ],
)
def test_what_does_something_stays(function: Callable[..., Any], left: list[str]) -> None:
    program = exported(function, X)
    canonicalize(program)
    assert targets(program) == left
    for a, b in zip(function(X), run(program, X), strict=True):
        assert a.dtype is b.dtype and torch.equal(a, b)


def test_a_product_with_one_that_widens_the_result_stays() -> None:
    """x * 1.0 of an integer tensor is a float tensor."""
    ids = torch.arange(15).reshape(3, 5)
    program = exported(lambda i: (i * 1.0,), ids)
    canonicalize(program)
    (found,) = run(program, ids)
    assert found.dtype is torch.float32


@pytest.mark.parametrize(
    ("function", "left"),
    [
        (lambda x: x.split([2, 5, 1], -1), ["slice.Tensor"] * 3),
        (lambda x: x.chunk(2, -1), ["slice.Tensor"] * 2),
        (lambda x: x.chunk(3, -1), ["slice.Tensor"] * 3),
        (lambda x: x.split(3, -1)[1:], ["slice.Tensor"] * 2),
        (lambda x: x.reshape(x.shape[0], x.shape[1], 2, 4).unbind(2), ["reshape.default", "select.int", "select.int"]),
    ],
)
def test_parts_of_known_size_read_the_source(function: Callable[..., Any], left: list[str]) -> None:
    program = exported(function, X)
    canonicalize(program)
    assert targets(program) == left
    for other in (X, torch.randn(2, 7, 8)):
        assert all(torch.equal(a, b) for a, b in zip(function(other), run(program, other), strict=True))


def test_parts_of_a_size_that_varies_stay_split() -> None:
    function = lambda x: x.split([x.shape[1] - 2, 2], 1)  # noqa: E731
    program = exported(function, X)
    canonicalize(program)
    assert "split_with_sizes.default" in targets(program)
    other = torch.randn(2, 7, 8)
    assert all(torch.equal(a, b) for a, b in zip(function(other), run(program, other), strict=True))


@pytest.mark.parametrize(
    ("equation", "shapes", "ops"),
    [
        ("bhqd,bhkd->bhqk", ((2, 3, 5, 4), (2, 3, 7, 4)), {"transpose.int", "matmul.default"}),
        ("bhqk,bhkd->bhqd", ((2, 3, 5, 7), (2, 3, 7, 4)), {"matmul.default"}),
        ("bqhd,bkhd->bhqk", ((2, 5, 3, 4), (2, 7, 3, 4)), {"transpose.int", "permute.default", "matmul.default"}),
        ("bhqk,bkhd->bqhd", ((2, 3, 5, 7), (2, 7, 3, 4)), {"transpose.int", "matmul.default"}),
        ("ij,jk->ik", ((5, 4), (4, 7)), {"matmul.default"}),
        ("ij,kj->ki", ((5, 4), (7, 4)), {"transpose.int", "matmul.default"}),
    ],
)
def test_einsum_of_two_matrices_is_a_product(equation: str, shapes: Any, ops: set[str]) -> None:
    a, b = (torch.randn(s) for s in shapes)
    program = exported(lambda x, y: (torch.einsum(equation, x, y),), a, b, dynamic=False)
    removed = canonicalize(program).removed
    assert removed["einsum"] == 1 and set(targets(program)) == ops
    torch.testing.assert_close(run(program, a, b)[0], torch.einsum(equation, a, b))


OTHER_EQUATIONS = ("bij,bij->b", "bij,bjk->bk", "bij,bkj->bijk", "...ij,...jk->...ik", "bii,bik->bk")


@pytest.mark.parametrize("equation", OTHER_EQUATIONS)
def test_other_equations_stay(equation: str) -> None:
    a = torch.randn(2, 4, 4)
    program = exported(lambda x: (torch.einsum(equation, x, x),), a, dynamic=False)
    canonicalize(program)
    assert targets(program) == ["einsum.default"]


def test_equal_nodes_become_one_but_random_ones_and_other_types_do_not() -> None:
    small = Small()
    x = small.input("x", torch.randn(3, 5))
    same = [small.call(aten.add.Tensor, small.call(aten.exp.default, x), 1.0) for _ in range(2)]
    integer = small.call(aten.add.Tensor, small.call(aten.exp.default, x), 1)
    true = small.call(aten.add.Tensor, small.call(aten.exp.default, x), True)
    noise = [small.call(aten.rand_like.default, x) for _ in range(2)]
    program = small.program(*same, integer, true, *noise)
    result = canonicalize(program)
    assert small.targets() == ["exp.default", *["add.Tensor"] * 3, *["rand_like.default"] * 2]
    assert result.removed == {"common subexpression": 4}


def test_a_write_is_never_merged_or_dropped() -> None:
    small = Small()
    x = small.input("x", torch.randn(3, 5))
    copied = small.call(aten.clone.default, small.call(aten.exp.default, x))
    small.call(aten.add_.Tensor, copied, 1.0)
    small.call(aten.add_.Tensor, copied, 1.0)
    program = small.program(copied)
    wanted = small.values["x"].exp() + 1.0 + 1.0
    canonicalize(program)
    assert small.targets().count("add_.Tensor") == 2
    assert torch.equal(small.run()[0], wanted)


def test_a_clone_that_is_written_to_stays() -> None:
    small = Small()
    x = small.input("x", torch.randn(3, 5))
    copied = small.call(aten.clone.default, x)
    written = small.call(aten.mul_.Tensor, copied, 2.0)
    program = small.program(written, x)
    value = small.values["x"].clone()
    canonicalize(program)
    doubled, kept = small.run()
    assert torch.equal(doubled, 2 * value) and torch.equal(kept, value)


def test_numbers_that_are_computed_of_numbers_are_noted() -> None:
    small = Small()
    x = small.input("x", torch.randn(3, 5))
    head = small.input("head", torch.tensor(16.0), InputKind.CONSTANT)
    twin = small.input("twin", torch.tensor(16.0), InputKind.CONSTANT)
    other = small.input("other", torch.tensor(16.0, dtype=torch.float64), InputKind.CONSTANT)
    temperature = small.weight("temperature", torch.tensor(16.0))
    roots = [small.call(aten.sqrt.default, n) for n in (head, twin, other, temperature)]
    last = x
    for root in roots:
        last = small.call(aten.div.Tensor, last, root)
    program = small.program(last)
    before = small.run()
    canonicalize(program)
    divisors = [n.args[1] for n in small.graph.nodes if n.target is aten.div.Tensor]
    assert [d.meta.get("constant") for d in divisors] == [4.0, 4.0, 4.0, None]  # a weight may change
    assert divisors[0] is divisors[1] and divisors[0] is not divisors[2]
    assert torch.equal(before[0], small.run()[0])


def test_the_result_says_what_went() -> None:
    program = exported(lambda x: (x.to(torch.float32).contiguous().view(x.shape).split([3, 5], -1)[0].exp(),), X)
    result = canonicalize(program)
    assert result.name == "canonicalize" and result.removed["split"] == 1
    assert result.nodes_after < result.nodes_before


def test_module_and_source_survive() -> None:
    small = Small()
    x = small.input("x", torch.randn(3, 8))
    parts = small.call(aten.split.Tensor, x, 4, 1)
    first = small.graph.call_function(__import__("operator").getitem, (parts, 0))
    first.meta = {"val": parts.meta["val"][0], "module": "layers.3.attn", "source": "modeling.py:7 q, k = x.split(4)"}
    canonicalize(small.program(first))
    (view,) = [n for n in small.graph.nodes if n.op == "call_function"]
    assert isinstance(view, fx.Node) and view.target is aten.slice.Tensor
    assert (view.meta["module"], view.meta["source"]) == ("layers.3.attn", "modeling.py:7 q, k = x.split(4)")
