"""Linear layers with few rows on Hopper at the speed of the memory: launches `stream_kernel`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import torch
import triton
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from . import linear_act as ops
from . import linear_act_triton, skinny_triton
from .counters import counters
from .launch import empty, launch, library, multiprocessors, on_device, rows_aligned
from .linear_act_wgmma import Rope, refuse_operands
from .op import Kernel, Signature
from .skinny_triton import MAX_ROWS, block_of_rows
from .stream_kernel import stream_heads_kernel, stream_kernel

ROWS: Final = 64
"""Rows of the weight in a tile, which are the fewest that the matrix unit takes; gated: of gate and of up each."""
BLOCK_K: Final = 256
"""Columns of a step at most: memory is faster the longer the pieces that are read of a row."""
STAGES: Final = 3
"""Of the ring at least, for the sake of which a step has fewer columns."""
HEAD: Final = 2 * ROWS
"""Columns of the heads that are turned in the kernel."""
RING: Final = 216 * 1024
"""Bytes of shared memory for weights and rows of x on their way."""


def _readable(x: Tensor) -> bool:
    """Whether TMA can read x `[rows, columns]`: aligned rows that do not overlap."""
    return rows_aligned(x) and (x.shape[0] == 1 or x.stride(0) >= x.shape[1])


def _descriptor(x: Tensor, block: list[int]) -> TensorDescriptor:
    dtype = gl.bfloat16 if x.dtype == torch.bfloat16 else gl.float16
    step = x.stride(0) if x.shape[0] > 1 else x.shape[1]
    return TensorDescriptor(x, list(x.shape), [step, 1], block, gl.NVMMASharedLayout.get_default_for(block, dtype))


@dataclass(frozen=True)
class _Plan:
    """How the steps of a product are dealt out, and the arguments of the kernel that say so."""

    grid: tuple[int]
    descriptors: tuple[TensorDescriptor, TensorDescriptor]
    scratch: tuple[Tensor, Tensor]
    """What is left of tiles in parts, and how many programs have left it."""
    steps: int
    depth: int
    launch: dict[str, Any]


def _plan(rows: Tensor, weight: Tensor, tiles: int, parts: int) -> _Plan:
    """`parts`: of ROWS rows each, of which a tile consists."""
    k, block_t, block_k = rows.shape[1], block_of_rows(rows.shape[0]), BLOCK_K
    while RING // (2 * block_k * (parts * ROWS + block_t)) < STAGES:
        block_k //= 2
    depth = triton.cdiv(k, block_k)
    steps = tiles * depth
    programs = min(multiprocessors(rows.device), steps)
    part = empty((programs, 2, parts, block_t, ROWS), torch.float32, rows.device)
    options = {
        "MOST": triton.next_power_of_2(triton.cdiv(depth, steps // programs) + 1),
        "STAGES": RING // (2 * block_k * (parts * ROWS + block_t)),
        "num_warps": 4,
        "launch_pdl": True,
    }
    descriptors = _descriptor(rows, [block_t, block_k]), _descriptor(weight, [ROWS, block_k])
    return _Plan((programs,), descriptors, (part, library(counters, tiles, rows.device)), steps, depth, options)


def readable(rows: Tensor, weight: Tensor) -> bool:
    """Whether x as `[M, K]` and the weight are neither empty nor anything that the kernel cannot read."""
    return min(*rows.shape, *weight.shape) > 0 and rows.shape[0] <= MAX_ROWS and _readable(rows) and _readable(weight)


def _run(x: Tensor, weight: Tensor, bias: Tensor | None, kind: str, gated: bool) -> Tensor:
    n = weight.shape[0] // 2 if gated else weight.shape[0]
    rows = x.reshape(-1, x.shape[-1])
    if n == 0 or not readable(rows, weight):
        return (skinny_triton.gate_up if gated else skinny_triton.linear_act)(x, weight, bias, kind)
    y = empty((*x.shape[:-1], n), x.dtype, x.device)
    plan = _plan(rows, weight, triton.cdiv(n, ROWS), 2 if gated else 1)
    with on_device(x):
        launch(
            stream_kernel,
            plan.grid,
            *plan.descriptors,
            x if bias is None else bias,
            y,
            *plan.scratch,
            rows.shape[0],
            n,
            plan.steps,
            plan.depth,
            0 if bias is None else bias.stride(0),
            HAS_BIAS=bias is not None,
            KIND=kind,
            GATED=gated,
            **plan.launch,
        )
    return y


def linear_rope(rows: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor, rope: Rope) -> None:
    """y `[..., N]` = rows `[M, K]` @ weight.T + bias, heads of q and k among its columns turned; see `Rope`.

    A head is a tile, of 2 * ROWS columns. The tensors are `readable`; those of `rope` are contiguous in their last
    dimension.
    """
    n = weight.shape[0]
    plan = _plan(rows, weight, triton.cdiv(n, HEAD), 2)
    with on_device(rows):
        launch(
            stream_heads_kernel,
            plan.grid,
            *plan.descriptors,
            rows if bias is None else bias,
            y,
            *plan.scratch,
            rows.shape[0],
            n,
            plan.steps,
            plan.depth,
            0 if bias is None else bias.stride(0),
            *rope.tensors,
            *rope.numbers,
            HAS_BIAS=bias is not None,
            ROPE=rope.traits,
            enable_fp_fusion=False,  # a fused multiply-add would skip the rounding of the product
            **plan.launch,
        )


def refuse_rows(signature: Signature) -> str | None:
    """Why x is more than a few rows, or `None`."""
    rows = 1
    for size in signature["x"].shape[:-1]:
        rows *= 1 if size is None else size
    return f"x has {rows} rows; this kernel is for {MAX_ROWS} at most" if rows > MAX_ROWS else None


def _supports(signature: Signature) -> str | None:
    return linear_act_triton.refuse_linear(signature) or refuse_operands(signature) or refuse_rows(signature)


def _supports_gate_up(signature: Signature) -> str | None:
    return linear_act_triton.refuse_gate_up(signature) or refuse_operands(signature) or refuse_rows(signature)


def linear_act(x: Tensor, weight: Tensor, bias: Tensor | None, kind: str) -> Tensor:
    """As the op `linear_act`."""
    return _run(x, weight, bias, kind, gated=False)


def gate_up(x: Tensor, weight: Tensor, bias: Tensor | None, kind: str) -> Tensor:
    """As the op `gate_up`."""
    return _run(x, weight, bias, kind, gated=True)


KERNELS: Final = (
    Kernel(ops.linear_act, "stream", linear_act, _supports, early=("weight",)),
    Kernel(ops.gate_up, "stream", gate_up, _supports_gate_up, early=("weight",)),
)
