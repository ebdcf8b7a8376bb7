"""Run an ordered list of passes over a captured program. The list itself stands in `passes/pipeline.py`.

    CANONICALIZE -> RAISE (one pass after the other) -> FUSE (all at once, chosen by cost) -> PACK -> LOWER

A pass is a set of rules, or a function on the program; each leaves a `PassResult`.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import fx, nn

from .cost import rewriting_us
from .device import device_for
from .program import Input, InputKind, Program
from .records import PassResult
from .rewrite import Costing, Policy, is_constant, rewrite
from .rule import GroupRule, Rule, Stage
from .shapes import described, hints_of
from .verify import Evaluator

SIZES = (1, 64)
"""What every symbolic size counts as when a fusion is judged: one token, and a batch of 64 sequences of 64. A fusion
must be slower at neither."""


@dataclass(frozen=True)
class Settings:
    """What a compilation may do, and with what it is checked."""

    device: torch.device
    verify: str = "fast"
    """"off", "fast" (one site for each rule and signature) or "full" (every site)."""
    enabled: Mapping[str, bool] = field(default_factory=dict)
    """By pass name; passes that are not named run."""
    rules: tuple[Rule | GroupRule, ...] = ()
    """The user's own."""
    deny: frozenset[tuple[str, str]] = frozenset()
    """(rule, anchor node) pairs that must stay as they are; (rule, "*") is the whole rule."""
    weights: Callable[[Input], torch.Tensor] | None = None
    """The live tensor of a weight input; None on meta weights, where nothing can be verified."""
    inputs: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """Example tensors for the USER inputs."""
    model: nn.Module | None = None
    """Where the state that masks and positions read is found; None: masks are kept as they are."""
    page_dtype: torch.dtype | None = None
    """Of pages of keys and values, where it is not that of the keys and values."""
    positions: int | None = None
    """Tokens of the longest sequence that the user wants, where keys and values lie in pages; None: the model's."""
    keep_text: bool = False
    """Keep each pass's graph before and after as text, for the report's diff."""


@dataclass(frozen=True)
class Compiled:
    """A rewritten program and what each pass did."""

    program: Program
    passes: list[PassResult]


@dataclass(frozen=True)
class Pass:
    """A named step: rules of one stage, or a function that changes the program in place."""

    name: str
    stage: Stage
    rules: tuple[Rule | GroupRule, ...] = ()
    run: Callable[[Program, Context], PassResult] | None = None
    optional: bool = True


@dataclass(frozen=True)
class Context:
    """What a pass that is a function gets to see."""

    settings: Settings
    evaluator: Evaluator | None


def compile_with(program: Program, passes: Sequence[Pass], settings: Settings) -> Compiled:
    """Run the passes on a copy of the program.

    Passes of stage FUSE run together: their candidates are collected over all rules, and overlaps go to whichever saves
    most. The user's rules run with the stage they name, RAISE ones before ours.
    """
    program = _copied(program)
    _mark_weights(program)
    verified = settings.verify != "off" and settings.weights is not None
    evaluator = Evaluator(program, settings.weights, settings.inputs) if verified and settings.weights else None
    context = Context(settings, evaluator)
    policy = Policy(evaluator=evaluator, every_site=settings.verify == "full", deny=settings.deny)
    active = [p for p in passes if not p.optional or settings.enabled.get(p.name, True)]
    results: list[PassResult] = []

    def run(step: Callable[[], list[PassResult]]) -> None:
        before = _text(program) if settings.keep_text else ""
        made = step()
        after = _text(program) if settings.keep_text else ""
        for result in made:
            result.before, result.after = before, after
        results.extend(made)

    for stage in Stage:
        members = [p for p in active if p.stage is stage]
        own = tuple(r for r in settings.rules if r.stage is stage)
        if stage is Stage.FUSE:
            groups = [("user", own), *((p.name, p.rules) for p in members)]
            costed = replace(policy, cost=costing(program, settings.device))
            run(lambda g=groups, c=costed: _fuse(program, g, c))  # type: ignore[misc]
            continue
        if own:
            run(lambda s=stage, r=own: [rewrite(program, "user", s, r, policy)])  # type: ignore[misc]
        for step in members:
            if step.run is not None:
                run(lambda f=step.run: [f(program, context)])  # type: ignore[misc]
            else:
                run(lambda p=step: [rewrite(program, p.name, p.stage, p.rules, policy)])  # type: ignore[misc]
    program.gm.recompile()  # once: writing the code costs more than finding the matches
    return Compiled(program, results)


def costing(program: Program, device: torch.device) -> Costing:
    """Roofline times at each of `SIZES`, remembered by what the nodes compute on which shapes."""
    target = device_for(device)
    symbols = list(hints_of(program.graph))
    hints = [dict.fromkeys(symbols, size) for size in SIZES] if symbols else [{}]
    known: dict[object, tuple[float, ...]] = {}

    def times(node: fx.Node) -> tuple[float, ...]:
        key = (node.target, described(node), described(node.args), described(node.kwargs))
        if key not in known:
            known[key] = tuple(rewriting_us(node, target, h) for h in hints)
        return known[key]

    def cost(nodes: Sequence[fx.Node]) -> tuple[float, ...]:
        counted = [n for n in nodes if not is_constant(n)]
        return tuple(sum(column) for column in zip(*map(times, counted))) if counted else tuple(0.0 for _ in hints)

    return cost


def _fuse(
    program: Program, groups: Sequence[tuple[str, Sequence[Rule | GroupRule]]], policy: Policy
) -> list[PassResult]:
    """One rewriting over all rules; its result told pass by pass."""
    started = time.perf_counter()
    rules = [r for _, members in groups for r in members if r.stage is Stage.FUSE]
    joint = rewrite(program, "fuse", Stage.FUSE, rules, policy)
    results = []
    for name, members in groups:
        names = {r.name for r in members if r.stage is Stage.FUSE}
        if not names:
            continue
        results.append(
            PassResult(
                name,
                Stage.FUSE.name,
                [w for w in joint.rewrites if w.rule in names],
                [m for m in joint.misses if m.rule in names],
                [r for r in joint.reverted if r.rule in names],
                nodes_before=joint.nodes_before,
                nodes_after=joint.nodes_after,
                time_s=(time.perf_counter() - started) / max(len(groups), 1),
            )
        )
    return results


def _copied(program: Program) -> Program:
    graph = copy.deepcopy(program.graph)
    gm = fx.GraphModule(program.gm, graph)
    return replace(program, gm=gm, inputs=list(program.inputs), guards=list(program.guards))


def _mark_weights(program: Program) -> None:
    for node, meaning in program.placeholder_inputs().items():
        node.meta["weight"] = meaning.kind is not InputKind.USER


def _text(program: Program) -> str:
    return program.gm.print_readable(print_output=False)
