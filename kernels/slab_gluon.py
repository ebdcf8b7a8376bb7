"""Linear layers of up to 64 rows on Hopper at the speed of the memory: launches `slab_kernel`.

Calls that the kernel cannot read, or whose weight has more rows than all programs together take, are left to
`stream_gluon`. `linear_rope` rotates heads as well, where it `turns` them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import triton
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from . import linear_act as ops
from . import linear_act_triton, stream_gluon
from .launch import empty, launch_in_clusters, multiprocessors, on_device
from .linear_act_wgmma import refuse_operands
from .op import Kernel, Signature
from .slab_kernel import slab_heads_kernel, slab_kernel

UNIT: Final = 8
"""Rows of each part that a slab is a multiple of; where there are more than ONE and no gate, of twice as many."""
MOST: Final = 256
"""Rows of a slab at most, all parts together: their sums stay in registers."""
PIECES: Final = 3
"""Powers of two that a slab's rows are the sum of, at most: each is a copy for itself in every step."""
ONE, ONE_GATED, TWO = 32, 64, 128
"""Rows of a slab, all parts together, up to which it has one piece, of gate and up, and two."""
BLOCK_ROWS: Final = 64
"""Rows of x that the matrix unit multiplies."""
NARROW, NARROW_HEADS = 64, 32
"""Rows of a slab, all parts together, up to which a step has 256 columns, else 128: in general, and of heads."""
SHARED_ROWS: Final = (32, 48)
"""Rows of a slab between which two programs have twice as many, and half of the columns, if there are SHARED_COLUMNS;
where there are MANY_COLUMNS, of fewer rows too. Not of gate and up."""
SHARED_COLUMNS, MANY_COLUMNS = 3584, 4097
AHEAD: Final = 96 * 1024
"""Bytes of weights before the wait, or a quarter of a program's if that is less, in whole stages, at least one: x comes
behind them. Where a program has LONG, all stages but one."""
SEVERAL, SEVERAL_SHORT = 1.15, 1.4
"""What two or three pieces of a head cost, of 16 rows or more and of 8, where one piece of as many rows costs 1."""
DEEP: Final = 6
"""Stages of a ring from which on, but for LONG, two at least are asked for behind the wait."""
LONG: Final = 768 * 1024
"""Bytes of a program's weights."""


def _sizes(rows: int) -> tuple[int, ...]:
    """Powers of two that add up to them, the largest first."""
    return tuple(1 << bit for bit in range(rows.bit_length() - 1, -1, -1) if rows >> bit & 1)


def _rows(n: int, programs: int, parts: int) -> int:
    """Rows of each part in a slab, if that many programs share n: as few as can be with few pieces."""
    rows = triton.cdiv(n, programs)
    unit = UNIT if parts == 2 or rows <= ONE else 2 * UNIT
    rows = triton.cdiv(rows, unit) * unit
    limits = (ONE if parts == 1 else ONE_GATED), TWO
    while len(_sizes(rows)) > 1 + sum(parts * rows > limit for limit in limits):
        rows += unit
    return rows


