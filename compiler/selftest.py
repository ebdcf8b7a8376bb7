"""Test a rule without a model: does it fire on its own pattern, and does what it puts there mean the same?

    def sample(draw):
        return {"x": torch.randn(3, 5 + 2 * draw)}

    regraft.self_test(MyRule(), sample)

The pattern is executable. It is built as a graph in every combination of its alternatives, on random fp64 tensors; the
rule must match there, and both graphs must agree to rounding. Then the same in bf16 with dtype casts, where the rule
takes them, judged as `optimize` judges: error against fp32 at most twice the original's plus a few ulp.

A `GroupRule` has no pattern: its sample is a module and a tuple of arguments, and the module is exported.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from .instantiate import Form, NotComputable, choices, chosen, forms, instantiate, used
from .lifting import lift
from .match import GraphIndex, Matcher, describe
from .program import Input, InputKind, Program
from .rewrite import Policy, rewrite
from .rule import GroupRule, Rule
from .verify import Evaluator, distance, magnitude

Sample = Callable[[int], Any]
"""By draw: a value for each variable and `p.arg` of the pattern; for a `GroupRule` a module and its arguments."""

CAP = 64
"""Combinations of alternatives tried for each draw."""
CAST_CAP = 4
"""Forms tried again in bf16 with casts, for each draw."""
ROUNDING = 1024 * torch.finfo(torch.float64).eps
"""What fp64 results may differ by, relative to the largest element."""


class SelfTestError(AssertionError):
    """The rule does not do what it says."""


@dataclass
class SelfTest:
    """What a self-test tried."""

    fired: int = 0
    """Forms on which the rule fired and agreed, in fp64."""
    fired_with_casts: int = 0
    """The same in bf16."""
    refused: Counter[str] = field(default_factory=Counter)
    """Forms that `check` refused, by reason."""
    not_computable: Counter[str] = field(default_factory=Counter)
    """Forms that could not be built on the samples, by reason."""


def self_test(
    rule: Rule | GroupRule,
    sample: Sample,
    draws: int = 3,
    *,
    spellings: Sequence[Mapping[str, int]] | None = None,
    cap: int = CAP,
) -> SelfTest:
    """Test a rule on its own pattern; raises `SelfTestError` where it does not fire, or changes a result.

    `sample(draw)` is called with torch seeded by the draw; let its sizes differ from draw to draw, and be odd. Give
    weights as `nn.Parameter`. Every alternative of the pattern must have fired in at least one draw.

    `spellings` tries these alone (alternatives by tag, the last one where a tag is not named), each of which must fire:
    for patterns whose alternatives need samples of different shapes.
    """
    tested = SelfTest()
    if isinstance(rule, GroupRule):
        for draw in range(draws):
            module, args = _drawn(sample, draw)
            _test_group(rule, module, tuple(args), f"draw {draw}")
            tested.fired += 1
        return tested
    pattern = rule.traced
    covered: set[tuple[str, int]] = set()
    given = None if spellings is None else [chosen(pattern, tags) for tags in spellings]
    for draw in range(draws):
        samples = _checked_samples(rule, _drawn(sample, draw))
        fired: list[Form] = []
        for form in given or forms(pattern, cap, draw):
            if _test_form(rule, form, samples, f"draw {draw}, {form}", tested):
                fired.append(form)
                covered |= {(c.where, i) for c, i in used(pattern, form)}
            elif given is not None:
                why = [*tested.refused, *tested.not_computable]
                raise SelfTestError(f"rule {rule.name} did not fire (draw {draw}, {form}): {why[-1]}")
        tested.fired += len(fired)
        lowered = {n: _lowered(v) for n, v in samples.items()}
        for form in fired[:CAST_CAP]:
            cast = Form(form.choice, casts=True)
            tested.fired_with_casts += _test_form(rule, cast, lowered, f"draw {draw}, {cast}", tested)
    if not tested.fired:
        why = [*tested.refused, *tested.not_computable]
        raise SelfTestError(f"rule {rule.name} fired nowhere: {'; '.join(why) or 'no forms'}")
    for choice in choices(pattern) if given is None else []:
        for i, alternative in enumerate(choice.alternatives):
            if (choice.where, i) not in covered:
                told = f"{describe(alternative)} ({choice.where})"
                why = [*tested.refused, *tested.not_computable]
                raise SelfTestError(f"rule {rule.name}: the alternative {told} never fired: {'; '.join(why)}")
    return tested


def _drawn(sample: Sample, draw: int) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(draw)
        return sample(draw)


def _checked_samples(rule: Rule, samples: Mapping[str, Any]) -> dict[str, Any]:
    for name, value in samples.items():
        if isinstance(value, torch.Tensor) and value.is_floating_point() and value.dtype is not torch.float64:
            value = nn.Parameter(value.double()) if isinstance(value, nn.Parameter) else value.double()
        samples = {**samples, name: value}
    missing = [n for n in rule.traced.variables if n not in samples]
    if missing:
        raise ValueError(f"the sample for rule {rule.name} has no {missing[0]!r}")
    return dict(samples)


def _lowered(value: Any) -> Any:
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        return value
    low = value.detach().to(torch.bfloat16)
    return nn.Parameter(low) if isinstance(value, nn.Parameter) else low


def _test_form(rule: Rule, form: Form, samples: Mapping[str, Any], where: str, tested: SelfTest) -> bool:
    """True where the rule fired and agreed, False where the form cannot be or `check` refused it."""
    try:
        program, inputs = instantiate(rule.traced, form, samples)
    except NotComputable as error:
        if not form.casts:
            tested.not_computable[" ".join(str(error).split())[:200]] += 1
        return False
    program.graph.eliminate_dead_code()  # casts of a choice not taken
    anchor = program.graph.output_node().args[0][0]  # type: ignore[index]
    matcher = Matcher(GraphIndex(program.graph), rule.traced)
    matches = list(matcher.matches(anchor))  # type: ignore[arg-type]
    if not matches:
        failure = matcher.failure
        raise SelfTestError(
            f"rule {rule.name} does not match its own pattern ({where}): wanted {failure.wanted}, found {failure.found}"
        )
    reasons = [rule.check(m) for m in matches]
    if all(r is not None for r in reasons):
        tested.refused[next(r.reason for r in reasons if r is not None)] += 1
        return False
    evaluator = Evaluator(program, lambda i: inputs[i.target], inputs) if form.casts else None
    _compare(rule, program, lambda i: inputs[i.target], evaluator, where)
    return True


def _test_group(rule: GroupRule, module: nn.Module, args: tuple[Any, ...], where: str) -> None:
    module = module.double().eval()
    args = tuple(a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args)
    with torch.no_grad():
        exported = torch.export.export(module, args, strict=False).run_decompositions({})
    gm, inputs = lift(exported, "", module)
    program = Program(gm, inputs, rebuild=tuple)
    tensors = dict(zip([i.target for i in inputs if i.kind is InputKind.USER], args, strict=True))
    tensors |= dict(module.named_parameters()) | dict(module.named_buffers())
    for node, meaning in program.placeholder_inputs().items():
        node.meta["weight"] = meaning.kind is not InputKind.USER

    def value(i: Input) -> torch.Tensor:
        return i.value if i.value is not None else tensors[i.target]

    _compare(rule, program, value, None, where)


def _compare(
    rule: Rule | GroupRule,
    program: Program,
    value: Callable[[Input], torch.Tensor],
    evaluator: Evaluator | None,
    where: str,
) -> None:
    before = _run(program, value)
    result = rewrite(program, "self_test", rule.stage, (rule,), Policy(evaluator=evaluator, every_site=True))
    if result.reverted:
        raise SelfTestError(f"rule {rule.name} is wrong ({where}): {result.reverted[0].reason}")
    if not result.rewrites:
        told = f": {result.misses[0].found}" if result.misses else ""
        raise SelfTestError(f"rule {rule.name} did not fire ({where}){told}")
    again = rewrite(program, "self_test", rule.stage, (rule,))
    if again.rewrites:
        raise SelfTestError(f"rule {rule.name} fires again on what it put there ({where}), without end")
    if evaluator is not None:
        return  # compared there, with the bound that holds in low precision
    try:
        after = _run(program, value)
    except Exception as error:
        raise SelfTestError(f"rule {rule.name}: what it put there raises ({where}): {error}") from error
    for old, new in zip(before, after, strict=True):
        if old.shape != new.shape or old.dtype is not new.dtype:
            raise SelfTestError(
                f"rule {rule.name} makes {new.dtype} {list(new.shape)} of {old.dtype} {list(old.shape)} ({where})"
            )
        change, allowed = distance(new, old).largest, ROUNDING * magnitude(old).largest
        if not change <= allowed:
            raise SelfTestError(f"rule {rule.name} changes the result by {change:.3g} ({where})")


@torch.no_grad()
def _run(program: Program, value: Callable[[Input], torch.Tensor]) -> tuple[torch.Tensor, ...]:
    result: tuple[torch.Tensor, ...] = fx.Interpreter(program.gm).run(*[value(i) for i in program.inputs])
    return tuple(result)
