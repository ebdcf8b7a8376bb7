"""How much memory the KV cache gets, and how many pages of each group that is."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch

from ...compiler.program import LayerSpec
from ...kernels.paged_attention import PAGE_DTYPES
from ..errors import InputError, OptionError

BLOCK_SIZES: Final = (16, 32, 64)
FRACTION: Final = 0.5
"""Of the free device memory, where nothing else is said: the other half stays the program's around us."""
RESERVE: Final = 1 << 30
"""Of the device memory that is free, what graphs need, and the activations of a prefill step of 8192 tokens."""
CPU_BYTES: Final = 512 << 20
LONGEST: Final = 131072
"""Tokens of a sequence where neither model nor user bounds them."""


@dataclass(frozen=True)
class Limits:
    """What decoding may take.

    With `max_seq_len` given, the KV cache holds `max_batch_size` sequences of that length. Otherwise it takes
    `memory_fraction` of the memory that is free when decoding first begins (half of it by default; 512 MiB on the CPU),
    but never more than `max_batch_size` sequences of the model's own length need. It is allocated once. More sequences
    than fit wait for their turn.

    Raises:
        OptionError: a value that cannot be.
    """

    max_batch_size: int = 64
    """Sequences that are decoded at once."""
    max_seq_len: int | None = None
    """Tokens of the longest sequence, prompt and output."""
    memory_fraction: float | None = None
    """Of the free memory."""
    block_size: int = 16
    """Tokens of a page."""
    token_budget: int | None = None
    """Tokens of one prefill step: longer prompts are cut, so that others are decoded meanwhile. By default 8192, or
    2048 where layers have a window: they keep a step's tokens beside those that the window shows."""
    kv_dtype: torch.dtype | None = None
    """float8_e4m3fn or int8: keys and values in half the memory of bf16, for some loss; by default the model's."""
    prefix_sharing: bool = True
    """Whether pages of equal beginnings are shared, also between calls."""
    warm_up_seconds: int = 30
    """How long kernels for prompts of all lengths may be compiled, on a GPU: those of the first prompt before it is
    computed, others while it is, and so for the first batch of several. What is not begun by then, or with 0, is
    compiled when a prompt needs it. Triton keeps them on disk."""

    def __post_init__(self) -> None:
        leasts = (("max_batch_size", 1), ("token_budget", 1), ("max_seq_len", 2), ("warm_up_seconds", 0))
        for name, least in leasts:
            value = getattr(self, name)
            if value is None and name in ("token_budget", "max_seq_len"):
                continue
            if not isinstance(value, int) or isinstance(value, bool):
                raise OptionError(f"{name}={value!r}: expected a whole number")
            if value < least:
                raise OptionError(f"{name}={value}: at least {least} is needed")
        share = self.memory_fraction
        if share is not None and not (isinstance(share, int | float) and 0 < share <= 1):
            raise OptionError(f"memory_fraction={share!r}: expected a number above 0, up to 1")
        if not isinstance(self.prefix_sharing, bool):
            raise OptionError(f"prefix_sharing={self.prefix_sharing!r}: expected True or False")
        if self.kv_dtype is not None and self.kv_dtype not in PAGE_DTYPES:
            raise OptionError(f"kv_dtype={self.kv_dtype}: expected one of {', '.join(map(str, PAGE_DTYPES))}")
        if self.block_size not in BLOCK_SIZES:
            raise OptionError(f"block_size={self.block_size}: expected one of {', '.join(map(str, BLOCK_SIZES))}")

    def budget(self, windows: Sequence[int]) -> int:
        """Tokens of a prefill step of a model whose groups have these windows (-1: none)."""
        if self.token_budget is not None:
            return self.token_budget
        return 8192 if all(left < 0 for left in windows) else 2048


def block_bytes(layers: Sequence[LayerSpec], group: int, block_size: int) -> int:
    """Bytes of one page of a group, over all of its layers, scales included."""
    token = 0
    for layer in layers:
        if layer.group == group:
            token += layer.kv_heads * (layer.key_dim + layer.value_dim) * layer.dtype.itemsize
            token += 8 * layer.kv_heads if layer.dtype in PAGE_DTYPES else 0
    return token * block_size


def free_bytes(device: torch.device) -> int:
    """Memory that could be allocated on the device, what PyTorch holds unused included."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def count_blocks(
    layers: Sequence[LayerSpec], windows: Sequence[int], limits: Limits, max_seq_len: int, device: torch.device
) -> list[int]:
    """Pages of each group.

    All groups get pages for the same number of tokens, but one with a window never more than a full batch can hold.

    Raises:
        InputError: there is not enough memory for what was asked, or for a single page.
    """
    size = limits.block_size
    bytes_of = [block_bytes(layers, group, size) for group in range(len(windows))]
    whole = -(-max_seq_len // size)
    most = []
    for left in windows:
        seen = whole if left < 0 else min(whole, -(-(left + limits.budget(windows)) // size) + 1)
        most.append(limits.max_batch_size * seen)
    free = free_bytes(device)
    wanted = sum(count * b for count, b in zip(most, bytes_of))
    if limits.max_seq_len is not None and limits.memory_fraction is None:
        if wanted > free:
            raise InputError(
                f"a KV cache for max_batch_size={limits.max_batch_size} sequences of max_seq_len={max_seq_len} tokens "
                f"needs {wanted >> 20} MiB; {free >> 20} MiB are free"
            )
        return most
    if limits.memory_fraction is not None:
        budget = int(limits.memory_fraction * max(free - RESERVE * (device.type == "cuda"), 0))
    else:
        budget = int(FRACTION * max(free - RESERVE, 0)) if device.type == "cuda" else min(CPU_BYTES, free // 2)
    if wanted <= budget:
        return most
    low, high = 0, max(most)
    while low < high:
        middle = (low + high + 1) // 2
        fits = sum(min(middle, m) * b for m, b in zip(most, bytes_of)) <= budget
        low, high = (middle, high) if fits else (low, middle - 1)
    if low == 0:
        raise InputError(
            f"{budget >> 10} KiB for the KV cache hold no page of {size} tokens, which needs {sum(bytes_of) >> 10} KiB"
        )
    return [min(low, m) for m in most]
