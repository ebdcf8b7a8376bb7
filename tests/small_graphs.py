"""Programs of a few nodes, built by hand, for tests of the engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from regraft.compiler.match import GraphIndex, Match, Matcher
from regraft.compiler.program import Input, InputKind, Program
from regraft.compiler.records import PassResult
from regraft.compiler.rewrite import Policy, rewrite
from regraft.compiler.rule import GroupRule, Rule, Stage
from regraft.compiler.verify import Evaluator

aten = torch.ops.aten


class Small:
    """A graph under construction: inputs and weights with their values, operators by overload."""

    def __init__(self) -> None:
        self.graph = fx.Graph()
        self.mode = FakeTensorMode()
        self.values: dict[str, Tensor] = {}
        self.inputs: list[Input] = []
        self.built: Program | None = None

    def input(self, name: str, value: Tensor, kind: InputKind = InputKind.USER) -> fx.Node:
        node = self.graph.placeholder(name)
        node.meta["val"] = self.mode.from_tensor(value)
        node.meta["weight"] = kind is not InputKind.USER
        self.values[name] = value
        self.inputs.append(Input(name, kind, name, value=value if kind is InputKind.CONSTANT else None))
        return node

    def weight(self, name: str, value: Tensor) -> fx.Node:
        return self.input(name, value, InputKind.PARAMETER)

    def constant(self, name: str, number: float) -> fx.Node:
        """A Python number as export lifts it: a 0-d tensor among the inputs, already noted by canonicalize."""
        node = self.input(name, torch.tensor(number, dtype=torch.float64), InputKind.CONSTANT)
        node.meta["constant"] = number
        return node

    def call(self, target: Any, *args: Any, module: str = "", source: str = "", **kwargs: Any) -> fx.Node:
        node = self.graph.call_function(target, args, kwargs)
        fakes = fx.map_arg((args, kwargs), lambda n: n.meta["val"])
        with self.mode:
            node.meta["val"] = target(*fakes[0], **fakes[1])
        if module:
            node.meta["nn_module_stack"] = {"": (module, "")}
        if source:
            file, line, code = source.split(":")
            node.meta["stack_trace"] = f'  File "/models/{file}", line {line}, in forward\n    {code}\n'
        return node

    def program(self, *outputs: fx.Node) -> Program:
        self.graph.output(outputs)
        self.built = Program(fx.GraphModule(torch.nn.Module(), self.graph), self.inputs, rebuild=tuple)
        return self.built

    def evaluator(self) -> Evaluator:
        assert self.built is not None
        return Evaluator(self.built, lambda i: self.values[i.target], self.values)

    def run(self) -> tuple[Tensor, ...]:
        assert self.built is not None
        with torch.no_grad():
            return tuple(fx.Interpreter(self.built.gm).run(*[self.values[i.target] for i in self.built.inputs]))

    def apply(self, *rules: Rule | GroupRule, policy: Policy | None = None, stage: Stage = Stage.RAISE) -> PassResult:
        assert self.built is not None
        return rewrite(self.built, "test", stage, rules, policy)

    def matches(self, rule: Rule, anchor: fx.Node) -> list[Match]:
        """Every way the rule's pattern holds at a node."""
        return list(Matcher(GraphIndex(self.graph), rule.traced).matches(anchor))

    def targets(self) -> list[str]:
        """The operators of the graph by name, in order."""
        return [str(n.target).replace("aten.", "") for n in self.graph.nodes if n.op == "call_function"]


def names(nodes: Sequence[fx.Node]) -> list[str]:
    return [n.name for n in nodes]
