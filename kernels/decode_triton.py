# mypy: disallow-untyped-defs=False
"""Moving a batch on by one token, as two launches: what `runtime/decoding/state.py` says, on the device."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_wait

from .launch import launch
from .overlap import overlaps, start_dependent


@triton.jit
def advance_kernel(
    computed_ptr, limits_ptr, tables_ptr, positions_ptr, lengths_ptr, active_ptr, slots_ptr,
    rows, stride_tg, stride_tr, stride_sg,
    PAGE: tl.constexpr, GROUPS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_wait()  # and lets no kernel start early: attention reads lengths and slots before it waits
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    here = row < rows
    computed = tl.load(computed_ptr + row, mask=here, other=0)
    limit = tl.load(limits_ptr + row, mask=here, other=0)
    active = computed < limit
    position = tl.where(active, computed, 0)
    for group in tl.static_range(GROUPS):
        at = tables_ptr + group * stride_tg + row.to(tl.int64) * stride_tr + position // PAGE
        page = tl.load(at, mask=here & active, other=0).to(tl.int64)
        slot = tl.where(active, page * PAGE + position % PAGE, -1)
        tl.store(slots_ptr + group * stride_sg + row, slot, mask=here)
    tl.store(positions_ptr + row, position.to(tl.int64), mask=here)
    tl.store(lengths_ptr + row, tl.where(active, computed + 1, 0), mask=here)
    tl.store(active_ptr + row, active.to(tl.uint8), mask=here)
    tl.store(computed_ptr + row, computed + active.to(tl.int32), mask=here)


@triton.jit
def take_kernel(
    tokens_ptr, active_ptr, ids_ptr, ring_ptr, tick_ptr, rows, stride_r,
    RING: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    start_dependent(PDL)
    row = tl.arange(0, BLOCK)  # [BLOCK]
    here = row < rows
    line = tl.load(tick_ptr)
    token = tl.load(tokens_ptr + row, mask=here, other=0)
    active = tl.load(active_ptr + row, mask=here, other=0) != 0
    tl.store(ids_ptr + row, token, mask=here & active)
    tl.store(ring_ptr + line * stride_r + row, token, mask=here)
    tl.debug_barrier()  # every thread has read the line
    tl.store(tick_ptr, (line + 1) % RING)


def advance(
    computed: Tensor, limits: Tensor, tables: Tensor, positions: Tensor, lengths: Tensor, active: Tensor,
    slots: Tensor, rows: int, page: int,
) -> None:  # fmt: skip
    """Rows 0 to `rows - 1` of tables `[G, N, most]`, slots `[G, N]` and vectors `[N]`, moved on in place."""
    block = 64
    launch(
        advance_kernel, (triton.cdiv(rows, block),), computed, limits, tables, positions, lengths, active, slots,
        rows, tables.stride(0), tables.stride(1), slots.stride(0),
        PAGE=page, GROUPS=tables.shape[0], BLOCK=block, num_warps=2, **overlaps(computed),
    )  # fmt: skip


def take(tokens: Tensor, active: Tensor, ids: Tensor, ring: Tensor, tick: Tensor) -> None:
    """Keep tokens `[S]` in line `tick` of ring `[lines, N]`, and in ids `[N]` where `active`; tick goes on by one."""
    rows, lines = tokens.shape[0], ring.shape[0]
    block = triton.next_power_of_2(rows)
    launch(
        take_kernel, (1,), tokens, active, ids, ring, tick, rows, ring.stride(0),
        RING=lines, BLOCK=block, num_warps=1, **overlaps(tokens),
    )  # fmt: skip
