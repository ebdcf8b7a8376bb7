# mypy: disallow-untyped-defs=False
"""Matrix product with an epilogue for Hopper, in Gluon: 16-bit operands through TMA, tiles through wgmma.

A program is persistent and its warps have roles. One warp loads tiles of x and of the weight into a ring of buffers;
two groups of four warps multiply, each one half of the tile's 128 rows; the helpers, two or four warps, take the
product of the previous tile out of shared memory (bias added, rounded to the dtype, as a separate kernel would find
it) and apply the activation, the gate, or the norm and rotation of q and k. So the matrix units do not wait for the
epilogue. Nothing follows the last tile of a program: there the multiplying warps apply the activation, in fp32.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from .activation_triton import activate, cap_of


@gluon.jit
def _exp2(x):
    return gl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def _reciprocal(x):
    return gl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def _sigmoid(x):
    return _reciprocal(1.0 + _exp2(-1.4426950408889634 * x))


@gluon.jit
def _gelu(x):
    """x * Phi(x), with Phi(-|x|) by Abramowitz and Stegun 7.1.26 (absolute error 1e-7): nothing cancels."""
    z = gl.minimum(gl.abs(x), 15.0)  # Phi(-15) is 0 in fp32; infinity times that would be NaN
    t = _reciprocal(1.0 + 0.2316418882663604 * z)
    p = ((((0.5307027145 * t - 0.7265760135) * t + 0.7107068705) * t - 0.142248368) * t + 0.127414796) * t
    tail = z * p * _exp2(-0.7213475204444817 * z * z)
    return gl.where(x < 0, -tail, x - tail)


@gluon.jit
def _activate(x, KIND: gl.constexpr):
    """`activate(x, KIND)` with the special functions of the hardware, two for each number."""
    CAP: gl.constexpr = cap_of(KIND)
    if CAP > 0.0:
        y = CAP - 2.0 * CAP * _sigmoid(x * (-2.0 / CAP))
    elif KIND == "silu":
        y = x * _sigmoid(x)
    elif KIND == "quick_gelu":
        y = x * _sigmoid(1.702 * x)
    elif KIND == "gelu" or KIND == "gelu_python":
        y = _gelu(x)
    elif KIND == "gelu_tanh" or KIND == "gelu_new" or KIND == "gelu_fast" or KIND == "gelu_fast8":
        # 0.5 * (1 + tanh(u)) = sigmoid(2 u)
        y = x * _sigmoid(x * (1.5957691216057308 + 0.07135481627260025 * x * x))
    else:
        y = activate(x, KIND)
    return y


@gluon.jit
def _place(tile, row_blocks, col_blocks, GROUP_M: gl.constexpr):
    """Row and column block of a tile; GROUP_M neighbouring row blocks share the weight in L2."""
    per_group = GROUP_M * col_blocks
    start = (tile // per_group) * GROUP_M
    rows = gl.minimum(row_blocks - start, GROUP_M)
    inside = tile % per_group
    return start + inside % rows, inside // rows


@gluon.jit
def _rows(block, M, tiles_ptr, GROUPED: gl.constexpr, BLOCK_M: gl.constexpr):
    """The rows of a block: group, first row, end. A group's last block has fewer than BLOCK_M."""
    if GROUPED:
        tile_ptr = tiles_ptr + 3 * block
        group = gl.load(tile_ptr)
        first = gl.load(tile_ptr + 1)
        end = first + gl.load(tile_ptr + 2)
    else:
        group = 0
        first = block * BLOCK_M
        end = M
    return group, first, end


