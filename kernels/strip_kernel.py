# mypy: disallow-untyped-defs=False, disable-error-code=assignment
"""Matrix products of 1 to 32 rows of x for Hopper, in Gluon: strips of the weight stream through shared memory.

Eight rows of the weight with all their columns are a strip; strips are dealt out to at most as many programs as there
are multiprocessors, so that no sum is shared between programs and none has to wait for another at its end. TMA brings
them into a ring, which is filled before a program waits for the kernel that computes x, as in `stream_kernel`, but for
what x would then have to wait for: copies come one after the other. The warps of a program share the columns: each
keeps its columns of x in registers from the first strip to the last, as operand of `mma.m16n8k16`, and reads its
columns of a strip as the other operand, 16 bytes a thread. These are columns in another order than the instruction
counts them in, of x and of the weight alike; a sum over columns does not mind. Each 16 rows of x are multiplied by what
has been read of a strip: twice where there are more, which leaves registers for half as many columns.

Gate and up, or the two halves of a head that is rotated, are two strips that make one result (PARTS).
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .activation_triton import activate
from .gluon_barrier import thread_barrier
from .rope_gluon import angles, turned


@gluon.constexpr_function
def _multiply(dtype, high):
    """PTX: sums $0 to $3 of a thread's 8 columns: of the weight in $4 to $7, of x in $8 to $11 and, `high`, $12 to $15.

    The last four operands are the sums so far.
    """
    kind = "bf16" if dtype == gl.bfloat16 else "f16"
    op = f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32"
    rows = [f"${i}" for i in range(12, 16)] if high else ["z"] * 4
    before = ", ".join(f"${i}" for i in range(16 if high else 12, 20 if high else 16))
    return (
        "{ .reg .b32 z; .reg .f32 a, b, c, d; mov.b32 z, 0;"
        f"{op} {{a, b, c, d}}, {{$8, {rows[0]}, $9, {rows[1]}}}, {{$4, $5}}, {{{before}}};"
        f"{op} {{$0, $1, $2, $3}}, {{$10, {rows[2]}, $11, {rows[3]}}}, {{$6, $7}}, {{a, b, c, d}}; }}"
    )


@gluon.constexpr_function
def _constraints(high):
    return ",".join(["=f"] * 4 + ["r"] * (12 if high else 8) + ["f"] * 4)


@gluon.constexpr_function
def _layout(warps):
    """Of int32 `[warps, 8 rows, 32]`: 32 bytes a lane, four lanes a row.

    Two loads of 16 bytes: each touches all of a row's 128 bytes, so that x costs one request to the L2 a row, and of
    eight lanes that read shared memory at once the swizzled places are in different banks.
    """
    return gl.BlockedLayout([1, 1, 8], [1, 8, 4], [warps, 1, 1], [2, 1, 0])


@gluon.constexpr_function
def _sums(warps):
    """The layout of what is left of `_layout` when a thread has added up its columns: `[warps, 8, 4, 4]`."""
    return gl.BlockedLayout([1, 1, 1, 4], [1, 8, 4, 1], [warps, 1, 1, 1], [3, 2, 1, 0])


@gluon.jit
def _row(strip, half, N, PARTS: gl.constexpr, ROPE: gl.constexpr):
    """The first row of a strip: of gate and up in turn, or of both halves of a head in turn."""
    if ROPE:
        pair = strip // 2
        row = pair // (half // 8) * (2 * half) + pair % (half // 8) * 8 + strip % 2 * half
    elif PARTS == 2:
        row = strip // 2 * 8 + strip % 2 * N
    else:
        row = strip * 8
    return row


@gluon.jit
def _copy(
    w_desc, bufs, full, stage, unit, first, last, half, N, PARTS: gl.constexpr, ROPE: gl.constexpr,
    STAGES: gl.constexpr, EACH: gl.constexpr, PIECES: gl.constexpr,
):  # fmt: skip
    """Asks for what a stage holds: the `unit`-th EACH strips of a program, or the `unit`-th of PIECES of a strip.

    `bufs`: for each stage the copies of each part.
    """
    INSIDE: gl.constexpr = PARTS if EACH > 1 else 1
    COPIES: gl.constexpr = bufs.shape[0] // (STAGES * INSIDE)
    BLOCKS: gl.constexpr = w_desc.block_type.shape[0]
    strip = first + unit // PIECES * EACH
    wanted = strip < last
    bar = full.index(stage)
    mbarrier.expect(bar, INSIDE * COPIES * w_desc.block_type.nbytes, pred=wanted)
    for part in gl.static_range(INSIDE):
        row = _row(strip + part, half, N, PARTS, ROPE)
        for i in gl.static_range(COPIES):
            buf = bufs.index((stage * INSIDE + part) * COPIES + i)
            block = (unit % PIECES * COPIES + i) * BLOCKS
            tma.async_copy_global_to_shared(w_desc, [block, row, 0], bar, buf, pred=wanted)


@gluon.jit
def _next(stage, phase, STAGES: gl.constexpr):
    """The stage behind, and the phase of its barrier."""
    stage += 1
    if stage == STAGES:
        stage = 0
        phase ^= 1
    return stage, phase


@gluon.jit
def _rows_of_x(x_ptr, row, k, M, K, stride, EVEN: gl.constexpr, COUNT: gl.constexpr, SPAN: gl.constexpr):
    """A thread's columns of one row of x, in all groups.

    Only what may lie behind the last column is masked: a masked load is one that others wait for.
    """
    ptrs = x_ptr.to(gl.pointer_type(gl.int32), bitcast=True) + gl.minimum(row, M - 1).to(gl.int64) * (stride * 4) + k
    found = ()
    for group in gl.static_range(COUNT):
        if EVEN or group < COUNT - 1:
            part = gl.load(ptrs + group * SPAN)
        else:
            part = gl.load(ptrs + group * SPAN, mask=k + group * SPAN < K * 4, other=0)
        found = found + (part,)  # noqa: RUF005 - no stars in Triton
    return found


@gluon.jit
def _columns(words, first, group: gl.constexpr, place: gl.constexpr, layout: gl.constexpr):
    """A group of columns of eight rows, the `place`-th of the buffers that begin with `first`."""
    WARPS: gl.constexpr = gl.num_warps()
    EACH: gl.constexpr = words.shape[1] // WARPS  # groups of a copy
    found = words.index(first + group // EACH).slice(group % EACH * WARPS, WARPS, 0)
    return found.slice(place * 8, 8, 1).load(layout)


@gluon.jit
def _copied_rows(words, first, layout: gl.constexpr, COUNT: gl.constexpr):
    """As `_rows_of_x` where eight rows of x have been copied to stages."""
    found = ()
    for group in gl.static_range(COUNT):
        found = found + (_columns(words, first, group, 0, layout),)  # noqa: RUF005
    return found


@gluon.jit
def _products(
    words, first, place: gl.constexpr, x, ones, twos, layout: gl.constexpr, KIND: gl.constexpr, FROM: gl.constexpr,
    COUNT: gl.constexpr,
):  # fmt: skip
    """Adds products of a strip to a warp's sums `[warps, 8, 32]`, of each 16 rows of x.

    In two chains, since each waits for one before it. `x`: of each eight rows their groups of columns. Of COUNT groups
    from FROM on, as far as there are any, which begin in the buffer `first`; the strip's rows begin with the `place`-th
    eight.
    """
    HIGH: gl.constexpr = len(x) > 1
    ASM: gl.constexpr = _multiply(KIND, HIGH)
    CONSTRAINTS: gl.constexpr = _constraints(HIGH)
    for group in gl.static_range(FROM, FROM + COUNT):
        if group < len(x[0]):
            w = _columns(words, first, group - FROM, place, layout)
            new = ()
            for tile in gl.static_range(len(ones)):
                if HIGH:
                    given = [w, x[2 * tile][group], x[2 * tile + 1][group], ones[tile]]
                else:
                    given = [w, x[0][group], ones[tile]]
                new = new + (gl.inline_asm_elementwise(ASM, CONSTRAINTS, given, gl.float32, True, 4),)  # noqa: RUF005
            ones = twos
            twos = new
    return ones, twos


@gluon.jit
def _zeros(shape: gl.constexpr, layout: gl.constexpr, TILES: gl.constexpr):
    """Sums to begin with, of each 16 rows of x."""
    found = ()
    for _ in gl.static_range(TILES):
        found = found + (gl.zeros(shape, gl.float32, layout),)  # noqa: RUF005
    return found


@gluon.jit
def _added(ones, twos):
    """Both chains, and a thread's columns: `[warps, 8, 4, 4]`, of each 16 rows of x."""
    WARPS: gl.constexpr = gl.num_warps()
    found = ()
    for tile in gl.static_range(len(ones)):
        acc = gl.sum(gl.reshape(ones[tile] + twos[tile], [WARPS, 8, 4, 2, 4]), 3)
        found = found + (gl.convert_layout(acc, _sums(WARPS), True),)  # noqa: RUF005
    return found


