# mypy: disallow-untyped-defs=False
"""Residual sum, RMSNorm, matrix product and rotation of heads of single rows in one launch, in Triton.

The root mean square of the sum is one factor of all results: each program adds up squares beside its products, over
the same columns, and multiplies at the end. What a norm of its own would round in between is not rounded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import norm_products as ops
from . import qkv_rope_triton, rms_norm_triton, skinny_triton
from .activation_triton import activate
from .choice import arranged
from .launch import TL_DTYPES, empty, launch, on_device, refuse_different_shapes, rows_aligned
from .linear_act import gate_up, linear_act
from .op import Kernel, Op, Signature, TensorSpec
from .overlap import load_early, overlaps, start_dependent
from .qkv_rope import qkv_rope
from .rms_norm import add_rms_norm, result_dtype
from .skinny_triton import GemvMemory
from .tuning import choose


@triton.jit
def _sum_of(x_ptrs, r_ptrs, g_ptrs, offset, inside, HAS_GAIN: tl.constexpr, SUM_DTYPE: tl.constexpr):
    """Some columns of x and the residual: their sum times the norm's weight, and the sum as it goes on."""
    x = tl.load(x_ptrs, mask=inside, other=0.0, eviction_policy="evict_last").to(tl.float32)
    r = tl.load(r_ptrs, mask=inside, other=0.0, eviction_policy="evict_last").to(tl.float32)
    total = (x + r).to(SUM_DTYPE)
    h = total.to(tl.float32)
    if HAS_GAIN:
        h *= tl.load(g_ptrs, mask=inside, other=0.0, eviction_policy="evict_last").to(tl.float32) + offset
    return h, total


