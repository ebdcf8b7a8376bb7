# mypy: disallow-untyped-defs=False
"""Linear layers with 2 to 8 rows of x: weights go from memory straight into the tensor cores' registers, in Gluon.

A dot product does not mind in which order the depth is summed, if both operands agree. So a thread takes 8 neighbouring
elements of a row, a load of 16 bytes, where the instruction's own order would have it take 2: nothing passes through
shared memory but the sums of the warps, which share the depth.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .activation_triton import activate
from .tuning import Config

MAX_ROWS = 8


@gluon.jit(do_not_specialize=["M"])
def direct_kernel(
    x_ptr,
    w_ptr,
    b_ptr,
    y_ptr,
    M,
    N,
    K,  # a multiple of DEPTH x WARPS
    stride_xm,
    stride_wn,
    stride_b,
    up_offset,  # from the weight's rows of gate to its rows of up
    HAS_BIAS: gl.constexpr,
    KIND: gl.constexpr,
    GATED: gl.constexpr,
    PDL: gl.constexpr,
    BLOCK_N: gl.constexpr,
    DEPTH: gl.constexpr,  # of a warp in one step
    WARPS: gl.constexpr,
):
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    BLOCK_T: gl.constexpr = 8
    STEP: gl.constexpr = DEPTH * WARPS
    sums: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [WARPS, 1, 1], [1, 16, 8])
    rows: gl.constexpr = gl.DotOperandLayout(0, sums, 8)
    tokens: gl.constexpr = gl.DotOperandLayout(1, sums, 8)
    start_n = gl.program_id(0) * BLOCK_N
    warp = gl.arange(0, WARPS, gl.SliceLayout(1, gl.SliceLayout(2, rows)))
    n = start_n + gl.arange(0, BLOCK_N, gl.SliceLayout(0, gl.SliceLayout(2, rows)))
    k = gl.arange(0, DEPTH, gl.SliceLayout(0, gl.SliceLayout(1, rows)))
    w_rows = (gl.minimum(n, N - 1).to(gl.int64) * stride_wn)[None, :, None]
    w_ptrs = w_ptr + w_rows + (warp * DEPTH)[:, None, None] + k[None, None, :]  # [WARPS, BLOCK_N, DEPTH]
    warp = gl.arange(0, WARPS, gl.SliceLayout(1, gl.SliceLayout(2, tokens)))
    k = gl.arange(0, DEPTH, gl.SliceLayout(0, gl.SliceLayout(2, tokens)))
    t = gl.arange(0, BLOCK_T, gl.SliceLayout(0, gl.SliceLayout(1, tokens)))
    x_rows = (gl.minimum(t, M - 1) * stride_xm)[None, None, :]
    x_ptrs = x_ptr + x_rows + (warp * DEPTH)[:, None, None] + k[None, :, None]  # [WARPS, DEPTH, BLOCK_T]
    acc = gl.zeros((WARPS, BLOCK_N, BLOCK_T), gl.float32, sums)
    up_acc = gl.zeros((WARPS, BLOCK_N, BLOCK_T), gl.float32, sums)
    w = gl.load(w_ptrs, eviction_policy="evict_first")
    if GATED:
        up = gl.load(w_ptrs + up_offset, eviction_policy="evict_first")
    for start in range(STEP, K, STEP):
        x = gl.load(x_ptrs + (start - STEP), eviction_policy="evict_last")
        next_w = gl.load(w_ptrs + start, eviction_policy="evict_first")
        if GATED:
            next_up = gl.load(w_ptrs + up_offset + start, eviction_policy="evict_first")
        acc = mma_v2(w, x, acc)
        w = next_w
        if GATED:
            up_acc = mma_v2(up, x, up_acc)
            up = next_up
    x = gl.load(x_ptrs + (K - STEP), eviction_policy="evict_last")
    y = gl.sum(mma_v2(w, x, acc), axis=0)
    inside_n = start_n + gl.arange(0, BLOCK_N, gl.SliceLayout(1, gl.SliceLayout(0, sums)))
    inside_t = gl.arange(0, BLOCK_T, gl.SliceLayout(0, gl.SliceLayout(0, sums)))
    if HAS_BIAS:
        b_ptrs = b_ptr + inside_n * stride_b
        y += gl.load(b_ptrs, mask=inside_n < N, other=0.0).to(gl.float32)[:, None]
    y = activate(y, KIND)
    if GATED:
        up_y = gl.sum(mma_v2(up, x, up_acc), axis=0)
        if HAS_BIAS:
            up_y += gl.load(b_ptrs + N * stride_b, mask=inside_n < N, other=0.0).to(gl.float32)[:, None]
        y *= up_y
    inside = (inside_n < N)[:, None] & (inside_t < M)[None, :]
    gl.store(y_ptr + inside_t[None, :] * N + inside_n[:, None], y.to(y_ptr.dtype.element_ty), mask=inside)


def direct_memory(config: Config) -> int:
    """Shared memory of one program: the sums of its warps."""
    return config["BLOCK_N"] * 8 * 4 * config.num_warps + 1024
