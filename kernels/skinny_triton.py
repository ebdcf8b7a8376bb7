# mypy: disallow-untyped-defs=False
"""Matrix products with few rows of x (64 at most), where reading the weight is all that costs, in Triton.

One row of x is a sum of products (`_gemv_kernel`). For more, rows of the weight are the first operand of the tensor
cores and rows of x the second, which may be 8 wide (`_skinny_kernel`); where that makes too few programs, several share
the depth, or the warps of a program do. Epilogues as in `linear_act_triton`, which also takes what does not fit here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import linear_act as ops
from . import linear_act_triton
from .activation_triton import activate, refuse_kind
from .launch import (
    empty,
    launch,
    on_device,
    refuse_mixed,
    refuse_tensors,
    refuse_vector,
    rows_aligned,
)
from .op import Kernel, Signature
from .overlap import load_early, overlaps, start_dependent
from .tuning import Config, choose

MAX_ROWS: Final = 64


@triton.jit
def _gemv_kernel(
    x_ptr,
    w_ptr,
    b_ptr,
    y_ptr,
    N,
    K,
    stride_wn,
    stride_b,
    up_offset,  # from the weight's rows of gate to its rows of up
    HAS_BIAS: tl.constexpr,
    KIND: tl.constexpr,
    GATED: tl.constexpr,
    ONCE: tl.constexpr,  # all columns at once: the weight is asked for before the wait
    EVEN_K: tl.constexpr,
    PDL: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)  # [ROWS]
    k = tl.arange(0, BLOCK_K)  # [BLOCK_K]
    w_ptrs = w_ptr + tl.minimum(n, N - 1).to(tl.int64)[:, None] * stride_wn + k[None, :]  # [ROWS, BLOCK_K]
    up_ptrs = w_ptrs + up_offset
    if ONCE:
        w, up = load_early(w_ptrs, up_ptrs, (k < K)[None, :], GATED, PDL)
        x = tl.load(x_ptr + k, mask=k < K, other=0.0, eviction_policy="evict_last").to(tl.float32)[None, :]
        acc = w.to(tl.float32) * x
        up_acc = up.to(tl.float32) * x
    else:
        start_dependent(PDL)
        acc = tl.zeros((ROWS, BLOCK_K), dtype=tl.float32)
        up_acc = tl.zeros((ROWS, BLOCK_K), dtype=tl.float32)
        for start in tl.range(0, K, BLOCK_K, num_stages=STAGES):
            if EVEN_K:
                w = tl.load(w_ptrs + start, eviction_policy="evict_first")
                x = tl.load(x_ptr + start + k, eviction_policy="evict_last")
            else:
                inside = k < K - start
                w = tl.load(w_ptrs + start, mask=inside[None, :], other=0.0, eviction_policy="evict_first")
                x = tl.load(x_ptr + start + k, mask=inside, other=0.0, eviction_policy="evict_last")
            x = x.to(tl.float32)[None, :]
            acc += w.to(tl.float32) * x
            if GATED:
                if EVEN_K:
                    up = tl.load(up_ptrs + start, eviction_policy="evict_first")
                else:
                    inside = k < K - start
                    up = tl.load(up_ptrs + start, mask=inside[None, :], other=0.0, eviction_policy="evict_first")
                up_acc += up.to(tl.float32) * x
    y = tl.sum(acc, axis=1)
    up_y = tl.sum(up_acc, axis=1)
    if HAS_BIAS:
        y += tl.load(b_ptr + n * stride_b, mask=n < N, other=0.0).to(tl.float32)
        if GATED:
            up_y += tl.load(b_ptr + (N + n) * stride_b, mask=n < N, other=0.0).to(tl.float32)
    y = activate(y, KIND)
    if GATED:
        y *= up_y
    tl.store(y_ptr + n, y.to(y_ptr.dtype.element_ty), mask=n < N)


@triton.jit
def _finish(
    acc,
    up_acc,
    b_ptr,
    y_ptr,
    t,
    n,
    M,
    N,
    stride_b,
    HAS_BIAS: tl.constexpr,
    KIND: tl.constexpr,
    GATED: tl.constexpr,
):
    """Bias, activation and store of a tile `[rows of the weight, rows of x]`."""
    if HAS_BIAS:
        acc += tl.load(b_ptr + n * stride_b, mask=n < N, other=0.0).to(tl.float32)[:, None]
        if GATED:
            up_acc += tl.load(b_ptr + (N + n) * stride_b, mask=n < N, other=0.0).to(tl.float32)[:, None]
    y = activate(acc, KIND)
    if GATED:
        y *= up_acc
    inside = (n < N)[:, None] & (t < M)[None, :]
    tl.store(y_ptr + t.to(tl.int64)[None, :] * N + n[:, None], y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["M"])
def _skinny_kernel(
    x_ptr,
    w_ptr,
    b_ptr,
    y_ptr,
    part_ptr,
    M,
    N,
    K,
    stride_xm,
    stride_wn,
    stride_b,
    up_offset,  # from the weight's rows of gate to its rows of up
    HAS_BIAS: tl.constexpr,
    KIND: tl.constexpr,
    GATED: tl.constexpr,
    EVEN_K: tl.constexpr,
    PDL: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PARTS: tl.constexpr,  # of the depth of a tile, each for warps of its own
    SPLIT_K: tl.constexpr,  # programs that share the depth
    STAGES: tl.constexpr,
):
    start_dependent(PDL)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    t = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)  # [BLOCK_T]
    split = tl.program_id(2)
    each = tl.cdiv(tl.cdiv(K, BLOCK_K), SPLIT_K) * BLOCK_K
    first = split * each
    last = tl.minimum(first + each, K)
    w_rows = tl.minimum(n, N - 1).to(tl.int64) * stride_wn
    # behind the last row each once more: one alone would be asked for by everybody
    x_rows = (t % M).to(tl.int64) * stride_xm
    if PARTS == 1:
        k = tl.arange(0, BLOCK_K)
        w_at = k[None, :]  # [1, BLOCK_K]
        x_at = k[:, None]  # [BLOCK_K, 1]
        w_ptrs = w_ptr + w_rows[:, None] + w_at
        x_ptrs = x_ptr + x_rows[None, :] + x_at
        acc = tl.zeros((BLOCK_N, BLOCK_T), dtype=tl.float32)
        up_acc = tl.zeros((BLOCK_N, BLOCK_T), dtype=tl.float32)
    else:
        DEPTH: tl.constexpr = BLOCK_K // PARTS
        k = (tl.arange(0, PARTS) * DEPTH)[:, None] + tl.arange(0, DEPTH)[None, :]  # [PARTS, DEPTH]
        w_at = k[:, None, :]
        x_at = k[:, :, None]
        w_ptrs = w_ptr + w_rows[None, :, None] + w_at
        x_ptrs = x_ptr + x_rows[None, None, :] + x_at
        acc = tl.zeros((PARTS, BLOCK_N, BLOCK_T), dtype=tl.float32)
        up_acc = tl.zeros((PARTS, BLOCK_N, BLOCK_T), dtype=tl.float32)
    for start in tl.range(first, last, BLOCK_K, num_stages=STAGES):
        if EVEN_K:
            w = tl.load(w_ptrs + start, eviction_policy="evict_first")
            x = tl.load(x_ptrs + start, eviction_policy="evict_last")
        else:
            w = tl.load(w_ptrs + start, mask=w_at < K - start, other=0.0, eviction_policy="evict_first")
            x = tl.load(x_ptrs + start, mask=x_at < K - start, other=0.0, eviction_policy="evict_last")
        acc = tl.dot(w, x, acc)
        if GATED:
            if EVEN_K:
                up = tl.load(w_ptrs + up_offset + start, eviction_policy="evict_first")
            else:
                inside = w_at < K - start
                up = tl.load(w_ptrs + up_offset + start, mask=inside, other=0.0, eviction_policy="evict_first")
            up_acc = tl.dot(up, x, up_acc)
    if PARTS > 1:
        acc = tl.sum(acc, axis=0)
        up_acc = tl.sum(up_acc, axis=0)
    if SPLIT_K == 1:
        _finish(acc, up_acc, b_ptr, y_ptr, t, n, M, N, stride_b, HAS_BIAS, KIND, GATED)
    else:
        inside = (n < N)[:, None] & (t < M)[None, :]
        out = part_ptr + (split * M + t).to(tl.int64)[None, :] * N + n[:, None]
        tl.store(out, acc, mask=inside)
        if GATED:
            tl.store(out + (SPLIT_K * M).to(tl.int64) * N, up_acc, mask=inside)


@triton.jit(do_not_specialize=["M"])
def _sum_kernel(
    part_ptr,
    b_ptr,
    y_ptr,
    M,
    N,
    stride_b,
    HAS_BIAS: tl.constexpr,
    KIND: tl.constexpr,
    GATED: tl.constexpr,
    PDL: tl.constexpr,
    SPLIT_K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The epilogue of `_skinny_kernel` where programs shared the depth: adds their parts in a fixed order."""
    start_dependent(PDL)
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    t = tl.program_id(1) + tl.arange(0, 1)
    at = (part_ptr + t.to(tl.int64) * N + n)[:, None]
    step = M.to(tl.int64) * N
    acc = tl.zeros((BLOCK, 1), dtype=tl.float32)
    up_acc = tl.zeros((BLOCK, 1), dtype=tl.float32)
    for split in tl.static_range(SPLIT_K):
        acc += tl.load(at + split * step, mask=(n < N)[:, None], other=0.0)
        if GATED:
            up_acc += tl.load(at + (SPLIT_K + split) * step, mask=(n < N)[:, None], other=0.0)
    _finish(acc, up_acc, b_ptr, y_ptr, t, n, M, N, stride_b, HAS_BIAS, KIND, GATED)


