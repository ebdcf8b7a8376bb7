"""Applying rules: where they may fire, which of two wins, what is told, and that the graph still computes the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from small_graphs import Small, aten
from torch import Tensor, fx

from regraft.compiler.match import Match
from regraft.compiler.pattern import Builder
from regraft.compiler.provenance import module_of, rewritten_by, source_of
from regraft.compiler.rewrite import Policy
from regraft.compiler.rule import Emitter, GroupRule, Reject, Rule, Stage


class Silu(Rule):
    """x * sigmoid(x) -> silu(x)"""

    stage = Stage.RAISE

    def pattern(self, p: Builder, x: Any) -> Any:
        return p.mul(x, p.sigmoid(x))

    def emit(self, m: Match, g: Emitter) -> fx.Node:
        return g.silu(m.x)


class WrongSilu(Silu):
    def emit(self, m: Match, g: Emitter) -> fx.Node:
        return g.mul(g.silu(m.x), 1.001)


class LongTail(Rule):
    """A pattern of nine parts, to be missed by one."""

    stage = Stage.RAISE

    def pattern(self, p: Builder, x: Any, w: Any) -> Any:
        return p.mul(p.exp(p.neg(p.tanh(p.add(p.relu(x), 1.0)))), p.sigmoid(w))

    def emit(self, m: Match, g: Emitter) -> fx.Node:
        return g.exp(m.x)


def silu_graph(copies: int = 1, dtype: torch.dtype = torch.float32) -> tuple[Small, list[fx.Node]]:
    small = Small()
    made = []
    for i in range(copies):
        x = small.input(f"x{i}", torch.randn(5 + 2 * i, 7, dtype=dtype))
        where: dict[str, Any] = {"module": f"L['self'].layers.{i}.mlp", "source": "modeling.py:12:x * gate(x)"}
        gate = small.call(aten.sigmoid.default, x, **where)
        made.append(small.call(aten.mul.Tensor, x, gate, **where))
    small.program(*made)
    return small, made


def assert_same(before: Sequence[Tensor], after: Sequence[Tensor], factor: float = 4.0) -> None:
    for a, b in zip(before, after, strict=True):
        assert a.dtype is b.dtype
        torch.testing.assert_close(a, b, atol=factor * torch.finfo(a.dtype).eps * float(a.abs().max()), rtol=0)


# -- replacing ---------------------------------------------------------------------------------------------------------


def test_every_site_is_replaced_and_the_result_stays() -> None:
    small, _ = silu_graph(copies=3)
    before = small.run()
    result = small.apply(Silu())
    assert small.targets() == ["silu.default"] * 3
    assert [(w.rule, w.replaced) for w in result.rewrites] == [
        ("silu", (f"sigmoid_default{s}", f"mul_tensor{s}")) for s in ("", "_1", "_2")
    ]
    assert (result.nodes_before, result.nodes_after) == (3 * 3 + 1, 3 * 2 + 1)
    assert_same(before, small.run())


def test_provenance_of_new_nodes() -> None:
    small, _ = silu_graph()
    rewrite = small.apply(Silu()).rewrites[0]
    (new,) = [n for n in small.graph.nodes if n.op == "call_function"]
    assert (module_of(new), source_of(new)) == ("layers.0.mlp", "modeling.py:12 x * gate(x)")
    assert rewritten_by(new) == ("silu",)
    assert new.meta["rewrites"] == (("silu", ("sigmoid_default", "mul_tensor")),)
    assert (rewrite.module, rewrite.source) == ("layers.0.mlp", "modeling.py:12 x * gate(x)")

    class Named(Rule):
        stage = Stage.RAISE

        def pattern(self, p: Builder, x: Any) -> Any:
            return p.silu(x)

        def emit(self, m: Match, g: Emitter) -> fx.Node:
            return g.activation(m.x, "silu")

    small.apply(Named())
    (last,) = [n for n in small.graph.nodes if n.op == "call_function"]
    assert rewritten_by(last) == ("silu", "named")
    assert source_of(last) == "modeling.py:12 x * gate(x)"


def test_a_replacement_has_the_shape_and_dtype_of_what_it_replaces() -> None:
    small, made = silu_graph(dtype=torch.bfloat16)
    wanted = made[0].meta["val"]
    small.apply(Silu())
    (new,) = [n for n in small.graph.nodes if n.op == "call_function"]
    assert new.meta["val"].shape == wanted.shape and new.meta["val"].dtype is torch.bfloat16


def test_an_emit_may_return_a_bound_value() -> None:
    class TwiceNegated(Rule):
        stage = Stage.RAISE

        def pattern(self, p: Builder, x: Any) -> Any:
            return p.neg(p.neg(x))

        def emit(self, m: Match, g: Emitter) -> fx.Node:
            return m.x

    small = Small()
    x = small.input("x", torch.randn(3, 5))
    y = small.call(aten.exp.default, small.call(aten.neg.default, small.call(aten.neg.default, x)))
    small.program(y)
    before = small.run()
    assert len(small.apply(TwiceNegated()).rewrites) == 1
    assert small.targets() == ["exp.default"]
    assert torch.equal(before[0], small.run()[0])


def test_rules_run_until_nothing_more_is_found() -> None:
    class Shorter(Rule):
        """exp(exp(x)) -> exp(x): each application makes room for the next."""

        stage = Stage.RAISE

        def pattern(self, p: Builder, x: Any) -> Any:
            return p.exp(p.exp(x))

        def emit(self, m: Match, g: Emitter) -> fx.Node:
            return g.exp(m.x)

    small = Small()
    x = small.input("x", torch.randn(3, 5))
    for _ in range(5):
        x = small.call(aten.exp.default, x)
    small.program(x)
    assert len(small.apply(Shorter()).rewrites) == 4
    assert small.targets() == ["exp.default"]


def test_several_outputs_are_replaced_one_by_one() -> None:
    class AddNorm(Rule):
        stage = Stage.RAISE

        def pattern(self, p: Builder, x: Any, residual: Any) -> Any:
            total = p.add(x, residual)
            return p.rms_norm(total, p.arg("w"), p.arg("eps"), p.arg("offset"), p.arg("mid"), p.arg("out")), total

        def emit(self, m: Match, g: Emitter) -> tuple[fx.Node, ...]:
            both = g.add_rms_norm(m.x, m.residual, m.w, m.eps, m.offset, m.mid, m.out)
            return g.item(both, 0), g.item(both, 1)

    small = Small()
    x, y = (small.input(n, torch.randn(5, 7)) for n in "xy")
    w = small.weight("w", torch.randn(7))
    total = small.call(aten.add.Tensor, x, y)
    normed = small.call(torch.ops.regraft.rms_norm.default, total, w, 1e-5)
    small.program(normed, small.call(aten.neg.default, total))
    before = small.run()
    assert len(small.apply(AddNorm()).rewrites) == 1
    assert small.targets().count("regraft.add_rms_norm.default") == 1
    assert "add.Tensor" not in small.targets()
    assert_same(before, small.run())


def test_the_wrong_number_of_outputs_is_told_and_changes_nothing() -> None:
    class Two(Silu):
        def emit(self, m: Match, g: Emitter) -> Any:
            return g.silu(m.x), g.exp(m.x)

    small, _ = silu_graph()
    result = small.apply(Two())
    assert small.targets() == ["sigmoid.default", "mul.Tensor"]
    assert [r.reason for r in result.reverted] == ["emit raised ValueError: it returned 2 nodes for 1 outputs"]


# -- where a rule may not fire -----------------------------------------------------------------------------------------


def test_a_value_used_elsewhere_stays_and_so_does_the_site() -> None:
    small = Small()
    x = small.input("x", torch.randn(5, 7))
    gate = small.call(aten.sigmoid.default, x)
    small.program(small.call(aten.mul.Tensor, x, gate), gate)
    assert small.apply(Silu()).rewrites == []
    assert small.targets() == ["sigmoid.default", "mul.Tensor"]


def test_a_view_used_elsewhere_stays_beside_the_replacement() -> None:
    class OfTransposed(Rule):
        stage = Stage.RAISE

        def pattern(self, p: Builder, x: Any) -> Any:
            return p.exp(p.transpose(x, -2, -1))

        def emit(self, m: Match, g: Emitter) -> fx.Node:
            return g.transpose(g.exp(m.x), 0, 1)

    small = Small()
    x = small.input("x", torch.randn(5, 7))
    turned = small.call(aten.transpose.int, x, 0, 1)
    small.program(small.call(aten.exp.default, turned), small.call(aten.neg.default, turned))
    before = small.run()
    assert len(small.apply(OfTransposed()).rewrites) == 1
    assert small.targets() == ["exp.default", "transpose.int", "transpose.int", "neg.default"]
    assert_same(before, small.run())


def test_nothing_is_matched_across_a_write() -> None:
    small = Small()
    x = small.input("x", torch.randn(5, 7))
    copied = small.call(aten.clone.default, x)
    gate = small.call(aten.sigmoid.default, copied)
    written = small.call(aten.add_.Tensor, copied, 1.0)
    product = small.call(aten.mul.Tensor, copied, gate)
    small.program(product, written)
    result = small.apply(Silu())
    assert result.rewrites == []
    assert [m.found for m in result.misses] == ["aten.add_.Tensor writes to memory in between"]


def test_a_match_that_would_have_to_stand_in_two_places_is_refused() -> None:
    """q's user stands before the input of k: no place for a node that makes both."""

    class Pair(GroupRule):
        stage = Stage.RAISE
        targets = frozenset([aten.linear.default])

        def key(self, node: fx.Node) -> Any:
            return node.args[0]

        def emit(self, group: Sequence[fx.Node], g: Emitter) -> tuple[fx.Node, ...]:
            return tuple(g.linear(*n.args) for n in group)

    small = Small()
    x = small.input("x", torch.randn(5, 7))
    first = small.call(aten.linear.default, x, small.weight("w", torch.randn(3, 7)))
    user = small.call(aten.mul.Tensor, small.call(aten.exp.default, first), 2.0)
    late = small.call(aten.expand.default, small.call(aten.sum.dim_IntList, user, [0, 1], True), [4, 7])
    second = small.call(aten.linear.default, x, late)
    small.program(user, second)
    result = small.apply(Pair())
    assert result.rewrites == []
    assert [m.found for m in result.misses] == [
        "exp_default needs linear_default before all inputs of the match are there"
    ]


