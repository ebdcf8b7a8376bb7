"""What `bench generate` compares: HuggingFace's ways to generate, vLLM, and regraft, each called in the same way."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import torch
from transformers.generation.streamers import BaseStreamer

from .bench import REGRAFT
from .checks import dtype_of
from .decoding.serving import paged_of
from .optimize import optimize, restore

EAGER: Final = "eager"
STATIC: Final = "static-compile"
"""HF's generate with a static cache, for which transformers compiles the decode step."""
BATCHED: Final = "hf-batch"
"""HF's `generate_batch`, with its CUDA graphs."""
VLLM: Final = "vllm"
GENERATORS: Final = (EAGER, STATIC, BATCHED, VLLM, REGRAFT)

Generate = Callable[[torch.Tensor, int], torch.Tensor]
"""Prompts `[B, P]` and the number of new tokens to the new tokens `[B, new]`, greedily, without an end token."""


@dataclass(frozen=True)
class Runner:
    """A candidate, ready to be called."""

    generate: Generate
    streamed: Callable[[torch.Tensor, int, BaseStreamer], Any] | None = None
    kv: Callable[[int, int], tuple[int, float | None]] | None = None
    """Bytes of keys and values, and their waste, for `batch` sequences of `length`, after a call."""


@contextmanager
def prepared(choice: str, model: Any, length: int) -> Iterator[Runner]:
    """The candidate of that name over `model`, which is as it was afterwards.

    Raises:
        ValueError: a name that is not known.
        ImportError: vllm, where it is not installed.
    """
    if choice == EAGER:
        yield _huggingface(model)
    elif choice == STATIC:
        try:
            yield _huggingface(model, cache_implementation="static")
        finally:
            torch.compiler.reset()
    elif choice == BATCHED:
        with _batched(model) as generate:
            yield Runner(generate, kv=_contiguous(model))
    elif choice == VLLM:
        with _vllm(model, length) as generate:
            yield Runner(generate)
    elif choice == REGRAFT:
        optimized = optimize(model, verbose=False)
        try:
            yield replace(_huggingface(optimized), kv=_paged(optimized))
        finally:
            restore(model)
    else:
        raise ValueError(f"unknown candidate {choice!r}; known: {', '.join(GENERATORS)}")


def _huggingface(model: Any, **options: Any) -> Runner:
    end = int(model.get_input_embeddings().weight.shape[0])  # no token: none ends a sequence, none has to be forbidden

    def generate(ids: torch.Tensor, new: int, streamer: BaseStreamer | None = None) -> torch.Tensor:
        more = {} if streamer is None else {"streamer": streamer}
        out: torch.Tensor = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new,
            eos_token_id=end,
            do_sample=False,
            num_beams=1,
            pad_token_id=0,
            **options,
            **more,
        )
        return out[:, ids.shape[1] :]

    return Runner(generate, generate, _contiguous(model))


@contextmanager
def _batched(model: Any) -> Iterator[Generate]:
    """Its CUDA graphs are asked for, which it leaves out where attention takes a mask. Calls share its cache, which has
    half of the free memory, as ours."""
    from transformers import GenerationConfig
    from transformers.generation import ContinuousBatchingConfig

    def generate(ids: torch.Tensor, new: int) -> torch.Tensor:
        config = GenerationConfig(max_new_tokens=new, do_sample=False, eos_token_id=-1, pad_token_id=0)
        options = ContinuousBatchingConfig(use_cuda_graph=True, max_memory_percent=0.5)
        found = model.generate_batch(ids.tolist(), config, options, persistent_manager=True)
        return torch.tensor([r.generated_tokens for r in found.values()], device=ids.device)

    logger = logging.getLogger("ContinuousBatchingLogger")
    before = logger.level
    logger.setLevel(logging.ERROR)  # it warns in every call that its manager is kept
    try:
        yield generate
    finally:
        logger.setLevel(before)
        model.destroy_cached_continuous_batching_manager()


@contextmanager
def _vllm(model: Any, length: int) -> Iterator[Generate]:
    """vLLM over the same config with random weights: the time is that of any weights, the tokens are not."""
    if find_spec("vllm") is None:
        raise ImportError("vllm is not installed here")
    vllm: Any = import_module("vllm")
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(model.config.to_dict(), default=str))
        engine = vllm.LLM(folder, load_format="dummy", skip_tokenizer_init=True, max_model_len=length + 1)

        def generate(ids: torch.Tensor, new: int) -> torch.Tensor:
            options = vllm.SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)
            found = engine.generate([{"prompt_token_ids": row} for row in ids.tolist()], options, use_tqdm=False)
            return torch.tensor([r.outputs[0].token_ids for r in found])

        yield generate


def kv_bytes(config: Any, batch: int, length: int, element: int) -> int:
    """A contiguous cache of all positions, from the config of a decoder."""
    text = config.get_text_config(decoder=True)
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return 2 * int(text.num_hidden_layers) * int(heads) * int(width) * batch * length * element


def _contiguous(model: Any) -> Callable[[int, int], tuple[int, float | None]]:
    element = torch.empty(0, dtype=dtype_of(model)).element_size()
    return lambda batch, length: (kv_bytes(model.config, batch, length, element), None)


def _paged(model: Any) -> Callable[[int, int], tuple[int, float | None]]:
    """Of the most pages held at once so far, or of HF's own cache where the model does not generate over pages."""

    def found(batch: int, length: int) -> tuple[int, float | None]:
        paged = paged_of(model)
        if paged is None:
            return _contiguous(model)(batch, length)
        stats = paged.engine.stats
        return stats.peak_kv_bytes, stats.waste

    return found
