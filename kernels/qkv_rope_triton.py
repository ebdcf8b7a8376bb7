# mypy: disallow-untyped-defs=False
"""Norm and rotation of q and k in place, behind a matrix product: a program turns BLOCK_R rows of a head.

The product is PyTorch's, or for few rows that of `skinny_triton`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from . import qkv_rope as ops
from . import skinny_triton
from .launch import (
    TL_DTYPES,
    collapse,
    empty,
    launch,
    library,
    on_device,
    refuse_mixed,
    refuse_tensors,
    refuse_vector,
)
from .op import Kernel, Signature
from .overlap import overlaps, start_dependent
from .rms_norm import result_dtype
from .rms_norm_triton import refuse_rounding
from .rope import LAYOUTS
from .tuning import RowMemory, choose

MAX_HEAD: Final = 2048


@triton.jit
def _weighted(x, scale, w_ptr, cols, stride_w, inside, offset, MID: tl.constexpr, PROMOTED: tl.constexpr, OUT):
    """One part `[BLOCK_R, n]` of normalised heads, rounded as the op `rms_norm` rounds; PROMOTED None: no weight."""
    y = (x * scale[:, None]).to(MID).to(tl.float32)
    if PROMOTED is not None:
        w = tl.load(w_ptr + cols * stride_w, mask=inside, other=0.0).to(tl.float32) + offset
        y = (y * w[None, :]).to(PROMOTED)
    return y.to(OUT).to(tl.float32)


@triton.jit(do_not_specialize=["R", "LENGTH"])
def _heads_kernel(
    y_ptr,
    cos_ptr,
    sin_ptr,
    q_weight_ptr,
    k_weight_ptr,
    R,
    LENGTH,
    Q_HEADS,
    D,
    ROTARY,
    stride_y,
    stride_cb,
    stride_cs,
    stride_cd,
    stride_sb,
    stride_ss,
    stride_sd,
    stride_q,
    stride_k,
    eps,
    offset,
    HAS_NORM: tl.constexpr,
    MID: tl.constexpr,
    PROMOTED: tl.constexpr,
    HAS_TAIL: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    PRODUCT: tl.constexpr,
    PDL: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    start_dependent(PDL)
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)  # [BLOCK_R]
    head = tl.program_id(1)
    w_ptr, stride_w = q_weight_ptr, stride_q
    if head >= Q_HEADS:
        w_ptr, stride_w = k_weight_ptr, stride_k
    pair = tl.arange(0, BLOCK_P)  # [BLOCK_P]
    if INTERLEAVED:
        first = 2 * pair
        second = 2 * pair + 1
    else:
        first = pair
        second = pair + ROTARY // 2
    is_pair = pair < ROTARY // 2
    inside = (rows < R)[:, None] & is_pair[None, :]  # [BLOCK_R, BLOCK_P]
    y_rows = y_ptr + rows.to(tl.int64)[:, None] * stride_y + head * D
    x1 = tl.load(y_rows + first[None, :], mask=inside, other=0.0).to(tl.float32)
    x2 = tl.load(y_rows + second[None, :], mask=inside, other=0.0).to(tl.float32)
    dtype = y_ptr.dtype.element_ty
    if HAS_NORM:
        squares = tl.sum(x1 * x1 + x2 * x2, axis=1)  # [BLOCK_R]
        if HAS_TAIL:
            last = ROTARY + tl.arange(0, BLOCK_T)  # [BLOCK_T]
            is_tail = last < D
            in_tail = (rows < R)[:, None] & is_tail[None, :]  # [BLOCK_R, BLOCK_T]
            tail = tl.load(y_rows + last[None, :], mask=in_tail, other=0.0).to(tl.float32)
            scale = tl.rsqrt((squares + tl.sum(tail * tail, axis=1)) / D + eps)
            tail = _weighted(tail, scale, w_ptr, last, stride_w, is_tail, offset, MID, PROMOTED, dtype)
            tl.store(y_rows + last[None, :], tail.to(dtype), mask=in_tail)
        else:
            scale = tl.rsqrt(squares / D + eps)
        x1 = _weighted(x1, scale, w_ptr, first, stride_w, is_pair, offset, MID, PROMOTED, dtype)
        x2 = _weighted(x2, scale, w_ptr, second, stride_w, is_pair, offset, MID, PROMOTED, dtype)
    sequence, position = (rows // LENGTH).to(tl.int64), (rows % LENGTH).to(tl.int64)
    cos_rows = cos_ptr + (sequence * stride_cb + position * stride_cs)[:, None]
    sin_rows = sin_ptr + (sequence * stride_sb + position * stride_ss)[:, None]
    cos1 = tl.load(cos_rows + first[None, :] * stride_cd, mask=inside, other=0.0).to(tl.float32)
    cos2 = tl.load(cos_rows + second[None, :] * stride_cd, mask=inside, other=0.0).to(tl.float32)
    sin1 = tl.load(sin_rows + first[None, :] * stride_sd, mask=inside, other=0.0).to(tl.float32)
    sin2 = tl.load(sin_rows + second[None, :] * stride_sd, mask=inside, other=0.0).to(tl.float32)
    # each product is rounded before the sum, as x * cos + rotated(x) * sin does
    y1 = (x1 * cos1).to(PRODUCT).to(tl.float32) - (x2 * sin1).to(PRODUCT).to(tl.float32)
    y2 = (x2 * cos2).to(PRODUCT).to(tl.float32) + (x1 * sin2).to(PRODUCT).to(tl.float32)
    tl.store(y_rows + first[None, :], y1.to(PRODUCT).to(dtype), mask=inside)
    tl.store(y_rows + second[None, :], y2.to(PRODUCT).to(dtype), mask=inside)


def norm_dtypes(
    x: torch.dtype, weights: tuple[Tensor | None, Tensor | None], offset: float, mid_dtype: torch.dtype | None
) -> tuple[tl.dtype, tl.dtype | None]:
    """The dtypes that a norm rounds to before its weight and after it; `None` where there is no weight."""
    weight = weights[0]
    promoted = None if weight is None else TL_DTYPES[result_dtype(x, weight.dtype, offset, mid_dtype, None)]
    return TL_DTYPES[mid_dtype or torch.float32], promoted


def product_dtype(x: torch.dtype, cos: Tensor, sin: Tensor, compute_dtype: torch.dtype | None) -> tl.dtype:
    """The dtype in which heads are multiplied with cos and sin."""
    return TL_DTYPES[torch.promote_types(compute_dtype or x, torch.promote_types(cos.dtype, sin.dtype))]


def tables(x: Tensor, cos: Tensor, sin: Tensor) -> tuple[int, Tensor, Tensor, tuple[int, int, int, int]]:
    """Rows of one sequence, cos and sin as given or copied, and their strides by sequence and by row within it."""
    lead = x.shape[:-1]
    wide = [t.expand(*lead, t.shape[-1]) for t in (cos, sin)]
    merged = collapse(lead, [t.stride()[:-1] for t in wide], 2)
    if merged is None:  # three leading dimensions that cannot be merged
        cos, sin = (t.contiguous() for t in wide)
        merged = collapse(lead, [t.stride()[:-1] for t in (cos, sin)], 2)
        assert merged is not None
    (_, length), ((cos_b, cos_s), (sin_b, sin_s)) = merged
    return length, cos, sin, (cos_b, cos_s, sin_b, sin_s)


def turned_behind(
    product: Callable[[Tensor, Tensor, Tensor | None], Tensor],
    turns: Callable[[Tensor, Tensor, int], bool] | None = None,
    linear_rope: Callable[..., None] | None = None,
) -> Callable[..., Tensor]:
    """The op `qkv_rope` as a product, `product(x, weight, bias)`, whose heads are turned in place.

    Whole heads without a norm are turned in the product by `linear_rope`, if there is one, where
    `turns(rows, weight, half)`: see `slab_gluon`.
    """

    def qkv_rope(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        q_weight: Tensor | None,
        k_weight: Tensor | None,
        q_heads: int,
        k_heads: int,
        head_dim: int,
        norm: bool,
        eps: float,
        offset: float,
        mid_dtype: torch.dtype | None,
        layout: str,
        compute_dtype: torch.dtype | None,
    ) -> Tensor:
        if turns is not None and linear_rope is not None and not norm and layout == "half":
            rows, half = x.reshape(-1, x.shape[-1]), head_dim // 2
            whole = head_dim == cos.shape[-1] and cos.stride(-1) == sin.stride(-1) == 1
            if whole and turns(rows, weight, half):
                length, cos, sin, strides = tables(x, cos, sin)
                y = empty((*x.shape[:-1], weight.shape[0]), x.dtype, x.device)
                sizes = (length, q_heads + k_heads, half)
                product_in = product_dtype(x.dtype, cos, sin, compute_dtype)
                linear_rope(rows, weight, bias, y, (cos, sin), strides, sizes, product_in)
                return y
        y = product(x, weight, bias)
        turn(x, y, cos, sin, q_weight, k_weight, (q_heads, k_heads, head_dim), norm, eps, offset, mid_dtype, layout,
             compute_dtype)  # fmt: skip
        return y

    return qkv_rope


def turn(
    x: Tensor,
    y: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    sizes: tuple[int, int, int],
    norm: bool,
    eps: float,
    offset: float,
    mid_dtype: torch.dtype | None,
    layout: str,
    compute_dtype: torch.dtype | None,
) -> None:
    """Norm and rotation in y `[..., N]`, made of x; `sizes`: heads of q, heads of k, columns of a head."""
    q_heads, k_heads, head_dim = sizes
    rows, rotary = y.numel() // y.shape[-1], cos.shape[-1]
    if rows == 0:
        return
    length, cos, sin, (cos_b, cos_s, sin_b, sin_s) = tables(x, cos, sin)
    mid, promoted = norm_dtypes(y.dtype, (q_weight, k_weight), offset, mid_dtype)
    config = choose("heads", {"rows": rows, "D": triton.next_power_of_2(head_dim)}, RowMemory(head_dim), x.device)
    with on_device(x):
        launch(
            _heads_kernel,
            (triton.cdiv(rows, config["BLOCK_R"]), q_heads + k_heads),
            y,
            cos,
            sin,
            y if q_weight is None else q_weight,
            y if k_weight is None else k_weight,
            rows,
            length,
            q_heads,
            head_dim,
            rotary,
            y.shape[-1],
            cos_b,
            cos_s,
            cos.stride(-1),
            sin_b,
            sin_s,
            sin.stride(-1),
            0 if q_weight is None else q_weight.stride(0),
            0 if k_weight is None else k_weight.stride(0),
            eps,
            offset,
            HAS_NORM=norm,
            MID=mid,
            PROMOTED=promoted,
            HAS_TAIL=rotary < head_dim,
            INTERLEAVED=layout == "interleaved",
            PRODUCT=product_dtype(y.dtype, cos, sin, compute_dtype),
            BLOCK_P=triton.next_power_of_2(rotary // 2),
            BLOCK_T=triton.next_power_of_2(max(1, head_dim - rotary)),
            enable_fp_fusion=False,  # a fused multiply-add would skip the rounding of the product
            **overlaps(x),
            **config.launch,
        )


def _refuse_heads(signature: Signature) -> str | None:
    x, weight, cos, sin = (signature[name] for name in ("x", "weight", "cos", "sin"))
    head, heads = signature["head_dim"], signature["q_heads"] + signature["k_heads"]
    if not x.shape or len(weight.shape) != 2 or weight.shape[0] is None or x.shape[-1] != weight.shape[1]:
        return f"x {list(x.shape)} and weight {list(weight.shape)} are not a linear layer"
    if not 0 < head <= MAX_HEAD or not 0 < heads * head <= weight.shape[0]:
        return f"{heads} heads of {head} columns among {weight.shape[0]}; a head has 1 to {MAX_HEAD}"
    if signature["layout"] not in LAYOUTS:
        return f"layout {signature['layout']!r} is not one of {LAYOUTS}"
    rotary = cos.shape[-1] if cos.shape else None
    if rotary is None or rotary % 2 or rotary > head or sin.shape[-1:] != (rotary,):
        return f"cos {list(cos.shape)} and sin {list(sin.shape)} do not turn an even part of {head} columns"
    if max(len(cos.shape), len(sin.shape)) > len(x.shape):
        return "cos or sin has more dimensions than x"
    if (signature["q_weight"] is None) != (signature["k_weight"] is None):
        return "only one of q and k has a norm weight"
    weights = [signature[name] for name in ("q_weight", "k_weight") if signature[name] is not None]
    if len({w.dtype for w in weights}) > 1:
        return "the norms' weights differ in dtype"
    return refuse_vector(signature, "q_weight", head) or refuse_vector(signature, "k_weight", head)


def refuse_qkv(signature: Signature) -> str | None:
    """Why the heads of this call cannot be turned by our kernels, or `None`."""
    return (
        refuse_tensors(signature, ("x", "weight", "bias", "cos", "sin", "q_weight", "k_weight"))
        or refuse_mixed(signature, ("x", "weight"))
        or _refuse_heads(signature)
        or refuse_vector(signature, "bias", signature["weight"].shape[0])
        or refuse_rounding(signature, ("mid_dtype", "compute_dtype"))
    )


qkv_rope: Final = turned_behind(lambda x, weight, bias: library(F.linear, x, weight, bias))
qkv_rope_of_few_rows: Final = turned_behind(
    lambda x, weight, bias: skinny_triton.linear_act(x, weight, bias, "identity")
)

KERNELS: Final = (
    Kernel(ops.qkv_rope, "cublas", qkv_rope, refuse_qkv),
    Kernel(ops.qkv_rope, "skinny", qkv_rope_of_few_rows, refuse_qkv, early=("weight",)),
)