@gluon.jit
def _together(sums, tile: gl.constexpr, PARTS: gl.constexpr):
    """Sums `[warps, 8, 4, 4]` of the strips of a block, added up over warps: `[8, 4, 4, strips]` as a vector.

    Those of the `tile`-th 16 rows of x. With two PARTS two vectors, of every other strip.
    """
    COUNT: gl.constexpr = len(sums)
    WARPS: gl.constexpr = gl.num_warps()
    if COUNT == 2:
        one = gl.permute(gl.join(sums[0][tile], sums[1][tile]), (1, 2, 3, 4, 0))
    else:
        even = gl.join(sums[0][tile], sums[2][tile])
        one = gl.permute(gl.join(even, gl.join(sums[1][tile], sums[3][tile])), (1, 2, 3, 4, 5, 0))
    EACH: gl.constexpr = COUNT * 4 // WARPS if COUNT * 4 > WARPS * PARTS else PARTS
    layout: gl.constexpr = gl.BlockedLayout([EACH, WARPS], [32, 1], [WARPS, 1], [1, 0])
    found = gl.sum(gl.convert_layout(gl.reshape(one, [128 * COUNT, WARPS]), layout), 1)
    partner = found
    if PARTS == 2:
        found, partner = gl.split(gl.reshape(found, [64 * COUNT, 2]))
    return found, partner


