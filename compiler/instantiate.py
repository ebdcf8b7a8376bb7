"""Turn a traced pattern back into graphs: one for each way its alternatives can be chosen.

A pattern's operators are ATen's and ours, so that it can be executed: `rsqrt` in a pattern is `aten.rsqrt` in the graph
made here. That is what lets a rule be tested without a model.
"""

from __future__ import annotations

import itertools
import logging
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from .match import describe
from .opset import OpSpec
from .pattern import AnyOf, Cast, Op, P, Param, Pattern, Var, children
from .program import Input, InputKind, Program
from .rule import _PREFERRED

Choice = Mapping[AnyOf, int]
"""Which alternative of each choice is taken."""


class NotComputable(Exception):
    """The form cannot be built on these samples: a value is missing, or no overload takes the operands."""


@dataclass(frozen=True)
class Form:
    """One way to spell a pattern."""

    choice: Choice
    casts: bool = False
    """With dtype casts: up to fp32 on the pattern's variables, back down on what is computed from them."""

    def __str__(self) -> str:
        others = [(c, i) for c, i in self.choice.items() if i != len(c.alternatives) - 1]
        taken = [f"{describe(c.alternatives[i])} at {c.tag or c.where}" for c, i in others]
        return ", ".join([*taken, *(["with casts"] if self.casts else [])]) or "the simplest spelling"


def choices(pattern: Pattern) -> list[AnyOf]:
    """Every choice in a pattern, also those inside alternatives, outermost first."""
    found: dict[AnyOf, None] = {}
    stack: list[Any] = list(reversed(pattern.outputs))
    seen: set[int] = set()
    while stack:
        value = stack.pop()
        if isinstance(value, P) and id(value) not in seen:
            seen.add(id(value))
            if isinstance(value, AnyOf):
                found[value] = None
            stack.extend(reversed(list(children(value))))
    return list(found)


def forms(pattern: Pattern, cap: int, seed: int) -> list[Form]:
    """Every combination of alternatives up to `cap`; beyond, each alternative among random others, and random ones."""
    found = choices(pattern)
    total = 1
    for choice in found:
        total *= len(choice.alternatives)
    if total <= cap:
        combinations: list[tuple[int, ...]] = list(itertools.product(*(range(len(c.alternatives)) for c in found)))
    else:
        draw = random.Random(seed)
        combinations = []
        for i, choice in enumerate(found):
            for wanted in range(len(choice.alternatives)):
                others = [draw.randrange(len(c.alternatives)) for c in found]
                combinations.append((*others[:i], wanted, *others[i + 1 :]))
        while len(combinations) < cap:
            combinations.append(tuple(draw.randrange(len(c.alternatives)) for c in found))
    unique: dict[frozenset[tuple[int, int]], Form] = {}
    for combination in combinations:
        form = Form(dict(zip(found, combination, strict=True)))
        taken = used(pattern, form)
        unique.setdefault(frozenset((id(c), i) for c, i in taken), Form(dict(taken)))
    return list(unique.values())


def chosen(pattern: Pattern, tags: Mapping[str, int]) -> Form:
    """The form that takes these alternatives, by tag, and the last one of every other choice."""
    found = choices(pattern)
    unknown = set(tags) - {c.tag for c in found}
    if unknown:
        raise ValueError(f"no choice of the pattern has the tag {sorted(unknown)[0]!r}")
    last = {c: tags.get(c.tag or "", len(c.alternatives) - 1) for c in found}
    return Form(dict(used(pattern, Form(last))))


def used(pattern: Pattern, form: Form) -> list[tuple[AnyOf, int]]:
    """The choices that a form really makes: those inside alternatives not taken do not count."""
    made: dict[AnyOf, int] = {}

    def walk(value: Any) -> None:
        if isinstance(value, AnyOf):
            if value not in made:
                made[value] = form.choice[value]
                walk(value.alternatives[made[value]])
            return
        for child in children(value):
            walk(child)

    for output in pattern.outputs:
        walk(output)
    return list(made.items())


def instantiate(pattern: Pattern, form: Form, samples: Mapping[str, Any]) -> tuple[Program, dict[str, torch.Tensor]]:
    """A program that computes the pattern's outputs in this form, and its inputs by name.

    Tensors among the samples become inputs, `nn.Parameter`s weights; one tensor under two names is one input. Raises
    `NotComputable`.
    """
    return _Builder(form, samples).build(pattern)


