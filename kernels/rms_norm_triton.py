# mypy: disallow-untyped-defs=False
"""RMSNorm in Triton: a program normalises BLOCK_R rows, each held whole in registers."""

from __future__ import annotations

from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import rms_norm as ops
from .launch import (
    TL_DTYPES,
    collapse,
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
from .tuning import RowMemory, choose

MAX_WIDTH: Final = 65536


@triton.jit
def row_offsets(rows, N1, N2, stride_0, stride_1, stride_2):
    """Offsets (int64) of rows of a tensor with three leading dimensions, the last two of sizes N1 and N2.

    Rows are divided as they come: 32 bits, where there are few enough, take a fraction of the time of 64.
    """
    inner = (rows % N2).to(tl.int64)
    outer = rows // N2
    return (outer // N1).to(tl.int64) * stride_0 + (outer % N1).to(tl.int64) * stride_1 + inner * stride_2


@triton.jit(do_not_specialize=["R", "N1", "N2"])
def _rms_norm_kernel(
    x_ptr,
    r_ptr,
    w_ptr,
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
    eps,
    offset,
    HAS_RESIDUAL: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
    SUM_DTYPE: tl.constexpr,
    MID_DTYPE: tl.constexpr,
    PROMOTED_DTYPE: tl.constexpr,
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
    if HAS_WEIGHT:  # read before the sum, which waits for all of the row
        w = tl.load(w_ptr + cols * stride_w, mask=cols < D, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, axis=1) / D + eps)  # [BLOCK_R]
    y = (x * scale[:, None]).to(MID_DTYPE).to(tl.float32)
    if HAS_WEIGHT:
        if HAS_OFFSET:
            w += offset
        y = (y * w[None, :]).to(PROMOTED_DTYPE)
    y_rows = row_offsets(rows, N1, N2, stride_y0, stride_y1, stride_y2)
    tl.store(y_ptr + y_rows[:, None] + cols[None, :] * stride_yd, y.to(y_ptr.dtype.element_ty), mask=inside)


def _run(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    eps: float,
    offset: float,
    mid_dtype: torch.dtype | None,
    out_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    if residual is not None and residual.shape != x.shape:  # sizes that were not known when the kernel was chosen
        x, residual = torch.broadcast_tensors(x, residual)
    sum_dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    weight_dtype = None if weight is None else weight.dtype
    promoted = ops.result_dtype(sum_dtype, weight_dtype, offset, mid_dtype, None)
    y = rows_like(x, promoted if out_dtype is None else out_dtype)
    s = x if residual is None else rows_like(x, sum_dtype)
    if x.numel() == 0:
        return y, s
    r = x if residual is None else residual
    tensors = (x, r, y, s)
    leading = collapse(x.shape[:-1], [t.stride()[:-1] for t in tensors], 3)
    if leading is None:  # more than three leading dimensions that cannot be merged: work on copies
        copies = _run(
            x.contiguous(), None if residual is None else r.contiguous(), weight, eps, offset, mid_dtype, out_dtype
        )
        return y.copy_(copies[0]), s if residual is None else s.copy_(copies[1])
    (n0, n1, n2), strides = leading
    width = x.shape[-1]
    block = triton.next_power_of_2(width)
    rows = n0 * n1 * n2
    config = choose("rms_norm", {"D": block, "R": rows, "bytes": x.element_size()}, RowMemory(block), x.device)
    with on_device(x):
        launch(
            _rms_norm_kernel,
            (triton.cdiv(rows, config["BLOCK_R"]),),
            x,
            r,
            x if weight is None else weight,
            y,
            s,
            rows,
            n1,
            n2,
            width,
            *(step for t, lead in zip(tensors, strides, strict=True) for step in (*lead, t.stride(-1))),
            0 if weight is None else weight.stride(0),
            eps,
            offset,
            HAS_RESIDUAL=residual is not None,
            HAS_WEIGHT=weight is not None,
            HAS_OFFSET=offset != 0,
            SUM_DTYPE=TL_DTYPES[sum_dtype],
            MID_DTYPE=TL_DTYPES[mid_dtype or torch.float32],
            PROMOTED_DTYPE=TL_DTYPES[promoted],
            BLOCK_D=block,
            **overlaps(x),
            **config.launch,
        )
    return y, s


def refuse_rounding(signature: Signature, names: tuple[str, ...]) -> str | None:
    """Why a dtype argument cannot be a kernel parameter, or `None`."""
    for name in names:
        if signature[name] is not None and signature[name] not in TL_DTYPES:
            return f"{name} is {signature[name]}; the Triton kernels round to float32, float16 or bfloat16"
    return None


def _supports(signature: Signature) -> str | None:
    return (
        refuse_tensors(signature, ("x", "weight"))
        or refuse_width(signature, "x", MAX_WIDTH)
        or refuse_vector(signature, "weight", signature["x"].shape[-1])
        or refuse_rounding(signature, ("mid_dtype", "out_dtype"))
    )


def _supports_add(signature: Signature) -> str | None:
    return (
        refuse_tensors(signature, ("x", "residual", "weight"))
        or refuse_different_shapes(signature, "x", "residual")
        or refuse_width(signature, "x", MAX_WIDTH)
        or refuse_vector(signature, "weight", signature["x"].shape[-1])
        or refuse_rounding(signature, ("mid_dtype", "out_dtype"))
    )


def rms_norm(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    offset: float = 0.0,
    mid_dtype: torch.dtype | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """As the op `rms_norm`."""
    return _run(x, None, weight, eps, offset, mid_dtype, out_dtype)[0]


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    eps: float,
    offset: float = 0.0,
    mid_dtype: torch.dtype | None = None,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """As the op `add_rms_norm`."""
    return _run(x, residual, weight, eps, offset, mid_dtype, out_dtype)


KERNELS: Final = (
    Kernel(ops.rms_norm, "triton", rms_norm, _supports),
    Kernel(ops.add_rms_norm, "triton", add_rms_norm, _supports_add),
)
