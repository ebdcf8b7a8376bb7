# mypy: disallow-untyped-defs=False
"""Matrix products with few rows of x for Hopper, in Gluon: the weight streams through a ring in shared memory.

The weight is cut into tiles of 64 rows (gated: 64 of gate and 64 of up) and these into steps of some columns. All
steps, tile by tile, are dealt out in equal shares to as many programs as there are multiprocessors. Rows of the weight
are the matrix unit's first operand, rows of x the second, 8 to 64 wide; both come by TMA. Where the weight is that of
q, k and v, a tile is a head of 128 rows, its halves as gate and up are: the program that ends it turns it as well.

The ring is filled with weights before a program waits for the kernel that computes x, but for one stage that x would
have to wait for: the memory is busy while that kernel ends. What wrote the weight must have ended when the last kernel
launched without `launch_pdl` began, as in `paged_decode_kernel`: from the kernel right in front nothing is promised
before the wait, whatever its launch.

A tile whose steps lie in several shares is left in parts. The last of its programs adds them up, in the order of the
programs: the result has the same bits each time.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .activation_triton import activate
from .gluon_barrier import thread_barrier
from .rope_gluon import angles, turned
from .wgmma_kernel import weighted


@gluon.jit
def _ask(
    x_desc, w_desc, x_bufs, w_bufs, full, stage, step, last, depth, TILE: gl.constexpr, up_offset,
    PARTS: gl.constexpr, WEIGHT: gl.constexpr, X: gl.constexpr,
):  # fmt: skip
    """Asks for what a step reads, if it is one of the program's: of the WEIGHT, which says how much comes, and of X."""
    wanted = step < last
    bar = full.index(stage)
    col = step % depth * w_desc.block_type.shape[1]
    if WEIGHT:
        BYTES: gl.constexpr = PARTS * w_desc.block_type.nbytes + x_desc.block_type.nbytes
        mbarrier.expect(bar, BYTES, pred=wanted)
        row = step // depth * TILE
        tma.async_copy_global_to_shared(w_desc, [row, col], bar, w_bufs.index(PARTS * stage), pred=wanted)
        if PARTS == 2:
            up = w_bufs.index(2 * stage + 1)
            tma.async_copy_global_to_shared(w_desc, [row + up_offset, col], bar, up, pred=wanted)
    if X:
        tma.async_copy_global_to_shared(x_desc, [0, col], bar, x_bufs.index(stage), pred=wanted)


