"""Attention on keys and values that lie in pages, the newest of them written on the way."""

from __future__ import annotations

import torch
from torch import Tensor

from .attention import attention, visible_pairs
from .cost import Cost, nbytes, size, sizes
from .op import define

PAGE_DTYPES = (torch.float8_e4m3fn, torch.int8)
"""Dtypes of pages that hold numbers divided by a scale, one for each token and head."""


def _cost(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    slots: Tensor,
    cu_seqlens_q: Tensor,
    lengths: Tensor,
    block_table: Tensor,
    max_q: int,
    sinks: Tensor | None = None,
    slopes: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    scale: float = 1.0,
    left: int = -1,
    softcap: float = 0.0,
    fresh: bool = False,
    relative: Tensor | None = None,
) -> Cost:
    """As if every sequence filled its row of the table: an upper bound, the lengths are not known."""
    tokens, heads, width = sizes(q)
    value_width = sizes(v)[-1]
    sequences, blocks = sizes(block_table)
    page, kv_heads = sizes(k_pages)[1:3]
    keys = blocks * page
    seen = keys if left < 0 else min(keys, left + size(max_q)) if keys.is_number else keys
    row = width * k_pages.element_size() + value_width * v_pages.element_size()
    row += sum(t.element_size() for t in (k_scale, v_scale) if t is not None)
    pairs = heads * sequences * visible_pairs(size(max_q), keys, left, 0)
    moved = sequences * seen * kv_heads * row + tokens * kv_heads * row  # read; written
    moved += nbytes(q, k, v, slots, cu_seqlens_q, lengths, block_table, sinks, slopes, relative)
    moved += tokens * heads * value_width * v.element_size()
    return Cost(pairs * (2 * width + 2 * value_width + 5), moved)


def _fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    slots: Tensor,
    cu_seqlens_q: Tensor,
    lengths: Tensor,
    block_table: Tensor,
    max_q: int,
    sinks: Tensor | None = None,
    slopes: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    scale: float = 1.0,
    left: int = -1,
    softcap: float = 0.0,
    fresh: bool = False,
    relative: Tensor | None = None,
) -> Tensor:
    return v.new_empty(q.shape[0], q.shape[1], v.shape[-1])


def write_rows(x: Tensor, pages: Tensor, slots: Tensor, scales: Tensor | None) -> None:
    """Write x `[T, Hkv, D]` into pages `[P, page, Hkv, D]` at `slots`; rows of a negative slot are left out.

    With scales `[P, page, Hkv]` each head of a row is divided by its largest magnitude over the largest number that
    the pages hold, which is written to `scales`.
    """
    rows = slots >= 0
    x, slots = x[rows], slots[rows]
    at = (slots // pages.shape[1], slots % pages.shape[1])
    if scales is None:
        pages[at] = x.to(pages.dtype)
        return
    largest = 127.0 if pages.dtype == torch.int8 else torch.finfo(pages.dtype).max
    divisor = x.float().abs().amax(dim=-1)  # [T, Hkv]
    divisor = divisor / torch.full_like(divisor, largest)  # by a number, CUDA would multiply with its inverse
    scales[at] = divisor
    y = x.float() / torch.where(divisor == 0, 1.0, divisor).unsqueeze(-1)
    if pages.dtype == torch.int8:
        y = y.round().clamp(-largest, largest)
    pages[at] = y.to(pages.dtype)


def read_rows(
    pages: Tensor, table: Tensor, first: int, length: int, scales: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Keys `first` to `length` of one sequence, `[length - first, Hkv, D]`, from pages that `table [most]` lists."""
    page = pages.shape[1]
    numbers = table[first // page : -(-length // page)].long()
    own = slice(first % page, first % page + length - first)
    rows = pages[numbers].flatten(0, 1)[own]
    if scales is None:
        return rows.to(dtype)
    compute = torch.promote_types(dtype, torch.float32)
    return (rows.to(compute) * scales[numbers].flatten(0, 1)[own].unsqueeze(-1)).to(dtype)


@define(cost=_cost, fake=_fake, mutates=("k_pages", "v_pages", "k_scale", "v_scale"))
def paged_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    slots: Tensor,
    cu_seqlens_q: Tensor,
    lengths: Tensor,
    block_table: Tensor,
    max_q: int,
    sinks: Tensor | None = None,
    slopes: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    scale: float = 1.0,
    left: int = -1,
    softcap: float = 0.0,
    fresh: bool = False,
    relative: Tensor | None = None,
) -> Tensor:
    """Writes k and v into pages, then attends: `[T, H, Dv]` contiguous in v's dtype.

    k `[T, Hkv, D]` and v `[T, Hkv, Dv]` go to pages `[P, page, Hkv, D]` and `[P, page, Hkv, Dv]` at slots (int64
    `[T]`, page number * page + offset; negative: not written). Then sequence s attends:

    * its queries are rows cu_seqlens_q[s] to cu_seqlens_q[s + 1] of q `[T, H, D]` (int32 `[S + 1]`, starting at 0); the
      last of them stands at position lengths[s] - 1 (int32 `[S]`: keys, those just written included);
    * key j lies in page block_table[s, j // page] (int32 `[S, most]`) at j % page, and is visible to the query at
      position p where p - left <= j <= p (`left` -1: where j <= p). Entries of pages that no query sees are not read.

    lengths[s] = 0 is a sequence that is not there: its rows are zeros, as are rows of q behind the last sequence.
    max_q: no sequence has more queries. sinks and softcap as in `attention`; slopes `[H]` (ALiBi): slope * j is added
    to the scores of key j; relative `[H, W]`: relative[h, min(p - j, W - 1)] is added to those of the query at p. Pages
    of int8 or float8_e4m3fn have k_scale and v_scale, float32 `[P, page, Hkv]`, which are written with the rows (see
    `write_rows`); read rows are rounded to the dtype of q and v.

    fresh: the caller knows that every sequence begins in this call (lengths[s] are its queries), so that k and v hold
    all its keys; it changes how the result is found, not which.
    """
    write_rows(k, k_pages, slots, k_scale)
    write_rows(v, v_pages, slots, v_scale)
    out = v.new_zeros(q.shape[0], q.shape[1], v.shape[-1])
    ends, keys = cu_seqlens_q.tolist(), lengths.tolist()
    for s, length in enumerate(keys):
        rows = slice(ends[s], ends[s + 1])
        queries = ends[s + 1] - ends[s]
        if length == 0 or queries == 0:
            continue
        first = 0 if left < 0 else max(0, length - queries - left)
        k_of = read_rows(k_pages, block_table[s], first, length, k_scale, q.dtype)
        v_of = read_rows(v_pages, block_table[s], first, length, v_scale, v.dtype)
        bias = None
        if slopes is not None:
            bias = slopes[:, None, None] * torch.arange(first, length, device=q.device)  # [H, 1, K]
        if relative is not None:
            places = torch.arange(first, length, device=q.device)
            apart = (places[-queries:, None] - places).clamp(0, relative.shape[1] - 1)
            bias = relative[:, apart] if bias is None else bias + relative[:, apart]  # [H, Q, K]
        heads_first = (t.transpose(0, 1).unsqueeze(0) for t in (q[rows], k_of, v_of))
        named = {"sinks": sinks, "scale": scale, "left": left, "right": 0, "softcap": softcap}
        out[rows] = attention.reference(*heads_first, bias=bias, **named)[0]
    return out
