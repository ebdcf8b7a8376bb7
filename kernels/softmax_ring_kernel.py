# mypy: disallow-untyped-defs=False
"""Softmax of wide rows for Hopper, in Gluon: a row stays in shared memory from its sum to its result.

PARTS programs share a row, each a part of its columns, which it has of many rows. Pieces of the part come by TMA, row
after row, into a ring in shared memory. A step writes the result of a piece, whose place in the ring then takes one of
a later row, and adds up the exponentials of a piece of the next row, `ahead` pieces further: memory is read and written
at once, each number one time.

The programs of a row tell each other their maxima and sums through memory, on a board. They wait for each other, so all
programs must run at once: the launch is cooperative. Several share a multiprocessor: while some wait others compute.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from .gluon_barrier import thread_barrier

LOG2_E = gl.constexpr(1.4426950408889634)


@gluon.jit
def _exp2(x):
    """Without the instructions that results below the smallest normal number take; these become 0."""
    return gl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def _columns(L: gl.constexpr, SHAPE: gl.constexpr):
    """Numbers of the columns of a piece, of that shape: a thread has SHAPE[2] neighbours, SHAPE[0] times."""
    k = gl.arange(0, SHAPE[0], gl.SliceLayout(1, gl.SliceLayout(2, L)))
    t = gl.arange(0, SHAPE[1], gl.SliceLayout(0, gl.SliceLayout(2, L)))
    e = gl.arange(0, SHAPE[2], gl.SliceLayout(0, gl.SliceLayout(0, L)))
    k = gl.expand_dims(gl.expand_dims(k, 1), 2)
    t = gl.expand_dims(gl.expand_dims(t, 0), 2)
    e = gl.expand_dims(gl.expand_dims(e, 0), 0)
    return (k * SHAPE[1] + t) * SHAPE[2] + e


@gluon.jit
def _after(slot, SLOTS: gl.constexpr):
    slot += 1
    if slot == SLOTS:
        slot = 0
    return slot


@gluon.jit
def _ask(x_desc, words, full, slot, asked, first, pieces, groups):
    """Have the next piece copied into a slot that nobody reads; `asked`: its row, its place there, pieces left."""
    row, place, left = asked
    SIZE: gl.constexpr = x_desc.block_type.shape[1]
    col = first + place * SIZE
    mbarrier.expect(full.index(slot), 4 * SIZE, pred=left > 0)
    tma.async_copy_global_to_shared(x_desc, [row, col], full.index(slot), words.index(slot), pred=left > 0)
    place += 1
    if place == pieces:
        place = 0
        row += groups
    return row, place, left - 1


@gluon.jit
def _add(ring, full, come, top, total, start, stop, L: gl.constexpr, SHAPE: gl.constexpr, SLOTS: gl.constexpr):
    """Each thread's maximum and its sum of exponentials with the piece that comes next; `come`: slot, phase."""
    slot, phase = come
    mbarrier.wait(full.index(slot), phase)
    x = ring.index(slot).load(L).to(gl.float32)
    slot = _after(slot, SLOTS)
    if slot == 0:
        phase ^= 1
    if start + SHAPE[0] * SHAPE[1] * SHAPE[2] > stop:
        x = gl.where(start + _columns(L, SHAPE) < stop, x, -float("inf"))
    new = gl.maximum(top, gl.max(gl.max(x, 2), 0))
    reached = gl.where(new == -float("inf"), 0.0, new)  # where nothing is finite so far, zeros are added
    e = _exp2((x - gl.expand_dims(gl.expand_dims(reached, 0), 2)) * LOG2_E)
    return (slot, phase), new, total * _exp2((top - reached) * LOG2_E) + gl.sum(gl.sum(e, 2), 0)


@gluon.jit
def _sum(tops, totals):
    """The highest of maxima, and the sum of the sums of exponentials that belong to them."""
    top = gl.max(tops, 0)
    reached = gl.where(top == -float("inf"), 0.0, top)
    return top, gl.sum(totals * _exp2((tops - reached) * LOG2_E), 0)


