# mypy: disallow-untyped-defs=False
"""Which rows each expert gets, found on the device: a stable counting sort, and tiles of at most so many rows.

Nothing of it is read by the host, so the launches do not depend on where the router sends a token, and can be captured
in a CUDA graph: there is room for as many tiles as there can be at most, and those that are not needed say so.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor, int32

from .launch import empty, launch
from .overlap import overlaps, start_dependent

BLOCK = 256
"""Pairs (token, slot) of one program of the sort, at most."""

PROGRAMS = 64
"""So many programs of the sort before they get more pairs: each reads the counts of all others."""


@triton.jit
def _load_experts(index_ptr, at, P, E, stride_t, stride_k, TOP: tl.constexpr):
    """The experts of pairs (token, slot), E for what is none."""
    e = tl.load(index_ptr + (at // TOP).to(tl.int64) * stride_t + (at % TOP) * stride_k, mask=at < P, other=-1)
    return tl.where((e >= 0) & (e < E), e, E).to(tl.int32)


@triton.jit(do_not_specialize=["P"])
def _count_kernel(
    index_ptr,
    counts_ptr,
    P,
    E,
    stride_t,
    stride_k,
    TOP: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """How often each expert occurs in each block of pairs."""
    start_dependent(PDL)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    e = _load_experts(index_ptr, at, P, E, stride_t, stride_k, TOP)
    counts = counts_ptr + tl.program_id(0) * EXPERTS + tl.arange(0, EXPERTS)
    tl.store(counts, tl.histogram(e, EXPERTS, mask=e < E))


@triton.jit(do_not_specialize=["P", "BLOCKS"])
def _route_kernel(
    index_ptr,
    counts_ptr,
    order_ptr,
    places_ptr,
    tiles_ptr,
    ends_ptr,
    used_ptr,
    P,  # pairs: tokens x slots
    E,
    BLOCKS,
    MAX_TILES,
    stride_t,
    stride_k,
    TOP: tl.constexpr,
    EXPERTS: tl.constexpr,  # power of two, E at least
    BLOCK_T: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
    TILES: tl.constexpr,
    PDL: tl.constexpr,
):
    start_dependent(PDL)
    pid = tl.program_id(0)
    row = pid * BLOCK + tl.arange(0, BLOCK)
    mine = _load_experts(index_ptr, row, P, E, stride_t, stride_k, TOP)
    # how often each expert occurs, in all and before this block
    if BLOCKS == 1:
        total = tl.histogram(mine, EXPERTS, mask=(mine < E) & (pid == 0))
        if pid > 0:  # a program for tiles only
            first_row = _load_experts(index_ptr, tl.arange(0, BLOCK), P, E, stride_t, stride_k, TOP)
            total = tl.histogram(first_row, EXPERTS, mask=first_row < E)
        before = tl.zeros((EXPERTS,), dtype=tl.int32)
    else:
        total = tl.zeros((EXPERTS,), dtype=tl.int32)
        before = tl.zeros((EXPERTS,), dtype=tl.int32)
        for start in range(0, BLOCKS, 32):
            block = start + tl.arange(0, 32)
            counts_ptrs = counts_ptr + block[:, None] * EXPERTS + tl.arange(0, EXPERTS)[None, :]
            counts = tl.load(counts_ptrs, mask=(block < BLOCKS)[:, None], other=0)
            total += tl.sum(counts, axis=0)
            before += tl.sum(tl.where((block < pid)[:, None], counts, 0), axis=0)
    experts = tl.arange(0, EXPERTS)
    end = tl.cumsum(total, 0)
    first = end - total
    # the place of each pair of this block
    rank = tl.zeros((BLOCK,), dtype=tl.int32)
    for step in tl.static_range(0, BLOCK, STEP):
        other_row = pid * BLOCK + step + tl.arange(0, STEP)
        other = _load_experts(index_ptr, other_row, P, E, stride_t, stride_k, TOP)
        same = (other[None, :] == mine[:, None]) & (other_row[None, :] < row[:, None])
        rank += tl.sum(same.to(tl.int32), axis=1)
    place = tl.gather(first + before, tl.minimum(mine, EXPERTS - 1), 0) + rank
    tl.store(order_ptr + place, row, mask=(row < P) & (mine < E))
    tl.store(places_ptr + row, tl.where(mine < E, place, -1), mask=row < P)
    if pid == 0:
        tl.store(ends_ptr + experts, end, mask=experts < E)
    # the tiles: expert, first row, rows; no rows where there is no tile
    if pid * TILES < MAX_TILES:
        count = (total + BLOCK_T - 1) // BLOCK_T
        if pid == 0:
            tl.store(used_ptr, tl.sum(count))
        last_tile = tl.cumsum(count, 0)
        tile = pid * TILES + tl.arange(0, TILES)
        e = tl.sum((last_tile[None, :] <= tile[:, None]).to(tl.int32), axis=1)
        here = tl.minimum(e, EXPERTS - 1)
        row_first = tl.gather(first, here, 0) + (tile - tl.gather(last_tile - count, here, 0)) * BLOCK_T
        rows = tl.where(e < E, tl.minimum(tl.gather(end, here, 0) - row_first, BLOCK_T), 0)
        inside = tile < MAX_TILES
        tl.store(tiles_ptr + 3 * tile, e, mask=inside)
        tl.store(tiles_ptr + 3 * tile + 1, row_first, mask=inside)
        tl.store(tiles_ptr + 3 * tile + 2, rows, mask=inside)


def max_tiles(pairs: int, experts: int, block_t: int) -> int:
    """As many tiles of `block_t` rows as any routing of that many pairs can need."""
    return min(pairs, pairs // block_t + experts)


class Routes(NamedTuple):
    """Pairs (token x slots + slot) by expert; all int32.

    * order `[pairs]`: the pairs, stable. Those that have no expert are left out, the end is then not written.
    * places `[pairs]`: where a pair is in the order, -1 for one that has no expert.
    * tiles `[max_tiles, 3]`: expert, first row in the order, rows.
    * ends `[experts]`: where the rows of each expert end.
    * used `[1]`: how many tiles have rows. They come first.
    """

    order: Tensor
    places: Tensor
    tiles: Tensor
    ends: Tensor
    used: Tensor


def route(index: Tensor, experts: int, block_t: int) -> Routes:
    """The routes of `index [tokens, slots]`, in tiles of `block_t` rows."""
    tokens, top = index.shape
    pairs = tokens * top
    many = max_tiles(pairs, experts, block_t)
    order = empty((pairs,), int32, index.device)
    places = empty((pairs,), int32, index.device)
    tiles = empty((many, 3), int32, index.device)
    ends = empty((experts,), int32, index.device)
    used = empty((1,), int32, index.device)
    width = max(16, triton.next_power_of_2(experts))
    block = min(BLOCK, max(64, triton.next_power_of_2(triton.cdiv(pairs, PROGRAMS))))
    block = min(block, max(16, triton.next_power_of_2(pairs)))
    blocks = triton.cdiv(pairs, block)
    counts = order
    if blocks > 1:
        counts = empty((blocks, width), int32, index.device)
        launch(
            _count_kernel,
            (blocks,),
            index,
            counts,
            pairs,
            experts,
            index.stride(0),
            index.stride(1),
            TOP=top,
            EXPERTS=width,
            BLOCK=block,
            **overlaps(index),
            num_warps=4,
        )
    tiles_a_program = max(16, min(64, 4096 // width))
    launch(
        _route_kernel,
        (max(blocks, triton.cdiv(many, tiles_a_program)),),
        index,
        counts,
        order,
        places,
        tiles,
        ends,
        used,
        pairs,
        experts,
        blocks,
        many,
        index.stride(0),
        index.stride(1),
        TOP=top,
        EXPERTS=width,
        BLOCK_T=block_t,
        BLOCK=block,
        STEP=min(64, block),
        TILES=tiles_a_program,
        **overlaps(index),
        num_warps=8 if block > 64 else 4,
    )
    return Routes(order, places, tiles, ends, used)
