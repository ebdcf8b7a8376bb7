"""Linear layers of up to 32 rows on Hopper at the speed of the memory: launches `strip_kernel`.

Calls that the kernel cannot read, or that have other sizes, are left to `stream_gluon`.
"""

from __future__ import annotations

from typing import Any, Final

import triton
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from . import linear_act as ops
from . import linear_act_triton, stream_gluon
from .launch import empty, launch, multiprocessors, on_device
from .linear_act_wgmma import refuse_operands
from .op import Kernel, Signature
from .strip_kernel import strip_heads_kernel, strip_kernel

WARPS: Final = 8
GROUP: Final = 64 * WARPS
"""Columns that the warps of a program multiply at once."""
STRIP: Final = 8
"""Rows of the weight in a strip."""
RING: Final = 208 * 1024
"""Bytes of shared memory for weights on their way; the sums of the warps lie beside it."""
STAGE: Final = 64 * 1024
"""Bytes of a stage at most: a strip, or as many short ones as fit, up to four (of heads two)."""
SHORT: Final = 100 * 1024
"""Bytes of weight for each program, up to which stages are half as large, so that few are needed.

Up to 2048 columns two programs then mostly fit in a multiprocessor, and the next kernel's weights are on their way
before this one's last have come."""
LONG: Final = 192 * 1024
"""Bytes of weight for each program, from which on stages of half the size are worth their barriers."""
BUSY: Final = 0.9
"""Share of the multiprocessors that must have a stage for more than 16 rows to have more than one strip in it."""
MAX_ROWS: Final = 32
COPIED_ROWS: Final = 5
"""Of x, from which on stages of the ring first bring them: fewer arrive sooner by loads of the threads."""
COPIED_ROWS_SHORT: Final = 9
"""The same where strips are short and no program has LONG."""
MAX_COLUMNS: Final = 4096
"""Columns of 16 rows of x that fit in the registers of a program; of more rows half as many do."""


def _copied(groups: int) -> int:
    """Groups of columns in a copy: a power of two, of which few are copied for nothing behind the last."""
    return next(size for size in (8, 4, 2, 1) if triton.cdiv(groups, size) * size - groups <= groups / 5)


def _fits(rows: Tensor, weight: Tensor) -> bool:
    """Whether the kernel can multiply x `[M, K]` by the weight: see `refuse`, and rows that TMA can read."""
    return stream_gluon.readable(rows, weight) and _refuse_sizes(rows.shape[0], rows.shape[1]) is None


def turns(rows: Tensor, weight: Tensor, half: int) -> bool:
    """Whether the kernel can multiply x `[M, K]` by heads of two halves and rotate them."""
    return half % STRIP == 0 and weight.shape[0] % (2 * half) == 0 and _fits(rows, weight)


def _refuse_sizes(m: int, k: int) -> str | None:
    if m > MAX_ROWS:
        return f"x has {m} rows; this kernel is for {MAX_ROWS} at most"
    if k % 64:
        return f"x has {k} columns, which 64 does not divide"
    most = MAX_COLUMNS if m <= 16 else MAX_COLUMNS // 2
    return f"x has {m} rows of {k} columns; this kernel takes {most} columns of so many at most" if k > most else None


