# mypy: disallow-untyped-defs=False
"""Flash attention on pages: a program walks over keys of one sequence and one kv head, page by page.

* A tile's rows are the queries of all heads that read one kv head: row r is query r // R of head r % R of the group, so
  that each key is read once for BLOCK_M of them.
* SPLIT: the second dimension of the grid divides the keys of each sequence by its own length, which is read on the
  device: one grid serves all lengths, and programs for which nothing is left return. `combine_kernel` puts the parts
  together; it knows from the length how many there are, and leaves alone what one program did by itself.
* `write_kernel` has written the new keys and values before. Few queries have a kernel of their own, see
  `paged_decode_kernel`.
"""

from __future__ import annotations

from typing import Final

import triton
import triton.language as tl

from .attention_kernel import LOG2E, LOWEST, _clear_behind, _divide, _exp_of, _soften
from .overlap import start_dependent

HALVES: Final = tl.constexpr(12582912.0)
"""1.5 * 2^23: added and taken away again, it rounds to whole numbers, halves to even ones."""


@triton.jit
def _keys_of(bottom, top, left, split, SPLITS, BLOCK_N: tl.constexpr, HAS_LEFT: tl.constexpr):
    """The first key of a split and the one behind its last, for queries at positions `bottom` to `top`.

    The first is a multiple of BLOCK_N; a split for which nothing is left ends before it begins.
    """
    first = top * 0
    if HAS_LEFT:
        first = tl.maximum(bottom - left, 0) // BLOCK_N * BLOCK_N
    stop = top + 1
    share = tl.cdiv(tl.cdiv(tl.maximum(stop - first, 0), BLOCK_N), SPLITS) * BLOCK_N
    return first + split * share, tl.minimum(stop, first + (split + 1) * share)


@triton.jit
def _clear_rows(o_ptr, cu_q_ptr, TOKENS, SEQUENCES, WIDTH):
    """Zeroes the rows behind the last sequence; programs of the first dimension of the grid share it."""
    _clear_behind(o_ptr, tl.load(cu_q_ptr + SEQUENCES).to(tl.int64) * WIDTH, TOKENS.to(tl.int64) * WIDTH)


