"""Replacements are compared on real values before they are kept: wrong ones, and less precise ones, are taken back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_graphs import Small, aten
from torch import fx

from regraft.compiler.match import Match
from regraft.compiler.pattern import Builder
from regraft.compiler.rewrite import Policy
from regraft.compiler.rule import Emitter, Rule, Stage
from regraft.compiler.verify import Distance, Upcast, bound_for, compare, distance, higher, magnitude


class Mean(Rule):
    """sum / n -> mean, in the ways that `how` names."""

    stage = Stage.RAISE

    def __init__(self, how: str) -> None:
        self.how = how

    def pattern(self, p: Builder, x: Any) -> Any:
        return p.div(p.sum(x, [-1]), p.arg("n"))

    def emit(self, m: Match, g: Emitter) -> fx.Node:
        if self.how == "right":
            return g.mean(m.x, [-1])
        if self.how == "another meaning":
            return g.div(g.sum(m.x, [-1]), m.n + 0.1)
        if self.how == "less precise":
            narrow = torch.bfloat16 if m.dtype(m.x) is torch.float32 else torch.float8_e4m3fn
            return g.cast(g.cast(g.mean(m.x, [-1]), dtype=narrow), dtype=m.dtype(m.x))
        if self.how == "another shape":
            return g.mean(m.x, [-1], True)
        if self.how == "another dtype":
            return g.mean(g.cast(m.x, dtype=torch.float64), [-1])
        assert self.how == "raises"
        return g.call(torch.ops.aten.index_select.default, m.x, 0, m.x)


def mean_graph(dtype: torch.dtype, copies: int = 1, widths: tuple[int, ...] = (33,)) -> Small:
    small = Small()
    outputs = []
    for i in range(copies):
        width = widths[i % len(widths)]
        x = small.input(f"x{i}", 3 + torch.randn(5, width, dtype=torch.float64).to(dtype))
        outputs.append(small.call(aten.div.Tensor, small.call(aten.sum.dim_IntList, x, [-1]), float(width)))
    small.program(*outputs)
    return small


def verified(small: Small, every_site: bool = False) -> Policy:
    return Policy(evaluator=small.evaluator(), every_site=every_site)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_right_rule_is_kept_with_its_errors(dtype: torch.dtype) -> None:
    small = mean_graph(dtype)
    result = small.apply(Mean("right"), policy=verified(small))
    assert result.reverted == [] and len(result.rewrites) == 1
    check = result.rewrites[0].check
    assert check is not None and check.passed and check.error_after <= check.bound
    assert small.targets() == ["mean.dim"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("how", ["another meaning", "less precise", "another shape", "another dtype", "raises"])
def test_a_wrong_rule_is_taken_back_and_named(how: str, dtype: torch.dtype) -> None:
    small = mean_graph(dtype)
    before = small.run()
    result = small.apply(Mean(how), policy=verified(small))
    assert result.rewrites == []
    assert [r.rule for r in result.reverted] == ["mean"]
    assert small.targets() == ["sum.dim_IntList", "div.Tensor"]
    assert torch.equal(before[0], small.run()[0])


def test_a_wrong_meaning_is_seen_even_where_rounding_hides_it() -> None:
    """In bf16 a factor of 1.003 is below the last place; evaluated one precision up it is not."""
    small = mean_graph(torch.bfloat16)
    (reverted,) = small.apply(Mean("another meaning"), policy=verified(small)).reverted
    assert reverted.check is not None
    assert reverted.check.error_after <= reverted.check.bound
    assert reverted.reason.endswith("another meaning")


def test_without_an_evaluator_nothing_is_checked() -> None:
    small = mean_graph(torch.float32)
    (kept,) = small.apply(Mean("less precise")).rewrites
    assert kept.check is None


def test_one_site_stands_for_all_of_its_signature() -> None:
    small = mean_graph(torch.float32, copies=4, widths=(33, 17))
    result = small.apply(Mean("right"), policy=verified(small))
    assert sum(w.check is not None for w in result.rewrites) == 2 and len(result.rewrites) == 4
    small = mean_graph(torch.float32, copies=4, widths=(33, 17))
    result = small.apply(Mean("right"), policy=verified(small, every_site=True))
    assert sum(w.check is not None for w in result.rewrites) == 4


def test_a_wrong_signature_is_taken_back_everywhere() -> None:
    small = mean_graph(torch.float32, copies=3)
    result = small.apply(Mean("less precise"), policy=verified(small))
    assert len(result.reverted) == 3 and result.rewrites == []


def test_only_the_wrong_sites_go_where_every_site_is_checked() -> None:
    class OnNarrow(Mean):
        """Wrong where the tensor is narrow: the check must not generalise from the first."""

        name = "on_narrow"

        def emit(self, m: Match, g: Emitter) -> fx.Node:
            self.how = "right" if m.val(m.x).shape[-1] > 20 else "another meaning"
            return super().emit(m, g)

    small = mean_graph(torch.float32, copies=4, widths=(33, 17))
    before = small.run()
    result = small.apply(OnNarrow("right"), policy=verified(small))
    assert (len(result.rewrites), len(result.reverted)) == (2, 2)
    for a, b in zip(before, small.run(), strict=True):
        torch.testing.assert_close(a, b, atol=4e-7 * 4, rtol=0)


def test_a_reverted_site_is_not_tried_again() -> None:
    tried = []

    class Counted(Mean):
        name = "counted"

        def emit(self, m: Match, g: Emitter) -> fx.Node:
            tried.append(m.anchor.name)
            return super().emit(m, g)

    class Other(Rule):
        """Makes a second round necessary."""

        stage = Stage.RAISE

        def pattern(self, p: Builder, x: Any) -> Any:
            return p.neg(p.neg(x))

        def emit(self, m: Match, g: Emitter) -> fx.Node:
            return g.mul(m.x, 1.0)

    small = Small()
    x = small.input("x", torch.randn(5, 33))
    mean = small.call(aten.div.Tensor, small.call(aten.sum.dim_IntList, x, [-1]), 33.0)
    small.program(small.call(aten.neg.default, small.call(aten.neg.default, mean)))
    result = small.apply(Counted("another meaning"), Other(), policy=verified(small))
    assert [w.rule for w in result.rewrites] == ["other"] and len(tried) == 1


# -- measures ----------------------------------------------------------------------------------------------------------


def test_one_precision_up() -> None:
    assert [higher(d) for d in (torch.bfloat16, torch.float16, torch.float32, torch.int64, torch.bool)] == [
        torch.float32,
        torch.float32,
        torch.float64,
        torch.int64,
        torch.bool,
    ]


def test_distance_and_magnitude() -> None:
    inf, nan = float("inf"), float("nan")
    a, b = torch.tensor([1.0, 2.0, inf, nan]), torch.tensor([1.0, 5.0, inf, nan])
    assert (distance(a, b).largest, distance(a, b).rms) == (3.0, 1.5)
    assert magnitude(b).largest == 5.0 and magnitude(b).rms == 13**0.5
    assert distance(torch.tensor([1.0, nan]), torch.tensor([1.0, 2.0])).largest == inf
    assert distance(torch.tensor([-inf]), torch.tensor([inf])).largest == inf
    assert distance(torch.zeros(2), torch.zeros(3)).largest == inf
    assert distance(torch.tensor([1, 2]), torch.tensor([1, 2])).largest == 0.0
    assert distance(torch.tensor([1, 2]), torch.tensor([1, 3])).largest == inf
    assert distance([torch.zeros(2), 3], [torch.zeros(2), 4]).largest == inf


def test_a_mean_over_a_handful_of_numbers_says_nothing() -> None:
    error, bound = Distance(1e-8, 9e-9), Distance(1e-7, 8e-9)
    assert error.within(bound, 6) and not error.within(bound, 6000)
    assert not Distance(2e-7, 1e-9).within(bound, 6)


def test_the_bound_is_twice_the_error_and_a_few_ulp() -> None:
    oracle = torch.full((8,), 4.0)
    error = distance(oracle + 0.25, oracle)
    bound = bound_for(error, oracle, torch.bfloat16)
    ulp = torch.finfo(torch.bfloat16).eps * 4.0
    assert bound.largest == 0.5 + 4 * ulp and bound.rms == 0.5 + 0.5 * ulp


def test_the_oracle_raises_dtypes_written_in_the_graph_too() -> None:
    """A cast to bf16 inside an fp32 graph must not round in the fp64 oracle."""
    small = Small()
    x = small.input("x", torch.randn(5, 7))
    narrow = small.call(aten._to_copy.default, x, dtype=torch.bfloat16)
    program = small.program(small.call(aten.exp.default, narrow))
    value = small.values["x"]
    (found,) = Upcast(program.gm, torch.float64).run(value.double())
    assert found.dtype is torch.float64
    assert torch.equal(found, value.double().exp())
    assert not torch.equal(small.run()[0].double(), found)


def test_a_kernel_without_a_higher_precision_is_compared_by_its_error_alone() -> None:
    small = mean_graph(torch.bfloat16)
    (x,) = [n for n in small.graph.nodes if n.op == "placeholder"]
    anchor = small.graph.output_node().args[0][0]  # type: ignore[index]
    old = [anchor.args[0], anchor]

    def kernel(value: torch.Tensor) -> torch.Tensor:
        assert value.dtype is torch.bfloat16, "a kernel runs in the model's precision only"
        return value.float().mean(-1).bfloat16()

    with small.graph.inserting_after(anchor):
        new = small.graph.call_function(kernel, (x,))
    assert compare(small.evaluator(), old, [anchor], [new], [new], meaning=False).passed
