"""The matcher: what a pattern takes, what it refuses, and what it says about the refusal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_graphs import Small, aten
from torch import fx

from regraft.compiler.match import GraphIndex, Matcher, literal_equal
from regraft.compiler.pattern import Builder, trace


def failure(small: Small, pattern: Callable[..., Any], anchor: fx.Node) -> tuple[str, str]:
    matcher = Matcher(GraphIndex(small.graph), trace(pattern))
    assert not list(matcher.matches(anchor))
    return matcher.failure.wanted, matcher.failure.found


def match(small: Small, pattern: Callable[..., Any], anchor: fx.Node) -> Any:
    return next(Matcher(GraphIndex(small.graph), trace(pattern)).matches(anchor), None)


def vector(dtype: torch.dtype = torch.float32) -> tuple[Small, fx.Node]:
    small = Small()
    return small, small.input("x", torch.randn(5, 7, dtype=dtype))


# -- commutativity -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("inner", [False, True])
def test_commutative_operators_match_either_way(swapped: bool, inner: bool) -> None:
    small, x = vector()
    y = small.input("y", torch.randn(5, 7))
    added = small.call(aten.add.Tensor, *((y, x) if inner else (x, y)))
    product = small.call(aten.mul.Tensor, *((small.call(aten.neg.default, x), added)[:: -1 if swapped else 1]))
    found = match(small, lambda p, a, b: p.mul(p.neg(a), p.add(a, b)), product)
    assert found is not None and found.a is x and found.b is y


def test_other_operators_match_in_order_only() -> None:
    small, x = vector()
    difference = small.call(aten.sub.Tensor, small.call(aten.neg.default, x), x)
    assert match(small, lambda p, a: p.sub(p.neg(a), a), difference) is not None
    assert match(small, lambda p, a: p.sub(a, p.neg(a)), difference) is None


def test_alpha_of_an_addition_is_no_silent_wildcard() -> None:
    small, x = vector()
    added = small.call(aten.add.Tensor, x, x, alpha=2)
    assert match(small, lambda p, a, b: p.add(a, b), added) is None
    assert failure(small, lambda p, a, b: p.add(a, b), added)[1] == "alpha=2"
    assert match(small, lambda p, a, b: p.add(a, b, alpha=2), added) is not None
    assert match(small, lambda p, a, b: p.add(a, b, alpha=p.arg("alpha")), added).alpha == 2


# -- repeated variables ------------------------------------------------------------------------------------------------


def test_a_variable_used_twice_is_the_same_node() -> None:
    small, x = vector()
    y = small.input("y", torch.randn(5, 7))
    same = small.call(aten.mul.Tensor, x, small.call(aten.sigmoid.default, x))
    other = small.call(aten.mul.Tensor, x, small.call(aten.sigmoid.default, y))
    assert match(small, lambda p, a: p.mul(a, p.sigmoid(a)), same) is not None
    assert match(small, lambda p, a: p.mul(a, p.sigmoid(a)), other) is None


def test_a_value_used_twice_in_the_pattern_is_one_node() -> None:
    def pattern(p: Builder, a: Any) -> Any:
        e = p.exp(a)
        return p.div(e, p.neg(e))

    small, x = vector()
    once = small.call(aten.exp.default, x)
    assert match(small, pattern, small.call(aten.div.Tensor, once, small.call(aten.neg.default, once))) is not None
    small, x = vector()
    first, second = small.call(aten.exp.default, x), small.call(aten.exp.default, x)
    copied = small.call(aten.div.Tensor, first, small.call(aten.neg.default, second))
    wanted, found = failure(small, pattern, copied)
    assert wanted.startswith("exp (test_match.py:")
    assert found == "exp (%exp_default_1), while the same value is exp (%exp_default) elsewhere"


def test_a_number_used_twice_is_the_same_number() -> None:
    small, x = vector()
    twice = small.call(aten.mul.Tensor, small.call(aten.div.Tensor, x, 3.0), 3.0)
    once = small.call(aten.mul.Tensor, small.call(aten.div.Tensor, x, 3.0), 4.0)
    pattern = lambda p, a, c: p.mul(p.div(a, c), c)  # noqa: E731
    assert match(small, pattern, twice).c == 3.0
    assert match(small, pattern, once) is None


# -- numbers in every form ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["python", "full", "lifted", "cast", "scalar_tensor"])
@pytest.mark.parametrize("bound", [False, True])
def test_a_number_matches_in_whatever_form_it_arrives(form: str, bound: bool) -> None:
    small, x = vector(torch.float64)
    if form == "python":
        number: Any = 0.5
    elif form == "full":
        number = small.call(aten.full.default, [], 0.5)
    elif form == "lifted":
        number = small.constant("c", 0.5)
    elif form == "cast":
        number = small.call(aten._to_copy.default, small.constant("c", 0.5), dtype=torch.float32)
    else:
        number = small.call(aten.scalar_tensor.default, 0.5)
    product = small.call(aten.mul.Tensor, x, number)
    if bound:
        assert match(small, lambda p, a, c: p.mul(a, c), product).c == 0.5
    else:
        assert match(small, lambda p, a: p.mul(a, 0.5), product) is not None
        assert match(small, lambda p, a: p.mul(a, 0.25), product) is None


def test_an_integer_and_the_equal_float_are_one_number_but_true_is_not_a_list() -> None:
    assert literal_equal(2, 2.0) and literal_equal([-1], (-1,)) and not literal_equal([1, 2], [1])
    assert not literal_equal([1], 1) and not literal_equal("tanh", "none") and literal_equal(None, None)
    assert not literal_equal(1, None)


def test_a_tensor_is_not_a_number() -> None:
    small, x = vector()
    product = small.call(aten.mul.Tensor, x, small.input("half", torch.tensor(0.5)))
    assert match(small, lambda p, a: p.mul(a, 0.5), product) is None


# -- arguments ---------------------------------------------------------------------------------------------------------


def test_defaults_that_the_graph_departs_from_are_seen() -> None:
    small, x = vector()
    kept = small.call(aten.mean.dim, x, [-1], True)
    dropped = small.call(aten.mean.dim, x, [-1])
    wide = small.call(aten.mean.dim, x, [-1], dtype=torch.float64)
    pattern = lambda p, a: p.mean(a, [-1])  # noqa: E731
    assert match(small, pattern, dropped) is not None
    assert failure(small, pattern, kept)[1] == "keepdim=True"
    assert failure(small, pattern, wide)[1] == "dtype=torch.float64"
    assert match(small, lambda p, a: p.mean(a, [-1], True), kept) is not None
    assert match(small, lambda p, a: p.mean(a, [-1], keepdim=True), kept) is not None


def test_keywords_match_whether_the_graph_or_the_pattern_gives_them_by_position() -> None:
    small, x = vector()
    by_name = small.call(aten.mean.dim, x, dim=[-1], keepdim=True)
    assert match(small, lambda p, a: p.mean(a, [-1], True), by_name) is not None
    gelu = small.call(aten.gelu.default, x, approximate="tanh")
    assert match(small, lambda p, a: p.gelu(a, approximate="tanh"), gelu) is not None
    assert match(small, lambda p, a: p.gelu(a), gelu) is None


def test_dimensions_count_from_the_end_and_a_transpose_has_no_order() -> None:
    small = Small()
    x = small.input("x", torch.randn(2, 3, 5, 7))
    for dims in ((2, 3), (3, 2), (-1, -2), (-2, 3)):
        turned = small.call(aten.transpose.int, x, *dims)
        assert match(small, lambda p, a: p.transpose(a, -2, -1), turned) is not None
    sliced = small.call(aten.slice.Tensor, x, 3, 0, 4)
    assert match(small, lambda p, a: p.slice(a, -1, 0, 4), sliced) is not None
    joined = small.call(aten.cat.default, [x, x], 3)
    assert match(small, lambda p, a: p.cat([a, a], -1), joined) is not None
    assert match(small, lambda p, a: p.cat([a, a, a], -1), joined) is None


def test_an_argument_binds_for_the_check_to_inspect() -> None:
    small, x = vector()
    sliced = small.call(aten.slice.Tensor, x, 1, 2, 5)
    found = match(small, lambda p, a: p.slice(a, -1, p.arg("start"), p.arg("end")), sliced)
    assert (found.start, found.end) == (2, 5)
    shaped = small.call(aten.view.default, x, [7, 5])
    assert match(small, lambda p, a: p.view(a, "sizes"), shaped).sizes == [7, 5]
    with pytest.raises(AttributeError, match="the pattern binds no 'stop'; it binds a, end, start"):
        found.stop  # noqa: B018


# -- casts and alternatives --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("after", [False, True])
def test_casts_are_optional_and_their_tags_say_what_was_there(before: bool, after: bool) -> None:
    small, x = vector(torch.bfloat16)
    wide = small.call(aten._to_copy.default, x, dtype=torch.float32) if before else x
    last = small.call(aten.exp.default, wide)
    if after:
        last = small.call(aten._to_copy.default, last, dtype=torch.float16)
    found = match(small, lambda p, a: p.cast(p.exp(p.cast(a, "up")), "down"), last)
    assert found.a is x
    assert found.up == (torch.float32 if before else None)
    assert found.down == (torch.float16 if after else None)
    assert len(found.nodes) == 1 + before + after


def test_two_optional_casts_of_one_value_need_not_agree() -> None:
    small, x = vector(torch.bfloat16)
    wide = small.call(aten._to_copy.default, x, dtype=torch.float32)
    product = small.call(aten.mul.Tensor, wide, small.call(aten.sigmoid.default, x))
    found = match(small, lambda p, a: p.mul(p.cast(a, "left"), p.sigmoid(p.cast(a, "right"))), product)
    assert (found.left, found.right) == (torch.float32, None)


def test_one_optional_cast_used_twice_is_one_value() -> None:
    small, x = vector(torch.bfloat16)
    wide = small.call(aten._to_copy.default, x, dtype=torch.float32)
    mixed = small.call(aten.mul.Tensor, wide, small.call(aten.sigmoid.default, x))
    equal = small.call(aten.mul.Tensor, wide, small.call(aten.sigmoid.default, wide))

    def pattern(p: Builder, a: Any) -> Any:
        up = p.cast(a)
        return p.mul(up, p.sigmoid(up))

    assert match(small, pattern, equal) is not None
    assert match(small, pattern, mixed) is None


def test_the_tag_of_a_choice_is_the_index_of_the_alternative() -> None:
    small, x = vector()
    spellings = [small.call(aten.pow.Tensor_Scalar, x, 2), small.call(aten.mul.Tensor, x, x)]
    spellings.append(small.call(aten.square.default, x))
    pattern = lambda p, a: p.exp(p.any(p.pow(a, 2), p.mul(a, a), p.square(a), tag="how"))  # noqa: E731
    assert [match(small, pattern, small.call(aten.exp.default, s)).how for s in spellings] == [0, 1, 2]


def test_a_later_failure_backtracks_into_another_alternative() -> None:
    small, x = vector()
    doubled = small.call(aten.neg.default, small.call(aten.neg.default, x))
    product = small.call(aten.mul.Tensor, doubled, x)
    found = match(small, lambda p, a: p.mul(p.any(p.neg(a), p.neg(p.neg(a)), tag="depth"), a), product)
    assert found.depth == 1  # neg(a) holds with a = neg(x), but then the other factor does not


def test_every_way_a_pattern_holds_is_offered() -> None:
    small, x = vector()
    negative = small.call(aten.exp.default, small.call(aten.neg.default, x))
    product = small.call(aten.mul.Tensor, small.call(aten.exp.default, x), negative)
    matches = list(Matcher(GraphIndex(small.graph), trace(lambda p, a, b: p.mul(p.exp(a), p.exp(b)))).matches(product))
    assert [(m.a.name, m.b.name) for m in matches] == [("x", "neg_default"), ("neg_default", "x")]


# -- what is inside ----------------------------------------------------------------------------------------------------


def test_an_interior_value_used_elsewhere_refuses() -> None:
    small, x = vector()
    inner = small.call(aten.exp.default, x)
    outer = small.call(aten.neg.default, inner)
    small.program(outer, inner)
    assert failure(small, lambda p, a: p.neg(p.exp(a)), outer)[1] == "its value is also used by output"


@pytest.mark.parametrize("free", [aten._to_copy.default, aten.transpose.int, aten.view.default])
def test_an_interior_view_or_cast_may_be_used_elsewhere(free: Any) -> None:
    small, x = vector()
    arguments: dict[Any, tuple[Any, ...]] = {aten.transpose.int: (0, 1), aten.view.default: ([7, 5],)}
    extra = {"dtype": torch.float64} if free is aten._to_copy.default else {}
    inner = small.call(free, x, *arguments.get(free, ()), **extra)
    outer = small.call(aten.neg.default, inner)
    small.program(outer, inner)
    patterns: dict[Any, Callable[..., Any]] = {
        aten._to_copy.default: lambda p, a: p.neg(p.cast(a, "dtype")),
        aten.transpose.int: lambda p, a: p.neg(p.transpose(a, -2, -1)),
        aten.view.default: lambda p, a: p.neg(p.view(a, "sizes")),
    }
    found = match(small, patterns[free], outer)
    assert found.a is x and set(found.nodes) == {inner, outer} and found.inputs == (x,)


def test_a_second_output_is_found_among_the_users_of_what_is_bound() -> None:
    small, x = vector()
    y = small.input("y", torch.randn(5, 7))
    total = small.call(aten.add.Tensor, x, y)
    normed = small.call(aten.exp.default, total)
    branch = small.call(aten.tanh.default, small.call(aten.neg.default, total))
    small.program(normed, branch)
    inside = match(small, lambda p, a, b: (p.exp(p.add(a, b)), p.add(a, b)), normed)
    assert inside is None  # two p.add are two values: the pattern must use one

    def shared(p: Builder, a: Any, b: Any) -> Any:
        total = p.add(a, b)
        return p.exp(total), total

    assert match(small, shared, normed).outputs == (normed, total)

    def walked(p: Builder, a: Any, b: Any) -> Any:
        total = p.add(a, b)
        return p.exp(total), p.tanh(p.neg(total)), total

    assert match(small, walked, normed).outputs == (normed, branch, total)


def test_the_deepest_failure_is_the_one_that_is_kept() -> None:
    small, x = vector()
    inner = small.call(aten.exp.default, small.call(aten.add.Tensor, small.call(aten.relu.default, x), 1.0))
    pattern = lambda p, a: p.any(p.neg(a), p.exp(p.add(p.tanh(a), 1.0)))  # noqa: E731
    wanted, found = failure(small, pattern, inner)
    assert wanted.startswith("tanh (test_match.py:")
    assert found == "relu (%relu_default)"
