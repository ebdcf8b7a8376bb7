# mypy: disallow-untyped-defs=False
"""Flash attention for Hopper in Gluon, after FlashAttention-3 (Shah et al., arXiv 2407.08608).

One warp copies tiles of K and V into a ring in shared memory by TMA; two warp groups own 64 queries each. A group
starts the scores of the next tile before it waits for the values of this one, so that its exponentials run beside the
matrix unit, and the two groups take turns in starting theirs (ping-pong). Probabilities stay in registers.

Tiles are walked from the last key to the first: the diagonal comes first, then the tiles that are seen whole, then the
window's left edge. Programs are persistent: each takes every so many-th tile of queries, the longest first; where
shared memory allows it, the queries of the next tile are copied and the output of the last one is written meanwhile.

VARLEN: sequences lie one behind the other. A copy knows nothing of their borders: values behind a sequence's last key
are zeroed in shared memory, and a tile of queries that reaches into the next sequence is stored row by row.

A head dimension that is no power of two is cut into two that are (80 = 64 + 16): two copies, two products.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .attention_gluon_parts import (
    LOG2E,
    LOWEST,
    clear,
    copy,
    find,
    layout_of,
    rounds,
    scores_of,
    softmax,
    span,
)
from .gluon_barrier import thread_barrier


@gluon.jit
def _produce(
    descs,
    descs2,
    buffers,
    buffers2,
    barriers,
    sizes,
    order,
    cu,
    HAS_LEFT: gl.constexpr,
    HAS_RIGHT: gl.constexpr,
    VARLEN: gl.constexpr,
    RAGGED: gl.constexpr,
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
    tiles, GROUP, SEQUENCES, _rows, max_q, max_k, left, right = sizes
    M: gl.constexpr = q_bufs.shape[1]
    N: gl.constexpr = k_bufs.shape[1]
    D: gl.constexpr = k_bufs.shape[2]
    DV: gl.constexpr = v_bufs.shape[2]
    count = 0
    used = 0
    most = rounds(tiles)
    done, batch, head, block, q_first, k_first, Q, K = find(
        gl.to_tensor(0), SEQUENCES - 1, most, tiles, order, max_q, max_k, cu, VARLEN, RAGGED, 2 * M
    )
    while done < most:
        place = batch * 0 if VARLEN else batch
        first, _whole, _edge, stop = span(block, Q, K, left, right, HAS_LEFT, HAS_RIGHT, 2 * M, N)
        at = (place, head // GROUP)
        for part in gl.static_range(2):
            slot = (used % SLOTS) * 2 + part
            mbarrier.wait(q_empty.index(slot), ((used // SLOTS) & 1) ^ 1)
            row = q_first + block * (2 * M) + part * M
            q_at, q_at2 = q_bufs.index(slot), q_bufs2.index(slot)
            copy(q_desc, q_desc2, (place, head), row, q_full.index(slot), q_at, q_at2, D, D2)
        for back in range(stop - first):
            row = k_first + (stop - 1 - back) * N
            stage = count % STAGES
            free = ((count // STAGES) & 1) ^ 1
            mbarrier.wait(k_empty.index(stage), free)
            copy(k_desc, k_desc2, at, row, k_full.index(stage), k_bufs.index(stage), k_bufs2.index(stage), D, D2)
            mbarrier.wait(v_empty.index(stage), free)
            copy(v_desc, v_desc2, at, row, v_full.index(stage), v_bufs.index(stage), v_bufs2.index(stage), DV, DV2)
            count = count + 1
        used = used + 1
        done, batch, head, block, q_first, k_first, Q, K = find(
            done + 1, batch, most, tiles, order, max_q, max_k, cu, VARLEN, RAGGED, 2 * M
        )


@gluon.jit
def _copy_out(desc, desc2, q, q2, batch, head, row, DV: gl.constexpr, DV2: gl.constexpr):
    """Starts the copy of a tile of the output, which lies where the queries were."""
    rows: gl.constexpr = q.shape[0]
    whole = q._reinterpret(q.dtype, [1, 1, rows, DV], desc.layout)
    tma.async_copy_shared_to_global(desc, [batch, head, row, 0], whole)
    if DV2 > 0:
        rest = q2._reinterpret(q.dtype, [1, 1, rows, DV2], desc2.layout)
        tma.async_copy_shared_to_global(desc2, [batch, head, row, DV], rest)


@gluon.jit
def _store(o_ptr, acc, rows, head, H, FIRST: gl.constexpr, WIDTH: gl.constexpr):
    """Stores rows [rows[0], rows[1]) of o `[T, H, WIDTH]`, columns from FIRST on, as many as acc holds of them."""
    LAYOUT: gl.constexpr = acc.type.layout
    row = rows[0] + gl.arange(0, acc.shape[0], gl.SliceLayout(1, LAYOUT))
    column = FIRST + gl.arange(0, acc.shape[1], gl.SliceLayout(0, LAYOUT))
    at = o_ptr + ((row.to(gl.int64) * H + head) * WIDTH)[:, None] + column[None, :]
    gl.store(at, acc, mask=(row < rows[1])[:, None] & (column < WIDTH)[None, :])


@gluon.jit
def _clear_behind(o_ptr, cu_q_ptr, SEQUENCES, T, ELEMENTS, PART: gl.constexpr):
    """Zeroes the rows of o `[T, H, WIDTH]` behind the last sequence; ELEMENTS are in one row."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([8], [32], [4], [0])
    last = T.to(gl.int64) * ELEMENTS
    first = gl.load(cu_q_ptr + SEQUENCES).to(gl.int64) * ELEMENTS + (gl.program_id(0) * 2 + PART) * 1024
    for start in range(first, last, gl.num_programs(0) * 2048):
        at = start + gl.arange(0, 1024, LAYOUT)
        gl.store(o_ptr + at, gl.zeros([1024], o_ptr.dtype.element_ty, LAYOUT), mask=at < last)


