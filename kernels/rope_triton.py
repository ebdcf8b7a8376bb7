# mypy: disallow-untyped-defs=False
"""Rotary embedding in Triton, alone and after RMSNorm: a program turns BLOCK_R rows of the last dimension.

A row is read as the two members of each rotated pair `[BLOCK_P]` and the tail `[BLOCK_T]` behind the rotated part.
"""

from __future__ import annotations

from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import rope as ops
from .launch import (
    TL_DTYPES,
    collapse,
    empty,
    empty_like,
    launch,
    on_device,
    refuse_tensors,
    refuse_vector,
    refuse_width,
)
from .op import Kernel, Signature
from .rms_norm import result_dtype
from .rms_norm_triton import refuse_rounding, row_offsets
from .tuning import RowMemory, choose

MAX_WIDTH: Final = 2048


@triton.jit
def _weighted(
    x, scale, w_ptr, cols, stride_w, inside, offset, HAS_WEIGHT, HAS_OFFSET, MID_DTYPE, PROMOTED_DTYPE, NORM_DTYPE
):
    """One part `[BLOCK_R, n]` of the normalised row, rounded as the op `rms_norm` rounds."""
    y = (x * scale[:, None]).to(MID_DTYPE).to(tl.float32)
    if HAS_WEIGHT:
        w = tl.load(w_ptr + cols * stride_w, mask=inside, other=0.0).to(tl.float32)
        if HAS_OFFSET:
            w += offset
        y = (y * w[None, :]).to(PROMOTED_DTYPE)
    return y.to(NORM_DTYPE).to(tl.float32)