class _Builder:
    def __init__(self, form: Form, samples: Mapping[str, Any]) -> None:
        self.form, self.samples = form, samples
        self.graph = fx.Graph()
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.made: dict[int, Any] = {}
        self.placeholders: dict[str, fx.Node] = {}
        self.inputs: list[Input] = []

    def build(self, pattern: Pattern) -> tuple[Program, dict[str, torch.Tensor]]:
        for name, value in self.samples.items():
            if isinstance(value, torch.Tensor):
                self._placeholder(name, value)
        outputs = tuple(self.value(output) for output in pattern.outputs)
        self.graph.output(outputs)
        gm = fx.GraphModule(torch.nn.Module(), self.graph)
        program = Program(gm, self.inputs, rebuild=tuple)
        return program, {n: v for n, v in self.samples.items() if isinstance(v, torch.Tensor)}

    def _placeholder(self, name: str, value: torch.Tensor) -> None:
        same = next((n for n in self.placeholders if self.samples[n] is value), None)
        if same is not None:
            self.placeholders[name] = self.placeholders[same]
            return
        node = self.graph.placeholder(name)
        weight = isinstance(value, torch.nn.Parameter)
        node.meta["val"] = self.mode.from_tensor(value.detach())
        node.meta["weight"] = weight
        self.placeholders[name] = node
        self.inputs.append(Input(node.name, InputKind.PARAMETER if weight else InputKind.USER, name))

    def value(self, p: Any) -> Any:
        if isinstance(p, list | tuple):
            return [self.value(v) for v in p]
        if not isinstance(p, P):
            return p
        if id(p) not in self.made:
            self.made[id(p)] = self._value(p)
        return self.made[id(p)]

    def _value(self, p: P) -> Any:
        if isinstance(p, Var | Param):
            if p.name in self.placeholders:
                return self.placeholders[p.name]
            if p.name not in self.samples:
                raise NotComputable(f"the sample has no {p.name!r}")
            return self.samples[p.name]
        if isinstance(p, AnyOf):
            return self.value(p.alternatives[self.form.choice[p]])
        if isinstance(p, Cast):
            inner = self.value(p.value)
            return self._cast(inner, up=_is_input(p.value)) if self.form.casts else inner
        assert isinstance(p, Op)
        return self._call(p)

    def _cast(self, node: Any, up: bool) -> Any:
        value = node.meta["val"] if isinstance(node, fx.Node) else None
        if not isinstance(value, torch.Tensor) or not value.is_floating_point():
            return node
        low = next(v.dtype for v in self.samples.values() if isinstance(v, torch.Tensor) and v.is_floating_point())
        wanted = torch.float32 if up else low
        if value.dtype is wanted:
            return node
        return self._node(torch.ops.aten._to_copy.default, (node,), {"dtype": wanted})

    def _call(self, p: Op) -> fx.Node:
        args = [self.value(a) for a in p.args]
        kwargs = {k: self.value(v) for k, v in p.kwargs.items()}
        refused: Exception | None = None
        for target in _overloads(p.spec):
            for numbers_as_tensors in (False, True):
                positional, named = _placed(target, args, kwargs)
                if numbers_as_tensors:
                    positional = tuple(self._tensor(v) if isinstance(v, float) else v for v in positional)
                try:
                    return self._node(target, positional, named)
                except Exception as error:  # noqa: BLE001 - torch raises many kinds where operands do not fit
                    refused = refused or error
        raise NotComputable(f"{p.spec.name} ({p.where}): {refused}") from refused

    def _tensor(self, number: float) -> fx.Node:
        """The form that a number has in a graph where an operator takes tensors only."""
        return self._node(torch.ops.aten.full.default, ([], number), {"dtype": torch.float64})

    def _node(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Node:
        fakes = fx.map_arg((args, kwargs), lambda n: n.meta["val"])
        with self.mode, torch.no_grad(), _quiet():
            value = target(*fakes[0], **fakes[1])
        node = self.graph.call_function(target, args, kwargs)
        node.meta["val"] = value
        return node


@contextmanager
def _quiet() -> Iterator[None]:
    """torch logs an error for each call on fake tensors that fails; trying overloads is no error."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def _is_input(p: Any) -> bool:
    return isinstance(p, Var) or (isinstance(p, Cast) and _is_input(p.value))


def _overloads(spec: OpSpec) -> Iterator[Any]:
    """The overload that export writes first, then the others."""
    first = _PREFERRED.get(spec.name)
    if first is not None:
        yield first
    others = (t for t in spec.targets if t is not first)
    yield from sorted(others, key=lambda t: (getattr(t, "_overloadname", "") != "Tensor", str(t)))


def _placed(target: Any, args: list[Any], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of a pattern follow the schema's order; those that torch takes by name only are given by name."""
    positional, named = [], dict(kwargs)
    schema = getattr(target, "_schema", None)
    if schema is None:
        return tuple(args), named
    for described, value in zip(schema.arguments, args, strict=False):
        if described.kwarg_only:
            named[described.name] = value
        else:
            positional.append(value)
    return tuple(positional), named
