# mypy: disallow-untyped-defs=False
"""Flash attention for Hopper in Gluon, after FlashAttention-3 (Shah et al., arXiv 2407.08608).

One warp copies tiles of K and V into a ring in shared memory by TMA; two warp groups own 64 queries each. A group
starts the scores of the next tile before it waits for the values of this one, so that its exponentials run beside the
matrix unit, and the two groups take turns in starting theirs (ping-pong). Probabilities stay in registers.

Tiles are walked from the last key to the first: the diagonal comes first, then the tiles that are seen whole, then the
window's left edge. Programs are persistent: each takes every so many-th tile of queries, the longest first; where
shared memory allows it, the queries of the next tile are copied and the output of the last one is written meanwhile.

A head dimension that is no power of two is cut into two that are (80 = 64 + 16): two copies, two products.
"""

from __future__ import annotations

from typing import Final

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

LOG2E: Final = gl.constexpr(1.4426950408889634)
LOWEST: Final = gl.constexpr(-3.4028234663852886e38)
"""A finite start of the running maximum: no row needs a check for `-inf - -inf`."""


@gluon.jit
def _copy(desc, desc2, at, row, full, buf, buf2, W: gl.constexpr, W2: gl.constexpr):
    """Starts the copy of rows of one head, in one or two parts; `full` is told of their bytes."""
    batch, head = at
    rows: gl.constexpr = buf.shape[0]
    whole = buf._reinterpret(buf.dtype, [1, 1, rows, W], desc.layout)
    if W2 > 0:
        mbarrier.expect(full, desc.block_type.nbytes + desc2.block_type.nbytes)
        tma.async_copy_global_to_shared(desc, [batch, head, row, 0], full, whole)
        rest = buf2._reinterpret(buf.dtype, [1, 1, rows, W2], desc2.layout)
        tma.async_copy_global_to_shared(desc2, [batch, head, row, W], full, rest)
    else:
        mbarrier.expect(full, desc.block_type.nbytes)
        tma.async_copy_global_to_shared(desc, [batch, head, row, 0], full, whole)


@gluon.jit
def _rounds(tiles):
    """How many tiles this program computes."""
    whole = tiles // gl.num_programs(0)
    return whole + (_index(whole) < tiles).to(gl.int32)


@gluon.jit
def _index(done):
    """The next tile after `done` others: programs take them in turns, every second time in the opposite order."""
    programs = gl.num_programs(0)
    place = gl.program_id(0)
    return done * programs + gl.where(done % 2 == 0, place, programs - 1 - place)


@gluon.jit
def _tile(index, B, H, Q_BLOCKS, SECTION):
    """Batch, head and block of a tile. SECTION heads, whose keys fit in L2, are done before the next ones are begun;
    among them the longest blocks of a causal mask come first, heads of a group side by side."""
    section = index // (SECTION * Q_BLOCKS)
    inside = index % (SECTION * Q_BLOCKS)
    size = gl.maximum(gl.minimum(SECTION, B * H - section * SECTION), 1)  # 1: for an index behind the last
    row = section * SECTION + inside % size
    return row // H, row % H, Q_BLOCKS - 1 - inside // size


