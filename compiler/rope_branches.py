"""Rotary tables whose frequencies depend on the length, without the branch that no graph can hold.

transformers decorates such a forward with `dynamic_rope_update`, which looks at `max(position_ids)` and swaps the
buffer `inv_freq` before the real forward runs. Here both frequencies exist and the length chooses:

    longrope  inv_freq = where(length > original_max, long, short)
    dynamic   inv_freq = where(length > max_position_embeddings, ntk(length), original)

which is what a freshly loaded model does. (The decorated dynamic variant also remembers the longest sequence it has
seen; a graph has no memory.) The buffer that the model swaps is never read by a graph, only the one with the original.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def _is_dynamic(kind: str) -> bool:
    return "dynamic" in kind or kind == "longrope"


def varying_rope(module: nn.Module) -> bool:
    """Whether this module's rotary frequencies depend on the length of the call."""
    kinds = getattr(module, "rope_type", None)
    values = kinds.values() if isinstance(kinds, dict) else [kinds]
    if not hasattr(type(module).forward, "__wrapped__"):
        return False
    return any(isinstance(kind, str) and _is_dynamic(kind) for kind in values)


def _swapped(module: nn.Module) -> list[tuple[str, str]]:
    """The buffers that such a module swaps, each with the name of the original."""
    kinds: Any = getattr(module, "rope_type", None)
    if not isinstance(kinds, dict):
        return [("inv_freq", "original_inv_freq")]
    return [(f"{t}_inv_freq", f"{t}_original_inv_freq") for t, kind in kinds.items() if _is_dynamic(kind)]


def swapped_buffers(module: nn.Module) -> frozenset[str]:
    """Names of the module's own buffers that its forward swaps as the length asks, which no graph reads."""
    if not varying_rope(module) or "forward" in module.__dict__:
        return frozenset()
    return frozenset(name for name, _ in _swapped(module))


def _undecorated(function: Callable[..., Any]) -> Callable[..., Any]:
    """The forward beneath `dynamic_rope_update`, which may lie under other decorators (`torch.no_grad`)."""
    while "dynamic_rope_update" not in getattr(function, "__qualname__", "") and not _is_update(function):
        inner = getattr(function, "__wrapped__", None)
        if inner is None:
            return function
        function = inner
    inner_forward: Callable[..., Any] = getattr(function, "__wrapped__", function)
    return inner_forward


def _is_update(function: Callable[..., Any]) -> bool:
    """`functools.wraps` hides the decorator's name; its code object keeps it."""
    code = getattr(function, "__code__", None)
    return code is not None and "modeling_rope_utils" in code.co_filename


def _frequencies(module: nn.Module, kind: str, layer_type: str | None, position_ids: Tensor, device: Any) -> Tensor:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    prefix = f"{layer_type}_" if layer_type is not None else ""
    config: Any = module.config
    original: Tensor = getattr(module, f"{prefix}original_inv_freq").to(device)
    compute = ROPE_INIT_FUNCTIONS[kind]
    length = torch.max(position_ids) + 1
    if kind == "longrope":
        rope = config.rope_parameters if layer_type is None else config.rope_parameters[layer_type]
        limit = rope["original_max_position_embeddings"]
        extra = {} if layer_type is None else {"layer_type": layer_type}
        long, _ = compute(config, device, seq_len=limit + 1, **extra)
        return torch.where(length > limit, long.to(original.dtype), original)
    extra = {} if layer_type is None else {"layer_type": layer_type}
    scaled, _ = compute(config, device, seq_len=length, **extra)
    limit = getattr(module, f"{prefix}max_seq_len_cached", getattr(module, "max_seq_len_cached", None))
    if not isinstance(limit, int):  # the model has already run past its limit and remembers the length as a tensor
        limit = getattr(module, "original_max_seq_len", config.max_position_embeddings)
    limit = min(limit, getattr(module, "original_max_seq_len", limit))
    return torch.where(length > limit, scaled.to(original.dtype), original)


def _branch_free(module: nn.Module) -> Callable[..., Any]:
    inner = _undecorated(type(module).forward)

    @torch.no_grad()
    def forward(x: Tensor, position_ids: Tensor, layer_type: str | None = None) -> Any:
        kinds: Any = module.rope_type
        kind = kinds if layer_type is None else kinds[layer_type]
        extra = {} if layer_type is None else {"layer_type": layer_type}
        if not _is_dynamic(kind):
            return inner(module, x, position_ids, **extra)
        name = "inv_freq" if layer_type is None else f"{layer_type}_inv_freq"
        # an instance attribute is found before nn.Module looks into its buffers
        module.__dict__[name] = _frequencies(module, kind, layer_type, position_ids, x.device)
        try:
            return inner(module, x, position_ids, **extra)
        finally:
            del module.__dict__[name]

    return forward


@contextmanager
def branch_free_rope(model: nn.Module) -> Iterator[None]:
    """While active, the model's length-dependent rotary modules run without branches; exactly undone afterwards."""
    changed = [m for m in model.modules() if varying_rope(m) and "forward" not in m.__dict__]
    shared: list[tuple[nn.Module, str, Tensor]] = []
    try:
        for module in changed:
            for name, original in _swapped(module):
                held = module._buffers.get(name)
                tied = getattr(module, original, None) is held
                if isinstance(held, Tensor) and tied:  # a graph would call both by one name
                    shared.append((module, name, held))
                    module._buffers[name] = held.clone()
            module.__dict__["forward"] = _branch_free(module)
        yield
    finally:
        for module in changed:
            module.__dict__.pop("forward", None)
        for module, name, held in shared:
            module._buffers[name] = held