@gluon.jit
def _load(
    x_desc, w_desc, x_bufs, w_bufs, full, free, row_blocks, col_blocks, M, K, up_offset, tiles_ptr,
    GROUPED: gl.constexpr, GATED: gl.constexpr, TRANSPOSED: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr, GROUP_M: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The loading warp: fills the ring of STAGES buffers, tile by tile."""
    OUT_N: gl.constexpr = BLOCK_N // 2 if GATED else BLOCK_N
    PARTS: gl.constexpr = 2 if GATED else 1
    stage = 0
    phase = 1
    for tile in range(gl.program_id(0), row_blocks * col_blocks, gl.num_programs(0)):
        block_m, block_n = _place(tile, row_blocks, col_blocks, GROUP_M)
        group, row, end = _rows(block_m, M, tiles_ptr, GROUPED, BLOCK_M)
        col = block_n * OUT_N
        if not TRANSPOSED:
            col += group * PARTS * up_offset
        for k in range(0, K, BLOCK_K):
            mbarrier.wait(free.index(stage), phase)
            bar = full.index(stage)
            if GROUPED:  # the lower half of a group's last block may be empty
                lower = end - row > BLOCK_M // 2
                mbarrier.expect(bar, (BLOCK_M + BLOCK_N) * BLOCK_K * 2, pred=lower)
                mbarrier.expect(bar, (BLOCK_M // 2 + BLOCK_N) * BLOCK_K * 2, pred=end - row <= BLOCK_M // 2)
            else:
                lower = True
                mbarrier.expect(bar, (BLOCK_M + BLOCK_N) * BLOCK_K * 2)
            tma.async_copy_global_to_shared(x_desc, [row, k], bar, x_bufs.index(2 * stage))
            tma.async_copy_global_to_shared(
                x_desc, [row + BLOCK_M // 2, k], bar, x_bufs.index(2 * stage + 1), pred=lower
            )
            for part in gl.static_range(PARTS):
                first = col + part * up_offset
                if TRANSPOSED:
                    place = [group * K + k, first]
                    tma.async_copy_global_to_shared(w_desc, place, bar, w_bufs.index(PARTS * stage + part))
                else:
                    tma.async_copy_global_to_shared(w_desc, [first, k], bar, w_bufs.index(PARTS * stage + part))
            stage += 1
            if stage == STAGES:
                stage = 0
                phase ^= 1


@gluon.jit
def _halves(x, M: gl.constexpr, N: gl.constexpr):
    """The left and right half of the columns; both stay in the registers where they are."""
    return x.reshape([M, 2, N // 2]).permute([0, 2, 1]).split()


@gluon.jit
def _hand_over(bufs, first: gl.constexpr, y, M: gl.constexpr, N: gl.constexpr, KIND: gl.constexpr):
    """Writes the activated `y [M, N]` into pieces of 64 columns, the first of which is `first`."""
    if N == 64:
        bufs.index(first).store(_activate(y, KIND).to(bufs.dtype))
    else:
        left, right = _halves(y, M, N)
        _hand_over(bufs, first, left, M, N // 2, KIND)
        _hand_over(bufs, first + N // 128, right, M, N // 2, KIND)


@gluon.jit
def _multiply(
    b_ptr, x_bufs, w_bufs, y_bufs, full, free, y_full, y_free, row_blocks, col_blocks, M, N, K, tiles_ptr,
    GROUPED: gl.constexpr, HALF: gl.constexpr, HAS_BIAS: gl.constexpr, KIND: gl.constexpr, GATED: gl.constexpr,
    TRANSPOSED: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr,
    GROUP_M: gl.constexpr, STAGES: gl.constexpr, WGMMA_N: gl.constexpr,
):  # fmt: skip
    """Four warps with one half of the tile's rows: products in registers, handed over to the helpers."""
    ROWS: gl.constexpr = BLOCK_M // 2
    OUT_N: gl.constexpr = BLOCK_N // 2 if GATED else BLOCK_N
    FIRST: gl.constexpr = HALF * (BLOCK_N // 64)
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WGMMA_N, 16])
    stage = 0
    phase = 0
    y_phase = 1
    tiles = row_blocks * col_blocks
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        block_m, block_n = _place(tile, row_blocks, col_blocks, GROUP_M)
        group, row, end = _rows(block_m, M, tiles_ptr, GROUPED, BLOCK_M)
        acc = gl.zeros((ROWS, BLOCK_N), gl.float32, layout)
        last = 0
        depth = K
        if GROUPED and HALF == 1:  # nothing to multiply where there are no rows
            depth = gl.where(end - row > ROWS, K, 0)
        for k in range(0, depth, BLOCK_K):
            mbarrier.wait(full.index(stage), phase)
            w = w_bufs.index(stage)
            if not TRANSPOSED:
                w = w.permute((1, 0))
            acc = warpgroup_mma(x_bufs.index(2 * stage + HALF), w, acc, use_acc=k > 0, is_async=True)
            acc = warpgroup_mma_wait(1, deps=[acc])
            mbarrier.arrive(free.index(last), count=1, pred=k > 0)
            last = stage
            stage += 1
            if stage == STAGES:
                stage = 0
                phase ^= 1
        if HAS_BIAS:  # on its way while the last products are computed
            c = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, layout))
            cols = block_n * OUT_N + c % OUT_N
            first = group * ((BLOCK_N // OUT_N) * N)
            bias = gl.load(b_ptr + first + cols + (c // OUT_N) * N, mask=cols < N, other=0.0)
        acc = warpgroup_mma_wait(0, deps=[acc])
        if GROUPED and HALF == 1:
            mbarrier.arrive(free.index(last), count=1, pred=depth > 0)
            for _ in range(depth, K, BLOCK_K):
                mbarrier.wait(full.index(stage), phase)
                mbarrier.arrive(free.index(stage), count=1)
                stage += 1
                if stage == STAGES:
                    stage = 0
                    phase ^= 1
        else:
            mbarrier.arrive(free.index(last), count=1)
        if HAS_BIAS:
            acc += gl.expand_dims(bias.to(gl.float32), 0)
        mbarrier.wait(y_free, y_phase)
        y_phase ^= 1
        if tile + gl.num_programs(0) >= tiles and (GATED or KIND != "identity"):
            if GATED:
                gate, up = _halves(acc, ROWS, BLOCK_N)
                _hand_over(y_bufs, FIRST, _activate(gate, KIND) * up, ROWS, OUT_N, "identity")
            else:
                _hand_over(y_bufs, FIRST, acc, ROWS, BLOCK_N, KIND)
        else:
            _hand_over(y_bufs, FIRST, acc, ROWS, BLOCK_N, "identity")
        mbarrier.arrive(y_full, count=1)


@gluon.jit
def _finish(
    y_ptr, y_bufs, y_full, y_free, row_blocks, col_blocks, M, N, rope, tiles_ptr,
    GROUPED: gl.constexpr, VECTOR: gl.constexpr, KIND: gl.constexpr, GATED: gl.constexpr, ROPE: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, GROUP_M: gl.constexpr, HELPERS: gl.constexpr,
):  # fmt: skip
    """The helpers: the epilogue of one tile while the next is multiplied, and the stores to memory."""
    ROWS: gl.constexpr = BLOCK_M // 2
    OUT_N: gl.constexpr = BLOCK_N // 2 if GATED else BLOCK_N
    STEP: gl.constexpr = 8 * HELPERS  # rows at a time: the registers of a helper are few
    PIECES: gl.constexpr = BLOCK_N // 64
    LANES: gl.constexpr = 32 if VECTOR == 1 else 64 // VECTOR  # of a warp that share a row
    layout: gl.constexpr = gl.BlockedLayout([1, VECTOR], [32 // LANES, LANES], [HELPERS, 1], [1, 0])
    dtype: gl.constexpr = y_bufs.dtype
    N = N // VECTOR * VECTOR  # the same number, seen to be a multiple
    r = gl.arange(0, STEP, layout=gl.SliceLayout(1, layout))
    c = gl.expand_dims(gl.arange(0, 64, layout=gl.SliceLayout(0, layout)), 0)
    phase = 0
    tiles = row_blocks * col_blocks
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        block_m, block_n = _place(tile, row_blocks, col_blocks, GROUP_M)
        _, first, end = _rows(block_m, M, tiles_ptr, GROUPED, BLOCK_M)
        done = tile + gl.num_programs(0) >= tiles
        for half in gl.static_range(2):
            mbarrier.wait(y_full.index(half), phase)
            for step in gl.static_range(ROWS // STEP):
                rows = first + half * ROWS + step * STEP + r
                if ROPE is None:
                    y_rows = y_ptr + gl.expand_dims(rows.to(gl.int64) * N, 1)
                    inside = gl.expand_dims(rows < end, 1)
                    for piece in gl.static_range(OUT_N // 64):
                        cols = block_n * OUT_N + piece * 64 + c
                        y = y_bufs.index(half * PIECES + piece).slice(step * STEP, STEP).load(layout)
                        if KIND != "identity" or GATED:  # noqa: SIM102 - one is known when compiling
                            if not done:
                                y = _activate(y.to(gl.float32), KIND)
                                if GATED:
                                    up = y_bufs.index(half * PIECES + PIECES // 2 + piece).slice(step * STEP, STEP)
                                    y *= up.load(layout).to(gl.float32)
                                y = y.to(dtype)
                        gl.store(y_rows + cols, y, mask=inside & (cols < N))
                else:
                    _turn_heads(
                        y_ptr, y_bufs, half * PIECES, step * STEP, rows, block_n * BLOCK_N, M, N, rope,
                        ROPE, BLOCK_N, STEP, HELPERS,
                    )  # fmt: skip
            mbarrier.arrive(y_free.index(half), count=1)
        phase ^= 1


@gluon.jit
def weighted(x, scale, w_ptr, cols, offset, MID: gl.constexpr, PROMOTED: gl.constexpr, OUT: gl.constexpr):
    """One part `[n, w]` of normalised heads, rounded as the op `rms_norm` rounds; PROMOTED is None without a weight."""
    y = (x * gl.expand_dims(scale, 1)).to(MID).to(gl.float32)
    if PROMOTED is not None:
        w = gl.load(w_ptr + cols).to(gl.float32) + offset
        y = (y * gl.expand_dims(w, 0)).to(PROMOTED)
    return y.to(OUT).to(gl.float32)


@gluon.jit
def _part(
    y_bufs, first_piece: gl.constexpr, first_row: gl.constexpr, col: gl.constexpr, STEP: gl.constexpr,
    WIDTH: gl.constexpr, layout: gl.constexpr,
):  # fmt: skip
    """STEP rows of WIDTH columns from `col` on."""
    return y_bufs.index(first_piece + col // 64).slice(first_row, STEP).slice(col % 64, WIDTH, 1).load(layout)


@gluon.jit
def _turn_heads(
    y_ptr, y_bufs, first_piece: gl.constexpr, first_row: gl.constexpr, rows, col, M, N, rope,
    ROPE: gl.constexpr, BLOCK_N: gl.constexpr, STEP: gl.constexpr, HELPERS: gl.constexpr,
):  # fmt: skip
    """Norm and rotation of the heads in `STEP` rows of a tile; columns that are no heads of q or k pass through.

    `rope`: cos, sin, q and k norm weights, rows of a sequence, strides of cos and sin by sequence and position, columns
    of q, of q and k, eps, offset. `ROPE`: head dim, whether there is a norm, the dtype in it before the weight and
    after (None without a weight), and the dtype of the products with cos and sin.
    """
    cos_ptr, sin_ptr, qw_ptr, kw_ptr, length, cos_b, cos_s, sin_b, sin_s, q_end, k_end, eps, offset = rope
    HEAD: gl.constexpr = ROPE[0]
    HAS_NORM: gl.constexpr = ROPE[1]
    MID: gl.constexpr = ROPE[2]
    PROMOTED: gl.constexpr = ROPE[3]
    PRODUCT: gl.constexpr = ROPE[4]
    HALF: gl.constexpr = HEAD // 2
    WIDTH: gl.constexpr = 64 if HALF > 64 else HALF  # columns of one part of half a head
    PARTS: gl.constexpr = HALF // WIDTH
    LANES: gl.constexpr = WIDTH // 8
    dtype: gl.constexpr = y_bufs.dtype
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [32 // LANES, LANES], [HELPERS, 1], [1, 0])
    rows = gl.convert_layout(rows, gl.SliceLayout(1, layout))
    c = gl.arange(0, WIDTH, layout=gl.SliceLayout(0, layout))
    cols = gl.expand_dims(c, 0)
    inside = gl.expand_dims(rows < M, 1)
    y_rows = y_ptr + gl.expand_dims(rows.to(gl.int64) * N, 1)
    sequence = rows // length
    position = rows % length
    cos_rows = cos_ptr + gl.expand_dims(sequence * cos_b + position * cos_s, 1) + cols
    sin_rows = sin_ptr + gl.expand_dims(sequence * sin_b + position * sin_s, 1) + cols
    for head in gl.static_range(BLOCK_N // HEAD):
        start = col + head * HEAD
        turned = start < k_end
        scale = gl.zeros((STEP,), gl.float32, gl.SliceLayout(1, layout))
        w_ptr = qw_ptr
        if start >= q_end:
            w_ptr = kw_ptr
        if HAS_NORM:  # noqa: SIM102 - known when compiling
            if turned:
                for part in gl.static_range(2 * PARTS):
                    x = _part(y_bufs, first_piece, first_row, head * HEAD + part * WIDTH, STEP, WIDTH, layout)
                    x = x.to(gl.float32)
                    scale += gl.sum(x * x, 1)
                scale = gl.rsqrt(scale / HEAD + eps)
        for part in gl.static_range(PARTS):
            y1 = _part(y_bufs, first_piece, first_row, head * HEAD + part * WIDTH, STEP, WIDTH, layout)
            y2 = _part(y_bufs, first_piece, first_row, head * HEAD + HALF + part * WIDTH, STEP, WIDTH, layout)
            if turned:
                x1 = y1.to(gl.float32)
                x2 = y2.to(gl.float32)
                if HAS_NORM:
                    x1 = weighted(x1, scale, w_ptr + part * WIDTH, c, offset, MID, PROMOTED, dtype)
                    x2 = weighted(x2, scale, w_ptr + HALF + part * WIDTH, c, offset, MID, PROMOTED, dtype)
                cos1 = gl.load(cos_rows + part * WIDTH, mask=inside, other=0.0).to(gl.float32)
                sin1 = gl.load(sin_rows + part * WIDTH, mask=inside, other=0.0).to(gl.float32)
                # each product is rounded before the sum, as x * cos + rotated(x) * sin does
                z1 = (x1 * cos1).to(PRODUCT).to(gl.float32) - (x2 * sin1).to(PRODUCT).to(gl.float32)
                y1 = z1.to(PRODUCT).to(dtype)
                cos2 = gl.load(cos_rows + HALF + part * WIDTH, mask=inside, other=0.0).to(gl.float32)
                sin2 = gl.load(sin_rows + HALF + part * WIDTH, mask=inside, other=0.0).to(gl.float32)
                z2 = (x2 * cos2).to(PRODUCT).to(gl.float32) + (x1 * sin2).to(PRODUCT).to(gl.float32)
                y2 = z2.to(PRODUCT).to(dtype)
            out = start + part * WIDTH + cols
            gl.store(y_rows + out, y1, mask=inside & (out < N))
            gl.store(y_rows + out + HALF, y2, mask=inside & (out + HALF < N))


@gluon.jit
def linear_kernel(
    x_desc, w_desc, y_ptr, b_ptr, tiles_ptr, used_ptr, M, N, K,
    cos_ptr, sin_ptr, q_weight_ptr, k_weight_ptr, length, cos_b, cos_s, sin_b, sin_s, q_end, k_end, eps, offset,
    HAS_BIAS: gl.constexpr, KIND: gl.constexpr, GATED: gl.constexpr, TRANSPOSED: gl.constexpr, ROPE: gl.constexpr,
    GROUPED: gl.constexpr, VECTOR: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, GROUP_M: gl.constexpr,
    HELPERS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    OUT_N: gl.constexpr = BLOCK_N // 2 if GATED else BLOCK_N
    PARTS: gl.constexpr = 2 if GATED else 1
    # four helpers leave a multiplying warp fewer registers than an instruction 256 wide asks for
    WGMMA_N: gl.constexpr = 128 if HELPERS == 4 or BLOCK_N == 128 else 256
    dtype: gl.constexpr = x_desc.dtype
    x_bufs = gl.allocate_shared_memory(dtype, [2 * STAGES, BLOCK_M // 2, BLOCK_K], x_desc.layout)
    if TRANSPOSED:
        w_bufs = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_K, BLOCK_N], w_desc.layout)
        w_parts = w_bufs._reinterpret(dtype, [PARTS * STAGES, BLOCK_K, OUT_N], w_desc.layout)
    else:
        w_bufs = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, BLOCK_K], w_desc.layout)
        w_parts = w_bufs._reinterpret(dtype, [PARTS * STAGES, OUT_N, BLOCK_K], w_desc.layout)
    y_bufs = gl.allocate_shared_memory(dtype, [BLOCK_N // 32, BLOCK_M // 2, 64], x_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    y_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    y_free = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(free.index(i), count=2)
    for i in gl.static_range(2):
        mbarrier.init(y_full.index(i), count=1)
        mbarrier.init(y_free.index(i), count=1)
    row_blocks = gl.load(used_ptr) if GROUPED else gl.cdiv(M, BLOCK_M)
    col_blocks = gl.cdiv(N, OUT_N)
    # the warps and registers of each role; together with the first role's they fill the register file
    if HELPERS == 4:
        gl.warp_specialize([
            (_finish, (
                y_ptr, y_bufs, y_full, y_free, row_blocks, col_blocks, M, N,
                (cos_ptr, sin_ptr, q_weight_ptr, k_weight_ptr, length, cos_b, cos_s, sin_b, sin_s,
                 q_end, k_end, eps, offset),
                tiles_ptr, GROUPED, VECTOR, KIND, GATED, ROPE, BLOCK_M, BLOCK_N, GROUP_M, HELPERS,
            )),
            (_multiply, (
                b_ptr, x_bufs, w_bufs, y_bufs, full, free, y_full.index(0), y_free.index(0), row_blocks, col_blocks,
                M, N, K, tiles_ptr, GROUPED, 0, HAS_BIAS, KIND, GATED, TRANSPOSED, BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M,
                STAGES, WGMMA_N,
            )),
            (_multiply, (
                b_ptr, x_bufs, w_bufs, y_bufs, full, free, y_full.index(1), y_free.index(1), row_blocks, col_blocks,
                M, N, K, tiles_ptr, GROUPED, 1, HAS_BIAS, KIND, GATED, TRANSPOSED, BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M,
                STAGES, WGMMA_N,
            )),
            (_load, (
                x_desc, w_desc, x_bufs, w_parts, full, free, row_blocks, col_blocks, M, K, N, tiles_ptr,
                GROUPED, GATED, TRANSPOSED, BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M, STAGES,
            )),
        ], [4, 4, 1], [192, 192, 24])  # fmt: skip
    else:
        gl.warp_specialize([
            (_multiply, (
                b_ptr, x_bufs, w_bufs, y_bufs, full, free, y_full.index(0), y_free.index(0), row_blocks, col_blocks,
                M, N, K, tiles_ptr, GROUPED, 0, HAS_BIAS, KIND, GATED, TRANSPOSED, BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M,
                STAGES, WGMMA_N,
            )),
            (_multiply, (
                b_ptr, x_bufs, w_bufs, y_bufs, full, free, y_full.index(1), y_free.index(1), row_blocks, col_blocks,
                M, N, K, tiles_ptr, GROUPED, 1, HAS_BIAS, KIND, GATED, TRANSPOSED, BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M,
                STAGES, WGMMA_N,
            )),
            (_finish, (
                y_ptr, y_bufs, y_full, y_free, row_blocks, col_blocks, M, N,
                (cos_ptr, sin_ptr, q_weight_ptr, k_weight_ptr, length, cos_b, cos_s, sin_b, sin_s,
                 q_end, k_end, eps, offset),
                tiles_ptr, GROUPED, VECTOR, KIND, GATED, ROPE, BLOCK_M, BLOCK_N, GROUP_M, HELPERS,
            )),
            (_load, (
                x_desc, w_desc, x_bufs, w_parts, full, free, row_blocks, col_blocks, M, K, N, tiles_ptr,
                GROUPED, GATED, TRANSPOSED, BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M, STAGES,
            )),
        ], [4, 2, 1], [208, 88, 88])  # fmt: skip
