"""Node by node, an exported graph becomes what tracing the whole program again makes of it."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import zoo
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from regraft.compiler import functional as module
from regraft.compiler.functional import functional, is_aliasing_composite
from regraft.compiler.lifting import lift

aten = torch.ops.aten


class _Call(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tensors: dict[str, Tensor]) -> Tensor:
        out = self.model(**tensors)
        return out[0] if not isinstance(out, Tensor) else out


def exported(model: nn.Module, tensors: dict[str, Tensor]) -> ExportedProgram:
    shapes = {n: [Dim.AUTO] * t.dim() for n, t in tensors.items()}
    with torch.no_grad():
        return torch.export.export(_Call(model), (tensors,), dynamic_shapes=(shapes,), strict=False)


def counts(program: ExportedProgram, model: nn.Module) -> Counter[str]:
    gm, _ = lift(program, "model.", model)
    skipped = (aten.clone.default, aten.sym_size.int)  # eval-mode dropout is nothing here, a copy there
    return Counter(
        str(n.target)
        for n in gm.graph.nodes
        if n.op == "call_function" and n.target not in skipped and isinstance(n.target, torch._ops.OpOverload)
    )


@pytest.mark.parametrize("name", ["llama", "bert", "t5"])
def test_the_same_operations_as_run_decompositions(name: str) -> None:
    model, inputs = zoo.build(name, layers=1)
    program = exported(model, inputs)
    whole = program.run_decompositions({})
    assert counts(functional(program), model) == counts(whole, model)
    for node in program.graph.nodes:
        if isinstance(node.target, torch._ops.OpOverload):
            assert not node.target._schema.is_mutable and not is_aliasing_composite(node.target)


class _InPlace(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = x * 2
        z = y + 1
        y.add_(3)
        y.clamp_(min=0)
        return y.view(-1) + z.reshape(-1)


class _ThroughView(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = x * 2
        y[:, 0].add_(3)
        return y


@pytest.mark.parametrize(("model", "local"), [(_InPlace(), True), (_ThroughView(), False)])
def test_writes(model: nn.Module, local: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A write to a fresh tensor becomes its functional form; one through a view has the whole program traced again."""
    again: list[int] = []
    own = ExportedProgram.run_decompositions
    monkeypatch.setattr(ExportedProgram, "run_decompositions", lambda self, table: again.append(1) or own(self, table))
    x = torch.randn(3, 4)
    program = functional(exported(model, {"x": x}))
    assert bool(again) is not local
    gm, _ = lift(program, "model.", model)
    assert all(not n.target._schema.is_mutable for n in gm.graph.nodes if isinstance(n.target, torch._ops.OpOverload))
    for size in (3, 5):
        x = torch.randn(size, 4)
        assert torch.equal(gm(x)[0], model(x))


def test_repeated_layers_are_traced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    traced: list[int] = []
    own = module.make_fx
    monkeypatch.setattr(module, "make_fx", lambda *a, **k: traced.append(1) or own(*a, **k))
    for layers in (1, 3):
        model, inputs = zoo.build("llama", layers=layers)
        traced.append(0)
        functional(exported(model, inputs))
    first = traced.index(0, 1)
    assert sum(traced[:first]) == sum(traced[first:]) > 0
