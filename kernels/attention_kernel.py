# mypy: disallow-untyped-defs=False
"""Flash attention in Triton (Dao, arXiv 2307.08691): a program owns BLOCK_M queries of one head, walks over keys.

Scores never leave the chip: running maximum m, running total and accumulator acc are rescaled whenever m grows. All
variants are one kernel, whose constants say what a program has to do; what it does not have to do costs nothing.

* The walk over the keys has three segments: tiles at the window's left edge, tiles that every query sees whole, and
  tiles at the diagonal or at the end. Only the middle one is long, and it compares no positions.
* R query heads that read one kv head can share a tile: row r is query r // R of head r % R of the group. For few
  queries this reads each key once a group.
* SPLIT: the second dimension of the grid divides the keys, `combine_kernel` puts the parts together.
* VARLEN: sequences lie one behind the other, `cu_q` and `cu_k` say where each begins. PAGED: keys lie in pages of PAGE
  that `table` lists for each sequence.
* A head dimension that is no power of two is cut into two that are (80 = 64 + 16).
"""

from __future__ import annotations

from typing import Final

import triton
import triton.language as tl

from .activation_triton import tanh

LOG2E: Final = tl.constexpr(1.4426950408889634)
LOWEST: Final = tl.constexpr(-3.4028234663852886e38)
"""A finite start of the running maximum: no row needs a check for `-inf - -inf`."""


@triton.jit
def _exp(x, PRECISE: tl.constexpr):
    """exp(x) for x <= 0: the hardware's, or with PRECISE Cephes' expf.c, for probabilities that stay in fp32.

    The hardware rounds x * log2(e) first, which costs an ulp for each doubling of |x|.
    """
    if PRECISE:
        x = tl.where(x < -150.0, -150.0, x)  # zero in fp32, and no infinity below
        n = tl.floor(x * LOG2E + 0.5)
        r = (x - n * 0.693359375) + n * 2.12194440054690583e-4  # x - n ln 2, in two steps
        p = ((1.9875691500e-4 * r + 1.3981999507e-3) * r + 8.3334519073e-3) * r + 4.1665795894e-2
        p = (p * r + 1.6666665459e-1) * r + 5.0000001201e-1
        y = tl.exp2(n) * (p * r * r + r + 1.0)
    else:
        y = tl.exp2(x * LOG2E)
    return y


@triton.jit
def _exp_of(x, NATURAL: tl.constexpr, PRECISE: tl.constexpr):
    """The exponential of a difference of scores, which are in units of log(2) unless NATURAL."""
    return _exp(x, PRECISE) if NATURAL else tl.exp2(x)


@triton.jit
def _soften(s, scale, softcap, NATURAL: tl.constexpr, PRECISE: tl.constexpr):
    """softcap * tanh(s * scale / softcap), by one exp2 where scores may have an error of softcap * 2^-22."""
    if PRECISE:
        y = softcap * tanh(s * (scale / softcap))
    else:
        unit = softcap if NATURAL else softcap * LOG2E
        y = unit - 2.0 * unit / (tl.exp2(s * (2.0 * LOG2E * scale / softcap)) + 1.0)
    return y


@triton.jit
def _clear_behind(o_ptr, first, last):
    """Zeroes elements [first, last) of o: the rows behind the last sequence; every program takes a share."""
    for start in range(first + tl.program_id(0) * 1024, last, tl.num_programs(0) * 1024):
        at = start + tl.arange(0, 1024)
        tl.store(o_ptr + at, tl.zeros((1024,), o_ptr.dtype.element_ty), mask=at < last)


# Sizes, and the strides that change with them, are not specialised: a new length must not compile a new kernel.
_SIZES: Final = ("B", "Q", "K", "Q_BLOCKS", "SPLITS", "ROWS", "left", "right", "stride_tb")
_STRIDES: Final = tuple(f"stride_{name}" for name in ("qb", "qh", "qq", "kb", "kh", "kk", "vb", "vh", "vk"))


