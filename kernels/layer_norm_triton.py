# mypy: disallow-untyped-defs=False
"""LayerNorm in Triton: a program normalises BLOCK_R rows, held whole in registers, in two passes."""

from __future__ import annotations

from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import layer_norm as ops
from .launch import (
    TL_DTYPES,
    collapse,
    empty,
    launch,
    on_device,
    refuse_different_shapes,
    refuse_tensors,
    refuse_vector,
    refuse_width,
    rows_like,
)
from .op import Kernel, Signature
from .overlap import overlaps, start_dependent
from .rms_norm_triton import MAX_WIDTH, row_offsets
from .tuning import RowMemory, choose

EARLY: Final = 32
"""Elements of the weight that a thread can hold, while the sums are taken, without running out of registers."""


@triton.jit(do_not_specialize=["R", "N1", "N2"])
def _layer_norm_kernel(
    x_ptr,
    r_ptr,
    w_ptr,
    b_ptr,
    y_ptr,
    s_ptr,
    R,
    N1,
    N2,
    D,
    stride_x0,
    stride_x1,
    stride_x2,
    stride_xd,
    stride_r0,
    stride_r1,
    stride_r2,
    stride_rd,
    stride_y0,
    stride_y1,
    stride_y2,
    stride_yd,
    stride_s0,
    stride_s1,
    stride_s2,
    stride_sd,
    stride_w,
    stride_b,
    eps,
    HAS_RESIDUAL: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SUM_DTYPE: tl.constexpr,
    EARLY: tl.constexpr,
    PDL: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    start_dependent(PDL)
    rows = tl.program_id(0).to(R.dtype) * BLOCK_R + tl.arange(0, BLOCK_R)  # [BLOCK_R]
    cols = tl.arange(0, BLOCK_D).to(tl.int64)  # [BLOCK_D]
    inside = (rows < R)[:, None] & (cols < D)[None, :]  # [BLOCK_R, BLOCK_D]
    x_rows = row_offsets(rows, N1, N2, stride_x0, stride_x1, stride_x2)
    x = tl.load(x_ptr + x_rows[:, None] + cols[None, :] * stride_xd, mask=inside, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        r_rows = row_offsets(rows, N1, N2, stride_r0, stride_r1, stride_r2)
        r = tl.load(r_ptr + r_rows[:, None] + cols[None, :] * stride_rd, mask=inside, other=0.0).to(tl.float32)
        total = (x + r).to(SUM_DTYPE)
        s_rows = row_offsets(rows, N1, N2, stride_s0, stride_s1, stride_s2)
        tl.store(s_ptr + s_rows[:, None] + cols[None, :] * stride_sd, total, mask=inside)
        x = total.to(tl.float32)
    if EARLY:  # before the sums, which wait for all of the row
        if HAS_WEIGHT:
            w = tl.load(w_ptr + cols * stride_w, mask=cols < D, other=0.0)
        if HAS_BIAS:
            b = tl.load(b_ptr + cols * stride_b, mask=cols < D, other=0.0)
    mean = tl.sum(x, axis=1) / D  # [BLOCK_R]
    centred = tl.where(inside, x - mean[:, None], 0.0)
    y = centred * tl.rsqrt(tl.sum(centred * centred, axis=1) / D + eps)[:, None]
    if not EARLY:
        if HAS_WEIGHT:
            w = tl.load(w_ptr + cols * stride_w, mask=cols < D, other=0.0)
        if HAS_BIAS:
            b = tl.load(b_ptr + cols * stride_b, mask=cols < D, other=0.0)
    if HAS_WEIGHT:
        y *= w.to(tl.float32)[None, :]
    if HAS_BIAS:
        y += b.to(tl.float32)[None, :]
    y_rows = row_offsets(rows, N1, N2, stride_y0, stride_y1, stride_y2)
    tl.store(y_ptr + y_rows[:, None] + cols[None, :] * stride_yd, y.to(y_ptr.dtype.element_ty), mask=inside)


def _run(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    if residual is not None and residual.shape != x.shape:  # sizes that were not known when the kernel was chosen
        x, residual = torch.broadcast_tensors(x, residual)
    sum_dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    s = x if residual is None else rows_like(x, sum_dtype)
    y = empty(x.shape, sum_dtype, x.device)  # F.layer_norm returns a contiguous tensor
    if x.numel() == 0:
        return y, s
    r = x if residual is None else residual
    tensors = (x, r, y, s)
    leading = collapse(x.shape[:-1], [t.stride()[:-1] for t in tensors], 3)
    if leading is None:  # more than three leading dimensions that cannot be merged: work on copies
        copies = _run(x.contiguous(), None if residual is None else r.contiguous(), weight, bias, eps)
        return copies[0], s if residual is None else s.copy_(copies[1])
    (n0, n1, n2), strides = leading
    width = x.shape[-1]
    block = triton.next_power_of_2(width)
    rows = n0 * n1 * n2
    config = choose("layer_norm", {"D": block, "R": rows, "bytes": x.element_size()}, RowMemory(block), x.device)
    with on_device(x):
        launch(
            _layer_norm_kernel,
            (triton.cdiv(rows, config["BLOCK_R"]),),
            x,
            r,
            x if weight is None else weight,
            x if bias is None else bias,
            y,
            s,
            rows,
            n1,
            n2,
            width,
            *(step for t, lead in zip(tensors, strides, strict=True) for step in (*lead, t.stride(-1))),
            0 if weight is None else weight.stride(0),
            0 if bias is None else bias.stride(0),
            eps,
            HAS_RESIDUAL=residual is not None,
            HAS_WEIGHT=weight is not None,
            HAS_BIAS=bias is not None,
            SUM_DTYPE=TL_DTYPES[sum_dtype],
            EARLY=block <= 32 * config.num_warps * EARLY,
            BLOCK_D=block,
            **overlaps(x),
            **config.launch,
        )
    return y, s


def _supports(signature: Signature) -> str | None:
    return refuse_tensors(signature, ("x", "weight", "bias")) or _refuse_sizes(signature)


def _supports_add(signature: Signature) -> str | None:
    return (
        refuse_tensors(signature, ("x", "residual", "weight", "bias"))
        or refuse_different_shapes(signature, "x", "residual")
        or _refuse_sizes(signature)
    )


def _refuse_sizes(signature: Signature) -> str | None:
    return (
        refuse_width(signature, "x", MAX_WIDTH)
        or refuse_vector(signature, "weight", signature["x"].shape[-1])
        or refuse_vector(signature, "bias", signature["x"].shape[-1])
    )


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """As the op `layer_norm`."""
    return _run(x, None, weight, bias, eps)[0]


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """As the op `add_layer_norm`."""
    return _run(x, residual, weight, bias, eps)


KERNELS: Final = (
    Kernel(ops.layer_norm, "triton", layer_norm, _supports),
    Kernel(ops.add_layer_norm, "triton", add_layer_norm, _supports_add),
)