@gluon.jit
def _finish(
    acc, up, block, last, tile: gl.constexpr, M, N, b_ptr, y_ptr, stride_b, rope, half,
    HAS_BIAS: gl.constexpr, KIND: gl.constexpr, GATED: gl.constexpr, PRODUCT: gl.constexpr,
):  # fmt: skip
    """Bias, activation or rotation, and store of what `_together` made of a block and the `tile`-th 16 rows of x."""
    ROPE: gl.constexpr = PRODUCT is not None
    PARTS: gl.constexpr = 2 if GATED or ROPE else 1
    COUNT: gl.constexpr = acc.shape[0] // 128  # of strips, gated: of pairs
    dtype: gl.constexpr = y_ptr.dtype.element_ty
    at = gl.arange(0, 128 * COUNT, acc.type.layout)
    mine = block + at % COUNT * PARTS
    at = at // COUNT
    t = tile * 16 + at // 16 + at // 2 % 2 * 8  # how the instruction lays its sums out over threads
    n = _row(mine, half, N, PARTS, ROPE) + at // 4 % 4 * 2 + at % 2
    used = (mine < last) & (n < N) & (t < M)
    other = half if ROPE else N
    if HAS_BIAS:
        acc += gl.load(b_ptr + n * stride_b, mask=used, other=0.0).to(gl.float32)
        if PARTS == 2:
            up += gl.load(b_ptr + (n + other) * stride_b, mask=used, other=0.0).to(gl.float32)
    y_ptrs = y_ptr + t * N + n
    if ROPE:
        y1 = acc.to(dtype).to(gl.float32)
        y2 = up.to(dtype).to(gl.float32)
        tables, heads = rope
        rotated = n // (2 * half) < heads
        one, two = turned(y1, y2, angles(tables, t, n % (2 * half), used & rotated, half), PRODUCT)
        gl.store(y_ptrs, gl.where(rotated, one, y1).to(dtype), mask=used)
        gl.store(y_ptrs + half, gl.where(rotated, two, y2).to(dtype), mask=used)
    else:
        y = activate(acc, KIND)
        if GATED:
            y *= up
        # read next, and kept for it where that was measured to pay
        gl.store(y_ptrs, y.to(dtype), mask=used, eviction_policy="evict_last" if GATED else "")