@dataclass(frozen=True)
class SkinnyMemory:
    """Shared memory of one program: each pipeline stage holds a tile of x and one or two of the weight."""

    itemsize: int
    weights: int
    block_t: int

    def __call__(self, config: Config) -> int:
        tile = config["BLOCK_K"] * (self.block_t + self.weights * config["BLOCK_N"]) * self.itemsize
        sums = config["PARTS"] * config["BLOCK_N"] * self.block_t * 4
        return max(config.num_stages * tile, sums) + 1024


@dataclass(frozen=True)
class GemvMemory:
    """Shared memory of one program: what a loop with stages keeps, x on its way to its threads, the sums over warps."""

    itemsize: int
    weights: int

    def __call__(self, config: Config) -> int:
        tile = config["BLOCK_K"] * (1 + self.weights * config["ROWS"]) * self.itemsize
        staged = config.num_stages * tile if config.num_stages > 1 else config["BLOCK_K"] * self.itemsize
        return staged + config["ROWS"] * 128 + 1024


def block_of_rows(m: int) -> int:
    """The width of the tensor cores' second operand for m rows of x."""
    return min(MAX_ROWS, max(8, triton.next_power_of_2(m)))


def fits(rows: Tensor, weight: Tensor) -> bool:
    """Whether the kernels here can read both in wide loads; fp32 only one row, since the tensor cores would round."""
    return (rows.shape[0] == 1 or rows.element_size() == 2) and rows_aligned(rows) and rows_aligned(weight)


