# mypy: disallow-untyped-defs=False
"""Matrix product with an epilogue in Triton: bias and activation, or the two halves of a gated MLP at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import linear_act as ops
from .activation_triton import activate, refuse_kind
from .launch import empty, launch, on_device, refuse_mixed, refuse_tensors, refuse_vector, rows_aligned
from .op import Kernel, Signature
from .tuning import Config, choose


@triton.jit
def add_compensated(total, lost, part):
    """`total + part` and the rounding error to take off the next time (Kahan).

    An fp32 dot is one chain of multiply-adds; chained over all of K it would round more often than cuBLAS does.
    """
    corrected = part - lost
    new = total + corrected
    return new, (new - total) - corrected


@triton.jit(do_not_specialize=["M"])
def _linear_kernel(
    x_ptr,
    w_ptr,
    b_ptr,
    y_ptr,
    M,
    N,
    K,
    stride_xm,
    stride_xk,
    stride_wn,
    stride_wk,
    stride_b,
    stride_ym,
    up_offset,  # from the weight's rows of gate to its rows of up
    HAS_BIAS: tl.constexpr,
    KIND: tl.constexpr,
    GATED: tl.constexpr,
    COMPENSATED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    # programs of GROUP_M neighbouring row blocks run side by side, so that they share the weight in L2
    pid = tl.program_id(0)
    row_blocks = tl.cdiv(M, BLOCK_M)
    per_group = GROUP_M * tl.cdiv(N, BLOCK_N)
    group_start = (pid // per_group) * GROUP_M
    group_rows = tl.minimum(row_blocks - group_start, GROUP_M)
    block_m = group_start + (pid % per_group) % group_rows
    block_n = (pid % per_group) // group_rows

    rows = block_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    cols = block_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    k = tl.arange(0, BLOCK_K).to(tl.int64)  # [BLOCK_K]
    x_ptrs = x_ptr + rows[:, None] * stride_xm + k[None, :] * stride_xk  # [BLOCK_M, BLOCK_K]
    w_ptrs = w_ptr + cols[None, :] * stride_wn + k[:, None] * stride_wk  # [BLOCK_K, BLOCK_N]
    row_inside = (rows < M)[:, None]
    col_inside = (cols < N)[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    up_acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    lost = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    up_lost = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, K, BLOCK_K):
        k_inside = k < K - start
        x = tl.load(x_ptrs, mask=row_inside & k_inside[None, :], other=0.0)  # [BLOCK_M, BLOCK_K]
        w = tl.load(w_ptrs, mask=col_inside & k_inside[:, None], other=0.0)  # [BLOCK_K, BLOCK_N]
        if COMPENSATED:
            acc, lost = add_compensated(acc, lost, tl.dot(x, w, input_precision="ieee"))
        else:
            acc = tl.dot(x, w, acc, input_precision="ieee")
        if GATED:
            up = tl.load(w_ptrs + up_offset, mask=col_inside & k_inside[:, None], other=0.0)  # [BLOCK_K, BLOCK_N]
            if COMPENSATED:
                up_acc, up_lost = add_compensated(up_acc, up_lost, tl.dot(x, up, input_precision="ieee"))
            else:
                up_acc = tl.dot(x, up, up_acc, input_precision="ieee")
        x_ptrs += BLOCK_K * stride_xk
        w_ptrs += BLOCK_K * stride_wk
    if HAS_BIAS:
        acc += tl.load(b_ptr + cols * stride_b, mask=cols < N, other=0.0).to(tl.float32)[None, :]
        if GATED:
            up_acc += tl.load(b_ptr + (N + cols) * stride_b, mask=cols < N, other=0.0).to(tl.float32)[None, :]
    y = activate(acc, KIND)
    if GATED:
        y *= up_acc
    tl.store(
        y_ptr + rows[:, None] * stride_ym + cols[None, :], y.to(y_ptr.dtype.element_ty), mask=row_inside & col_inside
    )


@dataclass(frozen=True)
class LinearMemory:
    """Shared memory of one program: each pipeline stage holds a tile of x and one or two of the weight."""

    itemsize: int
    weights: int

    def __call__(self, config: Config) -> int:
        tile = config["BLOCK_K"] * (config["BLOCK_M"] + self.weights * config["BLOCK_N"]) * self.itemsize
        epilogue = config["BLOCK_M"] * config["BLOCK_N"] * 4
        return max(config.num_stages * tile, epilogue) + 1024


def _plan(m: int, n: int, k: int, itemsize: int, weights: int, aligned: bool) -> tuple[dict[str, int], LinearMemory]:
    """The features by which a configuration is chosen, and its need of shared memory."""
    features = {"M": m, "N": n, "K": k, "bytes": itemsize, "weights": weights, "aligned": int(aligned)}
    return features, LinearMemory(itemsize, weights)


def _aligned(rows: Tensor, weight: Tensor) -> bool:
    """Whether both matrices are read in wide loads: Triton knows of sizes and strides only whether 16 divides them."""
    matrix = weight if weight.stride(1) == 1 else weight.t()
    sizes = (rows.shape[1], rows.stride(0), matrix.shape[1], matrix.stride(0))
    return rows_aligned(rows) and rows_aligned(matrix) and all(size % 16 == 0 for size in sizes)


def _run(x: Tensor, weight: Tensor, bias: Tensor | None, kind: str, gated: bool) -> Tensor:
    k = x.shape[-1]
    n = weight.shape[0] // 2 if gated else weight.shape[0]
    y = empty((*x.shape[:-1], n), x.dtype, x.device)
    if y.numel() == 0:
        return y
    rows = x.reshape(-1, k)  # a copy only where the leading dimensions cannot be merged
    m = rows.shape[0]
    weights = 2 if gated else 1
    config = choose("linear", *_plan(m, n, k, x.element_size(), weights, _aligned(rows, weight)), x.device)
    grid = (triton.cdiv(m, config["BLOCK_M"]) * triton.cdiv(n, config["BLOCK_N"]),)
    with on_device(x):
        launch(
            _linear_kernel,
            grid,
            rows,
            weight,
            x if bias is None else bias,
            y,
            m,
            n,
            k,
            rows.stride(0),
            rows.stride(1),
            weight.stride(0),
            weight.stride(1),
            0 if bias is None else bias.stride(0),
            n,
            n * weight.stride(0),
            HAS_BIAS=bias is not None,
            KIND=kind,
            GATED=gated,
            COMPENSATED=x.dtype == torch.float32,
            **config.launch,
        )
    return y


def _refuse_sizes(signature: Signature) -> str | None:
    x, weight = signature["x"], signature["weight"]
    if not x.shape or len(weight.shape) != 2:
        return f"x {list(x.shape)} and weight {list(weight.shape)} are not a linear layer"
    if x.shape[-1] != weight.shape[1]:
        return f"x has {x.shape[-1]} features, weight takes {weight.shape[1]}"
    return refuse_vector(signature, "bias", weight.shape[0])


def refuse_linear(signature: Signature) -> str | None:
    """Why a Triton kernel cannot compute a linear layer with its activation, or `None`."""
    return (
        refuse_tensors(signature, ("x", "weight", "bias"))
        or refuse_mixed(signature, ("x", "weight"))
        or _refuse_sizes(signature)
        or refuse_kind(signature)
    )


def refuse_gate_up(signature: Signature) -> str | None:
    """The same for the two projections of a gated MLP."""
    rows = signature["weight"].shape[0] if len(signature["weight"].shape) == 2 else None
    if rows is not None and rows % 2:
        return f"weight has {rows} rows, which is odd"
    return refuse_linear(signature)


def linear_act(x: Tensor, weight: Tensor, bias: Tensor | None, kind: str) -> Tensor:
    """As the op `linear_act`."""
    return _run(x, weight, bias, kind, gated=False)


def gate_up(x: Tensor, weight: Tensor, bias: Tensor | None, kind: str) -> Tensor:
    """As the op `gate_up`."""
    return _run(x, weight, bias, kind, gated=True)


KERNELS: Final = (
    Kernel(ops.linear_act, "triton", linear_act, refuse_linear),
    Kernel(ops.gate_up, "triton", gate_up, refuse_gate_up),
)
