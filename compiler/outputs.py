"""What a forward returns, taken apart into the tensors of a graph's outputs and put together again.

A structure is `ModelOutput`, dict, tuple or list, nested; its leaves are tensors, caches, and Python values that stay
as they were at capture.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache
from transformers.utils import ModelOutput

from .cache_recording import Blueprint


@dataclass(frozen=True)
class _Leaf:
    index: int


@dataclass(frozen=True)
class _CacheLeaf:
    index: int
    where: tuple[tuple[int, int], ...]
    blueprint: Blueprint


@dataclass(frozen=True)
class _Node:
    kind: type
    keys: tuple[str, ...] | None
    items: tuple[Any, ...]


@dataclass(frozen=True)
class _Constant:
    value: Any


class Structure:
    """The shape of one returned object; `rebuild(tensors)` makes another one like it."""

    def __init__(self, root: Any, size: int) -> None:
        self.root, self.size = root, size

    def rebuild(self, tensors: Sequence[Any]) -> Any:
        """`tensors` are the graph's outputs, in order."""
        return _rebuild(self.root, tensors)


def flatten(value: Any, blueprint: Blueprint | None = None) -> tuple[Structure, list[Any]]:
    """The structure of a returned object and its tensors; a recording cache gives K and V of each layer.

    Raises `TypeError` for a leaf that is neither a tensor nor a plain Python value.
    """
    leaves: list[Any] = []
    root = _flatten(value, blueprint, leaves)
    return Structure(root, len(leaves)), leaves


def caches(value: Any) -> list[Cache]:
    """The caches in a returned object."""
    if isinstance(value, Cache):
        return [value]
    if isinstance(value, dict):
        return [c for item in value.values() for c in caches(item)]
    if isinstance(value, tuple | list):
        return [c for item in value for c in caches(item)]
    return []


def unknown(value: Any) -> str | None:
    """The class of the first thing in a returned object that `flatten` would not take, caches apart; or None."""
    if isinstance(value, dict | tuple | list):
        items = value.values() if isinstance(value, dict) else value
        return next((found for item in items if (found := unknown(item)) is not None), None)
    plain = Tensor | Cache | bool | int | float | str | torch.dtype | torch.device
    return None if value is None or isinstance(value, plain) else type(value).__name__


def _flatten(value: Any, blueprint: Blueprint | None, leaves: list[Any]) -> Any:
    if isinstance(value, Tensor | torch.SymInt | torch.SymFloat | torch.SymBool):
        leaves.append(value)
        return _Leaf(len(leaves) - 1)
    if isinstance(value, Cache):
        if blueprint is None:
            raise TypeError(f"the forward returns a {type(value).__name__} that cannot be rebuilt")
        where, tensors = blueprint.collect(value)
        leaves.extend(tensors)
        return _CacheLeaf(len(leaves) - len(tensors), tuple(where), blueprint)
    if isinstance(value, dict):
        items = [(k, _flatten(v, blueprint, leaves)) for k, v in value.items()]
        return _Node(type(value), tuple(k for k, _ in items), tuple(i for _, i in items))
    if isinstance(value, tuple | list):
        return _Node(type(value), None, tuple(_flatten(v, blueprint, leaves) for v in value))
    if value is None or isinstance(value, bool | int | float | str | torch.dtype | torch.device):
        return _Constant(value)
    raise TypeError(f"the forward returns a {type(value).__name__}")


def _rebuild(node: Any, tensors: Sequence[Any]) -> Any:
    if isinstance(node, _Leaf):
        return tensors[node.index]
    if isinstance(node, _CacheLeaf):
        return node.blueprint.build(node.where, tensors[node.index : node.index + 2 * len(node.where)])
    if isinstance(node, _Constant):
        return node.value
    items = [_rebuild(item, tensors) for item in node.items]
    if node.keys is not None:
        pairs = dict(zip(node.keys, items, strict=True))
        return node.kind(**pairs) if issubclass(node.kind, ModelOutput) else node.kind(pairs)
    if hasattr(node.kind, "_fields"):  # a namedtuple
        return node.kind(*items)
    return node.kind(items)
