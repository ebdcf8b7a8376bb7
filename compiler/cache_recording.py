"""A key-value cache that remembers what the model writes, so that K and V of each layer become outputs of the graph.

One concrete run says which cache the model makes. While it is captured it gets a recording cache of the same classes
instead, and afterwards `Blueprint.build` makes the real one from the graph's outputs.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import (
    Cache,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    EncoderDecoderCache,
)


class _Recording:
    """Mixed into a layer class: keeps K and V as they come, as an empty cache would hand them back."""

    keys: Any
    values: Any
    is_initialized: bool

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if self.is_initialized:
            raise ValueError("a layer writes its cache twice in one forward")
        self.keys, self.values, self.is_initialized = key_states, value_states, True
        self.dtype, self.device = key_states.dtype, key_states.device
        return key_states, value_states

    def get_seq_length(self) -> Any:
        return self.keys.shape[-2] if self.is_initialized else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0


class _RecordingLayer(_Recording, DynamicLayer):
    pass


class _RecordingSlidingLayer(_Recording, DynamicSlidingWindowLayer):
    def __init__(self, sliding_window: int) -> None:  # without the tensor that the real one makes: it would be traced
        super(DynamicSlidingWindowLayer, self).__init__()
        self.sliding_window, self.cumulative_length, self.record_past = sliding_window, 0, False


@dataclass(frozen=True)
class LayerPlan:
    """`window` is the sliding window of a `DynamicSlidingWindowLayer`, `None` for a plain `DynamicLayer`."""

    window: int | None

    def real(self) -> DynamicLayer:
        return DynamicLayer() if self.window is None else DynamicSlidingWindowLayer(sliding_window=self.window)

    def recording(self) -> DynamicLayer:
        if self.window is None:
            return _RecordingLayer()
        return _RecordingSlidingLayer(sliding_window=self.window)


@dataclass(frozen=True)
class Blueprint:
    """Which cache a model makes: one list of layers, or two for an encoder-decoder (self, cross).

    `growing` tells for each list that the cache appends layers as they come (a `DynamicCache` without a config).
    """

    lists: tuple[tuple[LayerPlan, ...], ...]
    growing: tuple[bool, ...]
    encoder_decoder: bool

    @classmethod
    def of(cls, cache: Cache) -> Blueprint:
        """Raises `ValueError` with the reason where such a cache cannot be filled from K and V alone."""
        parts: tuple[Any, ...] = (cache,)
        if type(cache) is EncoderDecoderCache:
            parts = (cache.self_attention_cache, cache.cross_attention_cache)
        for part in parts:
            if type(part) is not DynamicCache:
                raise ValueError(f"its cache is a {type(part).__name__}")
            if part.offloading:
                raise ValueError("its cache is offloaded")
        lists = tuple(tuple(_plan(layer) for layer in part.layers) for part in parts)
        growing = tuple(part.layer_class_to_replicate is not None for part in parts)
        return cls(lists, growing, len(parts) == 2)

    def recorder(self) -> Cache:
        """An empty cache of the same classes whose layers record."""
        return self._assemble(recording=True)

    def collect(self, cache: Cache) -> tuple[list[tuple[int, int]], list[Tensor]]:
        """What a recorder holds: (list, layer) of each written layer, and its K and V in turn."""
        where: list[tuple[int, int]] = []
        tensors: list[Tensor] = []
        for i, part in enumerate(self._parts(cache)):
            for j, layer in enumerate(part.layers):
                if layer.is_initialized:
                    where.append((i, j))
                    tensors += [layer.keys, layer.values]
        return where, tensors

    def build(self, where: Sequence[tuple[int, int]], tensors: Sequence[Tensor]) -> Cache:
        """The cache that the original forward returns, from K and V of each written layer."""
        cache: Any = self._assemble(recording=False)
        parts = self._parts(cache)
        for index, (i, j) in enumerate(where):
            _write(parts[i], j, tensors[2 * index], tensors[2 * index + 1])
        if self.encoder_decoder:
            cache.is_updated.update({j: True for i, j in where if i == 1})
        return cache

    def _assemble(self, recording: bool) -> Cache:
        parts = []
        for plans, growing in zip(self.lists, self.growing, strict=True):
            part = DynamicCache()
            part.layers = [plan.recording() if recording else plan.real() for plan in plans]
            part.layer_class_to_replicate = DynamicLayer if growing and not recording else None
            parts.append(part)
        return EncoderDecoderCache(*parts) if self.encoder_decoder else parts[0]

    def _parts(self, cache: Any) -> list[Any]:
        return [cache.self_attention_cache, cache.cross_attention_cache] if self.encoder_decoder else [cache]


def _write(part: Any, index: int, keys: Tensor, values: Tensor) -> None:
    """What `part.update` does to an empty layer, without its copies and without waiting for the device."""
    layer: Any = part.layers[index] if index < len(part.layers) else None
    if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) or type(keys) is not Tensor:
        part.update(keys, values, index)
        return
    layer.dtype, layer.device, layer.is_initialized = keys.dtype, keys.device, True
    if type(layer) is DynamicSlidingWindowLayer:
        layer._sliding_window_tensor = _number(layer.sliding_window, keys.device)
        layer.cumulative_length = keys.shape[-2]
        keys, values = (t[:, :, -layer.sliding_window + 1 :, :] for t in (keys, values))
    layer.keys, layer.values = keys, values


@functools.lru_cache(maxsize=64)
def _number(value: int, device: torch.device) -> Tensor:
    """The number on the device, where it is only read: bringing one there makes the host wait."""
    with torch.inference_mode(False):
        return torch.tensor(value, dtype=torch.long, device=device)


def _plan(layer: Any) -> LayerPlan:
    if type(layer) is DynamicLayer:
        return LayerPlan(None)
    if type(layer) is DynamicSlidingWindowLayer:
        return LayerPlan(int(layer.sliding_window))
    raise ValueError(f"a layer of its cache is a {type(layer).__name__}, which holds more than keys and values")
