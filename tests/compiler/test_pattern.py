"""Patterns as data: what tracing a pattern function records."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from regraft.compiler.pattern import AnyOf, Builder, Op, trace

aten = torch.ops.aten


def test_names_of_parameters_are_variables_and_the_function_is_called_once() -> None:
    calls = []

    def pattern(p: Builder, x: Any, eps: Any) -> Any:
        calls.append((x.name, eps.name))
        return p.add(x, eps)

    traced = trace(pattern)
    assert traced.variables == ("x", "eps")
    assert calls == [("x", "eps")]
    assert len(traced.outputs) == 1


def test_roots_are_the_overloads_of_every_alternative_and_of_an_optional_cast() -> None:
    traced = trace(lambda p, x: p.cast(p.any(p.mul(x, 2), p.square(x))))
    wanted = {aten.mul.Tensor, aten.mul.Scalar, aten.square.default, aten._to_copy.default, aten.to.dtype}
    assert wanted <= traced.roots
    assert aten.add.Tensor not in traced.roots


def test_size_counts_the_shortest_spelling_and_shared_values_once() -> None:
    def pattern(p: Builder, x: Any, w: Any) -> Any:
        squared = p.any(p.mul(p.neg(x), p.neg(x)), p.square(x))
        return p.mul(p.cast(squared), p.add(squared, w))

    assert trace(pattern).size == 5  # mul, square, x, add, w


def test_several_outputs_keep_their_order() -> None:
    traced = trace(lambda p, x: (p.neg(x), p.exp(x)))
    assert [o.spec.name for o in traced.outputs if isinstance(o, Op)] == ["neg", "exp"]


def test_a_pattern_value_knows_the_line_it_was_written_on() -> None:
    traced = trace(lambda p, x: p.neg(x))
    file, _, line = traced.outputs[0].where.partition(":")
    assert file == "test_pattern.py"
    assert int(line) == test_a_pattern_value_knows_the_line_it_was_written_on.__code__.co_firstlineno + 1


def test_an_optional_operator_is_a_choice_of_two() -> None:
    traced = trace(lambda p, x: p.opt("clone", p.neg(x), tag="bare"))
    (choice,) = traced.outputs
    assert isinstance(choice, AnyOf) and choice.tag == "bare" and len(choice.alternatives) == 2


def test_further_variables_of_one_name_are_one() -> None:
    def pattern(p: Builder, x: Any) -> Any:
        assert p.variable("x") is x
        assert p.variable("scale_0") is p.variable("scale_0")
        return p.mul(x, p.variable("scale_0"))

    assert trace(pattern).size == 3


def test_an_unknown_operator_is_an_error_that_lists_the_known_ones() -> None:
    with pytest.raises(AttributeError, match=r"unknown operator 'rsqrtt' in a pattern; known: .*rsqrt"):
        trace(lambda p, x: p.rsqrtt(x))


def test_a_semantic_op_is_an_operator_of_patterns() -> None:
    traced = trace(lambda p, x: p.activation(x, "silu"))
    assert traced.roots == {torch.ops.regraft.activation.default}
    ours = trace(lambda p, x: p.regraft_layer_norm(x, None, None, 1e-5))
    assert ours.roots == {torch.ops.regraft.layer_norm.default}
    assert trace(lambda p, x: p.layer_norm(x, [8])).roots == {aten.layer_norm.default}


@pytest.mark.parametrize("result", ["variable", "number", "nothing"])
def test_a_pattern_must_return_operators(result: str) -> None:
    def pattern(p: Builder, x: Any) -> Any:
        return {"variable": x, "number": 3, "nothing": None}[result]

    with pytest.raises(TypeError, match="a pattern returns operators"):
        trace(pattern)
