"""Cases of attention on pages: decode steps of sequences of one length, whose keys lie in no order."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Final

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from .case import Arguments, Case, Part, randn
from .paged_attention import paged_attention

PAGE: Final = 16
_SIZES: Final = (
    # sequences, queries of each, keys of each, q heads, kv heads, head dim
    (1, 1, 160, 32, 8, 128),
    (8, 1, 160, 32, 8, 128),
    (64, 1, 160, 32, 8, 128),
    (1, 1, 1024, 32, 8, 128),
    (1, 1, 8192, 32, 8, 128),
    (8, 1, 8192, 32, 8, 128),
    (32, 1, 2048, 32, 8, 128),
    (64, 1, 512, 32, 8, 128),
    (64, 1, 4096, 32, 8, 128),
    (32, 1, 1024, 12, 12, 64),
    (8, 512, 2048, 32, 8, 128),
    (1, 2048, 2048, 32, 8, 128),
    (1, 8192, 8192, 32, 8, 128),
)


def paged_attentions(dtype: torch.dtype) -> Iterator[Case]:
    """Decode steps, chunks of prefills, and whole prompts."""
    for size in _SIZES:
        sequences, queries, keys, heads, kv_heads, width = size
        step = "decode" if queries == 1 else "whole prompts" if queries == keys else f"chunks of {queries}"
        name = f"{step}, {sequences} sequences of {keys} in pages of {PAGE}, {heads}/{kv_heads} heads of {width}"
        arguments, parts = functools.partial(_arguments, size, dtype), functools.partial(_parts, size)
        peers = {"SDPA of contiguous keys": functools.partial(_contiguous, size)} if queries == 1 else {}
        peers["SDPA behind a gather of the pages"] = functools.partial(_gathered, size)
        yield Case(paged_attention, name, dtype, arguments, peers, parts)


def _arguments(size: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Arguments:
    sequences, queries, keys, heads, kv_heads, width = size
    most = keys // PAGE
    table = torch.randperm(sequences * most, device=device).view(sequences, most)
    position = torch.arange(keys - queries, keys, device=device)
    slots = table[:, position // PAGE] * PAGE + position % PAGE
    return {
        "q": randn(dtype, device, sequences * queries, heads, width),
        "k": randn(dtype, device, sequences * queries, kv_heads, width),
        "v": randn(dtype, device, sequences * queries, kv_heads, width),
        "k_pages": randn(dtype, device, sequences * most, PAGE, kv_heads, width),
        "v_pages": randn(dtype, device, sequences * most, PAGE, kv_heads, width),
        "slots": slots.flatten(),
        "cu_seqlens_q": torch.arange(sequences + 1, dtype=torch.int32, device=device) * queries,
        "lengths": torch.full((sequences,), keys, dtype=torch.int32, device=device),
        "block_table": table.int(),
        "max_q": queries,
        "scale": width**-0.5,
        "fresh": queries == keys,
    }


def _parts(size: tuple[int, ...], arguments: Arguments) -> list[Part]:
    """The first and the last sequence, each with its own pages only."""
    sequences, queries, keys = size[:3]
    own = torch.arange(keys // PAGE, device=arguments["q"].device)
    parts: list[Part] = []
    for s in (0, sequences - 1):
        rows = slice(s * queries, (s + 1) * queries)
        one = {name: arguments[name][rows] for name in ("q", "k", "v")}
        one |= {name: arguments[name][arguments["block_table"][s].long()] for name in ("k_pages", "v_pages")}
        one |= {"slots": torch.arange(keys - queries, keys, device=own.device), "block_table": own.int()[None]}
        one |= {"cu_seqlens_q": arguments["cu_seqlens_q"][:2], "lengths": arguments["lengths"][:1]}
        parts.append(({**arguments, **one}, functools.partial(_rows, rows)))
    return parts


def _rows(rows: slice, out: Tensor) -> Tensor:
    return out[rows]


def _queries(size: tuple[int, ...], arguments: Arguments) -> Tensor:
    """`[S, H, Q, D]`."""
    q: Tensor = arguments["q"]
    return q.view(size[0], size[1], *q.shape[1:]).transpose(1, 2)


def _in_order(size: tuple[int, ...], arguments: Arguments, name: str) -> Tensor:
    """The keys or values of every sequence, the new ones included: `[S, Hkv, K, D]`, a view of a gathered copy."""
    rows: Tensor = arguments[f"{name}_pages"][arguments["block_table"].long()].flatten(1, 2)
    rows[:, -size[1] :] = arguments[name].view(size[0], size[1], *rows.shape[2:])
    return rows.transpose(1, 2)


def _contiguous(size: tuple[int, ...], arguments: Arguments) -> Callable[[], Tensor]:
    q = _queries(size, arguments)
    k, v = (_in_order(size, arguments, name).contiguous() for name in "kv")
    return lambda: _sdpa(size, arguments, q, k, v)


def _gathered(size: tuple[int, ...], arguments: Arguments) -> Callable[[], Tensor]:
    q = _queries(size, arguments)
    return lambda: _sdpa(size, arguments, q, *(_in_order(size, arguments, name) for name in "kv"))


def _sdpa(size: tuple[int, ...], arguments: Arguments, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = None
    if size[1] > 1:
        key = torch.arange(size[2], device=q.device)
        mask = key <= key[-size[1] :, None]
    y = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=arguments["scale"], enable_gqa=True)
    return y.transpose(1, 2).flatten(0, 1).contiguous()