@gluon.jit
def _add(acc, up, parts, program, steps, programs, begin, mask, PARTS: gl.constexpr, SIZE: gl.constexpr):
    """Adds what a program has left of the tile that begins with step `begin`."""
    slot = 2 * program + (program * steps // programs < begin).to(gl.int32)
    acc += gl.load(parts + slot * (PARTS * SIZE), mask=mask, other=0.0, cache_modifier=".cg")
    if PARTS == 2:
        up += gl.load(parts + (slot * PARTS + 1) * SIZE, mask=mask, other=0.0, cache_modifier=".cg")
    return acc, up


@gluon.jit
def _finish(acc, up, out, n, t, M, HAS_BIAS: gl.constexpr, KIND: gl.constexpr, GATED: gl.constexpr):
    """Bias, activation and store of a tile: rows n of the weight, rows t of x, broadcast against each other.

    `out`: bias, y, columns of y, the bias' stride.
    """
    b_ptr, y_ptr, N, stride_b = out
    if HAS_BIAS:
        acc += gl.load(b_ptr + n * stride_b, mask=n < N, other=0.0).to(gl.float32)
        if GATED:
            up += gl.load(b_ptr + (N + n) * stride_b, mask=n < N, other=0.0).to(gl.float32)
    y = activate(acc, KIND)
    if GATED:
        y *= up
    gl.store(y_ptr + t * N + n, y.to(y_ptr.dtype.element_ty), mask=(n < N) & (t < M))


@gluon.jit
def _turn(x1, x2, out, tile, r, t, M, rope, by, ROPE: gl.constexpr, HAS_BIAS: gl.constexpr):
    """Bias, norm, rotation and store of a head, whose halves are `[rows of x, ROWS]`; heads of v pass through.

    `rope`: the tables of `angles`, q and k norm weights, heads of q, of q and k, eps, offset. `by`: the angles. `ROPE`:
    whether there is a norm, the dtype in it before the weight and after (None without a weight), and the dtype of the
    products with cos and sin.
    """
    b_ptr, y_ptr, N, stride_b = out
    _, qw_ptr, kw_ptr, q_heads, heads, eps, offset = rope
    dtype: gl.constexpr = y_ptr.dtype.element_ty
    HALF: gl.constexpr = x1.shape[1]
    first = tile * (2 * HALF) + r
    n = gl.expand_dims(first, 0)
    if HAS_BIAS:
        x1 += gl.load(b_ptr + n * stride_b, mask=n < N, other=0.0).to(gl.float32)
        x2 += gl.load(b_ptr + (n + HALF) * stride_b, mask=n + HALF < N, other=0.0).to(gl.float32)
    y1 = x1.to(dtype)
    y2 = x2.to(dtype)
    if tile < heads:
        x1 = y1.to(gl.float32)
        x2 = y2.to(gl.float32)
        if ROPE[0]:
            scale = gl.rsqrt(gl.sum(x1 * x1 + x2 * x2, 1) / (2 * HALF) + eps)
            w_ptr = qw_ptr
            if tile >= q_heads:
                w_ptr = kw_ptr
            x1 = weighted(x1, scale, w_ptr, r, offset, ROPE[1], ROPE[2], dtype)
            x2 = weighted(x2, scale, w_ptr + HALF, r, offset, ROPE[1], ROPE[2], dtype)
        x1, x2 = turned(x1, x2, by, ROPE[3])
        y1 = x1.to(dtype)
        y2 = x2.to(dtype)
    t = gl.expand_dims(t, 1)
    y_ptr += t * N + n
    gl.store(y_ptr, y1, mask=(n < N) & (t < M))
    gl.store(y_ptr + HALF, y2, mask=(n + HALF < N) & (t < M))


@gluon.constexpr_function
def _flat(rows, warps):
    """The layout in which parts `[rows of x, rows of the weight]` are read again."""
    lanes = min(rows // 4, 32)
    return gl.BlockedLayout([1, 4], [32 // lanes, lanes], [warps, 1], [1, 0])


@gluon.jit
def _stream(
    x_desc, w_desc, out, rope, part_ptr, count_ptr, M, up_offset, steps, depth,
    HAS_BIAS: gl.constexpr, KIND: gl.constexpr, GATED: gl.constexpr, ROPE: gl.constexpr, MOST: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    gdc_launch_dependents()
    PARTS: gl.constexpr = 2 if GATED or ROPE is not None else 1
    ROWS: gl.constexpr = w_desc.block_type.shape[0]
    TILE: gl.constexpr = ROWS if ROPE is None else 2 * ROWS  # rows of the weight from one tile to the next
    BLOCK_K: gl.constexpr = w_desc.block_type.shape[1]
    BLOCK_T: gl.constexpr = x_desc.block_type.shape[0]
    dtype: gl.constexpr = x_desc.dtype
    x_bufs = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_T, BLOCK_K], x_desc.layout)
    w_bufs = gl.allocate_shared_memory(dtype, [PARTS * STAGES, ROWS, BLOCK_K], w_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
    thread_barrier()
    place = gl.program_id(0)
    programs = gl.num_programs(0)
    first = place * steps // programs
    last = (place + 1) * steps // programs
    EARLY: gl.constexpr = STAGES - 2  # copies come in their order: the last is asked for behind x, which waits for less
    for i in gl.static_range(EARLY):
        _ask(x_desc, w_desc, x_bufs, w_bufs, full, i, first + i, last, depth, TILE, up_offset, PARTS, True, False)
    gdc_wait()
    for i in gl.static_range(EARLY):
        _ask(x_desc, w_desc, x_bufs, w_bufs, full, i, first + i, last, depth, TILE, up_offset, PARTS, False, True)
    _ask(x_desc, w_desc, x_bufs, w_bufs, full, EARLY, first + EARLY, last, depth, TILE, up_offset, PARTS, True, True)
    FLAT: gl.constexpr = _flat(ROWS, gl.num_warps())
    if ROPE is not None:
        head_r = gl.arange(0, ROWS, gl.SliceLayout(0, FLAT))
        head_t = gl.arange(0, BLOCK_T, gl.SliceLayout(1, FLAT))
        at_t, at_r = gl.expand_dims(head_t, 1), gl.expand_dims(head_r, 0)
        by = angles(rope[0], at_t, at_r, (at_t < M) & (at_r >= 0), ROWS)
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, BLOCK_T, 16])
    r = gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    t = gl.arange(0, BLOCK_T, gl.SliceLayout(0, layout))
    stage = 0
    phase = 0
    behind = STAGES - 1  # the stage of the step before, which is copied to next
    start = first
    while start < last:
        tile = start // depth
        begin = tile * depth
        stop = gl.minimum(last, begin + depth)
        acc = gl.zeros((ROWS, BLOCK_T), gl.float32, layout)
        up = gl.zeros((ROWS, BLOCK_T), gl.float32, layout)
        for step in range(start, stop):
            mbarrier.wait(full.index(stage), phase)
            x = x_bufs.index(stage).permute((1, 0))
            acc = warpgroup_mma(w_bufs.index(PARTS * stage), x, acc, use_acc=step > start, is_async=True)
            if PARTS == 2:
                up = warpgroup_mma(w_bufs.index(2 * stage + 1), x, up, use_acc=step > start, is_async=True)
                acc, up = warpgroup_mma_wait(2, deps=[acc, up])
            else:
                acc = warpgroup_mma_wait(1, deps=[acc])
            thread_barrier()  # all warps have read the stage of the step before
            ahead = step + STAGES - 1
            _ask(x_desc, w_desc, x_bufs, w_bufs, full, behind, ahead, last, depth, TILE, up_offset, PARTS, True, True)
            behind = stage
            stage += 1
            if stage == STAGES:
                stage = 0
                phase ^= 1
        if PARTS == 2:
            acc, up = warpgroup_mma_wait(0, deps=[acc, up])
        else:
            acc = warpgroup_mma_wait(0, deps=[acc])
        whole: gl.constexpr = False  # a head is turned in the layout in which parts are added
        if ROPE is None:
            whole = stop - start == depth
        if whole:
            n, rows = gl.expand_dims(tile * ROWS + r, 1), gl.expand_dims(t, 0)
            _finish(acc, up, out, n, rows, M, HAS_BIAS, KIND, GATED)
        else:
            SIZE: gl.constexpr = BLOCK_T * ROWS
            left = part_ptr + (2 * place + (start > first).to(gl.int32)) * (PARTS * SIZE)
            left = left + gl.expand_dims(t * ROWS, 0) + gl.expand_dims(r, 1)
            used = gl.expand_dims(r >= 0, 1) & gl.expand_dims(t < M, 0)
            gl.store(left, acc, mask=used)
            if PARTS == 2:
                gl.store(left + SIZE, up, mask=used)
            one = ((begin + 1) * programs - 1) // steps  # the programs that share the tile, from one to another
            other = ((begin + depth) * programs - 1) // steps
            thread_barrier()
            if gl.atomic_add(count_ptr + tile, 1, sem="acq_rel") == other - one:  # the last of them adds up
                gl.store(count_ptr + tile, 0)
                flat_t = gl.expand_dims(gl.arange(0, BLOCK_T, gl.SliceLayout(1, FLAT)), 1)
                flat_r = gl.expand_dims(gl.arange(0, ROWS, gl.SliceLayout(0, FLAT)), 0)
                parts = part_ptr + flat_t * ROWS + flat_r
                real = (flat_t < M) & (flat_r >= 0)
                sum_acc = gl.zeros((BLOCK_T, ROWS), gl.float32, FLAT)
                sum_up = gl.zeros((BLOCK_T, ROWS), gl.float32, FLAT)
                if PARTS * SIZE * MOST <= 16384:  # all at once
                    for i in gl.static_range(MOST):
                        take = real & (one + i <= other)
                        sum_acc, sum_up = _add(
                            sum_acc, sum_up, parts, one + i, steps, programs, begin, take, PARTS, SIZE
                        )  # fmt: skip
                else:
                    for program in range(one, other + 1):
                        sum_acc, sum_up = _add(
                            sum_acc, sum_up, parts, program, steps, programs, begin, real, PARTS, SIZE
                        )  # fmt: skip
                if ROPE is None:
                    _finish(sum_acc, sum_up, out, tile * ROWS + flat_r, flat_t, M, HAS_BIAS, KIND, GATED)
                else:
                    _turn(sum_acc, sum_up, out, tile, head_r, head_t, M, rope, by, ROPE, HAS_BIAS)
        start = stop


@gluon.jit(do_not_specialize=["M", "N", "steps", "depth", "stride_b"])
def stream_kernel(
    x_desc, w_desc, b_ptr, y_ptr, part_ptr, count_ptr, M, N, steps, depth, stride_b,
    HAS_BIAS: gl.constexpr, KIND: gl.constexpr, GATED: gl.constexpr, MOST: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """`depth`: steps of a tile. part `[programs, 2 tiles, gate and up, rows of x, rows of a tile]` fp32, with anything
    in it; count `[tiles]` int32, 0 before and after. MOST: programs that may share a tile."""
    out = (b_ptr, y_ptr, N, stride_b)
    _stream(
        x_desc, w_desc, out, None, part_ptr, count_ptr, M, N, steps, depth, HAS_BIAS, KIND, GATED, None, MOST, STAGES
    )  # fmt: skip


@gluon.jit(do_not_specialize=["M", "N", "steps", "depth", "stride_b", "length", "q_heads", "heads"])
def stream_heads_kernel(
    x_desc, w_desc, b_ptr, y_ptr, part_ptr, count_ptr, M, N, steps, depth, stride_b,
    cos_ptr, sin_ptr, qw_ptr, kw_ptr, length, cos_b, cos_s, sin_b, sin_s, q_heads, heads, eps, offset,
    HAS_BIAS: gl.constexpr, ROPE: gl.constexpr, MOST: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """As `stream_kernel` without an activation; a tile is a head, those of q and k are turned (`_turn`)."""
    ROWS: gl.constexpr = w_desc.block_type.shape[0]
    out = (b_ptr, y_ptr, N, stride_b)
    tables = (cos_ptr, sin_ptr, length, cos_b, cos_s, sin_b, sin_s)
    rope = (tables, qw_ptr, kw_ptr, q_heads, heads, eps, offset)
    _stream(
        x_desc, w_desc, out, rope, part_ptr, count_ptr, M, ROWS, steps, depth, HAS_BIAS, "identity", False, ROPE, MOST,
        STAGES,
    )  # fmt: skip
