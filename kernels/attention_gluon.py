"""Launches the Hopper attention kernel: what TMA can read, tiles by head dimension, persistent programs."""

from __future__ import annotations

import functools
from typing import Final

import torch
import triton
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from . import attention as ops
from . import attention_triton, varlen_attention_triton
from .attention_gluon_kernel import attention_hopper_kernel
from .attention_triton import parts
from .launch import INTERPRETED, compute_capability, empty, launch, multiprocessors, on_device, rows_aligned
from .op import Kernel, Signature, TensorSpec
from .varlen_attention import varlen_attention as varlen_attention_op

QUERIES: Final = 64
"""Rows of one warp group; a program has two."""
REGISTERS: Final = 240
"""For a thread of the two warp groups that compute; the warp that copies gets 24."""

MAX_TILES: Final = 1 << 20
"""Of one launch; the kernel divides their numbers in fp32."""
L2_BYTES: Final = 24 << 20
"""How much of L2 the keys and values of the heads in progress may take."""
LIMIT: Final = 227 * 1024
"""Bytes of shared memory of one program."""


@functools.cache
def _tiles(d: int, dv: int) -> tuple[int, int, int] | None:
    """Keys of a tile, tiles of keys and tiles of queries in shared memory; `None` where no choice fits.

    A thread holds half as many registers as dv for the output and three quarters of the keys for the probabilities.
    """
    width, value_width = sum(parts(d)), sum(parts(dv))
    for keys, stages, slots in ((128, 3, 2), (128, 2, 2), (128, 2, 1), (64, 2, 1)):
        shared = 2 * (slots * 2 * QUERIES * width + stages * keys * (width + value_width)) + 1024
        if shared <= LIMIT and value_width // 2 + keys * 3 // 4 <= 190:
            return keys, stages, slots
    return None


def _readable(x: Tensor) -> bool:
    """Whether TMA can read x `[B, H, T, D]`: aligned rows, no dimension that is expanded."""
    return rows_aligned(x) and all(step > 0 for size, step in zip(x.shape, x.stride(), strict=True) if size > 1)


def _descriptor(x: Tensor, rows: int, width: int) -> TensorDescriptor:
    """Tiles `[1, 1, rows, width]` of x `[B, H, T, D]`, swizzled as the matrix unit reads them."""
    layout = gl.NVMMASharedLayout(min(2 * width, 128), 16, rank=4)
    steps = [step if size > 1 else x.shape[3] for size, step in zip(x.shape[:3], x.stride()[:3], strict=True)]
    return TensorDescriptor(x, list(x.shape), [*steps, 1], [1, 1, rows, width], layout)


def _descriptors(q: Tensor, k: Tensor, v: Tensor, o: Tensor, tile: int) -> list[TensorDescriptor]:
    """Of q, k, v and o for the first parts of their widths, then for the second ones (or the first again)."""
    tensors = ((q, QUERIES), (k, tile), (v, tile), (o, QUERIES))
    widths = [parts(x.shape[3]) for x, _ in tensors]
    first = [_descriptor(x, rows, w[0]) for (x, rows), w in zip(tensors, widths, strict=True)]
    second = [
        _descriptor(x, rows, w[1]) if w[1] else whole
        for (x, rows), w, whole in zip(tensors, widths, first, strict=True)
    ]
    return first + second


def _section(heads: int, most: int) -> int:
    """The most heads up to `most` that divide all of them into equal sections; all, where the sections were small."""
    found = max(size for size in range(1, min(most, heads) + 1) if heads % size == 0)
    return found if 2 * found > most else heads


def _blocks(rows: int, sequences: int) -> int:
    """Blocks of packed queries: each sequence has at most one more than the multiples of a block's rows in it."""
    return rows // (2 * QUERIES) + sequences


