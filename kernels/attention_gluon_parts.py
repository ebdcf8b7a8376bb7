# mypy: disallow-untyped-defs=False
"""Steps of the Hopper attention kernel: which tile is next, what it sees, copies, scores and the softmax."""

from __future__ import annotations

from typing import Final

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma

LOG2E: Final = gl.constexpr(1.4426950408889634)
LOWEST: Final = gl.constexpr(-3.4028234663852886e38)
"""A finite start of the running maximum: no row needs a check for `-inf - -inf`."""


@gluon.jit
def copy(desc, desc2, at, row, full, buf, buf2, W: gl.constexpr, W2: gl.constexpr):
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
def rounds(tiles):
    """How many tiles this program computes."""
    whole = tiles // gl.num_programs(0)
    return whole + (place_of(whole) < tiles).to(gl.int32)


@gluon.jit
def place_of(done):
    """The next tile after `done` others: programs take them in turns, every second time in the opposite order."""
    programs = gl.num_programs(0)
    place = gl.program_id(0)
    return done * programs + gl.where(done % 2 == 0, place, programs - 1 - place)


@gluon.jit
def quotient(x, inverse):
    """x // d of 0 <= x < 2^21, with inverse = 1 / d: a division of integers takes a hundred cycles."""
    return ((x.to(gl.float32) + 0.5) * inverse).to(gl.int32)


@gluon.jit
def tile(index, order):
    """Batch, head and block of a tile. SECTION heads, whose keys fit in L2, are done before the next ones are begun;
    among them the longest blocks of a causal mask come first, heads of a group side by side."""
    H, Q_BLOCKS, SECTION, per_head, per_section_head, per_tile = order
    section = quotient(index, per_tile)
    inside = index - section * (SECTION * Q_BLOCKS)
    back = quotient(inside, per_section_head)
    row = section * SECTION + inside - back * SECTION
    batch = quotient(row, per_head)
    return batch, row - batch * H, Q_BLOCKS - 1 - back


@gluon.jit
def find(done, batch, count, tiles, order, Q, K, cu, VARLEN: gl.constexpr, RAGGED: gl.constexpr, M: gl.constexpr):
    """The program's next tile from its `done`-th of `count` on: its number, batch, head and block, then the first
    query and key of its sequence, and how many there are.

    VARLEN: blocks behind the last query of a sequence are passed over; the number may then be `count`, and there is
    no tile. RAGGED: a sequence has a block for every M rows of q that it touches, at most one too many. The blocks of
    all are walked from the last to the first, so `batch` is where the search starts.
    """
    q_first = batch * 0
    k_first = batch * 0
    if VARLEN:
        cu_q_ptr, cu_k_ptr = cu
        H, BLOCKS, _section, per_head, _per_section_head, _per_tile = order
        head = batch * 0
        block = batch * 0
        Q = batch * 0
        search = True
        while search:
            index = gl.minimum(place_of(done), tiles - 1)
            if RAGGED:
                back = quotient(index, per_head)
                head = index - back * H
                q_first = gl.load(cu_q_ptr + batch)
                block = BLOCKS - 1 - back - batch - q_first // M
                while (block < 0) & (batch > 0):
                    batch = batch - 1
                    q_first = gl.load(cu_q_ptr + batch)
                    block = BLOCKS - 1 - back - batch - q_first // M
            else:
                batch, head, block = tile(index, order)
                q_first = gl.load(cu_q_ptr + batch)
            Q = gl.load(cu_q_ptr + batch + 1) - q_first
            search = (block * M >= Q) & (done < count)
            done = done + search.to(gl.int32)
        k_first = gl.load(cu_k_ptr + batch)
        K = gl.load(cu_k_ptr + batch + 1) - k_first
    else:
        batch, head, block = tile(place_of(done), order)
    return done, batch, head, block, q_first, k_first, Q, K


@gluon.constexpr_function
def _rows_layout(width):
    lanes = min(width // 8, 8)
    return gl.BlockedLayout([1, 8], [32 // lanes, lanes], [4, 1], [1, 0])


@gluon.jit
def clear(buf, used):
    """Zeroes the rows of a tile from `used` on, before the matrix unit reads it."""
    LAYOUT: gl.constexpr = _rows_layout(buf.shape[1])
    ROWS: gl.constexpr = buf.shape[0] // 4
    for i in gl.static_range(4):
        if used < (i + 1) * ROWS:
            part = buf.slice(i * ROWS, ROWS)
            row = i * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT))
            part.store(gl.where((row < used)[:, None], part.load(LAYOUT), 0.0).to(buf.dtype))


@gluon.jit
def span(block, Q, K, left, right, HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr, M: gl.constexpr, N: gl.constexpr):
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
def softmax(
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
        bias = gl.where((bias < LOWEST / LOG2E) & (bias > float("-inf")), LOWEST, bias * LOG2E)  # finite as it was
        s = s + bias[None, :]
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
def scores_of(q, q2, k, k2, none, D2: gl.constexpr):
    """Starts q @ k^T."""
    s = warpgroup_mma(q, k.permute((1, 0)), none, use_acc=False, is_async=True)
    if D2 > 0:
        s = warpgroup_mma(q2, k2.permute((1, 0)), s, is_async=True)
    return s


@gluon.constexpr_function
def layout_of(rows, width, dtype):
    return gl.NVMMASharedLayout.get_default_for([rows, width], dtype)
