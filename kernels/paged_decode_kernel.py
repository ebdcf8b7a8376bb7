# mypy: disallow-untyped-defs=False
"""Attention of few queries on pages, as decoding needs it: one launch, whatever the lengths are.

* A tile's rows are the queries of all heads that read one kv head, as in `paged_attention_kernel`, and all of a
  sequence's are in one tile.
* The second dimension of the grid is as many parts as the keys of a sequence may be divided into. How many there are
  is found from the length, so that none is short; the programs of the others read it and return. Of several parts, the
  program that is ready last puts them together: a counter tells it, which it sets back to zero.
* The part that ends a sequence takes the new keys and values from where they were computed and writes their pages.

Lengths, slots, tables, slopes, and old keys and values are read before the wait for the preceding kernels. That is
right because kernels that let the next one start early wait themselves before they end: one that runs while an earlier
one has not ended was launched behind the last kernel without `launch_pdl`, which began when all before it had ended.
What is read early must therefore have been written before that kernel. In a decoding step it has: the look-up of the
tokens' embeddings is launched without, behind what writes lengths, slots and tables (`compiler/looked_up.py` makes sure
that there is one), slopes are constants, and old keys are of earlier steps.
Queries, new keys and values, and rows that this call is not to write are read after the wait.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .attention_kernel import LOG2E, LOWEST, _clear_behind, _divide, _exp_of, _soften
from .paged_attention_kernel import HALVES


@triton.jit
def _stored(x, dtype: tl.constexpr, LARGEST: tl.constexpr):
    """Rows `[n, D]` as pages hold them, and what they are divided by: nothing where LARGEST is 0."""
    if LARGEST == 0:
        y = x.to(dtype)
        scale = tl.zeros((x.shape[0],), dtype=tl.float32)
    else:
        y = x.to(tl.float32)
        scale = tl.max(tl.abs(y), axis=1)
        scale = tl.div_rn(scale, scale * 0.0 + LARGEST)
        y = tl.div_rn(y, tl.where(scale == 0.0, 1.0, scale)[:, None] + y * 0.0)
        if LARGEST == 127.0:
            y = (y + HALVES) - HALVES
        y = y.to(dtype)
    return y, scale


@triton.jit
def _scores(
    s, key, head, position, slope, relative_ptr, K, scale, softcap,
    HAS_SLOPES: tl.constexpr, HAS_SOFTCAP: tl.constexpr, RELATIVE: tl.constexpr, PRECISE: tl.constexpr,
):  # fmt: skip
    """Products `[rows, n]` as scores, in units of log(2) unless PRECISE."""
    unit = 1.0 if PRECISE else LOG2E
    s = _soften(s, scale, softcap, PRECISE, PRECISE) if HAS_SOFTCAP else s * (scale * unit)
    if HAS_SLOPES:
        s += slope[:, None] * (key - (K - 1)).to(tl.float32)[None, :]
    if RELATIVE:
        apart = tl.minimum(tl.maximum(position[:, None] - key[None, :], 0), RELATIVE - 1)
        s += tl.load(relative_ptr + head[:, None] * RELATIVE + apart).to(tl.float32) * unit
    return s


@triton.jit
def _finish(o_ptr, at, inside, m, total, acc, head, K, sinks_ptr, slopes_ptr,
            HAS_SINKS: tl.constexpr, HAS_SLOPES: tl.constexpr, PRECISE: tl.constexpr):  # fmt: skip
    """Writes rows `[rows, DV]` of the result."""
    if HAS_SINKS:
        unit = 1.0 if PRECISE else LOG2E
        sink = tl.load(sinks_ptr + head).to(tl.float32) * unit
        if HAS_SLOPES:
            sink -= tl.load(slopes_ptr + head).to(tl.float32) * unit * (K - 1).to(tl.float32)
        m_new = tl.maximum(m, sink)
        alpha = _exp_of(m - m_new, PRECISE, PRECISE)
        total = total * alpha + _exp_of(sink - m_new, PRECISE, PRECISE)
        acc = acc * alpha[:, None]
    acc = _divide(acc, tl.where(total == 0.0, 1.0, total), PRECISE)
    tl.store(o_ptr + at, acc.to(o_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _combined(part_ptr, state_ptr, offset, row, is_query, parts, SPLITS, DV: tl.constexpr, BLOCK_DV: tl.constexpr,
              ROWS: tl.constexpr, CHUNK: tl.constexpr, PRECISE: tl.constexpr):  # fmt: skip
    """Maximum, total and sum of rows `row [ROWS]`, CHUNK parts asked for at a time; past the L1 cache: others wrote."""
    dv = tl.arange(0, BLOCK_DV)
    m = tl.full((ROWS,), LOWEST, dtype=tl.float32)
    total = tl.zeros((ROWS,), dtype=tl.float32)
    acc = tl.zeros((ROWS, BLOCK_DV), dtype=tl.float32)
    at = row * SPLITS
    inside = is_query[:, None] & (dv < DV)[None, :]
    for start in range(0, parts, CHUNK):
        for i in tl.static_range(CHUNK):
            here = start + i < parts
            of_part = tl.load(part_ptr + (at + (start + i))[:, None] * DV + dv[None, :], mask=inside & here, other=0.0,
                              cache_modifier=".cg")  # fmt: skip
            highest = tl.load(state_ptr + at + (start + i), mask=is_query & here, other=LOWEST, cache_modifier=".cg")
            weight = tl.load(state_ptr + offset + at + (start + i), mask=is_query & here, other=0.0,
                             cache_modifier=".cg")  # fmt: skip
            m_new = tl.maximum(m, highest)
            alpha = _exp_of(m - m_new, PRECISE, PRECISE)
            beta = _exp_of(highest - m_new, PRECISE, PRECISE)
            total = total * alpha + weight * beta
            acc = acc * alpha[:, None] + of_part * beta[:, None]
            m = m_new
    return m, total, acc


_STEPS = tuple(f"stride_{name}" for name in ("tb", "qt", "kt", "vt"))


@triton.jit(do_not_specialize=["TOKENS", "SEQUENCES", "SPLITS", "left", *_STEPS])
def decode_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    k_pages_ptr,
    v_pages_ptr,
    slots_ptr,
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
    ready_ptr,  # with SPLIT: [SEQUENCES * KV_HEADS], zeros
    TOKENS,
    SEQUENCES,
    SPLITS,
    KV_HEADS,
    stride_qt,
    stride_qh,
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
    stride_tb,
    scale,
    softcap,
    left,
    HAS_LEFT: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    HAS_SLOPES: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    RELATIVE: tl.constexpr,  # distances of a table of biases; 0: there is none
    LARGEST: tl.constexpr,  # pages hold numbers divided by a scale, up to LARGEST; 0: they do not
    SPLIT: tl.constexpr,
    PRECISE: tl.constexpr,  # scores in natural units, exponentials to the last bit
    ALIGN: tl.constexpr,  # strides of q, k and v are given in units of so many elements
    PAGE_ALIGN: tl.constexpr,  # as ALIGN, of the pages
    PDL: tl.constexpr,
    WIDE: tl.constexpr,  # rows of pages, in units of PAGE_ALIGN, need 64 bits
    PAGE: tl.constexpr,
    R: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    ROWS: tl.constexpr,  # a power of two: queries of a sequence times R, at most
    ONE: tl.constexpr,  # no sequence has more than one query
    NEWS: tl.constexpr,  # with ONE BLOCK_M, else a power of two: queries of a sequence, at most, and at least 16
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    LEAST: tl.constexpr,  # keys of a part, where there are several: a multiple of BLOCK_N
    STAGES: tl.constexpr,
):
    if PDL:
        gdc_launch_dependents()
    SCALED: tl.constexpr = LARGEST != 0
    pid = tl.program_id(0)
    split = tl.program_id(1)
    kv_head = (pid % KV_HEADS).to(tl.int64)
    sequence = (pid // KV_HEADS).to(tl.int64)
    H = KV_HEADS * R
    q_first = tl.load(cu_q_ptr + sequence).to(tl.int64)
    q_stop = tl.load(cu_q_ptr + sequence + 1).to(tl.int64)
    behind = tl.load(cu_q_ptr + SEQUENCES).to(tl.int64)
    K = tl.load(lengths_ptr + sequence)
    Q = (q_stop - q_first).to(tl.int32)
    shift = K - Q  # the first query's position
    old = tl.maximum(tl.where(Q > 0, shift, 0), 0)  # keys before this one are in their pages
    first = 0
    if HAS_LEFT:
        first = tl.maximum(shift - left, 0) // BLOCK_N * BLOCK_N
    parts = 1
    low = first
    high = old
    if SPLIT:
        keys = tl.maximum(old - first, 0)
        parts = tl.maximum(1, tl.minimum(SPLITS, tl.cdiv(keys, LEAST)))
        share = tl.maximum(tl.cdiv(tl.cdiv(keys, BLOCK_N), parts), 1) * BLOCK_N
        parts = tl.maximum(1, tl.cdiv(keys, share))
        if split >= parts:  # the first part is never left out: a grid that does not wait would end too early
            return
        low = first + split * share
        high = tl.minimum(old, low + share)
    news = tl.where((split == parts - 1) & (K > 0), Q, 0)  # new keys that this program attends to, and writes

    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    dv = tl.arange(0, BLOCK_DV)
    table = table_ptr + sequence * stride_tb
    k_head = k_pages_ptr + kv_head * (stride_kg * PAGE_ALIGN)
    v_head = v_pages_ptr + kv_head * (stride_vg * PAGE_ALIGN)
    PLACE: tl.constexpr = tl.int64 if WIDE else tl.int32
    oldest = 0
    if HAS_LEFT:
        oldest = shift - left
    ahead = tl.load(table + (low + n) // PAGE, mask=(low + n >= oldest) & (low + n < high), other=0)
    row = tl.minimum(tl.arange(0, BLOCK_M), tl.maximum(Q * R - 1, 0))  # what lies beyond computes the last row again
    query = row // R
    head = kv_head * R + row % R
    position = query + shift
    q_rows = (tl.minimum(q_first + query, TOKENS - 1) * stride_qt + head * stride_qh) * ALIGN  # [BLOCK_M]
    slope = 0.0
    if HAS_SLOPES:
        slope = tl.load(slopes_ptr + head).to(tl.float32) * (1.0 if PRECISE else LOG2E)  # [BLOCK_M]

    # new keys and values: rows of k and v, or of pages that were written before
    j = tl.arange(0, NEWS)
    is_first = j >= 0
    if ONE:  # the same one for all rows of the tile
        is_first = j == 0
        j = j * 0
    is_new = j < news
    slot = tl.load(slots_ptr + q_first + j, mask=is_new, other=-1)
    is_given = slot >= 0
    from_page = is_new & (slot < 0)
    new_page = tl.load(table + (shift + j) // PAGE, mask=from_page, other=0).to(tl.int64)
    new_page = tl.where(is_given, slot // PAGE, new_page)
    new_offset = tl.where(is_given, slot % PAGE, (shift + j) % PAGE)
    k_to = (k_head + (new_page * stride_kp + new_offset * stride_kk) * PAGE_ALIGN)[:, None] + d[None, :]
    v_to = (v_head + (new_page * stride_vp + new_offset * stride_vk) * PAGE_ALIGN)[:, None] + dv[None, :]
    k_new_at = (k_ptr + ((q_first + j) * stride_kt + kv_head * stride_kh) * ALIGN)[:, None] + d[None, :]
    v_new_at = (v_ptr + ((q_first + j) * stride_vt + kv_head * stride_vh) * ALIGN)[:, None] + dv[None, :]
    scale_at = new_page * stride_sp + new_offset * stride_sk + kv_head * stride_sg

    q = tl.zeros((BLOCK_M, BLOCK_D), dtype=q_ptr.dtype.element_ty)
    m = tl.full((BLOCK_M,), LOWEST, dtype=tl.float32)
    total = tl.zeros((BLOCK_M,), dtype=tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_DV), dtype=tl.float32)
    weights = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)

    # page numbers are read a tile ahead, so that loads of keys can be pipelined
    for start in tl.range(low, tl.maximum(high, low + 1), BLOCK_N, num_stages=STAGES):
        key = start + n  # [BLOCK_N]
        is_key = key < high
        if HAS_LEFT:
            is_key = is_key & (key >= oldest)
        page = ahead.to(PLACE)
        ahead = tl.load(table + (key + BLOCK_N) // PAGE, mask=key + BLOCK_N < high, other=0)
        offset = key % PAGE
        k_at = k_head + (page * stride_kp + offset * stride_kk).to(tl.int64) * PAGE_ALIGN
        v_at = v_head + (page * stride_vp + offset * stride_vk).to(tl.int64) * PAGE_ALIGN
        if D == BLOCK_D:
            k = tl.load(k_at[:, None] + d[None, :], mask=is_key[:, None], other=0.0)  # [BLOCK_N, BLOCK_D]
        else:
            k = tl.load(k_at[:, None] + d[None, :], mask=(d < D)[None, :] & is_key[:, None], other=0.0)
        if DV == BLOCK_DV:
            v = tl.load(v_at[:, None] + dv[None, :], mask=is_key[:, None], other=0.0)  # [BLOCK_N, BLOCK_DV]
        else:
            v = tl.load(v_at[:, None] + dv[None, :], mask=(dv < DV)[None, :] & is_key[:, None], other=0.0)
        if start == low:
            if PDL:
                gdc_wait()

            q = tl.load(q_ptr + q_rows[:, None] + d[None, :], mask=(d < D)[None, :], other=0.0)  # [BLOCK_M, BLOCK_D]
            k_given = tl.load(k_new_at, mask=(d < D)[None, :] & is_given[:, None], other=0.0)  # [NEWS, BLOCK_D]
            v_given = tl.load(v_new_at, mask=(dv < DV)[None, :] & is_given[:, None], other=0.0)
            k_paged = tl.load(k_to, mask=(d < D)[None, :] & from_page[:, None], other=0.0)
            v_paged = tl.load(v_to, mask=(dv < DV)[None, :] & from_page[:, None], other=0.0)
            k_stored, k_scales = _stored(k_given, k_pages_ptr.dtype.element_ty, LARGEST)
            v_stored, v_scales = _stored(v_given, v_pages_ptr.dtype.element_ty, LARGEST)
            tl.store(k_to, k_stored, mask=(d < D)[None, :] & (is_given & is_first)[:, None])
            tl.store(v_to, v_stored, mask=(dv < DV)[None, :] & (is_given & is_first)[:, None])
            k_new = tl.where(is_given[:, None], k_stored.to(q.dtype), k_paged.to(q.dtype))
            v_new = tl.where(is_given[:, None], v_stored.to(q.dtype), v_paged.to(q.dtype))
            if SCALED:
                tl.store(k_scale_ptr + scale_at, k_scales, mask=is_given & is_first)
                tl.store(v_scale_ptr + scale_at, v_scales, mask=is_given & is_first)
                k_scales = tl.where(is_given, k_scales, tl.load(k_scale_ptr + scale_at, mask=from_page, other=0.0))
                v_scales = tl.where(is_given, v_scales, tl.load(v_scale_ptr + scale_at, mask=from_page, other=0.0))

            # the new ones come first; the only one has the weight 1 until others come
            if ONE:
                s_new = tl.sum(q.to(tl.float32) * k_new.to(tl.float32), axis=1)  # [BLOCK_M]
                if SCALED:
                    s_new = s_new * k_scales
                own = shift + tl.arange(0, 1)
                s_new = _scores(s_new[:, None], own, head, position, slope, relative_ptr, K, scale, softcap,
                                HAS_SLOPES, HAS_SOFTCAP, RELATIVE, PRECISE)  # fmt: skip
                total = tl.where(is_new, 1.0, 0.0)
                m = tl.where(is_new, tl.sum(s_new, axis=1), LOWEST)
                acc = v_new.to(tl.float32) * total[:, None]
                if SCALED:
                    acc = acc * v_scales[:, None]
            else:
                s_new = tl.dot(q, tl.trans(k_new), input_precision="ieee")  # [BLOCK_M, NEWS]
                if SCALED:
                    s_new = s_new * k_scales[None, :]
                s_new = _scores(s_new, shift + j, head, position, slope, relative_ptr, K, scale, softcap,
                                HAS_SLOPES, HAS_SOFTCAP, RELATIVE, PRECISE)  # fmt: skip
                visible = is_new[None, :] & (shift + j[None, :] <= position[:, None])
                if HAS_LEFT:
                    visible = visible & (shift + j[None, :] >= position[:, None] - left)
                s_new = tl.where(visible, s_new, float("-inf"))
                m = tl.maximum(tl.max(s_new, axis=1), LOWEST)
                p_new = _exp_of(s_new - m[:, None], PRECISE, PRECISE)
                total = tl.sum(p_new, axis=1)
                if SCALED:
                    p_new = p_new * v_scales[None, :]
                acc = tl.dot(p_new.to(q.dtype), v_new, input_precision="ieee")
        s = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision="ieee")  # [BLOCK_M, BLOCK_N]
        of_key = (page * stride_sp + offset * stride_sk).to(tl.int64) + kv_head * stride_sg
        if SCALED:
            s = s * tl.load(k_scale_ptr + of_key, mask=is_key, other=0.0)[None, :]
        s = _scores(s, key, head, position, slope, relative_ptr, K, scale, softcap,
                    HAS_SLOPES, HAS_SOFTCAP, RELATIVE, PRECISE)  # fmt: skip
        if HAS_LEFT:
            s = tl.where(is_key[None, :] & (key[None, :] >= position[:, None] - left), s, float("-inf"))
        else:
            s = tl.where(is_key[None, :], s, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, axis=1))
        p = _exp_of(s - m_new[:, None], PRECISE, PRECISE)
        alpha = _exp_of(m - m_new, PRECISE, PRECISE)
        total = total * alpha
        weights = weights * alpha[:, None] + p
        m = m_new
        if SCALED:
            p = p * tl.load(v_scale_ptr + of_key, mask=is_key, other=0.0)[None, :]
        acc = tl.dot(p.to(q.dtype), v.to(q.dtype), acc * alpha[:, None], input_precision="ieee")
    total += tl.sum(weights, axis=1)

    out = (q_first + query) * H + head  # [BLOCK_M]
    is_query = tl.arange(0, BLOCK_M) < Q * R
    inside = is_query[:, None] & (dv < DV)[None, :]
    if SPLIT and parts > 1:
        of_totals = TOKENS.to(tl.int64) * H * SPLITS
        part = out * SPLITS + split
        tl.store(state_ptr + part, m, mask=is_query)
        tl.store(state_ptr + of_totals + part, total, mask=is_query)
        tl.store(part_ptr + part[:, None] * DV + dv[None, :], acc, mask=inside)
        tl.debug_barrier()  # the counter is moved by one thread, for what all have written
        before = tl.atomic_add(ready_ptr + pid, 1, sem="acq_rel", scope="gpu")
        if before == parts - 1:
            tl.store(ready_ptr + pid, 0)
            r = tl.arange(0, ROWS)
            r_head = kv_head * R + r % R
            r_out = (q_first + r // R) * H + r_head
            is_row = r < Q * R
            CHUNK: tl.constexpr = min(8, max(1, 8192 // (ROWS * BLOCK_DV)))
            r_m, r_total, r_acc = _combined(part_ptr, state_ptr, of_totals, r_out, is_row, parts, SPLITS, DV, BLOCK_DV,
                                            ROWS, CHUNK, PRECISE)  # fmt: skip
            _finish(o_ptr, r_out[:, None] * DV + dv[None, :], is_row[:, None] & (dv < DV)[None, :], r_m, r_total, r_acc,
                    r_head, K, sinks_ptr, slopes_ptr, HAS_SINKS, HAS_SLOPES, PRECISE)  # fmt: skip
    else:
        _finish(o_ptr, out[:, None] * DV + dv[None, :], inside, m, total, acc, head, K, sinks_ptr, slopes_ptr,
                HAS_SINKS, HAS_SLOPES, PRECISE)  # fmt: skip
    if split == 0:
        _clear_behind(o_ptr, behind * (H * DV), TOKENS.to(tl.int64) * (H * DV))