@triton.jit(do_not_specialize=["R", "N1", "N2"])
def _rope_kernel(
    x_ptr,
    w_ptr,
    cos_ptr,
    sin_ptr,
    y_ptr,
    R,
    N1,
    N2,
    D,
    ROTARY,
    stride_x0,
    stride_x1,
    stride_x2,
    stride_xd,
    stride_c0,
    stride_c1,
    stride_c2,
    stride_cd,
    stride_s0,
    stride_s1,
    stride_s2,
    stride_sd,
    stride_y0,
    stride_y1,
    stride_y2,
    stride_yd,
    stride_w,
    eps,
    offset,
    HAS_NORM: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
    HAS_TAIL: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    MID_DTYPE: tl.constexpr,
    PROMOTED_DTYPE: tl.constexpr,
    NORM_DTYPE: tl.constexpr,
    TURN_DTYPE: tl.constexpr,
    PRODUCT_DTYPE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    rows = tl.program_id(0).to(R.dtype) * BLOCK_R + tl.arange(0, BLOCK_R)  # [BLOCK_R]
    pair = tl.arange(0, BLOCK_P).to(tl.int64)  # [BLOCK_P]
    if INTERLEAVED:
        first = 2 * pair
        second = 2 * pair + 1
    else:
        first = pair
        second = pair + ROTARY // 2
    is_pair = pair < ROTARY // 2
    inside = (rows < R)[:, None] & is_pair[None, :]  # [BLOCK_R, BLOCK_P]
    x_row = x_ptr + row_offsets(rows, N1, N2, stride_x0, stride_x1, stride_x2)[:, None]
    y_row = y_ptr + row_offsets(rows, N1, N2, stride_y0, stride_y1, stride_y2)[:, None]
    cos_row = cos_ptr + row_offsets(rows, N1, N2, stride_c0, stride_c1, stride_c2)[:, None]
    sin_row = sin_ptr + row_offsets(rows, N1, N2, stride_s0, stride_s1, stride_s2)[:, None]
    x1 = tl.load(x_row + first[None, :] * stride_xd, mask=inside, other=0.0).to(tl.float32)
    x2 = tl.load(x_row + second[None, :] * stride_xd, mask=inside, other=0.0).to(tl.float32)
    if HAS_TAIL:
        last = ROTARY + tl.arange(0, BLOCK_T).to(tl.int64)  # [BLOCK_T]
        is_tail = last < D
        in_tail = (rows < R)[:, None] & is_tail[None, :]  # [BLOCK_R, BLOCK_T]
        tail = tl.load(x_row + last[None, :] * stride_xd, mask=in_tail, other=0.0).to(tl.float32)
    if HAS_NORM:
        squares = tl.sum(x1 * x1 + x2 * x2, axis=1)  # [BLOCK_R]
        if HAS_TAIL:
            squares += tl.sum(tail * tail, axis=1)
            scale = tl.rsqrt(squares / D + eps)
            tail = _weighted(
                tail, scale, w_ptr, last, stride_w, is_tail, offset,
                HAS_WEIGHT, HAS_OFFSET, MID_DTYPE, PROMOTED_DTYPE, NORM_DTYPE,
            )  # fmt: skip
        scale = tl.rsqrt(squares / D + eps)
        x1 = _weighted(
            x1, scale, w_ptr, first, stride_w, is_pair, offset,
            HAS_WEIGHT, HAS_OFFSET, MID_DTYPE, PROMOTED_DTYPE, NORM_DTYPE,
        )  # fmt: skip
        x2 = _weighted(
            x2, scale, w_ptr, second, stride_w, is_pair, offset,
            HAS_WEIGHT, HAS_OFFSET, MID_DTYPE, PROMOTED_DTYPE, NORM_DTYPE,
        )  # fmt: skip
    x1 = x1.to(TURN_DTYPE).to(tl.float32)
    x2 = x2.to(TURN_DTYPE).to(tl.float32)
    cos1 = tl.load(cos_row + first[None, :] * stride_cd, mask=inside, other=0.0).to(tl.float32)
    cos2 = tl.load(cos_row + second[None, :] * stride_cd, mask=inside, other=0.0).to(tl.float32)
    sin1 = tl.load(sin_row + first[None, :] * stride_sd, mask=inside, other=0.0).to(tl.float32)
    sin2 = tl.load(sin_row + second[None, :] * stride_sd, mask=inside, other=0.0).to(tl.float32)
    # each product is rounded before the sum, as x * cos + rotated(x) * sin does
    y1 = (x1 * cos1).to(PRODUCT_DTYPE).to(tl.float32) - (x2 * sin1).to(PRODUCT_DTYPE).to(tl.float32)
    y2 = (x2 * cos2).to(PRODUCT_DTYPE).to(tl.float32) + (x1 * sin2).to(PRODUCT_DTYPE).to(tl.float32)
    y1 = y1.to(PRODUCT_DTYPE).to(y_ptr.dtype.element_ty)
    y2 = y2.to(PRODUCT_DTYPE).to(y_ptr.dtype.element_ty)
    tl.store(y_row + first[None, :] * stride_yd, y1, mask=inside)
    tl.store(y_row + second[None, :] * stride_yd, y2, mask=inside)
    if HAS_TAIL:
        tl.store(y_row + last[None, :] * stride_yd, tail.to(y_ptr.dtype.element_ty), mask=in_tail)


def _run(
    x: Tensor,
    weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    norm: tuple[float, float, torch.dtype | None, torch.dtype | None] | None,
    layout: str,
    compute_dtype: torch.dtype | None,
) -> Tensor:
    """`norm`: eps, offset, mid_dtype and out_dtype of the norm before the rotation."""
    eps, offset, mid_dtype, out_dtype = norm or (0.0, 0.0, None, None)
    weight_dtype = None if weight is None else weight.dtype
    promoted = result_dtype(x.dtype, weight_dtype, offset, mid_dtype, None)
    dtype = x.dtype if norm is None else (out_dtype or promoted)
    turned = compute_dtype or dtype
    product = torch.promote_types(turned, torch.promote_types(cos.dtype, sin.dtype))
    width, rotary = x.shape[-1], cos.shape[-1]
    # the layout of the reference: elementwise where everything turns, a concatenation where there is a tail
    y = empty_like(x, dtype=dtype) if rotary == width else empty(x.shape, dtype, x.device)
    if x.numel() == 0:
        return y
    cos, sin = (t.expand(*x.shape[:-1], rotary) for t in (cos, sin))
    tensors = (x, cos, sin, y)
    leading = collapse(x.shape[:-1], [t.stride()[:-1] for t in tensors], 3)
    if leading is None:  # more than three leading dimensions that cannot be merged: work on copies
        return y.copy_(_run(x.contiguous(), weight, cos.contiguous(), sin.contiguous(), norm, layout, compute_dtype))
    (n0, n1, n2), strides = leading
    pairs, tail = triton.next_power_of_2(rotary // 2), triton.next_power_of_2(max(1, width - rotary))
    rows = n0 * n1 * n2
    features = {"D": triton.next_power_of_2(width), "R": rows, "bytes": x.element_size()}
    config = choose("rope", features, RowMemory(width), x.device)
    with on_device(x):
        launch(
            _rope_kernel,
            (triton.cdiv(rows, config["BLOCK_R"]),),
            x,
            x if weight is None else weight,
            cos,
            sin,
            y,
            rows,
            n1,
            n2,
            width,
            rotary,
            *(step for t, lead in zip(tensors, strides, strict=True) for step in (*lead, t.stride(-1))),
            0 if weight is None else weight.stride(0),
            eps,
            offset,
            HAS_NORM=norm is not None,
            HAS_WEIGHT=weight is not None,
            HAS_OFFSET=offset != 0,
            HAS_TAIL=rotary < width,
            INTERLEAVED=layout == "interleaved",
            MID_DTYPE=TL_DTYPES[mid_dtype or torch.float32],
            PROMOTED_DTYPE=TL_DTYPES[promoted],
            NORM_DTYPE=TL_DTYPES[dtype],
            TURN_DTYPE=TL_DTYPES[turned],
            PRODUCT_DTYPE=TL_DTYPES[product],
            BLOCK_P=pairs,
            BLOCK_T=tail,
            enable_fp_fusion=False,  # a fused multiply-add would skip the rounding of the product
            **config.launch,
        )
    return y


def _refuse_layout(signature: Signature) -> str | None:
    if signature["layout"] not in ops.LAYOUTS:
        return f"layout {signature['layout']!r} is not one of {ops.LAYOUTS}"
    if not 0 < len(signature["cos"].shape) <= len(signature["x"].shape) >= len(signature["sin"].shape) > 0:
        return "cos and sin must have one dimension or more, and no more than x"
    rotary, width = signature["cos"].shape[-1], signature["x"].shape[-1]
    if rotary is None or rotary % 2 or rotary > width:
        return f"the rotated width {rotary} must be known, even, and at most {width}"
    if signature["sin"].shape[-1] != rotary:
        return f"cos has width {rotary}, sin {signature['sin'].shape[-1]}"
    return None


def _supports(signature: Signature) -> str | None:
    return (
        refuse_tensors(signature, ("x", "cos", "sin"))
        or refuse_width(signature, "x", MAX_WIDTH)
        or _refuse_layout(signature)
        or refuse_rounding(signature, ("compute_dtype",))
    )


def _supports_norm(signature: Signature) -> str | None:
    return (
        refuse_tensors(signature, ("x", "weight", "cos", "sin"))
        or refuse_width(signature, "x", MAX_WIDTH)
        or refuse_vector(signature, "weight", signature["x"].shape[-1])
        or _refuse_layout(signature)
        or refuse_rounding(signature, ("mid_dtype", "out_dtype"))
    )


def rope(x: Tensor, cos: Tensor, sin: Tensor, layout: str = "half", compute_dtype: torch.dtype | None = None) -> Tensor:
    """As the op `rope`."""
    return _run(x, None, cos, sin, None, layout, compute_dtype)


def norm_rope(
    x: Tensor,
    weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    offset: float = 0.0,
    mid_dtype: torch.dtype | None = None,
    out_dtype: torch.dtype | None = None,
    layout: str = "half",
) -> Tensor:
    """As the op `norm_rope`."""
    return _run(x, weight, cos, sin, (eps, offset, mid_dtype, out_dtype), layout, None)


KERNELS: Final = (
    Kernel(ops.rope, "triton", rope, _supports),
    Kernel(ops.norm_rope, "triton", norm_rope, _supports_norm),
)
