"""Attention over sequences of different lengths that lie one behind the other, keys contiguous or in pages."""

from __future__ import annotations

from torch import Tensor

from .attention import attention, visible_pairs
from .cost import Cost, nbytes, size, sizes
from .op import define


def _varlen_cost(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_q: int,
    max_k: int,
    block_table: Tensor | None = None,
    sinks: Tensor | None = None,
    scale: float = 1.0,
    left: int = -1,
    right: int = -1,
    softcap: float = 0.0,
) -> Cost:
    """As if every sequence were as long as the longest: an upper bound, the lengths are not known."""
    _, heads, width = sizes(q)
    value_width = sizes(v)[-1]
    sequences = size(cu_seqlens_q.shape[0]) - 1
    pairs = sequences * heads * visible_pairs(size(max_q), size(max_k), left, right)
    out = size(q.shape[0]) * heads * value_width * v.element_size()
    moved = nbytes(q, k, v, cu_seqlens_q, cu_seqlens_k, block_table, sinks) + out
    return Cost(pairs * (2 * width + 2 * value_width + 5), moved)


def _fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_q: int,
    max_k: int,
    block_table: Tensor | None = None,
    sinks: Tensor | None = None,
    scale: float = 1.0,
    left: int = -1,
    right: int = -1,
    softcap: float = 0.0,
) -> Tensor:
    return v.new_empty(q.shape[0], q.shape[1], v.shape[-1])


def _rows(pages: Tensor, table: Tensor, length: int) -> Tensor:
    """The first `length` keys of one sequence: `[length, Hkv, D]` from pages `[P, page, Hkv, D]`."""
    return pages[table.long()].flatten(0, 1)[:length]


@define(cost=_varlen_cost, fake=_fake)
def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_q: int,
    max_k: int,
    block_table: Tensor | None = None,
    sinks: Tensor | None = None,
    scale: float = 1.0,
    left: int = -1,
    right: int = -1,
    softcap: float = 0.0,
) -> Tensor:
    """`attention` of each sequence for itself, returned as `[T, H, Dv]` contiguous in v's dtype.

    q `[T, H, D]`: the queries of sequence s are rows cu_seqlens_q[s] to cu_seqlens_q[s + 1]; `cu_seqlens_*` are int32
    `[S + 1]`, starting at 0. k `[Tk, Hkv, D]` and v `[Tk, Hkv, Dv]` are divided by cu_seqlens_k alike.

    With a block table (int32 `[S, most]`), k and v are pages `[P, page, Hkv, D]`: key j of sequence s lies in page
    block_table[s, j // page] at j % page, and cu_seqlens_k gives only the lengths, by differences.

    max_q and max_k: at least as long as the longest sequence. The rest is as in `attention`, whose alignment (the last
    query on the last key) holds in each sequence. Rows of q behind the last sequence give zeros. Nothing in one
    sequence, not even a NaN, reaches the result of another.
    """
    out = v.new_zeros(q.shape[0], q.shape[1], v.shape[-1])
    queries, keys = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for s in range(len(queries) - 1):
        length = keys[s + 1] - keys[s]
        if block_table is None:
            k_of, v_of = (t[keys[s] : keys[s + 1]] for t in (k, v))
        else:
            k_of, v_of = (_rows(t, block_table[s], length) for t in (k, v))
        heads_first = (t.transpose(0, 1).unsqueeze(0) for t in (q[queries[s] : queries[s + 1]], k_of, v_of))
        y = attention.reference(*heads_first, sinks=sinks, scale=scale, left=left, right=right, softcap=softcap)
        out[queries[s] : queries[s + 1]] = y[0]
    return out
