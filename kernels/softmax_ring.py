"""Softmax of wide rows on Hopper, read from memory once: launches `ring_kernel`."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Final

import torch
import triton
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from . import softmax as ops
from . import softmax_triton
from .counters import counters
from .launch import (
    ALIGNMENT,
    INTERPRETED,
    collapse,
    compute_capability,
    empty,
    launch,
    library,
    multiprocessors,
    on_device,
    rows_aligned,
)
from .op import Kernel, Signature
from .softmax_ring_kernel import ring_kernel

PIECE: Final = 4 * 1024
"""Bytes of a row that are copied at once."""
SLOTS: Final = 6
"""Of a program's ring, each of a piece."""
RESIDENT: Final = 8
"""Programs of a multiprocessor."""
WARPS: Final = 2
REGISTERS: Final = 65536 // (RESIDENT * WARPS * 32)
"""Of a thread at most, so that all these programs run at once."""
MOST_PARTS: Final = 64
"""Programs that may share a row."""
LINE: Final = 128
"""A part has a multiple of so many bytes."""


@dataclass(frozen=True)
class Split:
    """How rows are dealt out: programs that share one, bytes and pieces of the part of each, groups of programs."""

    parts: int
    size: int
    pieces: int
    groups: int

    @property
    def ahead(self) -> int:
        """Pieces by which the sum of a row is ahead of the result of the row before: 2 if more are on their way."""
        return 2 if 2 < self.pieces < SLOTS - 2 else 1


@functools.lru_cache(maxsize=1024)
def split(rows: int, size: int, programs: int) -> Split | None:
    """The split of rows of so many bytes with the least to do one after the other; `None` for narrow or huge rows."""
    best, least = None, 0
    for parts in range(1, min(MOST_PARTS, programs) + 1):
        part = triton.cdiv(triton.cdiv(size, parts), LINE) * LINE
        pieces, groups = triton.cdiv(part, PIECE), min(programs // parts, rows)
        work = triton.cdiv(rows, groups) * pieces * (17 if pieces == 2 else 16)  # two were measured 6% slower
        if 2 <= pieces < SLOTS and (best is None or work < least):
            best, least = Split(parts, part, pieces, groups), work
    return best


def _rows(x: Tensor) -> Tensor | None:
    """x as `[rows, D]`, or `None` where TMA cannot read it so."""
    leading = collapse(x.shape[:-1], [x.stride()[:-1]], 1)
    if leading is None or not rows_aligned(x):
        return None
    (count,), ((step,),) = leading
    rows = x.as_strided((count, x.shape[-1]), (step if count > 1 else x.shape[-1], 1))
    return rows if rows.stride(0) >= x.shape[-1] else None


def softmax(x: Tensor, compute_dtype: torch.dtype | None = None, out_dtype: torch.dtype | None = None) -> Tensor:
    """As the op `softmax`; the result is contiguous."""
    rows = _rows(x) if x.numel() else None
    size = x.shape[-1] * x.element_size()
    how = None if rows is None else split(rows.shape[0], size, multiprocessors(x.device) * RESIDENT)
    if rows is None or how is None:
        return softmax_triton.softmax(x, compute_dtype, out_dtype)
    y = empty(x.shape, ops.result_dtype(x.dtype, compute_dtype, out_dtype), x.device)
    words = rows.view(torch.int32)
    block = [1, PIECE // 4]
    places = triton.next_power_of_2(how.parts)
    boards = how.groups if how.parts > 1 else 1
    with on_device(x):
        launch(
            ring_kernel,
            (how.groups * how.parts,),
            TensorDescriptor(words, list(words.shape), list(words.stride()), block, gl.NVMMASharedLayout(0, 32, 2)),
            y,
            library(counters, boards * 2 * (4 * places + 16), x.device).view(torch.int64),
            rows.shape[0],
            size // ALIGNMENT,
            how.size // ALIGNMENT,
            how.pieces,
            how.ahead,
            DTYPE=_element(x.dtype),
            COMPUTE_DTYPE=_element(compute_dtype or x.dtype),
            SLOTS=SLOTS,
            PARTS=how.parts,
            PLACES=places,
            num_warps=WARPS,
            maxnreg=REGISTERS,
            launch_cooperative_grid=True,
        )
    return y


def _element(dtype: torch.dtype) -> gl.dtype:
    return {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16, torch.float32: gl.float32}[dtype]


def _supports(signature: Signature) -> str | None:
    reason = softmax_triton.KERNELS[0].supports(signature)
    if reason is not None:
        return reason
    if INTERPRETED or compute_capability(signature["x"].device)[0] != 9:
        return "this kernel is for Hopper GPUs"
    return None


KERNELS: Final = (Kernel(ops.softmax, "ring", softmax, _supports),)