@gluon.jit
def _span(block, Q, K, left, right, HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr, M: gl.constexpr, N: gl.constexpr):
    """Tiles of keys [first, stop) that a block sees, of which [whole, edge) are seen by all its queries."""
    bottom = block * M + K - Q  # positions of the first and the last query among the keys
    top = gl.minimum(block * M + M, Q) - 1 + K - Q
    first = 0
    whole = 0
    stop = (K + N - 1) // N
    edge = K // N
    if HAS_LEFT:
        first = gl.maximum(bottom - left, 0) // N
        whole = (gl.maximum(top - left, 0) + N - 1) // N
    if HAS_RIGHT:
        stop = gl.minimum((gl.maximum(top + right + 1, 0) + N - 1) // N, stop)
        edge = gl.minimum(gl.maximum(bottom + right + 1, 0) // N, edge)
    stop = gl.maximum(stop, first + 1)  # a block that sees nothing walks over one tile that is masked
    return first, whole, edge, stop


@gluon.jit
def _produce(
    descs,
    descs2,
    buffers,
    buffers2,
    barriers,
    sizes,
    HAS_LEFT: gl.constexpr,
    HAS_RIGHT: gl.constexpr,
    SLOTS: gl.constexpr,
    STAGES: gl.constexpr,
    D2: gl.constexpr,
    DV2: gl.constexpr,
):
    q_desc, k_desc, v_desc, _o_desc = descs
    q_desc2, k_desc2, v_desc2, _o_desc2 = descs2
    q_bufs, k_bufs, v_bufs = buffers
    q_bufs2, k_bufs2, v_bufs2 = buffers2
    q_full, q_empty, k_full, k_empty, v_full, v_empty, _turn = barriers
    B, H, GROUP, Q, K, Q_BLOCKS, SECTION, left, right = sizes
    M: gl.constexpr = q_bufs.shape[1]
    N: gl.constexpr = k_bufs.shape[1]
    D: gl.constexpr = k_bufs.shape[2]
    DV: gl.constexpr = v_bufs.shape[2]
    count = 0
    for done in range(_rounds(B * H * Q_BLOCKS)):
        batch, head, block = _tile(_index(done), B, H, Q_BLOCKS, SECTION)
        first, _whole, _edge, stop = _span(block, Q, K, left, right, HAS_LEFT, HAS_RIGHT, 2 * M, N)
        at = (batch, head // GROUP)
        for part in gl.static_range(2):
            slot = (done % SLOTS) * 2 + part
            mbarrier.wait(q_empty.index(slot), ((done // SLOTS) & 1) ^ 1)
            row = block * (2 * M) + part * M
            q_at, q_at2 = q_bufs.index(slot), q_bufs2.index(slot)
            _copy(q_desc, q_desc2, (batch, head), row, q_full.index(slot), q_at, q_at2, D, D2)
        for back in range(stop - first):
            row = (stop - 1 - back) * N
            stage = count % STAGES
            free = ((count // STAGES) & 1) ^ 1
            mbarrier.wait(k_empty.index(stage), free)
            _copy(k_desc, k_desc2, at, row, k_full.index(stage), k_bufs.index(stage), k_bufs2.index(stage), D, D2)
            mbarrier.wait(v_empty.index(stage), free)
            _copy(v_desc, v_desc2, at, row, v_full.index(stage), v_bufs.index(stage), v_bufs2.index(stage), DV, DV2)
            count = count + 1


@gluon.jit
def _softmax(
    s,
    m,
    total,
    j,
    low,
    high,
    key_mask_at,
    bias_at,
    step_p,
    step_b,
    K,
    scale,
    softcap,
    EDGE: gl.constexpr,
    HAS_LEFT: gl.constexpr,
    HAS_SOFTCAP: gl.constexpr,
    HAS_KEY_MASK: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    S_LAYOUT: gl.constexpr,
):
    """Probabilities of one tile, the new maximum and total, and what the accumulator is rescaled by.

    Query i sees the keys from low[i] up to high[i].
    """
    N: gl.constexpr = s.shape[1]
    key = j * N + gl.arange(0, N, gl.SliceLayout(0, S_LAYOUT))
    if HAS_SOFTCAP:
        unit = softcap * LOG2E
        s = unit - 2.0 * unit / (gl.exp2(s * (2.0 * LOG2E * scale / softcap)) + 1.0)
    if HAS_BIAS:
        if not HAS_SOFTCAP:
            s = s * (scale * LOG2E)
        bias = gl.load(bias_at + key.to(gl.int64) * step_b, mask=key < K, other=0.0).to(gl.float32)
        s = s + (bias * LOG2E)[None, :]
    if EDGE:
        s = gl.where(key[None, :] < high[:, None], s, float("-inf"))
        if HAS_LEFT:
            s = gl.where(key[None, :] >= low[:, None], s, float("-inf"))
    if HAS_KEY_MASK:
        real = gl.load(key_mask_at + key.to(gl.int64) * step_p, mask=key < K, other=0)
        s = gl.where((real != 0)[None, :], s, float("-inf"))
    if HAS_SOFTCAP or HAS_BIAS:
        m_new = gl.maximum(m, gl.max(s, axis=1))
        p = gl.exp2(s - m_new[:, None])
    else:
        m_new = gl.maximum(m, gl.max(s, axis=1) * (scale * LOG2E))
        p = gl.exp2(s * (scale * LOG2E) - m_new[:, None])
    alpha = gl.exp2(m - m_new)
    total = total * alpha + gl.sum(p, axis=1)
    return p, m_new, total, alpha


@gluon.jit
def _scores(q, q2, k, k2, none, D2: gl.constexpr):
    """Starts q @ k^T."""
    s = warpgroup_mma(q, k.permute((1, 0)), none, use_acc=False, is_async=True)
    if D2 > 0:
        s = warpgroup_mma(q2, k2.permute((1, 0)), s, is_async=True)
    return s


@gluon.jit
def _consume(
    descs,
    descs2,
    buffers,
    buffers2,
    barriers,
    sizes,
    pointers,
    numbers,
    PART: gl.constexpr,
    HAS_LEFT: gl.constexpr,
    HAS_RIGHT: gl.constexpr,
    HAS_SOFTCAP: gl.constexpr,
    HAS_KEY_MASK: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    HAS_SINKS: gl.constexpr,
    SLOTS: gl.constexpr,
    STAGES: gl.constexpr,
    D2: gl.constexpr,
    DV2: gl.constexpr,
    PINGPONG: gl.constexpr,
):
    o_desc, o_desc2 = descs[3], descs2[3]
    q_bufs, k_bufs, v_bufs = buffers
    q_bufs2, k_bufs2, v_bufs2 = buffers2
    q_full, q_empty, k_full, k_empty, v_full, v_empty, turn = barriers
    B, H, _group, Q, K, Q_BLOCKS, SECTION, left, right = sizes
    key_mask_ptr, bias_ptr, sink_ptr = pointers
    scale, softcap, step_pb, step_p, step_bb, step_bh, step_b, step_s = numbers
    M: gl.constexpr = q_bufs.shape[1]
    N: gl.constexpr = k_bufs.shape[1]
    DV: gl.constexpr = v_bufs.shape[2]
    WIDTH2: gl.constexpr = v_bufs2.shape[2]
    DTYPE: gl.constexpr = k_bufs.dtype
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DV, 16])
    O_LAYOUT2: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH2, 16])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, 2)
    P_LAYOUT2: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT2, 2)
    ROW: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    none = gl.zeros([M, N], gl.float32, S_LAYOUT)
    if PINGPONG and PART == 1:
        mbarrier.arrive(turn.index(0), count=1)
    count = 0
    batch, head, block = _tile(gl.program_id(0), B, H, Q_BLOCKS, SECTION)
    for done in range(_rounds(B * H * Q_BLOCKS)):
        first, whole, edge, stop = _span(block, Q, K, left, right, HAS_LEFT, HAS_RIGHT, 2 * M, N)
        row = block * (2 * M) + PART * M
        position = row + gl.arange(0, M, ROW) + (K - Q)
        low = position - left
        high = gl.full([M], 0, gl.int32, ROW) + K
        if HAS_RIGHT:
            high = gl.minimum(position + right + 1, K)
        key_mask_at = key_mask_ptr + batch.to(gl.int64) * step_pb
        bias_at = bias_ptr + batch.to(gl.int64) * step_bb + head.to(gl.int64) * step_bh
        m = gl.full([M], LOWEST, gl.float32, ROW)
        total = gl.zeros([M], gl.float32, ROW)
        acc = gl.zeros([M, DV], gl.float32, O_LAYOUT)
        acc2 = gl.zeros([M, WIDTH2], gl.float32, O_LAYOUT2)

        slot = (done % SLOTS) * 2 + PART
        q, q2 = q_bufs.index(slot), q_bufs2.index(slot)
        mbarrier.wait(q_full.index(slot), (done // SLOTS) & 1)
        stage = count % STAGES
        mbarrier.wait(k_full.index(stage), (count // STAGES) & 1)
        if PINGPONG:
            mbarrier.wait(turn.index(PART), count & 1)
        scores = _scores(q, q2, k_bufs.index(stage), k_bufs2.index(stage), none, D2)
        if PINGPONG:
            mbarrier.arrive(turn.index(1 - PART), count=1)
        if SLOTS > 1:  # the output of the tile before has left its memory by now
            tma.store_wait(0)
            mbarrier.arrive(q_empty.index(((done + 1) % SLOTS) * 2 + PART), count=1, pred=done > 0)
        s = warpgroup_mma_wait(0, deps=[scores])
        mbarrier.arrive(k_empty.index(stage), count=1)
        if HAS_RIGHT or edge < stop or whole >= stop:
            p, m, total, alpha = _softmax(
                s, m, total, stop - 1, low, high, key_mask_at, bias_at, step_p, step_b, K, scale, softcap,
                True, HAS_LEFT, HAS_SOFTCAP, HAS_KEY_MASK, HAS_BIAS, S_LAYOUT,
            )  # fmt: skip
        else:
            p, m, total, alpha = _softmax(
                s, m, total, stop - 1, low, high, key_mask_at, bias_at, step_p, step_b, K, scale, softcap,
                False, HAS_LEFT, HAS_SOFTCAP, HAS_KEY_MASK, HAS_BIAS, S_LAYOUT,
            )  # fmt: skip
        p = gl.convert_layout(p, P_LAYOUT).to(DTYPE)
        count = count + 1

        for SEGMENT in gl.static_range(3 if HAS_LEFT else 2):
            if SEGMENT == 0:
                begin = stop - 1
                end = gl.maximum(gl.maximum(edge, whole), first)
            elif SEGMENT == 1:
                begin = gl.minimum(edge, stop - 1)
                end = gl.maximum(whole, first)
            else:
                begin = gl.minimum(whole, stop - 1)
                end = first
            for back in range(begin - end):
                stage = count % STAGES
                old = (count - 1) % STAGES
                mbarrier.wait(k_full.index(stage), (count // STAGES) & 1)
                if PINGPONG:
                    mbarrier.wait(turn.index(PART), count & 1)
                scores = _scores(q, q2, k_bufs.index(stage), k_bufs2.index(stage), none, D2)
                mbarrier.wait(v_full.index(old), ((count - 1) // STAGES) & 1)
                values = warpgroup_mma(p, v_bufs.index(old), acc, is_async=True)
                if DV2 > 0:
                    p2 = gl.convert_layout(p, P_LAYOUT2)
                    values2 = warpgroup_mma(p2, v_bufs2.index(old), acc2, is_async=True)
                if PINGPONG:
                    mbarrier.arrive(turn.index(1 - PART), count=1)
                s = warpgroup_mma_wait(2 if DV2 > 0 else 1, deps=[scores])
                mbarrier.arrive(k_empty.index(stage), count=1)
                p_new, m, total, alpha = _softmax(
                    s, m, total, begin - 1 - back, low, high, key_mask_at, bias_at, step_p, step_b, K, scale, softcap,
                    SEGMENT != 1, HAS_LEFT, HAS_SOFTCAP, HAS_KEY_MASK, HAS_BIAS, S_LAYOUT,
                )  # fmt: skip
                if DV2 > 0:
                    acc, acc2, p = warpgroup_mma_wait(0, deps=[values, values2, p])
                    acc2 = acc2 * gl.convert_layout(alpha, gl.SliceLayout(1, O_LAYOUT2))[:, None]
                else:
                    acc, p = warpgroup_mma_wait(0, deps=[values, p])
                mbarrier.arrive(v_empty.index(old), count=1)
                acc = acc * gl.convert_layout(alpha, gl.SliceLayout(1, O_LAYOUT))[:, None]
                p = gl.convert_layout(p_new, P_LAYOUT).to(DTYPE)
                count = count + 1

        old = (count - 1) % STAGES
        mbarrier.wait(v_full.index(old), ((count - 1) // STAGES) & 1)
        values = warpgroup_mma(p, v_bufs.index(old), acc, is_async=True)
        if DV2 > 0:
            values2 = warpgroup_mma(gl.convert_layout(p, P_LAYOUT2), v_bufs2.index(old), acc2, is_async=True)
        next_batch, next_head, next_block = _tile(_index(done + 1), B, H, Q_BLOCKS, SECTION)  # beside the products
        if HAS_SINKS:
            sink = gl.load(sink_ptr + head * step_s).to(gl.float32) * LOG2E
            m_new = gl.maximum(m, sink)
            alpha = gl.exp2(m - m_new)
            total = total * alpha + gl.exp2(sink - m_new)
        factor = 1.0 / gl.where(total == 0.0, 1.0, total)
        if HAS_SINKS:
            factor = factor * alpha
        if DV2 > 0:
            acc, acc2, p = warpgroup_mma_wait(0, deps=[values, values2, p])
        else:
            acc, p = warpgroup_mma_wait(0, deps=[values, p])
        mbarrier.arrive(v_empty.index(old), count=1)
        # The queries are read: their memory takes the output, until the copy has read that.
        acc = acc * gl.convert_layout(factor, gl.SliceLayout(1, O_LAYOUT))[:, None]
        q._reinterpret(DTYPE, [M, DV], v_bufs.layout).store(acc.to(DTYPE))
        if DV2 > 0:
            acc2 = acc2 * gl.convert_layout(factor, gl.SliceLayout(1, O_LAYOUT2))[:, None]
            q2._reinterpret(DTYPE, [M, DV2], v_bufs2.layout).store(acc2.to(DTYPE))
        fence_async_shared()
        gl.thread_barrier()
        o_at = q._reinterpret(DTYPE, [1, 1, M, DV], o_desc.layout)
        tma.async_copy_shared_to_global(o_desc, [batch, head, row, 0], o_at)
        if DV2 > 0:
            o_at2 = q2._reinterpret(DTYPE, [1, 1, M, DV2], o_desc2.layout)
            tma.async_copy_shared_to_global(o_desc2, [batch, head, row, DV], o_at2)
        if SLOTS == 1:
            tma.store_wait(0)
            mbarrier.arrive(q_empty.index(PART), count=1)
        batch, head, block = next_batch, next_head, next_block
    tma.store_wait(0)


@gluon.constexpr_function
def _layout(rows, width, dtype):
    return gl.NVMMASharedLayout.get_default_for([rows, width], dtype)


@gluon.jit(do_not_specialize=["B", "Q", "K", "Q_BLOCKS", "SECTION", "left", "right"])
def attention_hopper_kernel(
    q_desc,  # [B, H, Q, D], blocks of [1, 1, M, first part of D]
    k_desc,  # [B, Hkv, K, D], blocks of [1, 1, N, first part of D]
    v_desc,  # [B, Hkv, K, DV]
    o_desc,  # [B, H, Q, DV]
    q_desc2,  # the same with blocks as wide as the second part; where there is none, the first again
    k_desc2,
    v_desc2,
    o_desc2,
    key_mask_ptr,
    bias_ptr,
    sink_ptr,
    B,
    H,
    GROUP,
    Q,
    K,
    Q_BLOCKS,
    SECTION,
    step_pb,
    step_p,
    step_bb,
    step_bh,
    step_b,
    step_s,
    scale,
    softcap,
    left,
    right,
    HAS_LEFT: gl.constexpr,
    HAS_RIGHT: gl.constexpr,
    HAS_SOFTCAP: gl.constexpr,
    HAS_KEY_MASK: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    HAS_SINKS: gl.constexpr,
    D2: gl.constexpr,  # 0 without a second part
    DV2: gl.constexpr,
    SLOTS: gl.constexpr,  # tiles of queries in shared memory
    STAGES: gl.constexpr,  # tiles of keys and values
    PINGPONG: gl.constexpr,
    REGISTERS: gl.constexpr,  # of a thread of the second group; the first gets what is left, about as many
):
    DTYPE: gl.constexpr = k_desc.dtype
    M: gl.constexpr = q_desc.block_type.shape[2]
    N: gl.constexpr = k_desc.block_type.shape[2]
    D: gl.constexpr = k_desc.block_type.shape[3]
    DV: gl.constexpr = v_desc.block_type.shape[3]
    q_bufs = gl.allocate_shared_memory(DTYPE, [2 * SLOTS, M, D], _layout(M, D, DTYPE))
    k_bufs = gl.allocate_shared_memory(DTYPE, [STAGES, N, D], _layout(N, D, DTYPE))
    v_bufs = gl.allocate_shared_memory(DTYPE, [STAGES, N, DV], _layout(N, DV, DTYPE))
    q_bufs2, k_bufs2, v_bufs2 = q_bufs, k_bufs, v_bufs
    if D2 > 0:
        q_bufs2 = gl.allocate_shared_memory(DTYPE, [2 * SLOTS, M, D2], _layout(M, D2, DTYPE))
        k_bufs2 = gl.allocate_shared_memory(DTYPE, [STAGES, N, D2], _layout(N, D2, DTYPE))
    if DV2 > 0:
        v_bufs2 = gl.allocate_shared_memory(DTYPE, [STAGES, N, DV2], _layout(N, DV2, DTYPE))
    q_full = gl.allocate_shared_memory(gl.int64, [2 * SLOTS, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [2 * SLOTS, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    turn = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2 * SLOTS):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(q_empty.index(i), count=1)
    for i in gl.static_range(2):
        mbarrier.init(turn.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=2)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(v_empty.index(i), count=2)
    descs = (q_desc, k_desc, v_desc, o_desc)
    descs2 = (q_desc2, k_desc2, v_desc2, o_desc2)
    buffers = (q_bufs, k_bufs, v_bufs)
    buffers2 = (q_bufs2, k_bufs2, v_bufs2)
    barriers = (q_full, q_empty, k_full, k_empty, v_full, v_empty, turn)
    sizes = (B, H, GROUP, Q, K, Q_BLOCKS, SECTION, left, right)
    pointers = (key_mask_ptr, bias_ptr, sink_ptr)
    numbers = (scale, softcap, step_pb, step_p, step_bb, step_bh, step_b, step_s)
    gl.warp_specialize(
        [
            (
                _consume,
                (
                    descs, descs2, buffers, buffers2, barriers, sizes, pointers, numbers, 0, HAS_LEFT, HAS_RIGHT,
                    HAS_SOFTCAP, HAS_KEY_MASK, HAS_BIAS, HAS_SINKS, SLOTS, STAGES, D2, DV2, PINGPONG,
                ),
            ),
            (
                _consume,
                (
                    descs, descs2, buffers, buffers2, barriers, sizes, pointers, numbers, 1, HAS_LEFT, HAS_RIGHT,
                    HAS_SOFTCAP, HAS_KEY_MASK, HAS_BIAS, HAS_SINKS, SLOTS, STAGES, D2, DV2, PINGPONG,
                ),
            ),
            (
                _produce,
                (descs, descs2, buffers, buffers2, barriers, sizes, HAS_LEFT, HAS_RIGHT, SLOTS, STAGES, D2, DV2),
            ),
        ],
        [4, 1],
        [REGISTERS, 24],
    )  # fmt: skip