@gluon.jit
def _word(tag, value):
    return (tag.to(gl.int64) << 32) | (value.to(gl.int32, bitcast=True).to(gl.int64) & 0xFFFFFFFF)


@gluon.jit
def _tell(board_ptr, tag, part, top, total, PLACES: gl.constexpr):
    """Board `[two rows in turn, maxima and sums, PLACES]` int64: the number of the row, from 1, above the value."""
    at = board_ptr + (tag & 1) * (2 * PLACES) + part
    gl.atomic_xchg(at, _word(tag, top), sem="relaxed")
    gl.atomic_xchg(at + PLACES, _word(tag, total), sem="relaxed")


@gluon.jit
def _hear(board_ptr, tag, PARTS: gl.constexpr, PLACES: gl.constexpr):
    """Maximum and sum of the whole row, when all its programs have told theirs."""
    L: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    part = gl.arange(0, PLACES, L)
    at = board_ptr + (tag & 1) * (2 * PLACES) + part
    tops = gl.full((PLACES,), 0, gl.int64, L)
    totals = gl.full((PLACES,), 0, gl.int64, L)
    missing = 1
    while missing > 0:
        tops = gl.load(at, mask=part < PARTS, other=0, volatile=True)
        totals = gl.load(at + PLACES, mask=part < PARTS, other=0, volatile=True)
        old = ((tops >> 32).to(gl.int32) != tag) | ((totals >> 32).to(gl.int32) != tag)
        missing = gl.sum((old & (part < PARTS)).to(gl.int32), 0)
    tops = gl.where(part < PARTS, tops.to(gl.int32).to(gl.float32, bitcast=True), -float("inf"))
    totals = gl.where(part < PARTS, totals.to(gl.int32).to(gl.float32, bitcast=True), 0.0)
    return _sum(tops, totals)


@gluon.jit
def _share(total, y_ptr):
    """What `_write` needs of the sum: its inverse, or for 16 bits, as near as these can tell, minus its logarithm."""
    if y_ptr.dtype.element_ty.primitive_bitwidth == 32:
        return 1.0 / total
    else:
        return -gl.log2(total)


@gluon.jit
def _write(y_ptr, x, top, share, start, stop, COMPUTE_DTYPE: gl.constexpr, L: gl.constexpr, SHAPE: gl.constexpr):
    y = (x.to(gl.float32) - top) * LOG2_E
    y = _exp2(y) * share if y_ptr.dtype.element_ty.primitive_bitwidth == 32 else _exp2(y + share)
    y = y.to(COMPUTE_DTYPE).to(y_ptr.dtype.element_ty)
    cols = start + _columns(L, SHAPE)
    if start + SHAPE[0] * SHAPE[1] * SHAPE[2] > stop:
        gl.store(y_ptr + cols, y, mask=cols < stop)
    else:
        gl.store(y_ptr + cols, y)