def _blocks(x: Tensor, columns: int, rows: int) -> TensorDescriptor:
    """x `[rows, K]` as `[K / 64, rows, 64]`, in blocks of `columns` times 64 and `rows`."""
    n, k = x.shape
    layout = gl.NVMMASharedLayout(128, 16, 3)
    return TensorDescriptor(x, [k // 64, n, 64], [64, x.stride(0) if n > 1 else k, 1], [columns, rows, 64], layout)


def _plan(
    rows: Tensor, weight: Tensor, strips: int, parts: int, most: int
) -> tuple[tuple[int], tuple[TensorDescriptor, TensorDescriptor], dict[str, Any]]:
    """How many programs there are, weight and x as TMA reads them, and what is decided when the kernel is compiled.

    `strips`: of results; `parts`: of the weight that make one; `most`: strips of the weight in a stage.
    """
    m, k = rows.shape
    programs = multiprocessors(rows.device)
    groups = triton.cdiv(k, GROUP)
    copied = _copied(groups)
    strip = triton.cdiv(groups, copied) * copied * GROUP * STRIP * weight.element_size()
    share = strips * parts * strip // programs
    single = strips * parts <= programs  # in full stages for some, so that the next kernel has the others
    full = share < LONG and (share > SHORT or m > 16)
    limit = STAGE if single or full else STAGE // 2
    least = BUSY * programs if m > 16 and not single else 0  # stages in all
    each = 1
    while 2 * each <= most and 2 * each * strip <= limit and 2 * each * least <= strips * parts:
        each *= 2
    copy_x = each == 1 and m >= (COPIED_ROWS if strip > STAGE // 2 or share >= LONG else COPIED_ROWS_SHORT)
    pieces = 2 if copy_x and strip == STAGE else 1
    held = pieces if copy_x else 0  # stages that x comes through
    whole = max(1, each // parts)
    programs = min(programs, triton.cdiv(strips, whole))
    units = triton.cdiv(triton.cdiv(strips, programs) * parts, each) * pieces
    stages = RING * pieces // (each * strip)
    if not single:
        stages = min(stages, units + held)
    options = {
        "EIGHTS": 1 if m <= 8 else 2 if m <= 16 else 4,
        "COPY_X": copy_x,
        "EVEN": k % GROUP == 0,
        "GROUPS": groups,
        "STAGES": stages,
        "LATE": int(units > stages - held),
        "EACH": each,
        "PIECES": pieces,
        "BLOCK": max(each, 2 * parts),
        "num_warps": WARPS,
        "launch_pdl": True,
    }
    columns = WARPS * copied // pieces
    descriptors = _blocks(weight, columns, STRIP * whole), _blocks(rows, columns, STRIP)
    return (programs,), descriptors, options


def _run(x: Tensor, weight: Tensor, bias: Tensor | None, kind: str, gated: bool) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    n = weight.shape[0] // 2 if gated else weight.shape[0]
    if n == 0 or not _fits(rows, weight):
        return (stream_gluon.gate_up if gated else stream_gluon.linear_act)(x, weight, bias, kind)
    y = empty((*x.shape[:-1], n), x.dtype, x.device)
    strips = triton.cdiv(n, STRIP)
    grid, descriptors, options = _plan(rows, weight, strips, 2 if gated else 1, 4)
    with on_device(x):
        launch(
            strip_kernel,
            grid,
            *descriptors,
            rows,
            x if bias is None else bias,
            y,
            rows.shape[0],
            n,
            rows.shape[1] // 8,
            rows.stride(0) // 8,
            0 if bias is None else bias.stride(0),
            strips,
            HAS_BIAS=bias is not None,
            KIND=kind,
            GATED=gated,
            **options,
        )
    return y


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
    strips = weight.shape[0] // (2 * STRIP)
    grid, descriptors, options = _plan(rows, weight, strips, 2, 2)
    length, heads, half = sizes
    with on_device(rows):
        launch(
            strip_heads_kernel,
            grid,
            *descriptors,
            rows,
            rows if bias is None else bias,
            y,
            rows.shape[0],
            weight.shape[0],
            rows.shape[1] // 8,
            rows.stride(0) // 8,
            0 if bias is None else bias.stride(0),
            strips,
            *tables,
            length,
            *strides,
            heads,
            half,
            HAS_BIAS=bias is not None,
            PRODUCT=product,
            enable_fp_fusion=False,  # a fused multiply-add would skip the rounding of the product
            **options,
        )


def refuse(signature: Signature) -> str | None:
    """Why x has too many rows or columns for this kernel, or `None`."""
    shape = signature["x"].shape
    rows = 1
    for size in shape[:-1]:
        rows *= 1 if size is None else size
    return None if not shape or shape[-1] is None else _refuse_sizes(rows, shape[-1])


def _supports(signature: Signature) -> str | None:
    return linear_act_triton.refuse_linear(signature) or refuse_operands(signature) or refuse(signature)


def _supports_gate_up(signature: Signature) -> str | None:
    return linear_act_triton.refuse_gate_up(signature) or refuse_operands(signature) or refuse(signature)


def linear_act(x: Tensor, weight: Tensor, bias: Tensor | None, kind: str) -> Tensor:
    """As the op `linear_act`."""
    return _run(x, weight, bias, kind, gated=False)


def gate_up(x: Tensor, weight: Tensor, bias: Tensor | None, kind: str) -> Tensor:
    """As the op `gate_up`."""
    return _run(x, weight, bias, kind, gated=True)


KERNELS: Final = (
    Kernel(ops.linear_act, "strip", linear_act, _supports, early=("weight",)),
    Kernel(ops.gate_up, "strip", gate_up, _supports_gate_up, early=("weight",)),
)
