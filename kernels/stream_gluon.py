"""Linear layers with few rows on Hopper at the speed of the memory: launches `stream_kernel`."""

from __future__ import annotations

import functools
from typing import Final

import torch
import triton
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from . import linear_act as ops
from . import linear_act_triton, skinny_triton
from .counters import counters
from .launch import empty, launch, library, on_device, rows_aligned
from .linear_act_wgmma import refuse_operands
from .op import Kernel, Signature
from .skinny_triton import MAX_ROWS, block_of_rows
from .stream_kernel import stream_kernel

ROWS: Final = 64
"""Rows of the weight in a tile, which are the fewest that the matrix unit takes; gated: of gate and of up each."""
BLOCK_K: Final = 256
"""Columns of a step at most: memory is faster the longer the pieces that are read of a row."""
STAGES: Final = 3
"""Of the ring at least, for the sake of which a step has fewer columns."""
RING: Final = 216 * 1024
"""Bytes of shared memory for weights and rows of x on their way."""


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _readable(x: Tensor) -> bool:
    """Whether TMA can read x `[rows, columns]`: aligned rows that do not overlap."""
    return rows_aligned(x) and (x.shape[0] == 1 or x.stride(0) >= x.shape[1])


def _descriptor(x: Tensor, block: list[int]) -> TensorDescriptor:
    dtype = gl.bfloat16 if x.dtype == torch.bfloat16 else gl.float16
    step = x.stride(0) if x.shape[0] > 1 else x.shape[1]
    return TensorDescriptor(x, list(x.shape), [step, 1], block, gl.NVMMASharedLayout.get_default_for(block, dtype))


def _run(x: Tensor, weight: Tensor, bias: Tensor | None, kind: str, gated: bool) -> Tensor:
    k = x.shape[-1]
    n = weight.shape[0] // 2 if gated else weight.shape[0]
    rows = x.reshape(-1, k)
    m = rows.shape[0]
    if min(m, n, k) == 0 or m > MAX_ROWS or not _readable(rows) or not _readable(weight):
        return (skinny_triton.gate_up if gated else skinny_triton.linear_act)(x, weight, bias, kind)
    y = empty((*x.shape[:-1], n), x.dtype, x.device)
    parts, block_t, block_k = 2 if gated else 1, block_of_rows(m), BLOCK_K
    while RING // (2 * block_k * (parts * ROWS + block_t)) < STAGES:
        block_k //= 2
    tiles, depth = triton.cdiv(n, ROWS), triton.cdiv(k, block_k)
    steps = tiles * depth
    programs = min(_multiprocessors(x.device), steps)
    part = empty((programs, 2, parts, block_t, ROWS), torch.float32, x.device)
    with on_device(x):
        launch(
            stream_kernel,
            (programs,),
            _descriptor(rows, [block_t, block_k]),
            _descriptor(weight, [ROWS, block_k]),
            x if bias is None else bias,
            y,
            part,
            library(counters, tiles, x.device),
            m,
            n,
            steps,
            depth,
            0 if bias is None else bias.stride(0),
            HAS_BIAS=bias is not None,
            KIND=kind,
            GATED=gated,
            MOST=triton.next_power_of_2(triton.cdiv(depth, steps // programs) + 1),
            STAGES=RING // (2 * block_k * (parts * ROWS + block_t)),
            num_warps=4,
            launch_pdl=True,
        )
    return y


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
