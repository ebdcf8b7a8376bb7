"""A model from a command line: a folder with weights, or a config alone with random ones."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
import transformers
from torch import nn

from .examples import make_examples

DTYPES: Mapping[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
_LAYER_FIELDS = (
    "num_hidden_layers",
    "num_layers",
    "n_layer",
    "encoder_layers",
    "decoder_layers",
    "num_decoder_layers",
)


CONFIGS: Final = Path(__file__).parent.parent / "benchmarks"
"""Configs that a name stands for, where the repository is there."""


class ArgumentError(ValueError):
    """A command-line argument that cannot be used: names it, its value, and what is allowed."""


def load_config(model: str) -> Any:
    """The config of a folder that holds a `config.json`, of that file itself, or of a name in `benchmarks/`."""
    path = Path(model)
    file = path / "config.json" if path.is_dir() else path
    named = CONFIGS / f"{model}.json"
    if not file.exists() and named.is_file():
        file = named
    if not file.is_file():
        known = ", ".join(sorted(p.stem for p in CONFIGS.glob("*.json") if p.stem != "forward"))
        hint = f" or one of {known}" if known else ""
        raise ArgumentError(f"model {model!r}: expected a folder with a config.json, or a config.json{hint}")
    try:
        return transformers.AutoConfig.from_pretrained(file)
    except (ValueError, OSError, KeyError, TypeError, AttributeError) as error:
        raise ArgumentError(f"model {model!r}: transformers cannot read its config ({error})") from error


def with_layers(config: Any, layers: int) -> Any:
    """The config with that many layers in each of its stacks, its towers included."""
    for name in _LAYER_FIELDS:
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            setattr(config, name, min(layers, value))
    for name in ("layer_types", "mlp_layer_types"):
        kinds = getattr(config, name, None)
        if isinstance(kinds, list):
            setattr(config, name, kinds[:layers])
    for value in vars(config).values():
        if isinstance(value, transformers.PretrainedConfig):
            with_layers(value, layers)
    return config


def model_class(config: Any) -> Any:
    """The class that the config names, or transformers' choice for its type."""
    for name in config.architectures or ():
        found = getattr(transformers, name, None)
        if found is None:  # a part of a model, such as an encoder, which only its own module exports
            module = type(config).__module__.replace(".configuration_", ".modeling_")
            found = getattr(importlib.import_module(module), name, None)
        if found is not None:
            return found
    for auto in (transformers.AutoModelForCausalLM, transformers.AutoModelForSeq2SeqLM, transformers.AutoModel):
        if type(config) in auto._model_mapping:
            return auto._model_mapping[type(config)]
    raise ArgumentError(f"no class of transformers {transformers.__version__} is known for {type(config).__name__}")


def has_weights(model: str) -> bool:
    """Whether the folder holds weights."""
    path = Path(model)
    return path.is_dir() and any(any(path.glob(p)) for p in ("*.safetensors", "pytorch_model*.bin"))


def load_model(model: str, *, dtype: torch.dtype | None, device: torch.device, layers: int | None = None) -> nn.Module:
    """The model in evaluation mode. Without weights they are random, from seed 0; on meta there are none."""
    config = load_config(model)
    if layers is not None:
        config = with_layers(config, layers)
    cls = model_class(config)
    made: nn.Module
    if has_weights(model) and device.type != "meta":
        made = cls.from_pretrained(model, config=config, dtype=dtype or "auto")
        return made.eval().to(device)
    torch.manual_seed(0)
    with torch.device(device):
        made = cls._from_config(config, dtype=dtype or getattr(config, "dtype", None) or torch.float32)
    return made.eval()


def inputs_for(model: nn.Module, batch: int, length: int, *, mask: bool = True) -> dict[str, torch.Tensor]:
    """Arguments of one call: token ids `[batch, length]` where the model takes tokens, others in their own size.

    Without `mask` there is no attention mask, as for sequences of the same length.
    """
    made = make_examples(model, model.forward)
    if made is None:
        raise ArgumentError(f"{type(model).__name__}: its config does not say what its inputs look like")
    kept = {name: value for name, value in made.items() if mask or not name.endswith("attention_mask")}
    return {name: _resized(name, value, batch, length) for name, value in kept.items()}


def _resized(name: str, value: torch.Tensor, batch: int, length: int) -> torch.Tensor:
    rows = value[torch.arange(batch, device=value.device) % len(value)]
    if value.is_floating_point() or value.dim() != 2:
        return rows
    columns = torch.arange(length, device=value.device)
    if name.endswith("input_ids"):
        shifted = (columns[None] * 7 + torch.arange(batch, device=value.device)[:, None] * 3) % value.shape[1]
        return rows.gather(1, shifted)
    return rows[:, columns % value.shape[1]]
