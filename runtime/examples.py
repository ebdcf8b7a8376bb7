"""Typical arguments of a model's forward, made from its config, for the signature that is captured first."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .checks import device_of, dtype_of

BATCH, LENGTH = 2, 12
TARGET_LENGTH = 7
"""Tokens of an encoder-decoder's decoder: another length than the encoder's, so that the two are not confused."""


def make_examples(module: nn.Module, forward: Callable[..., Any]) -> dict[str, torch.Tensor] | None:
    """Arguments for one call, or None where the config does not say what they look like.

    Tokens are drawn from the vocabulary without the special ones; pictures and sounds are noise of the shape that the
    config gives.
    """
    config = getattr(module, "config", None)
    names = set(inspect.signature(forward).parameters)
    main = getattr(module, "main_input_name", "input_ids")
    if config is None or main not in names:
        return None
    generator = torch.Generator().manual_seed(0)
    device, dtype = device_of(module), dtype_of(module)
    made: dict[str, torch.Tensor] = {}
    for name in dict.fromkeys([main, *_both_towers(config, names)]):
        value = _input(name, config, generator)
        if value is None:
            return None
        made[name] = value
    if "input_ids" in made and "attention_mask" in names:
        made["attention_mask"] = torch.ones_like(made["input_ids"])
    decoder = getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in names
    if decoder:
        tokens = _tokens(config, generator, TARGET_LENGTH)
        if tokens is not None:
            made["decoder_input_ids"] = tokens
    if device.type == "meta":  # the values say which argument is a mask of which; capture takes their shapes from there
        device = torch.device("cpu")
    return {n: t.to(device, dtype if t.is_floating_point() else None) for n, t in made.items()}


def _both_towers(config: Any, names: set[str]) -> list[str]:
    """For a model that compares a text with a picture or a sound (CLIP, CLAP): both; text alone for others."""
    if not hasattr(config, "projection_dim") and not hasattr(config, "logit_scale_init_value"):
        return []
    towers = [("text_config", "input_ids"), ("vision_config", "pixel_values"), ("audio_config", "input_features")]
    found = [name for part, name in towers if hasattr(config, part) and name in names]
    return found if len(found) > 1 else []


def _input(name: str, config: Any, generator: torch.Generator) -> torch.Tensor | None:
    if name == "input_ids":
        return _tokens(config, generator, LENGTH)
    if name == "pixel_values":
        return _picture(config, generator)
    if name == "input_values" and hasattr(config, "conv_stride"):
        return torch.randn((BATCH, 4000), generator=generator)
    if name == "input_features" and hasattr(config, "num_mel_bins"):
        frames = getattr(config, "max_source_positions", None)
        if frames is not None:
            return torch.randn((BATCH, config.num_mel_bins, 2 * frames), generator=generator)
    return None


def _tokens(config: Any, generator: torch.Generator, length: int) -> torch.Tensor | None:
    get = getattr(config, "get_text_config", None)
    text = get() if callable(get) else config
    vocabulary = getattr(text, "vocab_size", None) or getattr(config, "vocab_size", None)
    if not isinstance(vocabulary, int) or vocabulary < 2:
        return None
    named = [getattr(text, n, None) for n in ("pad_token_id", "bos_token_id", "eos_token_id")]
    named += [v for n, v in vars(config).items() if n.endswith(("_token_id", "_token_index"))]
    special = {i for v in named for i in (v if isinstance(v, (list, tuple)) else (v,)) if isinstance(i, int)}
    usable = torch.tensor([i for i in range(min(vocabulary, 4096 + len(special))) if i not in special] or [0])
    positions = getattr(text, "max_position_embeddings", None)
    if isinstance(positions, int) and 4 < positions < length + 4:
        length = positions - 4
    tokens = usable[torch.randint(len(usable), (BATCH, length), generator=generator)]
    end = getattr(text, "eos_token_id", None)
    if isinstance(end, (list, tuple)) and end:
        end = end[0]
    if hasattr(config, "projection_dim") and isinstance(end, int) and end < vocabulary:
        tokens[:, -1] = end  # a text tower pools at the end token
    return tokens


def _picture(config: Any, generator: torch.Generator) -> torch.Tensor | None:
    vision = getattr(config, "vision_config", config)
    size = getattr(vision, "image_size", None)
    if size is None:
        return None
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    return torch.randn((BATCH, getattr(vision, "num_channels", 3), height, width), generator=generator)
