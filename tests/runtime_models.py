"""Tiny models, and a compiler that changes nothing, for tests of the runtime."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers

from regraft.compiler.capture import capture
from regraft.compiler.program import Program
from regraft.compiler.records import PassResult
from regraft.runtime.optimize import install
from regraft.runtime.options import Options
from regraft.runtime.oracle import run_oracle
from regraft.runtime.stages import Pipeline

VOCABULARY = 131


def tiny_llama(layers: int = 1, seed: int = 0, **kwargs: Any) -> transformers.LlamaForCausalLM:
    """A llama of 64 features with grouped-query attention, in evaluation mode."""
    torch.manual_seed(seed)
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 112,
        "num_hidden_layers": layers,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**(sizes | kwargs))).eval()


def medium_llama(device: str = "cpu") -> transformers.LlamaForCausalLM:
    """Twenty-four layers, 0.9 GB in bf16."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            sizes = {
                "hidden_size": 1280,
                "intermediate_size": 3520,
                "num_attention_heads": 16,
                "num_key_value_heads": 4,
            }
            return tiny_llama(24, vocab_size=8192, **sizes)
    finally:
        torch.set_default_dtype(torch.float32)


def tokens(batch: int = 2, length: int = 9, seed: int = 1) -> torch.Tensor:
    """Random token ids without the special ones."""
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def exactly(model: Any, **inputs: Any) -> Any:
    """What the forward of the model's class gives with every floating value in float64."""
    given = {n: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for n, v in inputs.items()}
    forward = functools.partial(type(model).forward, model)
    return run_oracle(model, forward, given, torch.float64, eager=False)


@dataclass
class Unchanged:
    """What a compiler returns."""

    program: Program
    passes: list[PassResult] = field(default_factory=list)


_programs: dict[Any, Program] = {}
"""Captured programs hold no weights: models of one form share them, which saves the tests most of their time."""


class Identity:
    """Stages that capture and change nothing."""

    def __init__(self) -> None:
        self.captured: list[Any] = []

    def capture(self, module: Any, call: Any, forward: Any) -> Program:
        self.captured.append(call)
        if not isinstance(module, transformers.PreTrainedModel) or forward is not None:
            return capture(module, call.tensors, call.static, cache=call.cache, forward=forward)
        form = (
            type(module),
            repr(module),
            len(list(module.parameters())),
            module.config.to_json_string(),
            module.dtype,
            call.key,
        )
        if form not in _programs:
            _programs[form] = capture(module, call.tensors, call.static, cache=call.cache)
        return _programs[form]

    def compile(self, program: Program, options: Options, weights: Any, **settings: Any) -> Unchanged:
        return Unchanged(program)


class Real(Identity):
    """The pipeline, over captures that models of one form share."""

    def compile(self, program: Program, options: Options, weights: Any, **settings: Any) -> Any:
        return Pipeline().compile(program, options, weights, **settings)


def optimized(model: Any, stages: Any = None, **options: Any) -> Any:
    """`regraft.optimize` with given stages."""
    return install(model, Options(**options), stages or Identity())