def test_denied_sites_and_rules_stay() -> None:
    small, made = silu_graph(copies=3)
    result = small.apply(Silu(), policy=Policy(deny={("silu", made[1].name), ("other", made[0].name)}))
    assert [w.replaced[-1] for w in result.rewrites] == [made[0].name, made[2].name]
    small, _ = silu_graph(copies=2)
    assert small.apply(Silu(), policy=Policy(deny={("silu", "*")})).rewrites == []


# -- choosing ----------------------------------------------------------------------------------------------------------


class Half(Rule):
    """sigmoid alone: overlaps with Silu."""

    stage = Stage.RAISE

    def pattern(self, p: Builder, x: Any) -> Any:
        return p.sigmoid(x)

    def emit(self, m: Match, g: Emitter) -> fx.Node:
        return g.activation(m.x, "sigmoid")


def cost_by(prices: dict[Any, float]) -> Policy:
    return Policy(cost=lambda nodes: (sum(prices.get(n.target, 0.0) for n in nodes),))


@pytest.mark.parametrize(("silu", "half", "left"), [(1.0, 4.0, "silu"), (9.0, 1.0, "half"), (12.0, 6.0, "neither")])
def test_of_overlapping_candidates_the_one_that_saves_most_is_taken(silu: float, half: float, left: str) -> None:
    prices = {aten.sigmoid.default: 5.0, aten.mul.Tensor: 5.0, aten.silu.default: silu}
    prices[torch.ops.regraft.activation.default] = half
    small, _ = silu_graph()
    before = small.run()
    for rules in ((Silu(), Half()), (Half(), Silu())):
        result = small.apply(*rules, policy=cost_by(prices))
        assert [w.rule for w in result.rewrites] == ([] if left == "neither" else [left])
        assert_same(before, small.run())
        small, _ = silu_graph()
        before = small.run()