def _run(x: Tensor, weight: Tensor, bias: Tensor | None, kind: str, gated: bool) -> Tensor:
    k = x.shape[-1]
    n = weight.shape[0] // 2 if gated else weight.shape[0]
    rows = x.reshape(-1, k)
    m = rows.shape[0]
    if m == 0 or n == 0 or k == 0 or not fits(rows, weight):
        return (linear_act_triton.gate_up if gated else linear_act_triton.linear_act)(x, weight, bias, kind)
    y = empty((*x.shape[:-1], n), x.dtype, x.device)
    features = {"M": m, "N": n, "K": k, "bytes": x.element_size(), "weights": 2 if gated else 1}
    epilogue = {"HAS_BIAS": bias is not None, "KIND": kind, "GATED": gated}
    given_bias = x if bias is None else bias
    stride_b = 0 if bias is None else bias.stride(0)
    with on_device(x):
        if m == 1:
            config = choose("gemv", features, GemvMemory(x.element_size(), features["weights"]), x.device)
            launch(
                _gemv_kernel,
                (triton.cdiv(n, config["ROWS"]),),
                rows,
                weight,
                given_bias,
                y,
                n,
                k,
                weight.stride(0),
                stride_b,
                n * weight.stride(0),
                **epilogue,
                ONCE=k <= config["BLOCK_K"],
                EVEN_K=k % config["BLOCK_K"] == 0,
                STAGES=config.num_stages,
                **overlaps(x),
                **config.launch,
            )
            return y
        block_t = block_of_rows(m)
        config = choose("skinny", features, SkinnyMemory(x.element_size(), features["weights"], block_t), x.device)
        split = config["SPLIT_K"]
        parts = y if split == 1 else empty((features["weights"] * split * m * n,), torch.float32, x.device)
        launch(
            _skinny_kernel,
            (triton.cdiv(n, config["BLOCK_N"]), triton.cdiv(m, block_t), split),
            rows,
            weight,
            given_bias,
            y,
            parts,
            m,
            n,
            k,
            rows.stride(0),
            weight.stride(0),
            stride_b,
            n * weight.stride(0),
            **epilogue,
            EVEN_K=k % config["BLOCK_K"] == 0,
            BLOCK_T=block_t,
            STAGES=config.num_stages,
            **overlaps(x),
            **config.launch,
        )
        if split > 1:
            launch(
                _sum_kernel,
                (triton.cdiv(n, 512), m),
                parts,
                given_bias,
                y,
                m,
                n,
                stride_b,
                **epilogue,
                SPLIT_K=split,
                BLOCK=512,
                **overlaps(x),
                num_warps=4,
            )
    return y


