# mypy: disallow-untyped-defs=False
"""Which rows each expert gets, found on the device: a stable counting sort, and tiles of at most so many rows.

Nothing of it is read by the host, so the launches do not depend on where the router sends a token, and can be captured
in a CUDA graph: there is room for as many tiles as there can be at most, and those that are not needed say so.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor, int32

from .launch import empty, launch
from .skinny_triton import overlaps, start_dependent

CHUNK = 1024
BLOCK = 256


@triton.jit
def _load_experts(index_ptr, at, P, E, stride_t, stride_k, TOP: tl.constexpr):
    """The experts of pairs (token, slot), E for what is none."""
    e = tl.load(index_ptr + (at // TOP).to(tl.int64) * stride_t + (at % TOP) * stride_k, mask=at < P, other=-1)
    return tl.where((e >= 0) & (e < E), e, E).to(tl.int32)


@triton.jit(do_not_specialize=["P"])
def _route_kernel(
    index_ptr,
    order_ptr,
    tiles_ptr,
    P,  # pairs: tokens x slots
    E,
    MAX_TILES,
    stride_t,
    stride_k,
    TOP: tl.constexpr,
    EXPERTS: tl.constexpr,  # power of two, E at least
    BLOCK_T: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    TILES: tl.constexpr,
    PDL: tl.constexpr,
):
    start_dependent(PDL)
    block_start = tl.program_id(0) * BLOCK
    # how often each expert occurs, in all and before this block
    total = tl.zeros((EXPERTS,), dtype=tl.int32)
    before = tl.zeros((EXPERTS,), dtype=tl.int32)
    for start in range(0, P, CHUNK):
        at = start + tl.arange(0, CHUNK)
        e = _load_experts(index_ptr, at, P, E, stride_t, stride_k, TOP)
        total += tl.histogram(e, EXPERTS, mask=e < E)
        if start < block_start:
            before += tl.histogram(e, EXPERTS, mask=(e < E) & (at < block_start))
    experts = tl.arange(0, EXPERTS)
    first = tl.cumsum(total, 0) - total
    base = first + before
    # the place of each pair of this block
    row = block_start + tl.arange(0, BLOCK)
    mine = _load_experts(index_ptr, row, P, E, stride_t, stride_k, TOP)
    rank = tl.zeros((BLOCK,), dtype=tl.int32)
    STEP: tl.constexpr = 64
    for step in tl.static_range(0, BLOCK, STEP):
        other_row = block_start + step + tl.arange(0, STEP)
        other = _load_experts(index_ptr, other_row, P, E, stride_t, stride_k, TOP)
        same = (other[None, :] == mine[:, None]) & (other_row[None, :] < row[:, None])
        rank += tl.sum(same.to(tl.int32), axis=1)
    place = tl.gather(base, tl.minimum(mine, EXPERTS - 1), 0) + rank
    tl.store(order_ptr + place, row, mask=(row < P) & (mine < E))
    # the tiles: expert, first row, rows; no rows where there is no tile
    if block_start == 0:
        count = (total + BLOCK_T - 1) // BLOCK_T
        last_tile = tl.cumsum(count, 0)
        for tile_start in range(0, MAX_TILES, TILES):
            tile = tile_start + tl.arange(0, TILES)
            e = tl.sum((last_tile[None, :] <= tile[:, None]).to(tl.int32), axis=1)
            is_e = experts[None, :] == e[:, None]
            nth = tile - tl.sum(tl.where(is_e, (last_tile - count)[None, :], 0), axis=1)
            row_first = tl.sum(tl.where(is_e, first[None, :], 0), axis=1) + nth * BLOCK_T
            row_last = tl.sum(tl.where(is_e, (first + total)[None, :], 0), axis=1)
            rows = tl.where(e < E, tl.minimum(row_last - row_first, BLOCK_T), 0)
            inside = tile < MAX_TILES
            tl.store(tiles_ptr + 3 * tile, e, mask=inside)
            tl.store(tiles_ptr + 3 * tile + 1, row_first, mask=inside)
            tl.store(tiles_ptr + 3 * tile + 2, rows, mask=inside)


def max_tiles(pairs: int, experts: int, block_t: int) -> int:
    """As many tiles of `block_t` rows as any routing of that many pairs can need."""
    return min(pairs, pairs // block_t + experts)


def route(index: Tensor, experts: int, block_t: int) -> tuple[Tensor, Tensor]:
    """Pairs (token x slots + slot) by expert, stable, `[pairs]`, and the tiles `[max_tiles, 3]`; both int32.

    A tile is (expert, first row in the order, rows). Pairs that have no expert are left out, the end of the order is
    then not written.
    """
    tokens, top = index.shape
    pairs = tokens * top
    many = max_tiles(pairs, experts, block_t)
    order = empty((pairs,), int32, index.device)
    tiles = empty((many, 3), int32, index.device)
    width = max(16, triton.next_power_of_2(experts))
    launch(
        _route_kernel,
        (triton.cdiv(pairs, BLOCK),),
        index,
        order,
        tiles,
        pairs,
        experts,
        many,
        index.stride(0),
        index.stride(1),
        TOP=top,
        EXPERTS=width,
        BLOCK_T=block_t,
        BLOCK=BLOCK,
        CHUNK=CHUNK,
        TILES=max(1, min(64, 8192 // width)),
        **overlaps(index),
        num_warps=8,
    )
    return order, tiles