@dataclass(frozen=True)
class _Plan:
    """How a product is dealt out."""

    split: int
    """Programs of a cluster, each with a share of the columns."""
    pieces: tuple[int, ...]
    """Rows of each part in what is copied at once; all of them are a slab."""
    parts: int
    columns: int
    """Of a step."""

    @property
    def rows(self) -> int:
        """Of each part in a slab."""
        return sum(self.pieces)

    def grid(self, n: int) -> tuple[int]:
        return (triton.cdiv(n, self.rows) * self.split,)

    def descriptor(self, tensor: Tensor, parts: int, apart: int, rows: int) -> TensorDescriptor:
        """A matrix whose rows have `parts`, that many rows `apart`; each with as many rows as TMA copies at once."""
        (n, k), step = tensor.shape, tensor.stride(0) if tensor.shape[0] > 1 else tensor.shape[1]
        shape, strides = [parts, n - (parts - 1) * apart, k], [max(1, apart) * step, step, 1]
        layout = gl.NVMMASharedLayout(128, 16, 3)
        return TensorDescriptor(tensor, shape, strides, [parts, rows, self.columns], layout)

    def options(self, rows: Tensor) -> tuple[TensorDescriptor, int, dict[str, Any]]:
        """x as TMA reads it, steps of a program, what is decided when the kernel is compiled."""
        m, k = rows.shape
        box = next(size for size in (8, 16, 32, 64) if m <= size)
        boxes = 1
        if box > 8 and m < box:
            box, boxes = box // 2, 2
        slab = self.parts * self.rows
        steps = triton.cdiv(k, self.columns * self.split)
        stages = min(max(2, steps), stream_gluon.RING // (2 * self.columns * (BLOCK_ROWS + slab)))
        stage, share = 2 * self.columns * slab, 2 * slab * k // self.split
        early = stages - 1
        if share < LONG:
            early = max(1, min(round(min(share / 4, AHEAD) / stage), stages - (2 if stages >= DEEP else 1)))
        options = {
            "SPLIT": self.split,
            "STAGES": stages,
            "EARLY": early,
            "num_warps": 4,
            "launch_pdl": True,
        }
        return self.descriptor(rows, boxes, m - box if boxes == 2 else 0, box), steps, options


def _plan(n: int, k: int, parts: int, programs: int) -> _Plan | None:
    """For n rows of each part and k columns; `None` if these are more rows than all programs together take."""
    low, high = SHARED_ROWS
    least = triton.cdiv(n, programs)
    narrow = parts == 1 and least <= high and programs > 1
    split = 2 if narrow and k >= (SHARED_COLUMNS if least > low else MANY_COLUMNS) else 1
    rows = _rows(n, programs // split, parts)
    columns = 256 if parts * rows <= NARROW else 128
    return _Plan(split, _sizes(rows), parts, columns) if parts * rows <= MOST else None


def _plan_heads(n: int, half: int, programs: int) -> _Plan | None:
    """For n rows of heads, whose halves are parts: pieces of one size within a head; `None` as `_plan`."""
    found: tuple[float, _Plan] | None = None
    for size in (64, 32, 16, 8):
        count = triton.cdiv(n // 2, size * programs)
        if half % size == 0 and count <= PIECES and 2 * size * count <= MOST:
            cost = size * count * (1 if count == 1 else SEVERAL if size > 8 else SEVERAL_SHORT)
            if found is None or cost < found[0]:
                found = cost, _Plan(1, (size,) * count, 2, 256 if 2 * size * count <= NARROW_HEADS else 128)
    return None if found is None else found[1]


def _plan_of(rows: Tensor, weight: Tensor, parts: int) -> _Plan | None:
    """How x `[M, K]` is multiplied by the weight, or `None` if this kernel does not."""
    n, k = weight.shape
    if n % (8 * parts) or not stream_gluon.readable(rows, weight):
        return None
    return _plan(n // parts, k, parts, multiprocessors(rows.device))


def _run(x: Tensor, weight: Tensor, bias: Tensor | None, kind: str, gated: bool) -> Tensor:
    rows, parts = x.reshape(-1, x.shape[-1]), 2 if gated else 1
    n = weight.shape[0] // parts
    plan = _plan_of(rows, weight, parts)
    if plan is None:
        return (stream_gluon.gate_up if gated else stream_gluon.linear_act)(x, weight, bias, kind)
    y = empty((*x.shape[:-1], n), x.dtype, x.device)
    x_desc, steps, options = plan.options(rows)
    pieces = [plan.descriptor(weight, parts, n if gated else 0, size) for size in plan.pieces]
    with on_device(x):
        launch_in_clusters(
            plan.split,
            slab_kernel,
            plan.grid(n),
            x_desc,
            *(pieces[i % len(pieces)] for i in range(PIECES)),
            x if bias is None else bias,
            y,
            rows.shape[0],
            n // 8,
            steps,
            0 if bias is None else bias.stride(0),
            HAS_BIAS=bias is not None,
            KIND=kind,
            COUNT=len(pieces),
            **options,
        )
    return y


def turns(rows: Tensor, weight: Tensor, half: int) -> bool:
    """Whether the kernel can multiply x `[M, K]` by heads of two halves and rotate them."""
    whole = half % UNIT == 0 and weight.shape[0] % (2 * half) == 0 and stream_gluon.readable(rows, weight)
    return whole and _plan_heads(weight.shape[0], half, multiprocessors(rows.device)) is not None


def linear_rope(
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    y: Tensor,
    tables: tuple[Tensor, Tensor],
    strides: tuple[int, int, int, int],
    sizes: tuple[int, int, int],
    product: Any,
) -> None:
    """y `[..., N]` = rows `[M, K]` @ weight.T + bias, of whose heads of two halves the first are rotated.

    `tables`: cos and sin, contiguous in their last dimension; `strides`: of both, by sequence and position; `sizes`:
    rows of a sequence, heads that are rotated, columns of a half. The kernel `turns` them.
    """
    n, (length, heads, half) = weight.shape[0], sizes
    plan = _plan_heads(n, half, multiprocessors(rows.device))
    assert plan is not None
    x_desc, steps, options = plan.options(rows)
    with on_device(rows):
        launch_in_clusters(
            plan.split,
            slab_heads_kernel,
            plan.grid(n // 2),
            x_desc,
            plan.descriptor(weight, 2, half, plan.pieces[0]),
            rows if bias is None else bias,
            y,
            rows.shape[0],
            n // 8,
            steps,
            0 if bias is None else bias.stride(0),
            *tables,
            length,
            *strides,
            heads,
            HAS_BIAS=bias is not None,
            HALF=half,
            PRODUCT=product,
            COUNT=len(plan.pieces),
            enable_fp_fusion=False,  # a fused multiply-add would skip the rounding of the product
            **options,
        )


def _supports(signature: Signature) -> str | None:
    refused = linear_act_triton.refuse_linear(signature) or refuse_operands(signature)
    return refused or stream_gluon.refuse_rows(signature)


def _supports_gate_up(signature: Signature) -> str | None:
    refused = linear_act_triton.refuse_gate_up(signature) or refuse_operands(signature)
    return refused or stream_gluon.refuse_rows(signature)


def linear_act(x: Tensor, weight: Tensor, bias: Tensor | None, kind: str) -> Tensor:
    """As the op `linear_act`."""
    return _run(x, weight, bias, kind, gated=False)


def gate_up(x: Tensor, weight: Tensor, bias: Tensor | None, kind: str) -> Tensor:
    """As the op `gate_up`."""
    return _run(x, weight, bias, kind, gated=True)


KERNELS: Final = (
    Kernel(ops.linear_act, "slab", linear_act, _supports, early=("weight",)),
    Kernel(ops.gate_up, "slab", gate_up, _supports_gate_up, early=("weight",)),
)
