# mypy: disallow-untyped-defs=False, disable-error-code="assignment,misc,var-annotated"
"""Matrix products of up to 64 rows of x for Hopper, in Gluon: slabs of the weight stream through shared memory.

A program has one slab: as many rows of the weight as there must be for at most one program a multiprocessor. So it
reads x once; where tiles have 64 rows (`stream_kernel`), 64 rows of x are as many bytes as the weight. Rows of x are
the matrix unit's first operand, rows of the slab, in up to three pieces, the second; both come by TMA. No sum is shared
by programs but by the two of a cluster (SPLIT), each of which has half of the columns: each finishes half of the rows
of x, the other's sums of which it reads in the other's shared memory.

The ring is filled with weights before a program waits for the kernel that computes x, as in `stream_kernel`, as far as
x need not wait for them: copies come in their order. A stage is asked for again as soon as it has been multiplied.
Results go through shared memory, to be stored 16 bytes a thread.

Rows beyond the last of x make TMA slow (33 rows of a box of 64: 12.4 us for 4096 x 4096, 64 rows 10.5). So x comes in
one box where that has exactly its rows, or 8, else in two, of its first and of its last rows, that overlap. The other
rows of the operand are whatever shared memory held: their sums are not stored.

Gate and up are two parts of a piece that lie side by side, as are both halves of a head that is rotated. There all
pieces are of one size, each within a head.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .activation_triton import activate
from .gluon_barrier import thread_barrier
from .rope_gluon import angles, turned

ARRIVE = gl.constexpr("barrier.cluster.arrive.release.aligned;")
WAIT = gl.constexpr("barrier.cluster.wait.acquire.aligned;")


@gluon.constexpr_function
def _before(w_descs, piece):
    """Rows of a part in the pieces in front of one."""
    return sum(d.block_type.shape[1] for d in w_descs[:piece])


@gluon.jit
def _row(w_descs, first, piece: gl.constexpr, HALF: gl.constexpr):
    """Where the first part of a piece begins in a weight; `first`: rows of a part in front of the slab.

    HALF: rows of half a head, if both halves are parts.
    """
    row = first + _before(w_descs, piece)
    if HALF > 0:
        eight = row // 8  # so that the compiler sees that 16 bytes of results are aligned
        row = eight // (HALF // 8) * (2 * HALF) + eight % (HALF // 8) * 8
    return row


@gluon.constexpr_function
def _bytes(x_desc, w_descs):
    return x_desc.block_type.nbytes + sum(d.block_type.nbytes for d in w_descs)


@gluon.jit
def _ask(
    x_desc, w_descs, x_bufs, w_bufs, full, stage, step, steps, first, col, HALF: gl.constexpr, WEIGHT: gl.constexpr,
    X: gl.constexpr,
):  # fmt: skip
    """Asks for what a step reads, if there is one: of the WEIGHT, which says how much comes, and of X.

    Few copies: Triton lets all threads wait for each other in front of every one.
    """
    wanted = step < steps
    bar = full.index(stage)
    col += step * x_desc.block_type.shape[2]
    if WEIGHT:
        mbarrier.expect(bar, _bytes(x_desc, w_descs), pred=wanted)
    for i in gl.static_range(len(w_descs) if WEIGHT else 0):
        row = _row(w_descs, first, i, HALF)
        tma.async_copy_global_to_shared(w_descs[i], [0, row, col], bar, w_bufs[i].index(stage), pred=wanted)
    if X:
        BOXES: gl.constexpr = x_desc.block_type.shape[0]
        x = x_bufs.index(stage)
        if x.shape[0] > BOXES:
            x = x.slice(0, BOXES, 0)
        tma.async_copy_global_to_shared(x_desc, [0, 0, col], bar, x, pred=wanted)


@gluon.jit
def _ring(desc, BLOCKS: gl.constexpr, STAGES: gl.constexpr):
    """Memory for BLOCKS blocks of a descriptor `[blocks, rows, columns]` in each stage."""
    shape: gl.constexpr = [STAGES, BLOCKS, desc.block_type.shape[1], desc.block_type.shape[2]]
    return gl.allocate_shared_memory(desc.dtype, shape, desc.layout)


@gluon.jit
def _flat(bufs, stage):
    """What is in a stage, as rows."""
    shape: gl.constexpr = [bufs.shape[1] * bufs.shape[2], bufs.shape[3]]
    return bufs.index(stage)._reinterpret(bufs.dtype, shape, gl.NVMMASharedLayout(128, 16, 2))


@gluon.constexpr_function
def _sums(w_desc, warps):
    """The layout of sums `[64, all rows of a piece]`."""
    parts, rows, _ = w_desc.block_type.shape
    return gl.NVMMADistributedLayout([3, 0], [warps, 1], [16, parts * rows, 16])


@gluon.jit
def _zeros(w_desc):
    ROWS: gl.constexpr = w_desc.block_type.shape[0] * w_desc.block_type.shape[1]
    return gl.zeros((64, ROWS), gl.float32, _sums(w_desc, gl.num_warps()))


@gluon.jit
def _bias(w_desc, out, row):
    """That of a piece whose first part begins with a row of the weight."""
    b_ptr, _, N8, stride_b, apart = out
    ROWS: gl.constexpr = w_desc.block_type.shape[1]
    layout: gl.constexpr = gl.SliceLayout(0, _sums(w_desc, gl.num_warps()))
    at = gl.arange(0, w_desc.block_type.shape[0] * ROWS, layout)
    n = row + at % ROWS
    return gl.load(b_ptr + (n + at // ROWS * apart) * stride_b, mask=n < N8 * 8, other=0.0)


@gluon.jit
def _waited(accs):
    """Sums when all that was asked of the matrix unit has been added to them."""
    found = warpgroup_mma_wait(0, deps=accs)
    if len(accs) == 1:
        found = (found,)
    return found


@gluon.jit
def _cluster(PTX: gl.constexpr):
    gl.inline_asm_elementwise(PTX + " mov.b32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _places(acc, first: gl.constexpr):
    """Bytes into shared memory for a thread's sums, in the order of its registers, threads side by side; their rows.

    `first`: columns of the pieces in front.
    """
    layout: gl.constexpr = acc.type.layout
    t = gl.expand_dims(gl.arange(0, 64, gl.SliceLayout(1, layout)), 1)
    n = gl.expand_dims(gl.arange(0, acc.shape[1], gl.SliceLayout(0, layout)), 0)
    thread = t // 16 * 32 + t % 8 * 4 + n % 8 // 2
    register = n // 8 * 4 + t % 16 // 8 * 2 + n % 2 + first // 2
    return (register * 128 + thread) * 4, t + n * 0


@gluon.jit
def _leave(acc, first: gl.constexpr, other, HALF: gl.constexpr):
    """Sums of the rows of x that the other program finishes go where the ring was: to the beginning of the program's
    shared memory, `global_smem` in Triton's PTX, all of which is free behind the last step."""
    place, t = _places(acc, first)
    gl.inline_asm_elementwise(
        "{ .reg .pred p; .reg .b32 a; mov.u32 a, global_smem; add.u32 a, a, $1; setp.ne.s32 p, $3, 0;"
        " @p st.shared.f32 [a], $2; mov.b32 $0, 0; }",
        "=r,r,f,r",
        [place, acc, (t // HALF == other).to(gl.int32)],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def _take(acc, first: gl.constexpr, other, HALF: gl.constexpr):
    """Adds the sums that the other program left."""
    place, t = _places(acc, first)
    left = gl.inline_asm_elementwise(
        "{ .reg .pred p; .reg .b32 a; mov.u32 a, global_smem; add.u32 a, a, $1; mapa.shared::cluster.u32 a, a, $3;"
        " setp.ne.s32 p, $2, 0; mov.b32 $0, 0; @p ld.shared::cluster.f32 $0, [a]; }",
        "=f,r,r,r",
        [place, (t // HALF == 1 - other).to(gl.int32), other],
        dtype=gl.float32,
        is_pure=False,
        pack=1,
    )
    return acc + left


@gluon.constexpr_function
def _wide(columns, warps):
    """The layout in which a piece `[rows of x, columns]` is stored: 16 bytes a thread."""
    lanes = columns // 8
    return gl.BlockedLayout([1, 8], [32 // lanes, lanes], [warps, 1], [1, 0])


@gluon.jit
def _by_rows(acc, bufs, dtype: gl.constexpr, ROWS: gl.constexpr):
    """The first ROWS rows of sums, rounded, in the layout in which they are stored, by way of a piece of the ring."""
    COLUMNS: gl.constexpr = acc.shape[1]
    swizzled: gl.constexpr = gl.SwizzledSharedLayout(8, 1, COLUMNS // 8 if COLUMNS < 64 else 8, [1, 0])
    shared = bufs._reinterpret(dtype, [64, COLUMNS], swizzled)
    shared.store(acc.to(dtype))
    return shared.slice(0, ROWS, 0).load(_wide(COLUMNS, gl.num_warps()))


@gluon.jit
def _rows_of_x(layout: gl.constexpr, share, M, BOX: gl.constexpr, BOXES: gl.constexpr):
    """Rows of x in the order of the matrix unit's operand, and which of them the program finishes.

    `share`: the first and the last of these as they lie in the operand.
    """
    t = gl.expand_dims(gl.arange(0, BOX * BOXES, gl.SliceLayout(1, layout)), 1)
    t_first, t_last = share
    mine = (t >= t_first) & (t < t_last)
    if BOXES == 2:
        t = gl.where(t < BOX, t, t + (M - 2 * BOX))
    return t, mine & (t < M)


@gluon.jit
def _columns(layout: gl.constexpr, COLUMNS: gl.constexpr):
    return gl.expand_dims(gl.arange(0, COLUMNS, gl.SliceLayout(0, layout)), 0)


@gluon.jit
def _angles(
    w_descs, first, piece: gl.constexpr, rope, share, M, HALF: gl.constexpr, BOX: gl.constexpr, BOXES: gl.constexpr
):  # fmt: skip
    """`angles` of a piece, in the layout in which it is stored."""
    ROWS: gl.constexpr = w_descs[piece].block_type.shape[1]
    layout: gl.constexpr = _wide(ROWS, gl.num_warps())
    t, mine = _rows_of_x(layout, share, M, BOX, BOXES)
    row = _row(w_descs, first, piece, HALF)
    tables, heads = rope
    used = mine & (row // (2 * HALF) < heads)
    column = row // 8 % (HALF // 4) * 8
    return angles(tables, t, column + _columns(layout, ROWS), used, HALF)


@gluon.jit
def _finish(
    acc, bias, bufs, out, row, share, M, rotated, by,
    HAS_BIAS: gl.constexpr, KIND: gl.constexpr, PARTS: gl.constexpr, BOX: gl.constexpr, BOXES: gl.constexpr,
    PRODUCT: gl.constexpr,
):  # fmt: skip
    """Bias, activation or rotation, and store of a piece; `row`: its first of the weight; `out`: as in `_slab`.

    `rotated`: whether it is, `by` its `angles`.
    """
    _, y_ptr, N8, _, apart = out
    dtype: gl.constexpr = y_ptr.dtype.element_ty
    N = N8 * 8
    COLUMNS: gl.constexpr = acc.shape[1] // PARTS
    if HAS_BIAS:
        acc += gl.expand_dims(bias.to(gl.float32), 0)
    up = acc
    if PARTS == 2:
        acc, up = gl.split(gl.permute(gl.reshape(acc, (64, 2, COLUMNS)), (0, 2, 1)))
    layout: gl.constexpr = _wide(COLUMNS, gl.num_warps())
    t, mine = _rows_of_x(layout, share, M, BOX, BOXES)
    n = row + _columns(layout, COLUMNS)
    used = mine & (n < N)
    y_ptrs = y_ptr + t * (N8 * 8) + n
    if PRODUCT is not None:
        one = _by_rows(acc, bufs, dtype, BOX * BOXES)
        two = _by_rows(up, bufs, dtype, BOX * BOXES)
        if rotated:
            y1, y2 = turned(one.to(gl.float32), two.to(gl.float32), by, PRODUCT)
            one = y1.to(dtype)
            two = y2.to(dtype)
        gl.store(y_ptrs, one, mask=used)
        gl.store(y_ptrs + apart, two, mask=used)
    else:
        y = activate(acc, KIND)
        if PARTS == 2:
            y *= up
        gl.store(y_ptrs, _by_rows(y, bufs, dtype, BOX * BOXES), mask=used)


@gluon.jit
def _slab(
    x_desc, w_descs, out, rope, M, steps,
    HAS_BIAS: gl.constexpr, KIND: gl.constexpr, HALF: gl.constexpr, PRODUCT: gl.constexpr, SPLIT: gl.constexpr,
    STAGES: gl.constexpr, EARLY: gl.constexpr,
):  # fmt: skip
    """`out`: bias, y, columns of y, 8 at a time, the bias' stride, rows of the weight from one part to the next.

    `rope`: tables of `angles`, and how many heads are rotated.
    """
    gdc_launch_dependents()
    COUNT: gl.constexpr = len(w_descs)
    BOXES: gl.constexpr = x_desc.block_type.shape[0]
    BOX: gl.constexpr = x_desc.block_type.shape[1]
    PARTS: gl.constexpr = w_descs[0].block_type.shape[0]
    x_bufs = _ring(x_desc, 64 // BOX, STAGES)
    w_bufs = ()
    accs = ()
    for i in gl.static_range(COUNT):
        w_bufs = w_bufs + (_ring(w_descs[i], PARTS, STAGES),)  # noqa: RUF005 - no stars in Triton
        accs = accs + (_zeros(w_descs[i]),)  # noqa: RUF005
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
    thread_barrier()
    member = gl.program_id(0) % SPLIT
    first = gl.program_id(0) // SPLIT * _before(w_descs, COUNT)
    col = member * steps * x_desc.block_type.shape[2]
    for i in gl.static_range(EARLY):
        _ask(x_desc, w_descs, x_bufs, w_bufs, full, i, i, steps, first, col, HALF, True, False)
    gdc_wait()
    for i in gl.static_range(STAGES):
        _ask(x_desc, w_descs, x_bufs, w_bufs, full, i, i, steps, first, col, HALF, i >= EARLY, True)
    share = (member * (BOX * BOXES // SPLIT), (member + 1) * (BOX * BOXES // SPLIT))
    biases = ()
    by = ()
    for i in gl.static_range(COUNT if HAS_BIAS else 0):
        biases = biases + (_bias(w_descs[i], out, _row(w_descs, first, i, HALF)),)  # noqa: RUF005
    if HALF > 0:
        for i in gl.static_range(COUNT):
            by = by + (_angles(w_descs, first, i, rope, share, M, HALF, BOX, BOXES),)  # noqa: RUF005
    stage = 0
    phase = 0
    for step in range(steps):
        mbarrier.wait(full.index(stage), phase)
        x = _flat(x_bufs, stage)
        added = ()
        for i in gl.static_range(COUNT):
            w = _flat(w_bufs[i], stage).permute((1, 0))
            added = added + (warpgroup_mma(x, w, accs[i], use_acc=step > 0, is_async=True),)  # noqa: RUF005
        accs = _waited(added)
        thread_barrier()  # all warps have read the stage
        ahead = step + STAGES
        _ask(x_desc, w_descs, x_bufs, w_bufs, full, stage, ahead, steps, first, col, HALF, True, True)
        stage += 1
        if stage == STAGES:
            stage = 0
            phase ^= 1
    if SPLIT == 2:
        HALF_OF_X: gl.constexpr = BOX * BOXES // 2
        for i in gl.static_range(COUNT):
            _leave(accs[i], PARTS * _before(w_descs, i), 1 - member, HALF_OF_X)
        _cluster(ARRIVE)
        _cluster(WAIT)
        added = ()
        for i in gl.static_range(COUNT):
            added = added + (_take(accs[i], PARTS * _before(w_descs, i), 1 - member, HALF_OF_X),)  # noqa: RUF005
        accs = added
        _cluster(ARRIVE)
        _cluster(WAIT)  # the other program has read: this one may end, or put results wherever they go
    for i in gl.static_range(COUNT):
        row = _row(w_descs, first, i, HALF)
        bias = None
        if HAS_BIAS:
            bias = biases[i]
        rotated = None
        turn = None
        if HALF > 0:
            rotated = row // (2 * HALF) < rope[1]
            turn = by[i]
        _finish(
            accs[i], bias, w_bufs[i], out, row, share, M, rotated, turn, HAS_BIAS, KIND, PARTS, BOX, BOXES, PRODUCT
        )  # fmt: skip


@gluon.jit(do_not_specialize=["M", "N8", "steps", "stride_b"])
def slab_kernel(
    x_desc, w0_desc, w1_desc, w2_desc, b_ptr, y_ptr, M, N8, steps, stride_b,
    HAS_BIAS: gl.constexpr, KIND: gl.constexpr, COUNT: gl.constexpr, SPLIT: gl.constexpr, STAGES: gl.constexpr,
    EARLY: gl.constexpr,
):  # fmt: skip
    """Descriptors are `[parts, rows, columns]`, that of x has its boxes for parts. COUNT: of pieces, each with a
    descriptor of the weight. N8: columns of y, 8 at a time. SPLIT: programs of a cluster, 1 or 2. `steps`: of a
    program. EARLY stages of the ring are asked for before the wait."""
    w_descs = (w0_desc, w1_desc, w2_desc)[:COUNT]
    out = (b_ptr, y_ptr, N8, stride_b, N8 * 8)
    _slab(x_desc, w_descs, out, None, M, steps, HAS_BIAS, KIND, 0, None, SPLIT, STAGES, EARLY)


@gluon.jit(do_not_specialize=["M", "N8", "steps", "stride_b", "length", "heads"])
def slab_heads_kernel(
    x_desc, w_desc, b_ptr, y_ptr, M, N8, steps, stride_b,
    cos_ptr, sin_ptr, length, cos_b, cos_s, sin_b, sin_s, heads,
    HAS_BIAS: gl.constexpr, HALF: gl.constexpr, PRODUCT: gl.constexpr, COUNT: gl.constexpr, SPLIT: gl.constexpr,
    STAGES: gl.constexpr, EARLY: gl.constexpr,
):  # fmt: skip
    """As `slab_kernel` without an activation; of heads of two halves of HALF columns the first `heads` are rotated, in
    PRODUCT. COUNT: of pieces, with one descriptor."""
    w_descs = ()
    for _ in gl.static_range(COUNT):
        w_descs = w_descs + (w_desc,)  # noqa: RUF005
    out = (b_ptr, y_ptr, N8, stride_b, HALF)
    rope = ((cos_ptr, sin_ptr, length, cos_b, cos_s, sin_b, sin_s), heads)
    _slab(x_desc, w_descs, out, rope, M, steps, HAS_BIAS, "identity", HALF, PRODUCT, SPLIT, STAGES, EARLY)
