"""RAISE changes no bit: every model of the zoo against its captured graph, at two shapes; counts follow the layers."""

from __future__ import annotations

import collections
from collections.abc import Callable
from typing import Any

import pytest
import torch
import zoo

from regraft.compiler.capture import capture
from regraft.compiler.pipeline import Settings
from regraft.compiler.program import Input, InputKind, Program
from regraft.passes.pipeline import PASSES, compile_program

ONLY_RAISED = {p.name: p.stage.name in ("CANONICALIZE", "RAISE") for p in PASSES}
WRITTEN_OUT = ("bloom", "falcon", "falcon_alibi", "mpt", "gptj")
"""Attention that bypasses the registry: raised from SDPA or eager code, it sums in another order."""

COUNTS: dict[str, dict[str, Callable[[int], int]]] = {
    "llama": {"rms_norm": lambda n: 2 * n + 1, "rope_half": lambda n: 2 * n, "glu": lambda n: n, "masks": lambda n: n},
    "qwen3": {"rms_norm": lambda n: 4 * n + 1, "rope_half": lambda n: 2 * n, "glu": lambda n: n, "masks": lambda n: n},
    "gemma3": {"rms_norm": lambda n: 6 * n + 1, "rope_half": lambda n: 2 * n, "glu": lambda n: n, "masks": lambda n: n},
    "deepseekv3": {"rms_norm": lambda n: 4 * n + 1, "rope_half_tables": lambda n: 2 * n, "masks": lambda n: n},
    "gptneox": {"layer_norm": lambda n: 2 * n + 1, "rope_partial": lambda n: 2 * n, "activation_gelu": lambda n: n},
    "gpt2": {"layer_norm": lambda n: 2 * n + 1, "addmm_linear": lambda n: 3 * n, "activation_gelu_new": lambda n: n},
    "bert": {"layer_norm": lambda n: 2 * n + 1, "activation_gelu": lambda n: n, "masks": lambda n: n},
    "t5": {"rms_norm": lambda n: 5 * n + 2, "glu": lambda n: 2 * n, "masks": lambda n: 3 * n},
    "whisper": {"layer_norm": lambda n: 5 * n + 2, "masks": lambda n: n},
}


def _weights(model: torch.nn.Module) -> Callable[[Input], torch.Tensor]:
    named: dict[str, Any] = dict(model.named_parameters(remove_duplicate=False))
    named |= dict(model.named_buffers(remove_duplicate=False))

    def weight(meaning: Input) -> torch.Tensor:
        if meaning.recipe is not None:
            return meaning.recipe.graph(*(named[s] for s in meaning.recipe.sources))
        return meaning.value if meaning.value is not None else named[meaning.target]

    return weight


def _run(program: Program, weights: Callable[[Input], torch.Tensor], tensors: dict[str, torch.Tensor]) -> Any:
    given = [tensors[i.target] if i.kind is InputKind.USER else weights(i) for i in program.inputs]
    with torch.no_grad():
        return program.gm(*given)


def _longer(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    tokens = ("input_ids", "attention_mask", "decoder_input_ids")
    return {n: torch.cat([t, t[:, -3:]], 1) if n in tokens else t for n, t in tensors.items()}


def _raised(name: str, dtype: torch.dtype, layers: int) -> tuple[Program, Any, Callable[[Input], torch.Tensor]]:
    model, inputs = zoo.build(name, dtype=dtype, layers=layers)
    program = capture(model, inputs, {}, cache=False)
    weights = _weights(model)
    settings = Settings(torch.device("cpu"), enabled=ONLY_RAISED, weights=weights, inputs=program.example, model=model)
    return program, compile_program(program, settings), weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", [n for n in zoo.EIGHTEEN if n not in WRITTEN_OUT])
def test_no_bit_changes_at_two_shapes(name: str, dtype: torch.dtype) -> None:
    program, compiled, weights = _raised(name, dtype, 2)
    assert not [r for p in compiled.passes for r in p.reverted]
    for tensors in (program.example, _longer(program.example)):
        if program.limits.violation(tensors) is not None:
            assert name == "mamba2", "every other model takes another length"
            continue
        before, after = _run(program, weights, tensors), _run(compiled.program, weights, tensors)
        for a, b in zip(before, after, strict=True):
            assert not isinstance(a, torch.Tensor) or torch.equal(a, b), name


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("name", COUNTS)
def test_counts_are_functions_of_the_layers(name: str, layers: int) -> None:
    _, compiled, _ = _raised(name, torch.float32, layers)
    found = collections.Counter(r.rule for p in compiled.passes for r in p.rewrites)
    assert {rule: found[rule] for rule in COUNTS[name]} == {rule: f(layers) for rule, f in COUNTS[name].items()}