def test_a_fusion_must_be_slower_at_no_size() -> None:
    def cost(nodes: Sequence[fx.Node]) -> tuple[float, ...]:
        fused = any(n.target is aten.silu.default for n in nodes)
        return (2.0, 2.0) if fused else (1.9, 30.0)

    small, _ = silu_graph()
    assert small.apply(Silu(), policy=Policy(cost=cost)).rewrites == []
    assert small.targets() == ["sigmoid.default", "mul.Tensor"]


def test_without_a_cost_the_larger_match_wins() -> None:
    small, _ = silu_graph()
    assert [w.rule for w in small.apply(Half(), Silu()).rewrites] == ["silu"]


def test_a_replacement_waits_where_an_earlier_one_moved_its_input_behind_it() -> None:
    """The second rule's place was found before the first one's output moved down; the next round sets it right."""

    class Both(Rule):
        """Two outputs, of which the first stands long before the last input."""

        stage = Stage.RAISE

        def pattern(self, p: Builder, x: Any, y: Any) -> Any:
            first = p.exp(x)
            return p.mul(first, p.tanh(y)), first

        def emit(self, m: Match, g: Emitter) -> tuple[fx.Node, ...]:
            first = g.mul(g.exp(m.x), 1.0)
            return g.mul(g.tanh(m.y), first), first

    class Early(Rule):
        stage = Stage.RAISE

        def pattern(self, p: Builder, x: Any, z: Any) -> Any:
            return p.sub(p.relu(z), x)

        def emit(self, m: Match, g: Emitter) -> fx.Node:
            return g.add(g.neg(m.x), g.call(aten.relu.default, m.z))

    small = Small()
    x, y, z = (small.input(n, torch.randn(5, 7)) for n in "xyz")
    first = small.call(aten.exp.default, x)
    positive = small.call(aten.relu.default, z)
    late = small.call(aten.sin.default, y)
    product = small.call(aten.mul.Tensor, first, small.call(aten.tanh.default, late))
    small.program(product, small.call(aten.sub.Tensor, positive, first))
    before = small.run()
    result = small.apply(Both(), Early())
    assert sorted(w.rule for w in result.rewrites) == ["both", "early"]
    small.graph.lint()
    assert_same(before, small.run())


