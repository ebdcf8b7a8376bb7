"""The decoding attributes of an optimized model: set by `optimize`, taken away by `restore`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import GenerationMixin

from .generate import Decoding, Generate, Make, PrepareCache
from .generate_batch import GenerateBatch
from .shortcut import OURS

if TYPE_CHECKING:
    from ..dispatch import Dispatch


def install(model: Any, dispatch: Dispatch, make: Make) -> None:
    """Plug in beneath `generate`; nothing is built before it is called.

    Models that do not generate, and attributes that somebody set on this instance, stay as they are. `generate_batch`
    is for decoders alone, as transformers' own.
    """
    if not issubclass(type(model), GenerationMixin) or not model.can_generate():
        return
    if any(name in model.__dict__ for name in OURS):
        return
    decoding = Decoding(dispatch, make)
    model.__dict__["generate"] = Generate(decoding)
    if not model.config.is_encoder_decoder:
        model.__dict__["generate_batch"] = GenerateBatch(decoding)
    model.__dict__["_prepare_cache_for_generation"] = PrepareCache(decoding)


def remove(model: Any) -> None:
    """Give the class's own methods back, and all memory."""
    generate = model.__dict__.get("generate")
    if isinstance(generate, Generate):
        generate.decoding.release()
        for name in OURS:
            model.__dict__.pop(name, None)