@gluon.jit
def _strips(
    w_desc, x_desc, x_ptr, b_ptr, y_ptr, M, N, K, stride_x, stride_b, strips, rope, half,
    HAS_BIAS: gl.constexpr, KIND: gl.constexpr, GATED: gl.constexpr, PRODUCT: gl.constexpr, EIGHTS: gl.constexpr,
    COPY_X: gl.constexpr, EVEN: gl.constexpr, GROUPS: gl.constexpr, STAGES: gl.constexpr, EACH: gl.constexpr,
    BLOCK: gl.constexpr, PIECES: gl.constexpr, LATE: gl.constexpr,
):  # fmt: skip
    gdc_launch_dependents()
    dtype: gl.constexpr = w_desc.dtype
    ROPE: gl.constexpr = PRODUCT is not None
    PARTS: gl.constexpr = 2 if GATED or ROPE else 1
    WARPS: gl.constexpr = gl.num_warps()
    BLOCKS: gl.constexpr = w_desc.block_type.shape[0]
    ROWS: gl.constexpr = w_desc.block_type.shape[1]
    COPIES: gl.constexpr = (GROUPS * WARPS + BLOCKS - 1) // BLOCKS // PIECES
    TAKEN: gl.constexpr = COPIES * BLOCKS // WARPS  # groups of columns in a piece
    INSIDE: gl.constexpr = PARTS if EACH > 1 else 1  # parts of a result in a stage
    BUFFERS: gl.constexpr = STAGES * INSIDE * COPIES
    bufs = gl.allocate_shared_memory(dtype, [BUFFERS, BLOCKS, ROWS, 64], w_desc.layout)
    words = bufs._reinterpret(gl.int32, [BUFFERS, BLOCKS, ROWS, 32], gl.NVMMASharedLayout(128, 32, 3))
    full = gl.allocate_shared_memory(gl.int64, [STAGES + 1, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES + 1):
        mbarrier.init(full.index(i), count=1)
    thread_barrier()
    first = gl.program_id(0) * strips // gl.num_programs(0) * PARTS
    last = (gl.program_id(0) + 1) * strips // gl.num_programs(0) * PARTS
    FILLED: gl.constexpr = STAGES - PIECES if COPY_X else STAGES  # stages that x does not pass through
    for i in gl.static_range(FILLED - LATE):
        _copy(w_desc, bufs, full, i, i, first, last, half, N, PARTS, ROPE, STAGES, EACH, PIECES)
    layout: gl.constexpr = _layout(WARPS)
    warp = gl.expand_dims(gl.expand_dims(gl.arange(0, WARPS, gl.SliceLayout(1, gl.SliceLayout(2, layout))), 1), 2)
    row = gl.expand_dims(gl.expand_dims(gl.arange(0, 8, gl.SliceLayout(0, gl.SliceLayout(2, layout))), 0), 2)
    k = gl.expand_dims(gl.expand_dims(gl.arange(0, 32, gl.SliceLayout(0, gl.SliceLayout(1, layout))), 0), 1)
    k = warp * 32 + k
    gdc_wait()
    if COPY_X:
        bar = full.index(STAGES)
        mbarrier.expect(bar, PIECES * COPIES * x_desc.block_type.nbytes)
        for i in gl.static_range(PIECES * COPIES):
            tma.async_copy_global_to_shared(x_desc, [i * BLOCKS, 0, 0], bar, bufs.index(FILLED * COPIES + i))
    for i in gl.static_range(FILLED - LATE, FILLED):
        _copy(w_desc, bufs, full, i, i, first, last, half, N, PARTS, ROPE, STAGES, EACH, PIECES)
    rest = ()
    for i in gl.static_range(1, EIGHTS):
        rest = rest + (_rows_of_x(x_ptr, row + i * 8, k, M, K, stride_x, EVEN, GROUPS, WARPS * 32),)  # noqa: RUF005
    if COPY_X:
        mbarrier.wait(full.index(STAGES), 0)
        x = (_copied_rows(words, FILLED * COPIES, layout, GROUPS),)
        for i in gl.static_range(FILLED, STAGES):
            _copy(w_desc, bufs, full, i, i, first, last, half, N, PARTS, ROPE, STAGES, EACH, PIECES)
    else:
        x = (_rows_of_x(x_ptr, row, k, M, K, stride_x, EVEN, GROUPS, WARPS * 32),)
    x = x + rest
    ahead = STAGES
    stage = 0
    phase = 0
    TILES: gl.constexpr = (EIGHTS + 1) // 2
    zeros = _zeros((WARPS, 8, 32), layout, TILES)
    for block in range(first, last, BLOCK):
        sums = ()
        for i in gl.static_range(BLOCK // EACH):
            if EACH == 1:
                added = _zeros((WARPS, 8, 4, 4), _sums(WARPS), TILES)
                if block + i < last:
                    ones = zeros
                    twos = zeros
                    for piece in gl.static_range(PIECES):
                        mbarrier.wait(full.index(stage), phase)
                        ones, twos = _products(
                            words, stage * COPIES, 0, x, ones, twos, layout, dtype, piece * TAKEN, TAKEN
                        )  # fmt: skip
                        _copy(w_desc, bufs, full, stage, ahead, first, last, half, N, PARTS, ROPE, STAGES, EACH, PIECES)
                        ahead += 1
                        stage, phase = _next(stage, phase, STAGES)
                    added = _added(ones, twos)
                sums = sums + (added,)  # noqa: RUF005
            else:
                mbarrier.wait(full.index(stage), phase, pred=block + i * EACH < last)
                for j in gl.static_range(EACH):
                    buf = (stage * INSIDE + j % INSIDE) * COPIES
                    ones, twos = _products(words, buf, j // INSIDE, x, zeros, zeros, layout, dtype, 0, GROUPS)
                    sums = sums + (_added(ones, twos),)  # noqa: RUF005
                _copy(w_desc, bufs, full, stage, ahead, first, last, half, N, PARTS, ROPE, STAGES, EACH, PIECES)
                ahead += 1
                stage, phase = _next(stage, phase, STAGES)
        for tile in gl.static_range(TILES):
            acc, up = _together(sums, tile, PARTS)
            _finish(
                acc, up, block, last, tile, M, N, b_ptr, y_ptr, stride_b, rope, half, HAS_BIAS, KIND,
                GATED, PRODUCT,
            )  # fmt: skip


@gluon.jit(do_not_specialize=["M", "N", "K", "stride_x", "stride_b", "strips"])
def strip_kernel(
    w_desc, x_desc, x_ptr, b_ptr, y_ptr, M, N, K, stride_x, stride_b, strips,
    HAS_BIAS: gl.constexpr, KIND: gl.constexpr, GATED: gl.constexpr, EIGHTS: gl.constexpr, COPY_X: gl.constexpr,
    EVEN: gl.constexpr, GROUPS: gl.constexpr, STAGES: gl.constexpr, EACH: gl.constexpr, BLOCK: gl.constexpr,
    PIECES: gl.constexpr, LATE: gl.constexpr,
):  # fmt: skip
    """K and stride_x in units of 16 bytes. EIGHTS: of rows of x. COPY_X: the first come through the ring's last
    stages. GROUPS: of 64 columns for each warp. A stage of the ring holds EACH strips, or one of PIECES of a strip;
    LATE stages are asked for behind x. BLOCK strips are finished at once. `strips`: gated those of gate."""
    _strips(
        w_desc, x_desc, x_ptr, b_ptr, y_ptr, M, N, K, stride_x, stride_b, strips, None, 8, HAS_BIAS, KIND, GATED, None,
        EIGHTS, COPY_X, EVEN, GROUPS, STAGES, EACH, BLOCK, PIECES, LATE,
    )  # fmt: skip


@gluon.jit(do_not_specialize=["M", "N", "K", "stride_x", "stride_b", "strips", "length", "heads", "half"])
def strip_heads_kernel(
    w_desc, x_desc, x_ptr, b_ptr, y_ptr, M, N, K, stride_x, stride_b, strips,
    cos_ptr, sin_ptr, length, cos_b, cos_s, sin_b, sin_s, heads, half,
    HAS_BIAS: gl.constexpr, PRODUCT: gl.constexpr, EIGHTS: gl.constexpr, COPY_X: gl.constexpr, EVEN: gl.constexpr,
    GROUPS: gl.constexpr, STAGES: gl.constexpr, EACH: gl.constexpr, BLOCK: gl.constexpr, PIECES: gl.constexpr,
    LATE: gl.constexpr,
):  # fmt: skip
    """As `strip_kernel` without an activation; of heads of two halves the first `heads` are rotated, in PRODUCT."""
    rope = ((cos_ptr, sin_ptr, length, cos_b, cos_s, sin_b, sin_s), heads)
    _strips(
        w_desc, x_desc, x_ptr, b_ptr, y_ptr, M, N, K, stride_x, stride_b, strips, rope, half, HAS_BIAS,
        "identity", False, PRODUCT, EIGHTS, COPY_X, EVEN, GROUPS, STAGES, EACH, BLOCK, PIECES, LATE,
    )  # fmt: skip