# -- telling -----------------------------------------------------------------------------------------------------------


def missed(layers: int) -> tuple[Small, Any]:
    small = Small()
    outputs = []
    for i in range(layers):
        where: dict[str, Any] = {"module": f"model.layers.{i}.mlp", "source": "modeling.py:40:return tail(x)"}
        x, w = small.input(f"x{i}", torch.randn(3, 5)), small.input(f"w{i}", torch.randn(3, 5))
        inner = small.call(aten.add.Tensor, small.call(aten.silu.default, x, **where), 1.0, **where)
        body = small.call(aten.exp.default, small.call(aten.neg.default, small.call(aten.tanh.default, inner)))
        outputs.append(small.call(aten.mul.Tensor, body, small.call(aten.sigmoid.default, w), **where))
    small.program(*outputs)
    return small, small.apply(LongTail())


def test_a_near_miss_says_where_what_was_wanted_and_what_was_there() -> None:
    _, result = missed(layers=1)
    (miss,) = result.misses
    assert (miss.rule, miss.module, miss.source) == ("long_tail", "model.layers.0.mlp", "modeling.py:40 return tail(x)")
    assert miss.wanted.startswith("relu (test_rewrite.py:")
    assert miss.found == "silu (%silu_default)"
    assert (miss.depth, miss.size, miss.count) == (5, 9, 1)


def test_equal_near_misses_are_grouped_over_layers() -> None:
    _, result = missed(layers=4)
    (miss,) = result.misses
    assert (miss.module, miss.count) == ("model.layers.*.mlp", 4)


def test_a_refusal_is_told_with_its_reason_unless_it_is_quiet() -> None:
    class Picky(Silu):
        quiet = False

        def check(self, m: Match) -> Reject | None:
            return Reject("width 7 is not a multiple of 16", m.x, quiet=self.quiet)

    small, _ = silu_graph(copies=2)
    (miss,) = small.apply(Picky()).misses
    assert (miss.wanted, miss.found) == ("the side condition of the rule", "width 7 is not a multiple of 16")
    assert miss.depth == miss.size
    rule = Picky()
    rule.quiet = True
    assert small.apply(rule).misses == []


