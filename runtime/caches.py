"""Key-value caches given to a call: an empty one is filled from the graph's, as the model itself would fill it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, EncoderDecoderCache


def is_empty(cache: object) -> bool:
    """A cache nothing has been written to, of a kind that is filled by K and V alone: what `generate` starts with."""
    if type(cache) is EncoderDecoderCache:
        return is_empty(cache.self_attention_cache) and is_empty(cache.cross_attention_cache)
    if type(cache) is not DynamicCache or cache.offloading:
        return False
    return not any(getattr(layer, "is_initialized", True) for layer in cache.layers)


def layer_kinds(cache: object) -> tuple[Any, ...]:
    """What kind of layers a cache has; two caches of equal kinds hold the same for the same tokens."""
    if isinstance(cache, EncoderDecoderCache):
        return layer_kinds(cache.self_attention_cache), layer_kinds(cache.cross_attention_cache)
    assert isinstance(cache, DynamicCache)
    return tuple((type(layer), getattr(layer, "sliding_window", None)) for layer in cache.layers)


def fits(empty: object, kinds: Sequence[Any] | None) -> bool:
    """Whether the layers a graph makes (of `kinds`) are what the model would write into this empty cache."""
    if kinds is None:
        return False
    if isinstance(empty, EncoderDecoderCache):
        both = (empty.self_attention_cache, empty.cross_attention_cache)
        return len(kinds) == 2 and all(fits(part, k) for part, k in zip(both, kinds, strict=True))
    mine = layer_kinds(empty)
    return mine == tuple(kinds) or (not mine and all(kind == (DynamicLayer, None) for kind in kinds))


def fill(output: Any, given: Cache) -> Any:
    """Move what the graph's cache holds into the caller's, and let the output carry that one."""
    made = output["past_key_values"]
    if isinstance(given, EncoderDecoderCache):
        given.self_attention_cache.layers = made.self_attention_cache.layers
        given.cross_attention_cache.layers = made.cross_attention_cache.layers
        given.is_updated.update(made.is_updated)
    else:
        given.layers = made.layers
    output["past_key_values"] = given
    return output


def kinds_of_output(output: Any) -> tuple[Any, ...] | None:
    """The layer kinds of the cache in a model's output; None without one."""
    cache = output.get("past_key_values") if isinstance(output, dict) else None
    return layer_kinds(cache) if isinstance(cache, (DynamicCache, EncoderDecoderCache)) else None