@gluon.jit
def _consume(
    descs,
    descs2,
    buffers,
    buffers2,
    barriers,
    sizes,
    order,
    cu,
    pointers,
    numbers,
    PART: gl.constexpr,
    HAS_LEFT: gl.constexpr,
    HAS_RIGHT: gl.constexpr,
    HAS_SOFTCAP: gl.constexpr,
    HAS_KEY_MASK: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    HAS_SINKS: gl.constexpr,
    VARLEN: gl.constexpr,
    RAGGED: gl.constexpr,
    SLOTS: gl.constexpr,
    STAGES: gl.constexpr,
    D2: gl.constexpr,
    DV2: gl.constexpr,
    WIDTH: gl.constexpr,
    PINGPONG: gl.constexpr,
):
    o_desc, o_desc2 = descs[3], descs2[3]
    q_bufs, k_bufs, v_bufs = buffers
    q_bufs2, k_bufs2, v_bufs2 = buffers2
    q_full, q_empty, k_full, k_empty, v_full, v_empty, turn = barriers
    tiles, _group, SEQUENCES, T, max_q, max_k, left, right = sizes
    o_ptr, key_mask_ptr, bias_ptr, sink_ptr = pointers
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
    used = 0
    most = rounds(tiles)
    done, batch, head, block, q_first, _k_first, Q, K = find(
        gl.to_tensor(0), SEQUENCES - 1, most, tiles, order, max_q, max_k, cu, VARLEN, RAGGED, 2 * M
    )
    while done < most:
        at = batch * 0 if VARLEN else batch
        first, whole, edge, stop = span(block, Q, K, left, right, HAS_LEFT, HAS_RIGHT, 2 * M, N)
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

        slot = (used % SLOTS) * 2 + PART
        q, q2 = q_bufs.index(slot), q_bufs2.index(slot)
        mbarrier.wait(q_full.index(slot), (used // SLOTS) & 1)
        stage = count % STAGES
        mbarrier.wait(k_full.index(stage), (count // STAGES) & 1)
        if VARLEN and stop * N > K:  # values of the next sequence are not even multiplied by zero: they may be NaN
            mbarrier.wait(v_full.index(stage), (count // STAGES) & 1)
            clear(v_bufs.index(stage), K - (stop - 1) * N)
            if DV2 > 0:
                clear(v_bufs2.index(stage), K - (stop - 1) * N)
            fence_async_shared()
            thread_barrier()
        if PINGPONG:
            mbarrier.wait(turn.index(PART), count & 1)
        scores = scores_of(q, q2, k_bufs.index(stage), k_bufs2.index(stage), none, D2)
        if PINGPONG:
            mbarrier.arrive(turn.index(1 - PART), count=1)
        if SLOTS > 1:  # the output of the tile before has left its memory by now
            tma.store_wait(0)
            mbarrier.arrive(q_empty.index(((used + 1) % SLOTS) * 2 + PART), count=1, pred=used > 0)
        s = warpgroup_mma_wait(0, deps=[scores])
        mbarrier.arrive(k_empty.index(stage), count=1)
        if HAS_RIGHT or edge < stop or whole >= stop:
            p, m, total, alpha = softmax(
                s, m, total, stop - 1, low, high, key_mask_at, bias_at, step_p, step_b, K, scale, softcap,
                True, HAS_LEFT, HAS_SOFTCAP, HAS_KEY_MASK, HAS_BIAS, S_LAYOUT,
            )  # fmt: skip
        else:
            p, m, total, alpha = softmax(
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
                scores = scores_of(q, q2, k_bufs.index(stage), k_bufs2.index(stage), none, D2)
                mbarrier.wait(v_full.index(old), ((count - 1) // STAGES) & 1)
                values = warpgroup_mma(p, v_bufs.index(old), acc, is_async=True)
                if DV2 > 0:
                    p2 = gl.convert_layout(p, P_LAYOUT2)
                    values2 = warpgroup_mma(p2, v_bufs2.index(old), acc2, is_async=True)
                if PINGPONG:
                    mbarrier.arrive(turn.index(1 - PART), count=1)
                s = warpgroup_mma_wait(2 if DV2 > 0 else 1, deps=[scores])
                mbarrier.arrive(k_empty.index(stage), count=1)
                p_new, m, total, alpha = softmax(
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
        done, next_batch, next_head, next_block, next_q_first, _k_first, next_Q, next_K = find(
            done + 1, batch, most, tiles, order, max_q, max_k, cu, VARLEN, RAGGED, 2 * M
        )
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
        thread_barrier()
        if VARLEN and row + M > Q:  # some rows belong to the next sequence
            rows = (q_first + row, q_first + Q)
            _store(o_ptr, acc.to(DTYPE), rows, head, order[0], 0, WIDTH)
            if DV2 > 0:
                _store(o_ptr, acc2.to(DTYPE), rows, head, order[0], DV, WIDTH)
        else:
            _copy_out(o_desc, o_desc2, q, q2, at, head, q_first + row, DV, DV2)
        if SLOTS == 1:
            tma.store_wait(0)
            mbarrier.arrive(q_empty.index(PART), count=1)
        used = used + 1
        batch, head, block = next_batch, next_head, next_block
        q_first, Q, K = next_q_first, next_Q, next_K
    tma.store_wait(0)
    if VARLEN:
        _clear_behind(o_ptr, cu[0], SEQUENCES, T, order[0] * WIDTH, PART)


@gluon.jit(do_not_specialize=["SEQUENCES", "T", "TILES", "Q", "K", "Q_BLOCKS", "SECTION", "left", "right"])
def attention_hopper_kernel(
    q_desc,  # [B, H, Q, D], blocks of [1, 1, M, first part of D]
    k_desc,  # [B, Hkv, K, D], blocks of [1, 1, N, first part of D]
    v_desc,  # [B, Hkv, K, DV]
    o_desc,  # [B, H, Q, DV]
    q_desc2,  # the same with blocks as wide as the second part; where there is none, the first again
    k_desc2,
    v_desc2,
    o_desc2,
    o_ptr,
    key_mask_ptr,
    bias_ptr,
    sink_ptr,
    cu_q_ptr,  # with VARLEN: B is 1 above, sequences lie one behind the other
    cu_k_ptr,
    SEQUENCES,
    T,  # rows of q and o
    TILES,
    H,
    GROUP,
    Q,
    K,
    Q_BLOCKS,
    SECTION,
    per_head,  # reciprocals of H, SECTION and SECTION * Q_BLOCKS
    per_section_head,
    per_tile,
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
    VARLEN: gl.constexpr,
    RAGGED: gl.constexpr,  # how the blocks of packed sequences are counted, see `find`
    D2: gl.constexpr,  # 0 without a second part
    DV2: gl.constexpr,
    WIDTH: gl.constexpr,  # of values, without padding
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
    q_bufs = gl.allocate_shared_memory(DTYPE, [2 * SLOTS, M, D], layout_of(M, D, DTYPE))
    k_bufs = gl.allocate_shared_memory(DTYPE, [STAGES, N, D], layout_of(N, D, DTYPE))
    v_bufs = gl.allocate_shared_memory(DTYPE, [STAGES, N, DV], layout_of(N, DV, DTYPE))
    q_bufs2, k_bufs2, v_bufs2 = q_bufs, k_bufs, v_bufs
    if D2 > 0:
        q_bufs2 = gl.allocate_shared_memory(DTYPE, [2 * SLOTS, M, D2], layout_of(M, D2, DTYPE))
        k_bufs2 = gl.allocate_shared_memory(DTYPE, [STAGES, N, D2], layout_of(N, D2, DTYPE))
    if DV2 > 0:
        v_bufs2 = gl.allocate_shared_memory(DTYPE, [STAGES, N, DV2], layout_of(N, DV2, DTYPE))
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
    sizes = (TILES, GROUP, SEQUENCES, T, Q, K, left, right)
    order = (H, Q_BLOCKS, SECTION, per_head, per_section_head, per_tile)
    cu = (cu_q_ptr, cu_k_ptr)
    pointers = (o_ptr, key_mask_ptr, bias_ptr, sink_ptr)
    numbers = (scale, softcap, step_pb, step_p, step_bb, step_bh, step_b, step_s)
    gl.warp_specialize(
        [
            (
                _consume,
                (
                    descs, descs2, buffers, buffers2, barriers, sizes, order, cu, pointers, numbers, 0,
                    HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, HAS_KEY_MASK, HAS_BIAS, HAS_SINKS, VARLEN, RAGGED, SLOTS,
                    STAGES, D2, DV2, WIDTH, PINGPONG,
                ),
            ),
            (
                _consume,
                (
                    descs, descs2, buffers, buffers2, barriers, sizes, order, cu, pointers, numbers, 1,
                    HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, HAS_KEY_MASK, HAS_BIAS, HAS_SINKS, VARLEN, RAGGED, SLOTS,
                    STAGES, D2, DV2, WIDTH, PINGPONG,
                ),
            ),
            (
                _produce,
                (
                    descs, descs2, buffers, buffers2, barriers, sizes, order, cu,
                    HAS_LEFT, HAS_RIGHT, VARLEN, RAGGED, SLOTS, STAGES, D2, DV2,
                ),
            ),
        ],
        [4, 1],
        [REGISTERS, 24],
    )  # fmt: skip
