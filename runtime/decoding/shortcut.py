"""A call of `generate` that differs from an earlier one in its prompts alone: what that one came to is known.

transformers takes one to three milliseconds of host time to prepare a call, which a short prompt waits for. What it
prepares (processors, criteria, defaults) depends on the settings of the call, of the model's `generation_config` and
of its class. Where these are equal and plain values, the requests are made as before, for other prompts.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin
from transformers.generation import GenerationMode

from .paged_cache import is_left_padding, prompts
from .params import SamplingParams
from .requests import Request, of_rows

MAX_RECIPES: Final = 64
"""Kept for one model; all are dropped when there are more."""
OURS: Final = frozenset(["generate", "generate_batch", "_prepare_cache_for_generation"])
"""What `optimize` sets on a model."""
_PREPARES: Final = frozenset(dir(GenerationMixin)) - OURS
_PLAIN: Final = (bool, int, float, str, type(None), torch.dtype, torch.device)


@dataclass(frozen=True)
class Recipe:
    """What the requests of a call are made of."""

    params: SamplingParams
    """Of each sequence, without seed, padding and `min_length`."""
    max_new_tokens: int
    min_new_tokens: int
    """0: the end may come at once."""
    stop_tokens: frozenset[int]
    pad: int | None
    """What transformers tells padding by where no mask is given, None: by nothing."""
    fill: int
    """Behind the end of shorter outputs."""
    as_dict: bool

    @property
    def mode(self) -> GenerationMode:
        """As transformers calls it."""
        return GenerationMode.SAMPLE if self.params.do_sample else GenerationMode.GREEDY_SEARCH


@dataclass(frozen=True)
class Asked:
    """The arguments of a call."""

    settings: Hashable
    """Of everything but the prompts; equal ones are prepared alike."""
    input_ids: Tensor
    mask: Tensor | None


def asked(model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Asked | None:
    """The arguments taken apart, or None where something among them is more than prompts and plain values.

    None too where the model prepares calls by something that was set on it instead of by its class.
    """
    if not _PREPARES.isdisjoint(vars(model)):
        return None
    rest = dict(kwargs)
    given = [*args, *(rest.pop(name) for name in ("inputs", "input_ids") if rest.get(name) is not None)]
    mask, config = rest.pop("attention_mask", None), rest.pop("generation_config", None)
    if len(given) != 1 or not isinstance(given[0], Tensor) or given[0].dim() != 2 or given[0].dtype != torch.int64:
        return None
    ids = given[0]
    if mask is not None and not (isinstance(mask, Tensor) and mask.shape == ids.shape and mask.device == ids.device):
        return None
    legacy = vars(model.config)
    try:
        settings = (
            type(model),
            ids.device,
            mask is None,
            _plain(rest),
            None if config is None else (type(config), _plain(vars(config))),
            (type(model.generation_config), _plain(vars(model.generation_config))),
            _plain({name: legacy.get(name) for name in GenerationConfig._get_default_generation_params()}),
        )
    except TypeError:
        return None
    return Asked(settings, ids, mask)


def _plain(value: Any) -> Hashable:
    """The value as a key; raises TypeError for anything that might change under its name."""
    if isinstance(value, _PLAIN):
        return type(value), value
    if isinstance(value, list | tuple):
        return type(value), tuple(map(_plain, value))
    if isinstance(value, dict):
        return tuple((name, _plain(v)) for name, v in sorted(value.items()))
    raise TypeError(type(value))


def recipe_of(
    params: SamplingParams, prompt: int, most: int, stop_tokens: frozenset[int], config: GenerationConfig
) -> Recipe | None:
    """The recipe of a call, or None where lengths are part of it in another way than by counting new tokens.

    Args:
        prompt: tokens of the prompts, padding included.
        most: the largest length.
        config: as prepared.
    """
    new, least = config.max_new_tokens, config.min_new_tokens or 0
    if new is None or new < 1 or most != prompt + new or config.num_return_sequences not in (None, 1):
        return None
    if params.min_length not in (0, prompt + least) or (params.min_length and not least):
        return None
    if params.forced_eos or params.forced_bos is not None or params.begin_suppress or params.repetition_skip:
        return None
    pad = config._pad_token_tensor
    fill = None if pad is None else int(pad)
    told = fill if fill is not None and fill not in _ids(config._eos_token_tensor) else None
    return Recipe(
        replace(params, seed=0, padding=(), min_length=0),
        int(new),
        least if params.min_length else 0,
        stop_tokens,
        told,
        fill or 0,
        bool(config.return_dict_in_generate),
    )


def _ids(tokens: Tensor | None) -> list[int]:
    return [] if tokens is None else [int(t) for t in tokens.flatten().tolist()]


def requests_of(recipe: Recipe, call: Asked) -> list[Request] | None:
    """A request for each row, or None where only transformers knows what the mask stands for."""
    ids, mask = call.input_ids, call.mask
    if ids.numel() == 0:
        return None
    if mask is not None and bool((mask == 1).all()):
        mask = None
    elif mask is not None and not is_left_padding(mask):
        return None
    whole: list[list[int]] = ids.tolist()
    if call.mask is None and recipe.pad is not None and any(recipe.pad in row for row in whole):
        return None
    if call.mask is None and len(whole) > 1 and any(row[-1] == recipe.fill for row in whole):
        return None  # transformers warns of padding on the right
    tokens = whole if mask is None else prompts(ids, mask)
    params = recipe.params
    if recipe.min_new_tokens:
        params = replace(params, min_length=ids.shape[1] + recipe.min_new_tokens)
    return of_rows(params, tokens, whole, recipe.max_new_tokens, recipe.stop_tokens)