@triton.jit
def _norm_gemv_kernel(
    x_ptr,
    r_ptr,
    g_ptr,  # the norm's weight
    w_ptr,
    b_ptr,
    y_ptr,
    s_ptr,
    cos_ptr,
    sin_ptr,
    N,
    K,
    stride_x,
    stride_r,
    stride_g,
    stride_wn,
    stride_b,
    up_offset,  # from a row of the weight to the other that is multiplied beside it: of up, or of a rotated pair
    stride_cb,
    stride_cs,
    stride_cd,
    stride_sb,
    stride_ss,
    stride_sd,
    LENGTH,
    HEADS,
    D,
    eps,
    offset,
    HAS_GAIN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    KIND: tl.constexpr,
    GATED: tl.constexpr,
    ROPE: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    PRODUCT: tl.constexpr,
    SUM_DTYPE: tl.constexpr,
    ONCE: tl.constexpr,  # all columns at once: the weight is asked for before the wait
    PDL: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64)  # of this dimension of a grid there may be any number
    n = tl.program_id(1) * ROWS + tl.arange(0, ROWS)  # [ROWS]
    k = tl.arange(0, BLOCK_K)  # [BLOCK_K]
    wanted = n < N
    n = tl.minimum(n, N - 1)
    if ROPE:  # n counts pairs of rows: of the first half of a head and of the second, or neighbours
        head = n // (D // 2)
        if INTERLEAVED:
            first = 2 * (n % (D // 2))
            second = first + 1
        else:
            first = n % (D // 2)
            second = first + D // 2
        n = head * D + first
    w_ptrs = w_ptr + n.to(tl.int64)[:, None] * stride_wn + k[None, :]  # [ROWS, BLOCK_K]
    up_ptrs = w_ptrs + up_offset
    x_ptrs = x_ptr + t * stride_x + k
    r_ptrs = r_ptr + t * stride_r + k
    s_ptrs = s_ptr + t * K + k
    if ONCE:
        inside = k < K
        w, up = load_early(w_ptrs, up_ptrs, inside[None, :], GATED or ROPE, PDL)
        h, total = _sum_of(x_ptrs, r_ptrs, g_ptr + k * stride_g, offset, inside, HAS_GAIN, SUM_DTYPE)
        tl.store(s_ptrs, total, mask=inside & (tl.program_id(1) == 0))
        squares = total.to(tl.float32) * total.to(tl.float32)
        acc = w.to(tl.float32) * h[None, :]
        up_acc = up.to(tl.float32) * h[None, :]
    else:
        start_dependent(PDL)
        acc = tl.zeros((ROWS, BLOCK_K), dtype=tl.float32)
        up_acc = tl.zeros((ROWS, BLOCK_K), dtype=tl.float32)
        squares = tl.zeros((BLOCK_K,), dtype=tl.float32)
        for start in tl.range(0, K, BLOCK_K):
            inside = k < K - start
            w = tl.load(w_ptrs + start, mask=inside[None, :], other=0.0, eviction_policy="evict_first")
            g_ptrs = g_ptr + (start + k) * stride_g
            h, total = _sum_of(x_ptrs + start, r_ptrs + start, g_ptrs, offset, inside, HAS_GAIN, SUM_DTYPE)
            tl.store(s_ptrs + start, total, mask=inside & (tl.program_id(1) == 0))
            squares += total.to(tl.float32) * total.to(tl.float32)
            acc += w.to(tl.float32) * h[None, :]
            if GATED or ROPE:
                up = tl.load(up_ptrs + start, mask=inside[None, :], other=0.0, eviction_policy="evict_first")
                up_acc += up.to(tl.float32) * h[None, :]
    scale = tl.rsqrt(tl.sum(squares, axis=0) / K + eps)
    y = tl.sum(acc, axis=1) * scale
    up_y = tl.sum(up_acc, axis=1) * scale
    dtype = y_ptr.dtype.element_ty
    if ROPE:
        other = n + second - first
        if HAS_BIAS:
            y += tl.load(b_ptr + n * stride_b).to(tl.float32)
            up_y += tl.load(b_ptr + other * stride_b).to(tl.float32)
        y, up_y = y.to(dtype).to(tl.float32), up_y.to(dtype).to(tl.float32)
        cos_row = cos_ptr + (t // LENGTH) * stride_cb + (t % LENGTH) * stride_cs
        sin_row = sin_ptr + (t // LENGTH) * stride_sb + (t % LENGTH) * stride_ss
        turned = head < HEADS
        cos1 = tl.load(cos_row + first * stride_cd, mask=turned, other=1.0).to(tl.float32)
        cos2 = tl.load(cos_row + second * stride_cd, mask=turned, other=1.0).to(tl.float32)
        sin1 = tl.load(sin_row + first * stride_sd, mask=turned, other=0.0).to(tl.float32)
        sin2 = tl.load(sin_row + second * stride_sd, mask=turned, other=0.0).to(tl.float32)
        # each product is rounded before the sum, as x * cos + rotated(x) * sin does
        y1 = (y * cos1).to(PRODUCT).to(tl.float32) - (up_y * sin1).to(PRODUCT).to(tl.float32)
        y2 = (up_y * cos2).to(PRODUCT).to(tl.float32) + (y * sin2).to(PRODUCT).to(tl.float32)
        row = y_ptr + t * (2 * N)
        tl.store(row + n, tl.where(turned, y1, y).to(dtype), mask=wanted)
        tl.store(row + other, tl.where(turned, y2, up_y).to(dtype), mask=wanted)
    else:
        if HAS_BIAS:
            y += tl.load(b_ptr + n * stride_b).to(tl.float32)
            if GATED:
                up_y += tl.load(b_ptr + (N + n) * stride_b).to(tl.float32)
        y = activate(y, KIND)
        if GATED:
            y *= up_y
        tl.store(y_ptr + t * N + n, y.to(dtype), mask=wanted)


Refusal = Callable[[Signature], str | None]


@dataclass(frozen=True)
class _Turn:
    """The heads that are rotated behind the product."""

    cos: Tensor
    sin: Tensor
    heads: int
    width: int
    interleaved: bool
    compute_dtype: torch.dtype | None


def _run(
    norm: tuple[Any, ...], weight: Tensor, bias: Tensor | None, kind: str, gated: bool, turn: _Turn | None = None
) -> tuple[Tensor, Tensor] | None:
    """None where a tensor cannot be read in wide loads."""
    x, residual, gain, eps, offset, *_ = norm
    if x.shape != residual.shape:  # sizes that were not known when the kernel was chosen
        x, residual = torch.broadcast_tensors(x, residual)
    k, columns = x.shape[-1], weight.shape[0] // (2 if gated else 1)
    rows, beside = x.reshape(-1, k), residual.reshape(-1, k)
    if min(rows.shape[0], columns, k) == 0 or not all(map(rows_aligned, (rows, beside, weight))):
        return None
    sum_dtype = torch.promote_types(x.dtype, residual.dtype)
    y = empty((*x.shape[:-1], columns), weight.dtype, x.device)
    s = empty(x.shape, sum_dtype, x.device)
    n, both = columns, gated or turn is not None
    up_offset = n * weight.stride(0)
    length, cos, sin, steps, product = 1, x, x, (0, 0, 0, 0), tl.float32
    if turn is not None:
        n, up_offset = columns // 2, weight.stride(0) * (1 if turn.interleaved else turn.width // 2)
        length, cos, sin, steps = qkv_rope_triton.tables(y, turn.cos, turn.sin)
        product = qkv_rope_triton.product_dtype(y.dtype, cos, sin, turn.compute_dtype)
    features = {"N": n, "K": k, "bytes": weight.element_size(), "weights": 2 if both else 1}
    config = choose("norm_gemv", features, GemvMemory(weight.element_size(), features["weights"]), x.device)
    with on_device(x):
        launch(
            _norm_gemv_kernel,
            (rows.shape[0], triton.cdiv(n, config["ROWS"])),
            rows,
            beside,
            x if gain is None else gain,
            weight,
            x if bias is None else bias,
            y,
            s,
            cos,
            sin,
            n,
            k,
            rows.stride(0),
            beside.stride(0),
            0 if gain is None else gain.stride(0),
            weight.stride(0),
            0 if bias is None else bias.stride(0),
            up_offset,
            steps[0],
            steps[1],
            cos.stride(-1),
            steps[2],
            steps[3],
            sin.stride(-1),
            length,
            0 if turn is None else turn.heads,
            2 if turn is None else turn.width,
            eps,
            offset,
            HAS_GAIN=gain is not None,
            HAS_BIAS=bias is not None,
            KIND=kind,
            GATED=gated,
            ROPE=turn is not None,
            INTERLEAVED=turn is not None and turn.interleaved,
            PRODUCT=product,
            SUM_DTYPE=TL_DTYPES[sum_dtype],
            ONCE=k <= config["BLOCK_K"],
            **overlaps(x),
            **config.launch,
        )
    return y, s


def _linear(args: tuple[Any, ...], gated: bool) -> tuple[Tensor, Tensor]:
    norm, (weight, bias, kind) = args[: ops.NORM], args[ops.NORM :]
    found = _run(norm, weight, bias, kind, gated)
    if found is not None:
        return found
    normed, s = rms_norm_triton.add_rms_norm(*norm)
    return (skinny_triton.gate_up if gated else skinny_triton.linear_act)(normed, weight, bias, kind), s


def norm_linear_act(*args: Any, **named: Any) -> tuple[Tensor, Tensor]:
    """As the op `norm_linear_act`."""
    return _linear(arranged(ops.norm_linear_act, args, named), gated=False)


def norm_gate_up(*args: Any, **named: Any) -> tuple[Tensor, Tensor]:
    """As the op `norm_gate_up`."""
    return _linear(arranged(ops.norm_gate_up, args, named), gated=True)


def norm_qkv_rope(*args: Any, **named: Any) -> tuple[Tensor, Tensor]:
    """As the op `norm_qkv_rope`: one launch, or two where heads have norms or are rotated in part only."""
    args = arranged(ops.norm_qkv_rope, args, named)
    first, (weight, bias, cos, sin, q_weight, k_weight, q_heads, k_heads, width, norm, *rest) = (
        args[: ops.NORM],
        args[ops.NORM :],
    )
    layout, compute_dtype = rest[-2:]
    whole = cos.shape[-1] == width and weight.shape[0] % width == 0
    turn = _Turn(cos, sin, q_heads + k_heads, width, layout == "interleaved", compute_dtype)
    found = _run(first, weight, bias, "identity", False, turn if whole and not norm else None)
    if found is None:
        normed, s = rms_norm_triton.add_rms_norm(*first)
        return qkv_rope_triton.qkv_rope_of_few_rows(normed, *args[ops.NORM :]), s
    if norm or not whole:
        sizes = (q_heads, k_heads, width)
        qkv_rope_triton.turn(found[0], found[0], cos, sin, q_weight, k_weight, sizes, norm, *rest)
    return found


def _supports(product: Op, refuse: Refusal) -> Refusal:
    """Why a joint call cannot be computed: its norm, its product, or a norm that leaves the weight's dtype."""

    def supports(signature: Signature) -> str | None:
        values = list(signature.values())
        norm = add_rms_norm.signature(*values[: ops.NORM])
        x, residual, gain, _, offset, mid_dtype, out_dtype = norm.values()
        refused = rms_norm_triton.KERNELS[1].supports(norm) or refuse_different_shapes(norm, "x", "residual")
        if refused is not None:
            return refused
        total = torch.promote_types(x.dtype, residual.dtype)
        dtype = result_dtype(total, None if gain is None else gain.dtype, offset, mid_dtype, out_dtype)
        y = TensorSpec(x.shape, dtype, x.device)
        weight = signature["weight"]
        if dtype != weight.dtype:
            return f"the norm makes {dtype}, the weight is {weight.dtype}"
        return refuse(product.signature(y, *values[ops.NORM :]))

    return supports


_EARLY: Final = ("weight",)

KERNELS: Final = (
    Kernel(
        ops.norm_linear_act,
        "gemv",
        norm_linear_act,
        _supports(linear_act, skinny_triton.KERNELS[0].supports),
        early=_EARLY,
    ),
    Kernel(ops.norm_gate_up, "gemv", norm_gate_up, _supports(gate_up, skinny_triton.KERNELS[1].supports), early=_EARLY),
    Kernel(ops.norm_qkv_rope, "gemv", norm_qkv_rope, _supports(qkv_rope, qkv_rope_triton.refuse_qkv), early=_EARLY),
)
