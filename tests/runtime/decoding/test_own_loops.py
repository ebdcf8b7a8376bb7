"""Models whose `generate` is a loop of their own keep it, cache and all."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as tf
import zoo
from runtime_models import tokens

import regraft
from regraft.runtime.errors import RegraftWarning


class OwnLoop(tf.LlamaForCausalLM):
    """Has a loop of its own, for which it prepares the cache itself, and names no mode."""

    def generate(self, input_ids: torch.Tensor, steps: int = 3) -> torch.Tensor:
        prepared: dict[str, Any] = {}
        self._prepare_cache_for_generation(self.generation_config, prepared, None, len(input_ids), 16)
        cache, new = prepared["past_key_values"], input_ids
        for _ in range(steps):
            logits = self(new, past_key_values=cache).logits
            new = logits[:, -1:].argmax(-1)
            input_ids = torch.cat([input_ids, new], 1)
        return input_ids


def test_a_loop_of_the_models_own() -> None:
    plain = OwnLoop(zoo.config("llama", 1)).eval()
    ids = tokens(1, 7)
    with torch.no_grad():
        expected = plain.generate(ids)
    model = regraft.optimize(plain, verify="off", verbose=False)
    with torch.no_grad(), pytest.warns(RegraftWarning, match="a generate of the model's own, which names no mode"):
        assert torch.equal(model.generate(ids), expected)
    assert model.report.record.generated == {"HuggingFace's loop": 1}


def test_tokens_of_the_models_own() -> None:
    """XLM says what stands in the place of a mask that its `prepare_inputs_for_generation` puts behind all tokens."""
    sizes = {"emb_dim": 48, "n_layers": 1, "n_heads": 4, "max_position_embeddings": 64, "mask_token_id": 4}
    numbers = {"pad_token_id": 0, "pad_index": 0, "bos_token_id": 1, "eos_token_id": 2, "n_langs": 1}
    torch.manual_seed(0)
    plain = tf.XLMWithLMHeadModel(tf.XLMConfig(vocab_size=zoo.VOCAB, causal=True, **sizes, **numbers)).eval()
    given = {"input_ids": tokens(2, 7), "max_new_tokens": 6, "do_sample": False}
    expected = plain.generate(**given)
    model = regraft.optimize(plain, verify="off", verbose=False)
    with pytest.warns(RegraftWarning, match="adds tokens of its own"):
        assert torch.equal(model.generate(**given), expected)