def test_half_of_a_small_pattern_is_no_near_miss() -> None:
    small = Small()
    x, y = small.input("x", torch.randn(3, 5)), small.input("y", torch.randn(3, 5))
    small.program(small.call(aten.mul.Tensor, x, small.call(aten.sigmoid.default, y)))
    assert small.apply(Silu()).misses == []


def test_a_rule_that_fires_elsewhere_on_the_same_nodes_missed_nothing() -> None:
    """mul(exp(neg(tanh(...)))) inside a longer chain: the outer product fails, the inner one fires."""
    small = Small()
    x, w = small.input("x", torch.randn(3, 5)), small.input("w", torch.randn(3, 5))
    inner = small.call(aten.add.Tensor, small.call(aten.relu.default, x), 1.0)
    body = small.call(aten.exp.default, small.call(aten.neg.default, small.call(aten.tanh.default, inner)))
    small.program(small.call(aten.mul.Tensor, body, small.call(aten.sigmoid.default, w)))
    result = small.apply(LongTail())
    assert len(result.rewrites) == 1 and result.misses == []


# -- rules that raise --------------------------------------------------------------------------------------------------


def test_a_check_that_raises_refuses_and_is_told() -> None:
    class Broken(Silu):
        def check(self, m: Match) -> Reject | None:
            raise AttributeError("'int' object has no attribute 'dim'")

    small, _ = silu_graph()
    result = small.apply(Broken())
    assert small.targets() == ["sigmoid.default", "mul.Tensor"]
    assert [m.found for m in result.misses] == ["check raised AttributeError: 'int' object has no attribute 'dim'"]


def test_an_emit_that_raises_leaves_the_graph_as_it_was_and_other_rules_go_on() -> None:
    class Broken(Silu):
        def emit(self, m: Match, g: Emitter) -> fx.Node:
            g.exp(m.x)
            raise KeyError("val")

    small, _ = silu_graph(copies=2)
    result = small.apply(Broken(), Half())
    assert [r.reason for r in result.reverted] == ["emit raised KeyError: 'val'"] * 2
    assert [w.rule for w in result.rewrites] == ["half"] * 2
    assert "exp.default" not in small.targets()


# -- groups ------------------------------------------------------------------------------------------------------------


class Siblings(GroupRule):
    """linear(x, a), linear(x, b), ... -> slices of one linear"""

    stage = Stage.RAISE
    targets = frozenset([aten.linear.default])

    def key(self, node: fx.Node) -> Any:
        return node.args[0]

    def check(self, group: Sequence[fx.Node]) -> Reject | None:
        return Reject("too many", group[0]) if len(group) > 4 else None

    def emit(self, group: Sequence[fx.Node], g: Emitter) -> tuple[fx.Node, ...]:
        joined = g.linear(group[0].args[0], g.cat([n.args[1] for n in group], 0))
        sizes = [n.args[1].meta["val"].shape[0] for n in group]  # type: ignore[union-attr]
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        return tuple(g.slice(joined, -1, a, a + n) for a, n in zip(starts, sizes, strict=True))


def sibling_graph(count: int) -> Small:
    small = Small()
    x, other = small.input("x", torch.randn(5, 7)), small.input("other", torch.randn(5, 7))
    weights = [small.weight(f"w{i}", torch.randn(3 + 2 * i, 7)) for i in range(count)]
    outputs = [small.call(aten.linear.default, x, w) for w in weights]
    alone = small.call(aten.linear.default, other, weights[0])
    small.program(*outputs, alone)
    return small


@pytest.mark.parametrize("count", [2, 3, 4])
def test_siblings_become_one(count: int) -> None:
    small = sibling_graph(count)
    before = small.run()
    result = small.apply(Siblings())
    assert len(result.rewrites) == 1 and len(result.rewrites[0].replaced) == count
    assert small.targets().count("linear.default") == 2
    assert_same(before, small.run(), factor=16)


def test_an_only_child_is_no_group_and_a_refused_group_is_told() -> None:
    small = sibling_graph(1)
    result = small.apply(Siblings())
    assert result.rewrites == [] and result.misses == []
    assert [m.found for m in sibling_graph(5).apply(Siblings()).misses] == ["too many"]