def _run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    sequences: int,
    queries: int,
    keys: int,
    scale: float,
    left: int,
    right: int,
    softcap: float,
    bias: Tensor | None = None,
    key_mask: Tensor | None = None,
    sinks: Tensor | None = None,
    cu: tuple[Tensor, Tensor] | None = None,
) -> None:
    """Launches for q `[B, H, T, D]`, k, v and o `[B, H, T, DV]`; o is a view of a contiguous `[B, T, H, DV]`."""
    (heads, d), (kv_heads, dv) = q.shape[1::2], v.shape[1::2]
    tiles = _tiles(d, dv)
    if tiles is None:
        raise ValueError(f"no tiles of head dimensions {d} and {dv}")
    tile, stages, slots = tiles
    blocks, rows = triton.cdiv(queries, 2 * QUERIES), sequences * heads
    ragged = cu is not None and blocks * sequences > _blocks(q.shape[2], sequences)
    if ragged:
        blocks, rows = _blocks(q.shape[2], sequences), heads
    section = rows
    if right < 0:  # rows of one length: heads are done one after another, as many at once as L2 holds
        most = max(1, L2_BYTES // (2 * keys * (d + dv))) * (heads // kv_heads)
        section = _section(rows, most)
    bias_steps = (0, 0, 0, 0) if bias is None else bias.expand(sequences, heads, queries, keys).stride()
    key_steps = (0, 0) if key_mask is None else key_mask.expand(sequences, keys).stride()
    with on_device(q):
        launch(
            attention_hopper_kernel,
            (min(blocks * rows, multiprocessors(q.device)),),
            *_descriptors(q, k, v, o, tile),
            o,
            q if key_mask is None else key_mask,
            q if bias is None else bias,
            q if sinks is None else sinks,
            *((q, q) if cu is None else cu),
            sequences,
            q.shape[2],
            blocks * rows,
            heads,
            heads // kv_heads,
            queries,
            keys,
            blocks,
            section,
            1.0 / heads,
            1.0 / section,
            1.0 / (section * blocks),
            *key_steps,
            bias_steps[0],
            bias_steps[1],
            bias_steps[3],
            0 if sinks is None else sinks.stride(0),
            float(scale),
            float(softcap),
            left,
            right,
            HAS_LEFT=left >= 0,
            HAS_RIGHT=right >= 0,
            HAS_SOFTCAP=softcap != 0.0,
            HAS_KEY_MASK=key_mask is not None,
            HAS_BIAS=bias is not None,
            HAS_SINKS=sinks is not None,
            VARLEN=cu is not None,
            RAGGED=ragged,
            D2=parts(d)[1],
            DV2=parts(dv)[1],
            WIDTH=dv,
            SLOTS=slots,
            STAGES=stages,
            PINGPONG=True,
            REGISTERS=REGISTERS,
            num_warps=4,
            maxnreg=168,
        )


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    key_mask: Tensor | None = None,
    sinks: Tensor | None = None,
    scale: float = 1.0,
    left: int = -1,
    right: int = -1,
    softcap: float = 0.0,
) -> Tensor:
    """As the op `attention`; views that TMA cannot read, and a bias of its own for each pair of query
    and key, are left to the kernel that reads by address."""
    batch, heads, queries, _ = q.shape
    keys, dv = v.shape[2:]
    paired = bias is not None and queries > 1 and bias.expand(batch, heads, queries, keys).stride(2) != 0
    readable = all(_readable(t) for t in (q, k, v)) and k.shape[0] == v.shape[0] == batch
    many = batch * heads * triton.cdiv(queries, 2 * QUERIES) > MAX_TILES
    if paired or not readable or many or 0 in (q.numel(), keys) or scale <= 0.0:
        return attention_triton.attention(q, k, v, mask, bias, key_mask, sinks, scale, left, right, softcap)
    o = empty((batch, queries, heads, dv), v.dtype, v.device)
    window = (scale, left, right, softcap)
    _run(q, k, v, o.transpose(1, 2), batch, queries, keys, *window, bias, key_mask, sinks)
    return o


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_q: int,
    max_k: int,
    block_table: Tensor | None = None,
    sinks: Tensor | None = None,
    scale: float = 1.0,
    left: int = -1,
    right: int = -1,
    softcap: float = 0.0,
) -> Tensor:
    """As the op `varlen_attention` without pages."""
    q4, k4, v4 = (t.transpose(0, 1).unsqueeze(0) for t in (q, k, v))
    sequences = cu_seqlens_q.shape[0] - 1
    readable = all(_readable(t) for t in (q4, k4, v4))
    many = _blocks(q.shape[0], sequences) * q.shape[1] > MAX_TILES  # or fewer, see `_run`
    if not readable or many or 0 in (q.numel(), k.numel(), max_q, max_k, sequences) or scale <= 0.0:
        rest = (block_table, sinks, scale, left, right, softcap)
        return varlen_attention_triton.varlen_attention(q, k, v, cu_seqlens_q, cu_seqlens_k, max_q, max_k, *rest)
    o = empty((*q.shape[:2], v.shape[2]), v.dtype, v.device)
    cu = (cu_seqlens_q, cu_seqlens_k)
    window = (scale, left, right, softcap)
    _run(q4, k4, v4, o.transpose(0, 1).unsqueeze(0), sequences, max_q, max_k, *window, sinks=sinks, cu=cu)
    return o


def _refuse_here(q: TensorSpec, v: TensorSpec) -> str | None:
    """Why the kernel cannot take these head dimensions and dtypes on this device, or `None`."""
    if INTERPRETED or compute_capability(q.device) != (9, 0):
        return "this kernel is for compute capability 9.0"
    if q.dtype == torch.float32:
        return "q is float32; this kernel takes float16 and bfloat16"
    d, dv = q.shape[-1], v.shape[-1]
    if d is None or dv is None or d % 8 or dv % 8 or min(d, dv) < 33:
        return f"head dimensions {d} and {dv}; it takes multiples of 8 above 32"
    if any(o > i for o, i in zip(parts(dv), parts(d), strict=True)):
        return f"head dimensions {d} and {dv}; it takes values no wider than keys"
    if _tiles(d, dv) is None:
        return f"tiles of head dimensions {d} and {dv} do not fit in shared memory"
    return None


def _supports(signature: Signature) -> str | None:
    reason = attention_triton.supports(signature) or _refuse_here(signature["q"], signature["v"])
    if reason is None and signature["mask"] is not None:
        return "it takes no mask for each pair of query and key"
    return reason


def _supports_varlen(signature: Signature) -> str | None:
    reason = varlen_attention_triton.supports(signature) or _refuse_here(signature["q"], signature["v"])
    if reason is None and signature["block_table"] is not None:
        return "it takes no pages"
    return reason


KERNELS: Final = (
    Kernel(ops.attention, "gluon", attention, _supports),
    Kernel(varlen_attention_op, "gluon", varlen_attention, _supports_varlen),
)
