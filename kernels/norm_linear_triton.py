# mypy: disallow-untyped-defs=False
"""A linear layer with RMSNorm as its prologue, in Triton: each program reads its rows twice, first for statistics."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import norm_linear as ops
from .launch import TL_DTYPES, empty, launch, on_device, refuse_mixed, refuse_tensors, refuse_vector
from .linear_act_triton import add_compensated
from .op import Kernel, Signature
from .rms_norm import result_dtype
from .rms_norm_triton import refuse_rounding
from .tuning import Config, choose


@triton.jit(do_not_specialize=["M"])
def _norm_linear_kernel(
    x_ptr,
    g_ptr,
    w_ptr,
    b_ptr,
    y_ptr,
    M,
    N,
    K,
    stride_xm,
    stride_xk,
    stride_g,
    stride_wn,
    stride_wk,
    stride_b,
    stride_ym,
    eps,
    offset,
    HAS_NORM_WEIGHT: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    MID_DTYPE: tl.constexpr,
    PROMOTED_DTYPE: tl.constexpr,
    COMPENSATED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    cols = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    k = tl.arange(0, BLOCK_K).to(tl.int64)  # [BLOCK_K]
    row_inside = (rows < M)[:, None]
    squares = tl.zeros((BLOCK_M,), dtype=tl.float32)
    for start in range(0, K, BLOCK_K):
        at = start + k
        inside = row_inside & (at < K)[None, :]
        x = tl.load(x_ptr + rows[:, None] * stride_xm + at[None, :] * stride_xk, mask=inside, other=0.0).to(tl.float32)
        squares += tl.sum(x * x, axis=1)
    scale = tl.rsqrt(squares / K + eps)  # [BLOCK_M]
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    lost = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, K, BLOCK_K):
        at = start + k
        inside = row_inside & (at < K)[None, :]
        x = tl.load(x_ptr + rows[:, None] * stride_xm + at[None, :] * stride_xk, mask=inside, other=0.0).to(tl.float32)
        normed = (x * scale[:, None]).to(MID_DTYPE).to(tl.float32)  # [BLOCK_M, BLOCK_K]
        if HAS_NORM_WEIGHT:
            g = tl.load(g_ptr + at * stride_g, mask=at < K, other=0.0).to(tl.float32)
            if HAS_OFFSET:
                g += offset
            normed = (normed * g[None, :]).to(PROMOTED_DTYPE).to(tl.float32)
        w_inside = (cols < N)[None, :] & (at < K)[:, None]
        w = tl.load(w_ptr + cols[None, :] * stride_wn + at[:, None] * stride_wk, mask=w_inside, other=0.0)
        if COMPENSATED:
            acc, lost = add_compensated(acc, lost, tl.dot(normed, w, input_precision="ieee"))
        else:
            acc = tl.dot(normed.to(w_ptr.dtype.element_ty), w, acc, input_precision="ieee")
    if HAS_BIAS:
        acc += tl.load(b_ptr + cols * stride_b, mask=cols < N, other=0.0).to(tl.float32)[None, :]
    y_inside = row_inside & (cols < N)[None, :]
    tl.store(y_ptr + rows[:, None] * stride_ym + cols[None, :], acc.to(y_ptr.dtype.element_ty), mask=y_inside)


@dataclass(frozen=True)
class NormLinearMemory:
    """Shared memory of one program: in each stage a tile of x and one of the weight, x once more after the norm."""

    x_itemsize: int
    w_itemsize: int

    def __call__(self, config: Config) -> int:
        x_tile = config["BLOCK_M"] * config["BLOCK_K"]
        w_tile = config["BLOCK_N"] * config["BLOCK_K"]
        staged = config.num_stages * (x_tile * self.x_itemsize + w_tile * self.w_itemsize)
        return staged + x_tile * self.w_itemsize + 1024


def norm_linear(
    x: Tensor,
    norm_weight: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    offset: float = 0.0,
    mid_dtype: torch.dtype | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """As the op `norm_linear`."""
    n, k = weight.shape
    y = empty((*x.shape[:-1], n), weight.dtype, weight.device)
    if y.numel() == 0:
        return y
    rows = x.reshape(-1, k)
    m = rows.shape[0]
    norm_dtype = None if norm_weight is None else norm_weight.dtype
    promoted = result_dtype(x.dtype, norm_dtype, offset, mid_dtype, None)
    memory = NormLinearMemory(x.element_size(), weight.element_size())
    config = choose("norm_linear", {"M": m, "N": n, "K": k}, memory, x.device)
    grid = (triton.cdiv(m, config["BLOCK_M"]), triton.cdiv(n, config["BLOCK_N"]))
    with on_device(x):
        launch(
            _norm_linear_kernel,
            grid,
            rows,
            x if norm_weight is None else norm_weight,
            weight,
            x if bias is None else bias,
            y,
            m,
            n,
            k,
            rows.stride(0),
            rows.stride(1),
            0 if norm_weight is None else norm_weight.stride(0),
            weight.stride(0),
            weight.stride(1),
            0 if bias is None else bias.stride(0),
            n,
            eps,
            offset,
            HAS_NORM_WEIGHT=norm_weight is not None,
            HAS_OFFSET=offset != 0,
            HAS_BIAS=bias is not None,
            MID_DTYPE=TL_DTYPES[mid_dtype or torch.float32],
            PROMOTED_DTYPE=TL_DTYPES[promoted],
            COMPENSATED=weight.dtype == torch.float32,
            **config.launch,
        )
    return y


def _refuse_sizes(signature: Signature) -> str | None:
    x, weight = signature["x"], signature["weight"]
    if not x.shape or len(weight.shape) != 2:
        return f"x {list(x.shape)} and weight {list(weight.shape)} are not a linear layer"
    if x.shape[-1] != weight.shape[1]:
        return f"x has {x.shape[-1]} features, weight takes {weight.shape[1]}"
    return refuse_vector(signature, "bias", weight.shape[0]) or refuse_vector(signature, "norm_weight", x.shape[-1])


def _supports(signature: Signature) -> str | None:
    return (
        refuse_tensors(signature, ("x", "norm_weight", "weight", "bias"))
        or (refuse_mixed(signature, ("weight", "bias")) if signature["bias"] is not None else None)
        or refuse_rounding(signature, ("mid_dtype", "out_dtype"))
        or _refuse_sizes(signature)
    )


KERNELS: Final = (Kernel(ops.norm_linear, "triton", norm_linear, _supports),)
