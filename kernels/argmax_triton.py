# mypy: disallow-untyped-defs=False
"""The largest of each row of logits in one launch: parts of a row side by side, put together by whichever is last."""

from __future__ import annotations

from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import TL_DTYPES, empty, launch
from .overlap import overlaps, start_dependent

SMALLEST: Final = 1024
LARGEST: Final = 8192
"""Elements that a program reads."""
PROGRAMS: Final = 1024
"""Parts grow until there are no more programs than that."""


@triton.jit
def argmax_kernel(
    x_ptr, parts_ptr, arrived_ptr, out_ptr, count, stride_x,
    PARTS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Numbers become integers of the same order, NaN above all of them, -0 equal to 0. A part is one number: the
    integer above the distance of its place from the end, so that of equal ones the first is the greatest."""
    start_dependent(PDL)
    part, row = tl.program_id(0), tl.program_id(1)
    at = part * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    x = tl.load(x_ptr + row.to(tl.int64) * stride_x + at, mask=at < count, other=0.0).to(tl.float32)
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)
    key = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    key = tl.where(x != x, 0x7FFFFFFF, key)
    key = tl.where(at < count, key, -0x80000000)
    best = tl.max(key, axis=0)
    first = tl.min(tl.where(key == best, at, 0x7FFFFFFF), axis=0)
    found = (best.to(tl.int64) << 32) | (0x7FFFFFFF - first).to(tl.int64)
    if PARTS == 1:
        tl.store(out_ptr + row, first.to(tl.int64))
    else:
        mine = parts_ptr + row * PARTS
        tl.store(mine + part, found)
        tl.debug_barrier()
        before = tl.atomic_add(arrived_ptr + row, 1, sem="acq_rel")
        if before == PARTS - 1:
            number = tl.arange(0, BLOCK_P)  # [BLOCK_P]
            low = tl.full((BLOCK_P,), -0x8000000000000000, tl.int64)
            all_found = tl.load(
                mine + number, mask=number < PARTS, other=low, cache_modifier=".cg"
            )  # past the L1 cache
            greatest = tl.max(all_found, axis=0)
            tl.store(out_ptr + row, 0x7FFFFFFF - (greatest & 0x7FFFFFFF))
            tl.store(arrived_ptr + row, 0)


def supports(x: Tensor) -> bool:
    """Whether `argmax` takes these rows."""
    return x.dim() == 2 and x.dtype in TL_DTYPES and x.stride(1) == 1 and 0 < x.shape[1] < 1 << 31 and len(x) < 65536


def argmax(x: Tensor, arrived: Tensor) -> Tensor:
    """`x.float().argmax(-1)` of rows [S, V], int64 [S]: the first of equal ones, and of NaNs where there are any.

    arrived: int32 [S] or longer, zeros, and zeros again afterwards; of two launches side by side each has its own.
    """
    rows, count = x.shape
    block = SMALLEST
    while block < LARGEST and rows * triton.cdiv(count, block) > PROGRAMS:
        block *= 2
    parts = triton.cdiv(count, block)
    out = empty((rows,), torch.int64, x.device)
    scratch = empty((rows, parts), torch.int64, x.device)
    if rows:
        launch(
            argmax_kernel, (parts, rows), x, scratch, arrived, out, count, x.stride(0),
            PARTS=parts, BLOCK_P=triton.next_power_of_2(parts), BLOCK=block, num_warps=block // 512, **overlaps(x),
        )  # fmt: skip
    return out
