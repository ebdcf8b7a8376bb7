"""What a call of `generate` asks for that the engine cannot do, by the name of the argument."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import GenerationConfig, GenerationMixin
from transformers.generation import GenerationMode
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria
from transformers.generation.utils import GENERATION_MODES_MAPPING

from .paged_cache import are_plain_positions, is_left_padding
from .processors import Untranslated

MODES = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE, GenerationMode.BEAM_SEARCH, GenerationMode.BEAM_SAMPLE)
TOKEN_BY_TOKEN = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
PREPARE = ("prepare_inputs_for_generation", "_update_model_kwargs_for_generation")
"""What makes the arguments of a step: the engine makes them by itself."""
UNDERSTOOD = ("attention_mask", "position_ids", "logits_to_keep", "use_cache")
"""Arguments of the model that the engine takes, or that change nothing of the last logits."""


def refusal(config: GenerationConfig, mode: GenerationMode | None, arguments: Mapping[str, Any]) -> str | None:
    """Why a prepared call cannot run over pages, or None.

    Args:
        arguments: what the model's forward is to be called with beside `input_ids`, by the names of a decoder.
    """
    if mode is None:  # a loop of the model's own prepares its cache
        return "a generate of the model's own, which names no mode"
    if mode not in MODES:
        return mode.value.replace("_", " ")
    if arguments.get("past_key_values") is not None:
        return "past_key_values"
    for name in ("cache_implementation", "prefill_chunk_size"):
        if getattr(config, name, None) is not None:
            return f"{name}={getattr(config, name)!r}"
    if getattr(config, "is_assistant", False):
        return "assistant_model"
    if getattr(config, "guidance_scale", None) not in (None, 1, 1.0):
        return f"guidance_scale={config.guidance_scale}"  # its processor calls the model with a cache of its own
    for name, value in arguments.items():
        if name not in UNDERSTOOD and name != "past_key_values" and value is not None and value is not False:
            return name
    mask, positions = arguments.get("attention_mask"), arguments.get("position_ids")
    if isinstance(mask, Tensor) and not is_left_padding(mask):
        return "an attention_mask that is not padding on the left"
    if isinstance(positions, Tensor) and not are_plain_positions(positions, mask):
        return "position_ids"
    return None


def of_its_own(model: Any, mode: GenerationMode) -> str | None:
    """What of a loop the model does in another way than its class, or transformers; None: nothing."""
    loop = GENERATION_MODES_MAPPING[mode]
    if getattr(type(model), loop) is not getattr(GenerationMixin, loop):
        return f"a {loop} of the model's own"
    for name in PREPARE:  # PEFT's prompts replace it for the time of a call
        replaced = model.__dict__.get(name)
        if replaced is not None and getattr(replaced, "__func__", None) is not getattr(type(model), name):
            return f"another {name} than that of the model's class"
    return None


class Effective:
    """Settings of a call as `generate` will see them: arguments before `generation_config` before the model's own."""

    def __init__(self, arguments: Mapping[str, Any], *configs: GenerationConfig | None) -> None:
        self._arguments = arguments
        self._configs = [*(c for c in configs if c is not None), GenerationConfig(), _Defaults()]

    def __getattr__(self, name: str) -> Any:
        if name in self._arguments:
            return self._arguments[name]
        return next((v for c in self._configs if (v := getattr(c, name, None)) is not None), None)


class _Defaults:
    def __getattr__(self, name: str) -> Any:
        return GenerationConfig._get_default_generation_params().get(name)


def stops(criteria: Any) -> tuple[int, frozenset[int]]:
    """The largest length, padding included, and the tokens that end a sequence.

    Raises:
        Untranslated: another kind of criterion.
    """
    length, tokens = None, frozenset[int]()
    for criterion in criteria:
        if type(criterion) is MaxLengthCriteria:
            most = math.ceil(criterion.max_length)  # a float where max_new_tokens is one
            length = most if length is None else min(length, most)
        elif type(criterion) is EosTokenCriteria:
            tokens |= frozenset(int(t) for t in criterion.eos_token_id.flatten().tolist())
        else:
            raise Untranslated(f"the stopping criterion {type(criterion).__name__}")
    if length is None:
        raise Untranslated("a call without max_length")
    return length, tokens