def _supports(signature: Signature) -> str | None:
    x, weight = signature["x"], signature["weight"]
    refused = refuse_tensors(signature, ("x", "weight", "bias")) or refuse_mixed(signature, ("x", "weight"))
    if refused is not None:
        return refused
    if not x.shape or len(weight.shape) != 2 or x.shape[-1] != weight.shape[1]:
        return f"x {list(x.shape)} and weight {list(weight.shape)} are not a linear layer"
    rows = 1
    for size in x.shape[:-1]:
        rows *= 1 if size is None else size
    if rows > MAX_ROWS:
        return f"x has {rows} rows; this kernel is for {MAX_ROWS} at most"
    return refuse_vector(signature, "bias", weight.shape[0]) or refuse_kind(signature)


def _supports_gate_up(signature: Signature) -> str | None:
    shape = signature["weight"].shape
    if shape and shape[0] is not None and shape[0] % 2:
        return f"weight has {shape[0]} rows, which is odd"
    return _supports(signature)


def linear_act(x: Tensor, weight: Tensor, bias: Tensor | None, kind: str) -> Tensor:
    """As the op `linear_act`."""
    return _run(x, weight, bias, kind, gated=False)


def gate_up(x: Tensor, weight: Tensor, bias: Tensor | None, kind: str) -> Tensor:
    """As the op `gate_up`."""
    return _run(x, weight, bias, kind, gated=True)


KERNELS: Final = (
    Kernel(ops.linear_act, "skinny", linear_act, _supports, early=("weight",)),
    Kernel(ops.gate_up, "skinny", gate_up, _supports_gate_up, early=("weight",)),
)
