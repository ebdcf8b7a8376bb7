"""The projection of q, k and v with norm and rotation: where it is fused, that it computes the same, and where not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as tf
import zoo
from capture_checks import assert_same, tensors_in

from regraft.compiler.capture import capture
from regraft.compiler.pipeline import Compiled, Settings
from regraft.compiler.program import Input, InputKind
from regraft.kernels.table import op_of
from regraft.passes.pipeline import compile_program

LAYERS = 2
WITHOUT = {"lower": False}
"""At a width of 64 the norm in front of the projection is cheaper to fuse."""


def phi(**more: Any) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """Biases, and half of each head rotated."""
    sizes = {"vocab_size": 131, "hidden_size": 64, "intermediate_size": 112, "num_attention_heads": 4}
    config = tf.PhiConfig(**sizes, num_hidden_layers=LAYERS, partial_rotary_factor=0.5, **more)
    model = tf.PhiForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    return model, {"input_ids": torch.randint(3, 131, (2, 9))}


def built(name: str) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    return phi() if name == "phi" else zoo.build(name, layers=LAYERS)


def weights(model: torch.nn.Module) -> Callable[[Input], torch.Tensor]:
    named: dict[str, Any] = dict(model.named_parameters(remove_duplicate=False))
    named |= dict(model.named_buffers(remove_duplicate=False))

    def weight(meaning: Input) -> torch.Tensor:
        if meaning.recipe is not None:
            return meaning.recipe.graph(*(named[s] for s in meaning.recipe.sources))
        return meaning.value if meaning.value is not None else named[meaning.target]

    return weight


def run(compiled: Compiled, weight: Callable[[Input], torch.Tensor], tensors: dict[str, torch.Tensor]) -> Any:
    given = [tensors[i.target] if i.kind is InputKind.USER else weight(i) for i in compiled.program.inputs]
    with torch.no_grad():
        return compiled.program.gm(*given)


def count(compiled: Compiled, name: str) -> int:
    ops = [op_of(n.target) for n in compiled.program.graph.nodes]
    return sum(op is not None and op.name == name for op in ops)


MODELS = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "starcoder2", "phi", "glm")


@pytest.mark.parametrize("name", MODELS)
def test_it_fires_in_every_layer_and_computes_the_same(name: str) -> None:
    model, tensors = built(name)
    weight = weights(model)
    program = capture(model, tensors, {}, cache=False)
    fused = compile_program(program, Settings(torch.device("cpu"), verify="off", enabled=WITHOUT))
    apart = compile_program(
        program, Settings(torch.device("cpu"), verify="off", enabled={**WITHOUT, "qkv_rope": False})
    )
    assert count(fused, "qkv_rope") == LAYERS
    assert count(fused, "rope") + count(fused, "norm_rope") == 0
    assert count(apart, "qkv_rope") == 0
    for found, own in zip(
        tensors_in(run(fused, weight, tensors)), tensors_in(run(apart, weight, tensors)), strict=True
    ):
        assert_same(found, own)


def test_verification_accepts_it() -> None:
    model, tensors = built("qwen3")
    program = capture(model, tensors, {}, cache=False)
    settings = Settings(
        torch.device("cpu"), verify="full", enabled=WITHOUT, weights=weights(model), inputs=tensors, model=model
    )
    compiled = compile_program(program, settings)
    of_rule = next(p for p in compiled.passes if p.name == "qkv_rope")
    assert not of_rule.reverted
    assert len(of_rule.rewrites) == LAYERS
    assert all(r.check is not None and r.check.passed for r in of_rule.rewrites)


def test_norms_that_differ_stay_apart() -> None:
    model, tensors = built("qwen3")
    for layer in model.model.layers:
        layer.self_attn.k_norm.variance_epsilon = 1e-3
    program = capture(model, tensors, {}, cache=False)
    compiled = compile_program(program, Settings(torch.device("cpu"), verify="off", enabled=WITHOUT))
    assert count(compiled, "qkv_rope") == 0
    assert count(compiled, "norm_rope") == 2 * LAYERS
    misses = next(p for p in compiled.passes if p.name == "qkv_rope").misses
    assert any("differ in eps" in miss.found for miss in misses)