@triton.jit(do_not_specialize=["TOKENS", "SEQUENCES", "BLOCKS", "SPLITS", "left", "stride_tb", "stride_qt"])
def paged_kernel(
    q_ptr,
    k_pages_ptr,
    v_pages_ptr,
    cu_q_ptr,
    lengths_ptr,
    table_ptr,
    sinks_ptr,
    slopes_ptr,
    relative_ptr,  # [H, RELATIVE]
    k_scale_ptr,
    v_scale_ptr,
    o_ptr,  # [TOKENS, H, DV]
    part_ptr,  # with SPLIT: [TOKENS, H, SPLITS, DV]
    state_ptr,  # with SPLIT: [2, TOKENS, H, SPLITS], maximum and total
    TOKENS,
    SEQUENCES,
    BLOCKS,
    SPLITS,
    KV_HEADS,
    stride_qt,
    stride_qh,
    stride_kp,
    stride_kk,
    stride_kg,
    stride_vp,
    stride_vk,
    stride_vg,
    stride_sp,
    stride_sk,
    stride_sg,
    stride_tb,
    scale,
    softcap,
    left,
    HAS_LEFT: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    HAS_SLOPES: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    RELATIVE: tl.constexpr,  # distances of a table of biases; 0: there is none
    SCALED: tl.constexpr,  # pages hold numbers divided by a scale
    SPLIT: tl.constexpr,
    PRECISE: tl.constexpr,  # scores in natural units, exponentials to the last bit
    ALIGN: tl.constexpr,  # strides of q are given in units of so many elements
    PAGE_ALIGN: tl.constexpr,  # as ALIGN, of the pages
    PDL: tl.constexpr,
    PAGE: tl.constexpr,
    R: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    start_dependent(PDL)
    pid = tl.program_id(0)
    split = tl.program_id(1)
    kv_head = (pid % KV_HEADS).to(tl.int64)
    sequence = ((pid // KV_HEADS) % SEQUENCES).to(tl.int64)
    block = BLOCKS - 1 - pid // KV_HEADS // SEQUENCES  # the longest rows first
    H = KV_HEADS * R
    q_first = tl.load(cu_q_ptr + sequence).to(tl.int64)
    Q = (tl.load(cu_q_ptr + sequence + 1) - q_first).to(tl.int32)
    K = tl.load(lengths_ptr + sequence)
    if block * BLOCK_M >= Q * R:
        if not SPLIT:
            _clear_rows(o_ptr, cu_q_ptr, TOKENS, SEQUENCES, H * DV)
        return
    shift = K - Q  # the first query's position
    bottom = block * BLOCK_M // R + shift
    top = tl.minimum(block * BLOCK_M + BLOCK_M - 1, Q * R - 1) // R + shift
    if K == 0:
        top = -1
    first, stop = _keys_of(bottom, top, left, split, SPLITS, BLOCK_N, HAS_LEFT)
    if SPLIT:  # noqa: SIM102 - the kernel is compiled for one of both
        if first >= stop:
            return

    row = block * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    is_query = row < Q * R
    row = tl.minimum(row, Q * R - 1)  # what lies beyond computes the last row again
    query = row // R
    head = kv_head * R + row % R
    position = query + shift
    d = tl.arange(0, BLOCK_D)
    dv = tl.arange(0, BLOCK_DV)
    n = tl.arange(0, BLOCK_N)
    q_rows = ((q_first + query) * stride_qt + head * stride_qh) * ALIGN  # [BLOCK_M]
    q = tl.load(q_ptr + q_rows[:, None] + d[None, :], mask=(d < D)[None, :], other=0.0)  # [BLOCK_M, BLOCK_D]
    unit = 1.0 if PRECISE else LOG2E  # scores are in units of log(2) unless PRECISE
    if HAS_SLOPES:
        slope = tl.load(slopes_ptr + head).to(tl.float32) * unit  # [BLOCK_M]

    # tiles from `whole` to `edge` are old keys that every query sees; all borders but `stop` are multiples of BLOCK_N
    whole = 0
    oldest = 0
    edge = tl.maximum(bottom, 0) // BLOCK_N * BLOCK_N
    if HAS_LEFT:
        oldest = bottom - left
        whole = tl.cdiv(tl.maximum(top - left, 0), BLOCK_N) * BLOCK_N
    table = table_ptr + sequence * stride_tb
    k_head = k_pages_ptr + kv_head * (stride_kg * PAGE_ALIGN)
    v_head = v_pages_ptr + kv_head * (stride_vg * PAGE_ALIGN)
    m = tl.full((BLOCK_M,), LOWEST, dtype=tl.float32)
    total = tl.zeros((BLOCK_M,), dtype=tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_DV), dtype=tl.float32)
    for SEGMENT in tl.static_range(0 if HAS_LEFT else 1, 3):
        if SEGMENT == 0:
            low = first
            high = tl.minimum(tl.minimum(whole, edge), stop)
        elif SEGMENT == 1:
            low = tl.maximum(first, whole)
            high = tl.minimum(edge, stop)
        else:
            low = tl.maximum(first, edge)
            high = stop
        # Page numbers are read a tile ahead, so that loads of keys can be pipelined. Where tiles are large enough for
        # Hopper's wgmma they are in every segment: the ptxas of CUDA 12.8, which Triton 3.6 brings, has been seen to
        # read a matrix descriptor too early where a tile passes through registers into shared memory.
        is_key = (low + n >= oldest) & (low + n < high)
        ahead = tl.load(table + (low + n) // PAGE, mask=is_key, other=0)
        for start in tl.range(low, high, BLOCK_N, num_stages=STAGES if SEGMENT == 1 or BLOCK_M >= 64 else 1):
            key = start + n  # [BLOCK_N]
            is_key = (key >= oldest) & (key < high)
            page = ahead.to(tl.int64)
            ahead = tl.load(table + (key + BLOCK_N) // PAGE, mask=key + BLOCK_N < high, other=0)
            offset = key % PAGE
            k_at = k_head + (page * stride_kp + offset * stride_kk) * PAGE_ALIGN  # [BLOCK_N]
            v_at = v_head + (page * stride_vp + offset * stride_vk) * PAGE_ALIGN

            inside = (d < D)[:, None]
            inside_v = (dv < DV)[None, :]
            if SEGMENT != 1:
                inside = inside & is_key[None, :]
                inside_v = inside_v & is_key[:, None]
            if SEGMENT == 1 and D == BLOCK_D:
                k = tl.load(k_at[None, :] + d[:, None])  # [BLOCK_D, BLOCK_N]
            else:
                k = tl.load(k_at[None, :] + d[:, None], mask=inside, other=0.0)
            if SEGMENT == 1 and DV == BLOCK_DV:
                v = tl.load(v_at[:, None] + dv[None, :])  # [BLOCK_N, BLOCK_DV]
            else:
                v = tl.load(v_at[:, None] + dv[None, :], mask=inside_v, other=0.0)
            s = tl.dot(q, k.to(q.dtype), input_precision="ieee")  # [BLOCK_M, BLOCK_N]
            if SCALED:
                of_key = page * stride_sp + offset * stride_sk + kv_head * stride_sg
                k_scale = tl.load(k_scale_ptr + of_key, mask=is_key, other=0.0)
                v_scale = tl.load(v_scale_ptr + of_key, mask=is_key, other=0.0)
                s = s * k_scale[None, :]
            s = _soften(s, scale, softcap, PRECISE, PRECISE) if HAS_SOFTCAP else s * (scale * unit)
            if HAS_SLOPES:
                s += slope[:, None] * (key - (K - 1)).to(tl.float32)[None, :]
            if RELATIVE:
                apart = tl.minimum(tl.maximum(position[:, None] - key[None, :], 0), RELATIVE - 1)
                s += tl.load(relative_ptr + head[:, None] * RELATIVE + apart).to(tl.float32) * unit
            if SEGMENT != 1:
                visible = is_key[None, :] & (key[None, :] <= position[:, None])
                if HAS_LEFT:
                    visible = visible & (key[None, :] >= position[:, None] - left)
                s = tl.where(visible, s, float("-inf"))
            m_new = tl.maximum(m, tl.max(s, axis=1))
            p = _exp_of(s - m_new[:, None], PRECISE, PRECISE)
            alpha = _exp_of(m - m_new, PRECISE, PRECISE)
            total = total * alpha + tl.sum(p, axis=1)
            m = m_new

            if SCALED:
                p = p * v_scale[None, :]
            acc = tl.dot(p.to(q.dtype), v.to(q.dtype), acc * alpha[:, None], input_precision="ieee")

    out = (q_first + query) * H + head  # [BLOCK_M]
    inside = is_query[:, None] & (dv < DV)[None, :]
    if SPLIT:  # noqa: SIM102 - as above
        if (split > 0) | (stop <= top):  # there are other parts
            part = out * SPLITS + split
            tl.store(state_ptr + part, m, mask=is_query)
            tl.store(state_ptr + TOKENS.to(tl.int64) * H * SPLITS + part, total, mask=is_query)
            tl.store(part_ptr + part[:, None] * DV + dv[None, :], acc, mask=inside)
            return
    if HAS_SINKS:
        sink = tl.load(sinks_ptr + head).to(tl.float32) * unit
        if HAS_SLOPES:
            sink -= slope * (K - 1).to(tl.float32)
        m_new = tl.maximum(m, sink)
        alpha = _exp_of(m - m_new, PRECISE, PRECISE)
        total = total * alpha + _exp_of(sink - m_new, PRECISE, PRECISE)
        acc = acc * alpha[:, None]
    acc = _divide(acc, tl.where(total == 0.0, 1.0, total), PRECISE)
    tl.store(o_ptr + out[:, None] * DV + dv[None, :], acc.to(o_ptr.dtype.element_ty), mask=inside)
    if not SPLIT:
        _clear_rows(o_ptr, cu_q_ptr, TOKENS, SEQUENCES, H * DV)


@triton.jit(do_not_specialize=["TOKENS", "SEQUENCES", "SPLITS", "left"])
def combine_kernel(
    part_ptr,  # [TOKENS, H, SPLITS, DV]
    state_ptr,  # [2, TOKENS, H, SPLITS]
    cu_q_ptr,
    lengths_ptr,
    sinks_ptr,
    slopes_ptr,
    o_ptr,  # [TOKENS, H, DV]
    TOKENS,
    SEQUENCES,
    SPLITS,
    H,
    left,
    HAS_LEFT: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    HAS_SLOPES: tl.constexpr,
    PRECISE: tl.constexpr,
    PDL: tl.constexpr,
    R: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """One program puts the parts of one query and head together: of the query-th of each sequence, by the grid."""
    start_dependent(PDL)
    head = tl.program_id(0) % H
    sequence = (tl.program_id(0) // H).to(tl.int64)
    query = tl.program_id(1)
    if query == 0:
        _clear_rows(o_ptr, cu_q_ptr, TOKENS, SEQUENCES, H * DV)
    q_first = tl.load(cu_q_ptr + sequence).to(tl.int64)
    Q = (tl.load(cu_q_ptr + sequence + 1) - q_first).to(tl.int32)
    K = tl.load(lengths_ptr + sequence)
    if query >= Q:
        return
    start = (query * R + head % R) // BLOCK_M * BLOCK_M
    top = tl.minimum(start + BLOCK_M - 1, Q * R - 1) // R + K - Q
    if K == 0:
        top = -1
    split = tl.arange(0, BLOCK_S)
    first, stop = _keys_of(start // R + K - Q, top, left, split, SPLITS, BLOCK_N, HAS_LEFT)
    is_part = (first < stop) & (split < SPLITS)
    if (top >= 0) & (tl.max(tl.where(is_part, split, 0), axis=0) == 0):
        return  # the only part has written the result
    dv = tl.arange(0, BLOCK_DV)
    row = (q_first + query) * H + head
    at = row * SPLITS + split  # [BLOCK_S]
    m = tl.load(state_ptr + at, mask=is_part, other=LOWEST)
    total = tl.load(state_ptr + TOKENS.to(tl.int64) * H * SPLITS + at, mask=is_part, other=0.0)
    inside = is_part[:, None] & (dv < DV)[None, :]
    part = tl.load(part_ptr + at[:, None] * DV + dv[None, :], mask=inside, other=0.0)  # [BLOCK_S, BLOCK_DV]
    highest = tl.max(m, axis=0)
    if HAS_SINKS:
        unit = 1.0 if PRECISE else LOG2E
        sink = tl.load(sinks_ptr + head).to(tl.float32) * unit
        if HAS_SLOPES:
            sink -= tl.load(slopes_ptr + head).to(tl.float32) * unit * (K - 1).to(tl.float32)
        highest = tl.maximum(highest, sink)
    weight = _exp_of(m - highest, PRECISE, PRECISE)
    all_of_it = tl.sum(total * weight, axis=0)
    if HAS_SINKS:
        all_of_it += _exp_of(sink - highest, PRECISE, PRECISE)
    y = tl.sum(part * weight[:, None], axis=0)
    y = tl.div_rn(y, tl.where(all_of_it == 0.0, 1.0, all_of_it))
    tl.store(o_ptr + row * DV + dv, y.to(o_ptr.dtype.element_ty), mask=dv < DV)


@triton.jit
def _scaled(x, LARGEST: tl.constexpr, INTEGER: tl.constexpr):
    """Rows `[BLOCK_T, D]` divided by a scale of each, before they are converted to the pages' dtype; and the scales."""
    x = x.to(tl.float32)
    scale = tl.max(tl.abs(x), axis=1)  # [BLOCK_T]
    scale = tl.div_rn(scale, scale * 0.0 + LARGEST)
    x = tl.div_rn(x, tl.where(scale == 0.0, 1.0, scale)[:, None] + x * 0.0)
    if INTEGER:
        x = (x + HALVES) - HALVES
    return x, scale


@triton.jit(do_not_specialize=["TOKENS", "stride_kt", "stride_vt"])
def write_kernel(
    k_ptr,
    v_ptr,
    k_pages_ptr,
    v_pages_ptr,
    slots_ptr,
    k_scale_ptr,
    v_scale_ptr,
    TOKENS,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    stride_kp,
    stride_kk,
    stride_kg,
    stride_vp,
    stride_vk,
    stride_vg,
    stride_sp,
    stride_sk,
    stride_sg,
    SCALED: tl.constexpr,
    LARGEST: tl.constexpr,
    INTEGER: tl.constexpr,
    ALIGN: tl.constexpr,
    PAGE_ALIGN: tl.constexpr,
    PDL: tl.constexpr,
    PAGE: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """BLOCK_T rows of one head of k and v into their pages."""
    start_dependent(PDL)
    row = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)  # [BLOCK_T]
    head = tl.program_id(1).to(tl.int64)
    slot = tl.load(slots_ptr + row, mask=row < TOKENS, other=-1)
    is_row = slot >= 0
    page, offset = slot // PAGE, slot % PAGE
    d = tl.arange(0, BLOCK_D)
    inside = is_row[:, None] & (d < D)[None, :]
    k_at = k_ptr + (row * stride_kt + head * stride_kh) * ALIGN
    k = tl.load(k_at[:, None] + d[None, :], mask=inside, other=0.0)  # [BLOCK_T, BLOCK_D]
    dv = tl.arange(0, BLOCK_DV)
    inside_v = is_row[:, None] & (dv < DV)[None, :]
    v_at = v_ptr + (row * stride_vt + head * stride_vh) * ALIGN
    v = tl.load(v_at[:, None] + dv[None, :], mask=inside_v, other=0.0)  # [BLOCK_T, BLOCK_DV]
    if SCALED:
        k, k_scale = _scaled(k, LARGEST, INTEGER)
        v, v_scale = _scaled(v, LARGEST, INTEGER)
        at = page * stride_sp + offset * stride_sk + head * stride_sg
        tl.store(k_scale_ptr + at, k_scale, mask=is_row)
        tl.store(v_scale_ptr + at, v_scale, mask=is_row)
    k_to = k_pages_ptr + (page * stride_kp + offset * stride_kk + head * stride_kg) * PAGE_ALIGN
    v_to = v_pages_ptr + (page * stride_vp + offset * stride_vk + head * stride_vg) * PAGE_ALIGN
    tl.store(k_to[:, None] + d[None, :], k.to(k_pages_ptr.dtype.element_ty), mask=inside)
    tl.store(v_to[:, None] + dv[None, :], v.to(v_pages_ptr.dtype.element_ty), mask=inside_v)