@gluon.jit(do_not_specialize=["R", "U", "V", "pieces", "ahead"])
def ring_kernel(
    x_desc, y_ptr, board_ptr, R, U, V, pieces, ahead,
    DTYPE: gl.constexpr, COMPUTE_DTYPE: gl.constexpr, SLOTS: gl.constexpr, PARTS: gl.constexpr, PLACES: gl.constexpr,
):  # fmt: skip
    """x `[R, 16 U bytes]` as words of 32 bits; y the same as numbers. A part has 16 V bytes or fewer in so many pieces,
    from 2 to SLOTS - `ahead`, which is from 1 to pieces - 1. PLACES: the power of two from PARTS on. board `[groups,
    4 PLACES + 16]` int64, 0 before and after; where a program has a row for itself it is not touched."""
    E: gl.constexpr = 128 // DTYPE.primitive_bitwidth
    T: gl.constexpr = 32 * gl.num_warps()
    SHAPE: gl.constexpr = [x_desc.block_type.shape[1] // (4 * T), T, E]
    BLOCK: gl.constexpr = SHAPE[0] * T * E
    L: gl.constexpr = gl.BlockedLayout([1, 1, E], [1, 32, 1], [1, gl.num_warps(), 1], [2, 1, 0])
    BY_THREAD: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(2, L))
    words = gl.allocate_shared_memory(gl.int32, [SLOTS, 1, x_desc.block_type.shape[1]], x_desc.layout)
    ring = words._reinterpret(DTYPE, [SLOTS, SHAPE[0], T, E], gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0]))
    full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(SLOTS):
        mbarrier.init(full.index(s), count=1)
    thread_barrier()
    group = gl.program_id(0) // PARTS
    groups = gl.num_programs(0) // PARTS
    part = gl.program_id(0) % PARTS
    begin = part * V * E
    stop = gl.minimum(begin + V * E, U * E)
    board_ptr += group * (4 * PLACES + 16)
    asked = (group, 0, (R - group + groups - 1) // groups * pieces)
    for s in gl.static_range(SLOTS):
        asked = _ask(x_desc, words, full, s, asked, part * V * 4, pieces, groups)
    come = (0, 0)
    free = 0  # the slot that is read for the last time next
    tops = gl.full((T,), -float("inf"), gl.float32, BY_THREAD)
    totals = gl.zeros((T,), gl.float32, BY_THREAD)
    for i in range(pieces):
        come, tops, totals = _add(ring, full, come, tops, totals, begin + i * BLOCK, stop, L, SHAPE, SLOTS)
    next_top, next_total = _sum(tops, totals)
    if PARTS > 1:
        _tell(board_ptr, gl.to_tensor(1), part, next_top, next_total, PLACES)
    tops = gl.full((T,), -float("inf"), gl.float32, BY_THREAD)
    totals = gl.zeros((T,), gl.float32, BY_THREAD)
    if group + groups < R:
        for i in range(ahead):
            come, tops, totals = _add(ring, full, come, tops, totals, begin + i * BLOCK, stop, L, SHAPE, SLOTS)
    tag = 1
    for row in range(group, R, groups):
        top, total = next_top, next_total
        if PARTS > 1:
            top, total = _hear(board_ptr, tag, PARTS, PLACES)
        share = _share(total, y_ptr)
        y_row = y_ptr + gl.cast(row, gl.int64) * (U * E)
        more = row + groups < R
        for i in range(pieces):
            x = ring.index(free).load(L)
            thread_barrier()  # all warps have read it
            asked = _ask(x_desc, words, full, free, asked, part * V * 4, pieces, groups)
            free = _after(free, SLOTS)
            _write(y_row, x, top, share, begin + i * BLOCK, stop, COMPUTE_DTYPE, L, SHAPE)
            place = i + ahead
            if (place == pieces) & more:  # the next row is complete
                next_top, next_total = _sum(tops, totals)
                if PARTS > 1:
                    _tell(board_ptr, tag + 1, part, next_top, next_total, PLACES)
                tops = gl.full((T,), -float("inf"), gl.float32, BY_THREAD)
                totals = gl.zeros((T,), gl.float32, BY_THREAD)
                more = row + 2 * groups < R
            if place >= pieces:
                place -= pieces
            if more:
                start = begin + place * BLOCK
                come, tops, totals = _add(ring, full, come, tops, totals, start, stop, L, SHAPE, SLOTS)
        tag += 1
    if PARTS > 1:
        thread_barrier()  # all warps have heard the last row
        left_ptr = (board_ptr + 4 * PLACES).to(gl.pointer_type(gl.int32), bitcast=True)
        if gl.atomic_add(left_ptr, 1, sem="acq_rel") == PARTS - 1:  # nobody reads the board any more
            flat: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
            gl.store(board_ptr + gl.arange(0, 4 * PLACES, flat), gl.full((4 * PLACES,), 0, gl.int64, flat))
            gl.store(left_ptr, 0)
