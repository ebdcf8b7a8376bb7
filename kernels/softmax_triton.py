# mypy: disallow-untyped-defs=False
"""Softmax in Triton: rows held whole in registers, or, where they are too wide, read twice with a running maximum."""

from __future__ import annotations

from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import softmax as ops
from .launch import ALIGNMENT, INTERPRETED, TL_DTYPES, collapse, empty, launch, on_device, refuse_tensors
from .op import Kernel, Signature
from .rms_norm_triton import refuse_rounding, row_offsets
from .tuning import RowMemory, choose

WHOLE: Final = 16384
"""Elements of a row that a program holds; wider rows are read twice."""


@triton.jit
def _exp(x, FAST: tl.constexpr):
    """FAST: without the instructions that results below the smallest normal number take; these become 0."""
    if FAST:
        y = x * 1.4426950408889634
        return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [y], tl.float32, is_pure=True, pack=1)
    else:
        return tl.exp(x)


@triton.jit(do_not_specialize=["R", "N1", "N2"])
def _softmax_kernel(
    x_ptr,
    y_ptr,
    R,
    N1,
    N2,
    D,
    stride_x0,
    stride_x1,
    stride_x2,
    stride_xd,
    COMPUTE_DTYPE: tl.constexpr,
    STRIDED: tl.constexpr,
    FLAT: tl.constexpr,
    FAST: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """FLAT: there is one leading dimension, and nothing to divide before x is asked for."""
    rows = tl.program_id(0).to(R.dtype) * BLOCK_R + tl.arange(0, BLOCK_R)  # [BLOCK_R]
    cols = tl.arange(0, BLOCK_D)  # [BLOCK_D]
    inside = (rows < R)[:, None] & (cols < D)[None, :]  # [BLOCK_R, BLOCK_D]
    x_rows = rows.to(tl.int64) * stride_x2 if FLAT else row_offsets(rows, N1, N2, stride_x0, stride_x1, stride_x2)
    x_cols = cols  # 64 bits for each would not leave room for a wide row
    if STRIDED:
        x_cols = cols.to(tl.int64) * stride_xd
    x = tl.load(x_ptr + x_rows[:, None] + x_cols[None, :], mask=inside, other=-float("inf")).to(tl.float32)
    e = _exp(x - tl.max(x, axis=1)[:, None], FAST)
    y = (e * (1.0 / tl.sum(e, axis=1))[:, None]).to(COMPUTE_DTYPE)
    y_rows = rows.to(tl.int64) * D
    tl.store(y_ptr + y_rows[:, None] + cols[None, :], y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _pieces(
    x_ptr, start, D, stride_xd, STRIDED: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, KEEP: tl.constexpr
):
    """Columns `start` and up of a row as `[BLOCK_T, BLOCK_E]`, and their numbers; KEEP: in the L2, for another time."""
    cols = start + tl.arange(0, BLOCK_T)[:, None] * BLOCK_E + tl.arange(0, BLOCK_E)[None, :]
    at = cols
    if STRIDED:
        at = cols.to(tl.int64) * stride_xd
    policy: tl.constexpr = "evict_last" if KEEP else "evict_first"
    x = tl.load(x_ptr + at, mask=cols < D, other=-float("inf"), eviction_policy=policy)
    return x.to(tl.float32), cols


@triton.jit(do_not_specialize=["N1", "N2"])
def _long_softmax_kernel(
    x_ptr,
    y_ptr,
    N1,
    N2,
    D,
    stride_x0,
    stride_x1,
    stride_x2,
    stride_xd,
    COMPUTE_DTYPE: tl.constexpr,
    STRIDED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """A program reads a row twice, from its L2 the second time. Each thread has a maximum and a sum of its own."""
    row = tl.program_id(0)
    x_ptr += row_offsets(row, N1, N2, stride_x0, stride_x1, stride_x2)
    y_ptr += row.to(tl.int64) * D
    BLOCK_D: tl.constexpr = 4 * BLOCK_T * BLOCK_E
    top = tl.full((BLOCK_T,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_T,), tl.float32)
    for start in range(0, D, BLOCK_D):
        a, _ = _pieces(x_ptr, start, D, stride_xd, STRIDED, BLOCK_T, BLOCK_E, True)
        b, _ = _pieces(x_ptr, start + BLOCK_D // 4, D, stride_xd, STRIDED, BLOCK_T, BLOCK_E, True)
        c, _ = _pieces(x_ptr, start + BLOCK_D // 2, D, stride_xd, STRIDED, BLOCK_T, BLOCK_E, True)
        d, _ = _pieces(x_ptr, start + BLOCK_D // 4 * 3, D, stride_xd, STRIDED, BLOCK_T, BLOCK_E, True)
        new = tl.maximum(top, tl.max(tl.maximum(tl.maximum(a, b), tl.maximum(c, d)), axis=1))
        reached = tl.where(new == -float("inf"), 0.0, new)  # where nothing is finite so far, zeros are added
        shift = reached[:, None]
        e = (tl.exp(a - shift) + tl.exp(b - shift)) + (tl.exp(c - shift) + tl.exp(d - shift))
        total = total * tl.exp(top - reached) + tl.sum(e, axis=1)
        top = new
    highest = tl.max(top, axis=0)
    reached = tl.where(highest == -float("inf"), 0.0, highest)
    scale = 1.0 / tl.sum(total * tl.exp(top - reached), axis=0)
    pieces = tl.cdiv(D, BLOCK_D // 4)
    for i in tl.range(pieces, loop_unroll_factor=4):  # the last pieces first: they were read last
        x, cols = _pieces(x_ptr, (pieces - 1 - i) * (BLOCK_D // 4), D, stride_xd, STRIDED, BLOCK_T, BLOCK_E, False)
        y = (tl.exp(x - highest) * scale).to(COMPUTE_DTYPE)
        tl.store(y_ptr + cols, y.to(y_ptr.dtype.element_ty), mask=cols < D, eviction_policy="evict_first")


def softmax(x: Tensor, compute_dtype: torch.dtype | None = None, out_dtype: torch.dtype | None = None) -> Tensor:
    """As the op `softmax`; the result is contiguous."""
    y = empty(x.shape, ops.result_dtype(x.dtype, compute_dtype, out_dtype), x.device)
    if x.numel() == 0:
        return y
    leading = collapse(x.shape[:-1], [x.stride()[:-1]], 3)
    if leading is None:  # more than three leading dimensions that cannot be merged: work on a copy
        return softmax(x.contiguous(), compute_dtype, out_dtype)
    (n0, n1, n2), (strides,) = leading
    rows, width = n0 * n1 * n2, x.shape[-1]
    sizes = (n1, n2, width, *strides, x.stride(-1))
    how = {"COMPUTE_DTYPE": TL_DTYPES[compute_dtype or x.dtype], "STRIDED": x.stride(-1) != 1}
    block = triton.next_power_of_2(width)
    needed = RowMemory(min(block, WHOLE))
    config = choose("softmax", {"D": block, "R": rows, "bytes": x.element_size()}, needed, x.device)
    with on_device(x):
        if width > WHOLE:
            threads = {"BLOCK_T": 32 * config.num_warps, "BLOCK_E": ALIGNMENT // x.element_size()}
            settings = {"num_warps": config.num_warps, "num_stages": config.num_stages}
            launch(_long_softmax_kernel, (rows,), x, y, *sizes, **how, **threads, **settings)
        else:
            grid = (triton.cdiv(rows, config["BLOCK_R"]),)
            how |= {"FLAT": n0 * n1 == 1, "FAST": not INTERPRETED}
            launch(_softmax_kernel, grid, x, y, rows, *sizes, **how, BLOCK_D=block, **config.launch)
    return y


def _supports(signature: Signature) -> str | None:
    if not signature["x"].shape:
        return "x has no dimensions"
    if signature["compute_dtype"] not in (None, torch.float32, signature["x"].dtype):
        return f"x is rounded to {signature['compute_dtype']} first"
    return refuse_tensors(signature, ("x",)) or refuse_rounding(signature, ("compute_dtype", "out_dtype"))


KERNELS: Final = (Kernel(ops.softmax, "triton", softmax, _supports),)
