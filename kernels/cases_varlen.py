"""Cases of attention over packed sequences: the same work as a batch, which is a peer; another is a document mask."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from . import cases_attention
from .case import Arguments, Case, Part, randn
from .varlen_attention import varlen_attention

_SIZES: Final = (
    # sequences, length of each, q heads, kv heads, head dim
    (32, 512, 32, 8, 128),
    (8, 2048, 32, 8, 128),
    (32, 512, 12, 12, 64),
)


def varlen_attentions(dtype: torch.dtype) -> Iterator[Case]:
    """16k tokens in all, causal: sequences of one length, so that a batch is the same."""
    for size in _SIZES:
        sequences, length, heads, kv_heads, width = size
        name = f"causal, {sequences} sequences of {length}, {heads}/{kv_heads} heads of {width}"
        peers = {name: functools.partial(peer, size) for name, peer in _PEERS.items()}
        arguments, parts = functools.partial(_arguments, size, dtype), functools.partial(_parts, size)
        yield Case(varlen_attention, name, dtype, arguments, peers, parts)


def _arguments(size: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Arguments:
    sequences, length, heads, kv_heads, width = size
    ends = torch.arange(sequences + 1, dtype=torch.int32, device=device) * length
    return {
        "q": randn(dtype, device, sequences * length, heads, width),
        "k": randn(dtype, device, sequences * length, kv_heads, width),
        "v": randn(dtype, device, sequences * length, kv_heads, width),
        "cu_seqlens_q": ends,
        "cu_seqlens_k": ends,
        "max_q": length,
        "max_k": length,
        "scale": width**-0.5,
        "right": 0,
    }


def _parts(size: tuple[int, ...], arguments: Arguments) -> list[Part]:
    """The first and the last sequence."""
    sequences, length = size[:2]
    parts: list[Part] = []
    for first in (0, (sequences - 1) * length):
        rows = slice(first, first + length)
        one = {name: arguments[name][rows] for name in ("q", "k", "v")}
        one |= {name: arguments[name][:2] for name in ("cu_seqlens_q", "cu_seqlens_k")}
        parts.append(({**arguments, **one}, functools.partial(_rows, rows)))
    return parts


def _rows(rows: slice, out: Tensor) -> Tensor:
    return out[rows]


def _batch(size: tuple[int, ...], arguments: Arguments) -> Callable[[], Tensor]:
    sequences, length = size[:2]
    q, k, v = (arguments[n].view(sequences, length, *arguments[n].shape[1:]).transpose(1, 2) for n in "qkv")

    def call() -> Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION if q.is_cuda else SDPBackend.MATH):
            y = scaled_dot_product_attention(q, k, v, is_causal=True, scale=arguments["scale"], enable_gqa=True)
        return y.transpose(1, 2).flatten(0, 1).contiguous()

    return call


@functools.lru_cache(maxsize=1)
def _flex_of(length: int, tokens: int, device: torch.device) -> tuple[Any, Any]:
    from torch.nn.attention.flex_attention import create_block_mask

    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (j <= i) & (i // length == j // length)

    return cases_attention.compiled_flex(), create_block_mask(visible, None, None, tokens, tokens, device=device)


def _flex(size: tuple[int, ...], arguments: Arguments) -> Callable[[], Tensor]:
    q, k, v = (arguments[n].transpose(0, 1).unsqueeze(0) for n in "qkv")
    run, mask = _flex_of(size[1], size[0] * size[1], q.device)

    def call() -> Tensor:
        y: Tensor = run(q, k, v, block_mask=mask, scale=arguments["scale"], enable_gqa=True)
        return y[0].transpose(0, 1).contiguous()

    return call


_PEERS: Final = {"SDPA cuDNN of a batch": _batch, "FlexAttention": _flex}
