"""Compiled models through the engine: greedy tokens are those of HuggingFace's own loop over one prompt at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import zoo

import regraft
from regraft.runtime.decoding.engine import Engine
from regraft.runtime.decoding.flat import FlatProgram, flat_program
from regraft.runtime.decoding.memory import Limits
from regraft.runtime.decoding.requests import Request
from regraft.runtime.decoding.sampling import Sampler


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_greedy_tokens_are_those_of_eager(name: str) -> None:
    model, inputs = zoo.build(name)
    made = torch.Generator().manual_seed(1)
    prompts = [torch.randint(3, model.config.vocab_size, (n,), generator=made) for n in (1, 7, 19, 33)]
    expected = []
    for prompt in prompts:
        ids = prompt[None]
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        expected.append(out[0, len(prompt) :].tolist())
    model = regraft.optimize(model, example_inputs=inputs, verbose=False)
    flat = flat_program(model)
    assert isinstance(flat, FlatProgram)
    engine = Engine(flat, "cpu", Limits(max_batch_size=3, token_budget=16, max_seq_len=64))
    requests = [Request(p.tolist(), max_new_tokens=12) for p in prompts]
    assert engine.run(requests, Sampler(flat.vocab, "cpu")) == expected
    for pool in engine.executor.tables.pools:
        pool.check([])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)
    _check_followed(model, flat, engine, requests)
    for parameter in model.parameters():
        parameter.data.mul_(1.5)
    _check_followed(model, flat, engine, requests)


def _check_followed(model: Any, flat: FlatProgram, engine: Engine, requests: list[Request]) -> None:
    """Pages of prompts that were computed with other weights are not shared."""
    assert flat_program(model) is flat
    changed = engine.run(requests, Sampler(flat.vocab, "cpu"))
    fresh = Engine(flat, "cpu", Limits(max_batch_size=3, max_seq_len=64, prefix_sharing=False))
    assert changed == fresh.run(requests, Sampler(flat.vocab, "cpu"))