@triton.jit(do_not_specialize=[*_SIZES, *_STRIDES])
def attention_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    mask_ptr,
    bias_ptr,
    key_mask_ptr,
    sink_ptr,
    o_ptr,  # [ROWS, DV], row = (query of all) * H + head; with SPLIT [SPLITS, ROWS, DV]
    state_ptr,  # with SPLIT: [2, SPLITS, ROWS], maximum and total
    cu_q_ptr,
    cu_k_ptr,
    table_ptr,
    B,
    H,
    GROUP,
    Q,
    K,
    Q_BLOCKS,
    SPLITS,
    ROWS,
    stride_qb,
    stride_qh,
    stride_qq,
    stride_qd,
    stride_kb,
    stride_kh,
    stride_kk,
    stride_kd,
    stride_vb,
    stride_vh,
    stride_vk,
    stride_vd,
    stride_mb,
    stride_mh,
    stride_mq,
    stride_mk,
    stride_bb,
    stride_bh,
    stride_bq,
    stride_bk,
    stride_pb,
    stride_pk,
    stride_sh,
    stride_tb,
    scale,
    softcap,
    left,
    right,
    MASK: tl.constexpr,  # 0 none, 1 the same for all queries, 2 for each pair
    BIAS: tl.constexpr,  # as MASK
    HAS_KEY_MASK: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    PRECISE: tl.constexpr,
    NATURAL: tl.constexpr,  # scores in natural units: with a bias, in fp32, or for a scale that is not positive
    SPLIT: tl.constexpr,
    VARLEN: tl.constexpr,
    PAGED: tl.constexpr,
    PAGE: tl.constexpr,
    ALIGN: tl.constexpr,  # strides of q, k and v but the last are given in units of so many elements
    WIDE: tl.constexpr,  # offsets inside a tile need 64 bits
    R: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_D2: tl.constexpr,  # the second part, 0 where one is enough
    BLOCK_DV: tl.constexpr,
    BLOCK_DV2: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    pid = tl.program_id(0)
    columns = H // R  # heads that have tiles of their own lie side by side: they share keys in L2
    lead = (pid % columns) * R
    batch = ((pid // columns) % B).to(tl.int64)
    block = Q_BLOCKS - 1 - pid // columns // B  # the longest rows of a causal mask first
    kv_head = (lead // GROUP).to(tl.int64)
    q_first = batch * Q
    k_first = batch * K
    q_base = q_ptr + batch * stride_qb * ALIGN
    if VARLEN:
        if not SPLIT:
            _clear_behind(o_ptr, tl.load(cu_q_ptr + B).to(tl.int64) * (H * DV), ROWS.to(tl.int64) * DV)
        q_first = tl.load(cu_q_ptr + batch).to(tl.int64)
        k_first = tl.load(cu_k_ptr + batch).to(tl.int64)
        Q = (tl.load(cu_q_ptr + batch + 1) - q_first).to(tl.int32)
        K = (tl.load(cu_k_ptr + batch + 1) - k_first).to(tl.int32)
        if block * BLOCK_M >= Q * R:
            return
        q_base = q_ptr + q_first * stride_qq * ALIGN
    row = block * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    is_query = row < Q * R
    row = tl.minimum(row, Q * R - 1)  # what lies beyond computes the last row again
    query = (row // R).to(tl.int64)
    head = (lead + row % R).to(tl.int64)
    if R == 1:
        head = lead.to(tl.int64)
    shift = K - Q
    position = row // R + shift  # where each query stands among the keys

    d = tl.arange(0, BLOCK_D)
    dv = tl.arange(0, BLOCK_DV)
    d2 = BLOCK_D + tl.arange(0, BLOCK_D2 if BLOCK_D2 > 0 else 16)
    dv2 = BLOCK_DV + tl.arange(0, BLOCK_DV2 if BLOCK_DV2 > 0 else 16)
    n = tl.arange(0, BLOCK_N)
    col = n
    if WIDE:
        d = d.to(tl.int64)
        dv = dv.to(tl.int64)
        d2 = d2.to(tl.int64)
        dv2 = dv2.to(tl.int64)
        col = n.to(tl.int64)
    rows = query * stride_qq * ALIGN + head * stride_qh * ALIGN
    if D >= BLOCK_D:
        q = tl.load(q_base + rows[:, None] + d[None, :] * stride_qd)  # [BLOCK_M, BLOCK_D]
    else:
        q = tl.load(q_base + rows[:, None] + d[None, :] * stride_qd, mask=(d < D)[None, :], other=0.0)
    if BLOCK_D2 > 0:
        q2 = tl.load(q_base + rows[:, None] + d2[None, :] * stride_qd, mask=(d2 < D)[None, :], other=0.0)
    if BLOCK_DV2 > 0:
        acc2 = tl.zeros((BLOCK_M, BLOCK_DV2), dtype=tl.float32)

    # The segments' borders, all multiples of BLOCK_N but the last.
    bottom = block * BLOCK_M // R + shift  # positions of the first and the last query
    top = tl.minimum(block * BLOCK_M + BLOCK_M - 1, Q * R - 1) // R + shift
    first = 0
    whole = 0  # from here to `edge` every tile is seen by every query
    stop = K
    edge = K // BLOCK_N * BLOCK_N
    if HAS_LEFT:
        first = tl.maximum(bottom - left, 0) // BLOCK_N * BLOCK_N
        whole = (tl.maximum(top - left, 0) + BLOCK_N - 1) // BLOCK_N * BLOCK_N
    if HAS_RIGHT:
        stop = tl.maximum(tl.minimum(top + right + 1, K), 0)
        edge = tl.minimum(tl.maximum(bottom + right + 1, 0) // BLOCK_N * BLOCK_N, edge)
    split = tl.program_id(1)
    if SPLIT:
        share = tl.cdiv(tl.cdiv(tl.maximum(stop - first, 0), BLOCK_N), SPLITS) * BLOCK_N
        first += split * share
        stop = tl.minimum(stop, first + share)

    k_base = k_ptr + kv_head * stride_kh * ALIGN
    v_base = v_ptr + kv_head * stride_vh * ALIGN
    if not PAGED:
        k_base += batch * stride_kb * ALIGN
        v_base += batch * stride_vb * ALIGN
        if VARLEN:
            k_base = k_ptr + (kv_head * stride_kh + k_first * stride_kk) * ALIGN
            v_base = v_ptr + (kv_head * stride_vh + k_first * stride_vk) * ALIGN
    m = tl.full((BLOCK_M,), LOWEST, dtype=tl.float32)
    total = tl.zeros((BLOCK_M,), dtype=tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_DV), dtype=tl.float32)
    zero = batch * 0  # 64 bits
    for SEGMENT in tl.static_range(0 if HAS_LEFT else 1, 3):
        if SEGMENT == 0:
            low = first
            high = tl.minimum(whole, stop)
        elif SEGMENT == 1:
            low = tl.maximum(first, whole)
            high = tl.minimum(edge, stop)
        else:
            low = tl.maximum(first, tl.maximum(whole, edge))
            high = stop
        for start in range(low, high, BLOCK_N):
            key = start + n  # [BLOCK_N]
            is_key = key < K
            if PAGED:
                if PAGE % BLOCK_N == 0:
                    page = tl.load(table_ptr + batch * stride_tb + start // PAGE).to(tl.int64)
                    k_tile = k_base + (page * stride_kb + (start % PAGE) * stride_kk) * ALIGN
                    v_tile = v_base + (page * stride_vb + (start % PAGE) * stride_vk) * ALIGN
                    k_col = col * stride_kk * ALIGN
                    v_col = col * stride_vk * ALIGN
                else:
                    page = tl.load(table_ptr + batch * stride_tb + key // PAGE, mask=is_key, other=0).to(tl.int64)
                    k_tile = k_base
                    v_tile = v_base
                    k_col = (page * stride_kb + (key % PAGE) * stride_kk) * ALIGN
                    v_col = (page * stride_vb + (key % PAGE) * stride_vk) * ALIGN
            else:
                k_tile = k_base + (zero + start) * stride_kk * ALIGN
                v_tile = v_base + (zero + start) * stride_vk * ALIGN
                k_col = col * stride_kk * ALIGN
                v_col = col * stride_vk * ALIGN

            k_at = k_tile + (k_col[None, :] + d[:, None] * stride_kd)
            if SEGMENT != 1 and D < BLOCK_D:
                k = tl.load(k_at, mask=is_key[None, :] & (d < D)[:, None], other=0.0)  # [BLOCK_D, BLOCK_N]
            elif SEGMENT != 1:
                k = tl.load(k_at, mask=is_key[None, :], other=0.0)
            elif D < BLOCK_D:
                k = tl.load(k_at, mask=(d < D)[:, None], other=0.0)
            else:
                k = tl.load(k_at)
            s = tl.dot(q, k, input_precision="ieee")  # [BLOCK_M, BLOCK_N]
            if BLOCK_D2 > 0:
                k2_at = k_tile + (k_col[None, :] + d2[:, None] * stride_kd)
                if SEGMENT != 1:
                    k2 = tl.load(k2_at, mask=is_key[None, :] & (d2 < D)[:, None], other=0.0)
                elif D < BLOCK_D + BLOCK_D2:
                    k2 = tl.load(k2_at, mask=(d2 < D)[:, None], other=0.0)
                else:
                    k2 = tl.load(k2_at)
                s = tl.dot(q2, k2, s, input_precision="ieee")

            if HAS_SOFTCAP:
                s = _soften(s, scale, softcap, NATURAL, PRECISE)
            elif NATURAL:
                s = s * scale
            if BIAS > 0:
                bias_at = bias_ptr + batch * stride_bb + key.to(tl.int64)[None, :] * stride_bk
                if BIAS == 2 or R > 1:
                    bias_at += (head * stride_bh + query * stride_bq)[:, None]
                else:
                    bias_at += head * stride_bh
                if SEGMENT != 1:
                    s += tl.load(bias_at, mask=is_key[None, :], other=0.0).to(tl.float32)
                else:
                    s += tl.load(bias_at).to(tl.float32)
            if SEGMENT != 1:
                visible = is_key[None, :]
                if HAS_LEFT:
                    visible = visible & (key[None, :] >= position[:, None] - left)
                if HAS_RIGHT:
                    visible = visible & (key[None, :] <= position[:, None] + right)
                s = tl.where(visible, s, float("-inf"))
            if HAS_KEY_MASK:
                real = tl.load(key_mask_ptr + batch * stride_pb + key.to(tl.int64) * stride_pk, mask=is_key, other=0)
                s = tl.where((real != 0)[None, :], s, float("-inf"))
            if MASK > 0:
                mask_at = mask_ptr + batch * stride_mb + key.to(tl.int64)[None, :] * stride_mk
                if MASK == 2 or R > 1:
                    mask_at += (head * stride_mh + query * stride_mq)[:, None]
                else:
                    mask_at += head * stride_mh
                seen = tl.load(mask_at, mask=is_key[None, :], other=0) if SEGMENT != 1 else tl.load(mask_at)
                s = tl.where(seen != 0, s, float("-inf"))

            if HAS_SOFTCAP or NATURAL:
                m_new = tl.maximum(m, tl.max(s, axis=1))
                p = _exp_of(s - m_new[:, None], NATURAL, PRECISE)
            else:
                m_new = tl.maximum(m, tl.max(s, axis=1) * (scale * LOG2E))
                p = tl.exp2(s * (scale * LOG2E) - m_new[:, None])
            alpha = _exp_of(m - m_new, NATURAL, PRECISE)
            total = total * alpha + tl.sum(p, axis=1)
            m = m_new

            v_at = v_tile + (v_col[:, None] + dv[None, :] * stride_vd)
            if SEGMENT != 1 and DV < BLOCK_DV:
                v = tl.load(v_at, mask=is_key[:, None] & (dv < DV)[None, :], other=0.0)  # [BLOCK_N, BLOCK_DV]
            elif SEGMENT != 1:
                v = tl.load(v_at, mask=is_key[:, None], other=0.0)
            elif DV < BLOCK_DV:
                v = tl.load(v_at, mask=(dv < DV)[None, :], other=0.0)
            else:
                v = tl.load(v_at)
            p = p.to(v.dtype)
            acc = tl.dot(p, v, acc * alpha[:, None], input_precision="ieee")
            if BLOCK_DV2 > 0:
                v2_at = v_tile + (v_col[:, None] + dv2[None, :] * stride_vd)
                if SEGMENT != 1:
                    v2 = tl.load(v2_at, mask=is_key[:, None] & (dv2 < DV)[None, :], other=0.0)
                elif DV < BLOCK_DV + BLOCK_DV2:
                    v2 = tl.load(v2_at, mask=(dv2 < DV)[None, :], other=0.0)
                else:
                    v2 = tl.load(v2_at)
                acc2 = tl.dot(p, v2, acc2 * alpha[:, None], input_precision="ieee")

    out = (q_first + query) * H + head  # [BLOCK_M]
    if SPLIT:
        out += split.to(tl.int64) * ROWS
        tl.store(state_ptr + out, m, mask=is_query)
        tl.store(state_ptr + SPLITS.to(tl.int64) * ROWS + out, total, mask=is_query)
    else:
        if HAS_SINKS:
            sink = tl.load(sink_ptr + head * stride_sh).to(tl.float32)
            if not NATURAL:
                sink = sink * LOG2E
            m_new = tl.maximum(m, sink)
            alpha = _exp_of(m - m_new, NATURAL, PRECISE)
            total = total * alpha + _exp_of(sink - m_new, NATURAL, PRECISE)
            acc = acc * alpha[:, None]
            if BLOCK_DV2 > 0:
                acc2 = acc2 * alpha[:, None]
        total = tl.where(total == 0.0, 1.0, total)
        acc = _divide(acc, total, PRECISE)
        if BLOCK_DV2 > 0:
            acc2 = _divide(acc2, total, PRECISE)
    keep = is_query[:, None]
    tl.store(o_ptr + out[:, None] * DV + dv[None, :], acc.to(o_ptr.dtype.element_ty), mask=keep & (dv < DV)[None, :])
    if BLOCK_DV2 > 0:
        o = acc2.to(o_ptr.dtype.element_ty)
        tl.store(o_ptr + out[:, None] * DV + dv2[None, :], o, mask=keep & (dv2 < DV)[None, :])


@triton.jit
def _divide(acc, total, PRECISE: tl.constexpr):
    return tl.div_rn(acc, total[:, None]) if PRECISE else acc * (1.0 / total)[:, None]


@triton.jit(do_not_specialize=["ROWS", "SPLITS", "B"])
def combine_kernel(
    part_ptr,  # [SPLITS, ROWS, DV]
    state_ptr,  # [2, SPLITS, ROWS]
    sink_ptr,
    cu_q_ptr,
    o_ptr,  # [ROWS, DV]
    B,
    H,
    ROWS,
    SPLITS,
    stride_sh,
    HAS_SINKS: tl.constexpr,
    VARLEN: tl.constexpr,
    NATURAL: tl.constexpr,
    PRECISE: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """One program puts the parts of one query and head together."""
    row = tl.program_id(0).to(tl.int64)
    split = tl.arange(0, BLOCK_S)
    dv = tl.arange(0, BLOCK_DV)
    at = split.to(tl.int64) * ROWS + row
    is_part = split < SPLITS
    if VARLEN:
        is_part &= row < tl.load(cu_q_ptr + B).to(tl.int64) * H  # nothing behind the last sequence
    m = tl.load(state_ptr + at, mask=is_part, other=LOWEST)  # [BLOCK_S]
    total = tl.load(state_ptr + SPLITS.to(tl.int64) * ROWS + at, mask=is_part, other=0.0)
    part = tl.load(part_ptr + at[:, None] * DV + dv[None, :], mask=is_part[:, None] & (dv < DV)[None, :], other=0.0)
    top = tl.max(m, axis=0)
    if HAS_SINKS:
        sink = tl.load(sink_ptr + (row % H) * stride_sh).to(tl.float32)
        if not NATURAL:
            sink = sink * LOG2E
        top = tl.maximum(top, sink)
    weight = _exp_of(m - top, NATURAL, PRECISE)
    whole = tl.sum(total * weight, axis=0)
    if HAS_SINKS:
        whole += _exp_of(sink - top, NATURAL, PRECISE)
    y = tl.sum(part * weight[:, None], axis=0)
    y = tl.div_rn(y, tl.where(whole == 0.0, 1.0, whole))
    tl.store(o_ptr + row * DV + dv, y.to(o_ptr.dtype.element_ty), mask=dv < DV)
