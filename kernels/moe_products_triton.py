# mypy: disallow-untyped-defs=False
"""The products of a mixture of experts in Triton, with their epilogues; `moe_triton` launches them.

`up_gemv_kernel` and `down_gemv_kernel` read an expert's weight once for each pair (token, slot) as sums of products.
`grouped_kernel` multiplies tiles of the rows that share an expert in the tensor cores.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .activation_triton import activate
from .overlap import start_dependent


@triton.jit
def _gate(g, u, limit, alpha, up_offset, KIND: tl.constexpr, LIMIT: tl.constexpr, ALPHA: tl.constexpr):
    """As `moe.gate`, of fp32 halves; LIMIT is 0 without, 1 before and 2 after the activation."""
    if LIMIT == 1:
        g = tl.where(g > limit, limit, g)
    g = g / (1.0 + tl.exp(-alpha * g)) if ALPHA else activate(g, KIND)
    if LIMIT == 2:
        g = tl.where(g > limit, limit, g)
    if LIMIT > 0:
        u = tl.where(u > limit, limit, tl.where(u < -limit, -limit, u))
    return g * (u + up_offset)


@triton.jit(do_not_specialize=["T"])
def up_gemv_kernel(
    x_ptr,
    index_ptr,
    w_ptr,
    b_ptr,
    y_ptr,
    T,
    E,
    N,
    K,
    stride_xm,
    stride_it,
    stride_ik,
    stride_we,
    stride_wn,
    stride_wk,
    stride_be,
    stride_bn,
    w_up,  # from a gate's row in the weight to its up's
    b_up,
    limit,
    alpha,
    up_offset,
    TOP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    GATED: tl.constexpr,
    KIND: tl.constexpr,
    LIMIT: tl.constexpr,
    ALPHA: tl.constexpr,
    EVEN_K: tl.constexpr,
    PDL: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    start_dependent(PDL)
    pair = tl.program_id(0)
    e = tl.load(index_ptr + (pair // TOP) * stride_it + (pair % TOP) * stride_ik).to(tl.int64)
    if (e < 0) | (e >= E):
        return
    n = tl.program_id(1) * ROWS + tl.arange(0, ROWS)  # [ROWS]
    k = tl.arange(0, BLOCK_K)  # [BLOCK_K]
    rows = w_ptr + e * stride_we + tl.minimum(n, N - 1).to(tl.int64)[:, None] * stride_wn
    x_ptrs = x_ptr + (pair // TOP).to(tl.int64) * stride_xm + k
    acc = tl.zeros((ROWS, BLOCK_K), dtype=tl.float32)
    up_acc = tl.zeros((ROWS, BLOCK_K), dtype=tl.float32)
    for start in range(0, K, BLOCK_K):
        ptrs = rows + (start + k).to(tl.int64)[None, :] * stride_wk
        if EVEN_K:
            w = tl.load(ptrs)
            x = tl.load(x_ptrs + start)
        else:
            w = tl.load(ptrs, mask=(k < K - start)[None, :], other=0.0)
            x = tl.load(x_ptrs + start, mask=k < K - start, other=0.0)
        x = x.to(tl.float32)[None, :]
        acc += w.to(tl.float32) * x
        if GATED:
            inside = (k < K - start)[None, :]
            up = tl.load(ptrs + w_up) if EVEN_K else tl.load(ptrs + w_up, mask=inside, other=0.0)
            up_acc += up.to(tl.float32) * x
    y = tl.sum(acc, axis=1)
    up_y = tl.sum(up_acc, axis=1)
    if HAS_BIAS:
        b_ptrs = b_ptr + e * stride_be + n * stride_bn
        y += tl.load(b_ptrs, mask=n < N, other=0.0).to(tl.float32)
        if GATED:
            up_y += tl.load(b_ptrs + b_up, mask=n < N, other=0.0).to(tl.float32)
    y = _gate(y, up_y, limit, alpha, up_offset, KIND, LIMIT, ALPHA) if GATED else activate(y, KIND)
    tl.store(y_ptr + pair.to(tl.int64) * N + n, y.to(y_ptr.dtype.element_ty), mask=n < N)


@triton.jit(do_not_specialize=["T"])
def down_gemv_kernel(
    x_ptr,
    index_ptr,
    router_ptr,
    w_ptr,
    b_ptr,
    y_ptr,
    T,
    E,
    N,
    K,
    stride_it,
    stride_ik,
    stride_rt,
    stride_rk,
    stride_we,
    stride_wn,
    stride_wk,
    stride_be,
    stride_bn,
    TOP: tl.constexpr,
    SLOTS: tl.constexpr,  # power of two, TOP at least
    HAS_BIAS: tl.constexpr,
    EVEN_K: tl.constexpr,
    PDL: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    start_dependent(PDL)
    t = tl.program_id(0)
    n = tl.program_id(1) * ROWS + tl.arange(0, ROWS)  # [ROWS]
    # all slots at once: line j is row j % ROWS of the expert of slot j // ROWS
    line = tl.arange(0, ROWS * SLOTS)
    slot = line // ROWS
    n_line = tl.program_id(1) * ROWS + line % ROWS
    e = tl.load(index_ptr + t * stride_it + slot * stride_ik, mask=slot < TOP, other=-1).to(tl.int64)
    known = (e >= 0) & (e < E)
    e = tl.where(known, e, 0)
    weight = tl.load(router_ptr + t * stride_rt + slot * stride_rk, mask=known, other=0.0).to(tl.float32)
    k = tl.arange(0, BLOCK_K)  # [BLOCK_K]
    rows = w_ptr + (e * stride_we + tl.minimum(n_line, N - 1).to(tl.int64) * stride_wn)[:, None]
    x_rows = x_ptr + ((t * TOP + slot).to(tl.int64) * K)[:, None]
    acc = tl.zeros((ROWS * SLOTS, BLOCK_K), dtype=tl.float32)
    for start in range(0, K, BLOCK_K):
        inside = known[:, None] & (k < K - start)[None, :]
        ptrs = rows + (start + k).to(tl.int64)[None, :] * stride_wk
        if EVEN_K:
            inside = known[:, None]
        w = tl.load(ptrs, mask=inside, other=0.0)
        x = tl.load(x_rows + (start + k)[None, :], mask=inside, other=0.0)
        acc += w.to(tl.float32) * x.to(tl.float32)
    y_line = tl.sum(acc, axis=1)
    if HAS_BIAS:
        y_line += tl.load(b_ptr + e * stride_be + n_line * stride_bn, mask=known & (n_line < N), other=0.0).to(
            tl.float32
        )
    y = tl.sum(tl.reshape(y_line * weight, (SLOTS, ROWS)), axis=0)
    tl.store(y_ptr + t.to(tl.int64) * N + n, y.to(y_ptr.dtype.element_ty), mask=n < N)


@triton.jit
def grouped_kernel(
    x_ptr,
    order_ptr,
    tiles_ptr,
    router_ptr,
    w_ptr,
    b_ptr,
    y_ptr,
    N,
    K,
    MAX_TILES,
    stride_xm,
    stride_rt,
    stride_rk,
    stride_we,
    stride_wn,
    stride_wk,
    stride_be,
    stride_bn,
    w_up,
    b_up,
    limit,
    alpha,
    up_offset,
    TOP: tl.constexpr,
    FIRST: tl.constexpr,  # the first product: rows of x by token, y in order; else x in order, y by pair and weighted
    HAS_BIAS: tl.constexpr,
    GATED: tl.constexpr,
    KIND: tl.constexpr,
    LIMIT: tl.constexpr,
    ALPHA: tl.constexpr,
    EVEN_K: tl.constexpr,
    PDL: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PARTS: tl.constexpr,
    GROUP: tl.constexpr,
    STAGES: tl.constexpr,
):
    start_dependent(PDL)
    # programs of GROUP neighbouring tiles run side by side: they share an expert's weight in L2
    pid = tl.program_id(0)
    per_group = GROUP * tl.cdiv(N, BLOCK_N)
    group_start = (pid // per_group) * GROUP
    group_tiles = tl.minimum(MAX_TILES - group_start, GROUP)
    tile = group_start + (pid % per_group) % group_tiles
    block = (pid % per_group) // group_tiles
    count = tl.load(tiles_ptr + 3 * tile + 2)
    if count <= 0:
        return
    e = tl.load(tiles_ptr + 3 * tile).to(tl.int64)
    first = tl.load(tiles_ptr + 3 * tile + 1)
    t = tl.arange(0, BLOCK_T)  # [BLOCK_T]
    row = first + t % count  # behind the last row each once more: one alone would be asked for by everybody
    pair = tl.load(order_ptr + row)
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    w_rows = e * stride_we + tl.minimum(n, N - 1).to(tl.int64) * stride_wn
    x_rows = (pair // TOP if FIRST else row).to(tl.int64) * stride_xm
    if PARTS == 1:
        k = tl.arange(0, BLOCK_K)
        w_at = k[None, :]  # [1, BLOCK_K]
        x_at = k[:, None]  # [BLOCK_K, 1]
        w_ptrs = w_ptr + w_rows[:, None] + w_at.to(tl.int64) * stride_wk
        x_ptrs = x_ptr + x_rows[None, :] + x_at
        acc = tl.zeros((BLOCK_N, BLOCK_T), dtype=tl.float32)
        up_acc = tl.zeros((BLOCK_N, BLOCK_T), dtype=tl.float32)
    else:
        DEPTH: tl.constexpr = BLOCK_K // PARTS
        k = (tl.arange(0, PARTS) * DEPTH)[:, None] + tl.arange(0, DEPTH)[None, :]  # [PARTS, DEPTH]
        w_at = k[:, None, :]
        x_at = k[:, :, None]
        w_ptrs = w_ptr + w_rows[None, :, None] + w_at.to(tl.int64) * stride_wk
        x_ptrs = x_ptr + x_rows[None, None, :] + x_at
        acc = tl.zeros((PARTS, BLOCK_N, BLOCK_T), dtype=tl.float32)
        up_acc = tl.zeros((PARTS, BLOCK_N, BLOCK_T), dtype=tl.float32)
    for start in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        if EVEN_K:
            w = tl.load(w_ptrs)
            x = tl.load(x_ptrs)
        else:
            w = tl.load(w_ptrs, mask=w_at < K - start, other=0.0)
            x = tl.load(x_ptrs, mask=x_at < K - start, other=0.0)
        acc = tl.dot(w, x, acc)
        if GATED:
            inside = w_at < K - start
            up = tl.load(w_ptrs + w_up) if EVEN_K else tl.load(w_ptrs + w_up, mask=inside, other=0.0)
            up_acc = tl.dot(up, x, up_acc)
        w_ptrs += BLOCK_K * stride_wk
        x_ptrs += BLOCK_K
    if PARTS > 1:
        acc = tl.sum(acc, axis=0)
        up_acc = tl.sum(up_acc, axis=0)
    if HAS_BIAS:
        b_ptrs = b_ptr + e * stride_be + n * stride_bn
        acc += tl.load(b_ptrs, mask=n < N, other=0.0).to(tl.float32)[:, None]
        if GATED:
            up_acc += tl.load(b_ptrs + b_up, mask=n < N, other=0.0).to(tl.float32)[:, None]
    if FIRST:
        y = _gate(acc, up_acc, limit, alpha, up_offset, KIND, LIMIT, ALPHA) if GATED else activate(acc, KIND)
        y_rows = row.to(tl.int64) * N
    else:
        router = tl.load(router_ptr + (pair // TOP).to(tl.int64) * stride_rt + (pair % TOP) * stride_rk)
        y = acc * router.to(tl.float32)[None, :]
        y_rows = pair.to(tl.int64) * N
    inside = (n < N)[:, None] & (t < count)[None, :]
    tl.store(y_ptr + y_rows[None, :] + n[:, None], y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def add_slots_kernel(
    part_ptr,
    index_ptr,
    y_ptr,
    E,
    N,
    stride_it,
    stride_ik,
    TOP: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    start_dependent(PDL)
    t = tl.program_id(0)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    y = tl.zeros((BLOCK,), dtype=tl.float32)
    for slot in tl.static_range(TOP):
        e = tl.load(index_ptr + t.to(tl.int64) * stride_it + slot * stride_ik)
        mask = (n < N) & (e >= 0) & (e < E)  # no expert, no part
        part = part_ptr + (t * TOP + slot).to(tl.int64) * N + n
        y += tl.load(part, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
    tl.store(y_ptr + t.to(tl.int64) * N + n, y.to(y_ptr.dtype.element_ty), mask=n < N)


@triton.jit
def spread_rows_kernel(
    x_ptr,
    places_ptr,
    y_ptr,
    N,
    stride_xm,
    TOP: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Each token's row to the places of its slots."""
    start_dependent(PDL)
    pair = tl.program_id(0)
    place = tl.load(places_ptr + pair)
    if place < 0:
        return
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + (pair // TOP).to(tl.int64) * stride_xm + n, mask=n < N)
    tl.store(y_ptr + place.to(tl.int64) * N + n, x, mask=n < N)


@triton.jit
def weigh_slots_kernel(
    part_ptr,
    places_ptr,
    router_ptr,
    y_ptr,
    N,
    stride_rt,
    stride_rk,
    TOP: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """The rows of a token's slots, weighted by the router and added in their order."""
    start_dependent(PDL)
    t = tl.program_id(0)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    y = tl.zeros((BLOCK,), dtype=tl.float32)
    for slot in tl.static_range(TOP):
        place = tl.load(places_ptr + t * TOP + slot)
        weight = tl.load(router_ptr + t.to(tl.int64) * stride_rt + slot * stride_rk).to(tl.float32)
        part = tl.load(part_ptr + place.to(tl.int64) * N + n, mask=(n < N) & (place >= 0), other=0.0)
        y += weight * part.to(tl.float32)
    tl.store(y_ptr + t.to(tl.int64) * N + n, y.to(y_ptr.dtype.element_ty), mask=n < N)
