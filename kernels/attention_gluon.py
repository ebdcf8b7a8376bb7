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
from . import attention_triton
from .attention_gluon_kernel import attention_hopper_kernel
from .attention_triton import parts
from .launch import INTERPRETED, compute_capability, empty, launch, on_device, rows_aligned
from .op import Kernel, Signature

QUERIES: Final = 64
"""Rows of one warp group; a program has two."""
REGISTERS: Final = 240
"""For a thread of the two warp groups that compute; the warp that copies gets 24."""

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


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


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
    batch, heads, queries, d = q.shape
    kv_heads, keys, dv = v.shape[1:]
    tiles = _tiles(d, dv)
    bias_steps = (0, 0, 0, 0) if bias is None else bias.expand(batch, heads, queries, keys).stride()
    readable = all(_readable(t) for t in (q, k, v)) and k.shape[0] == v.shape[0] == batch
    if tiles is None or not readable or bias_steps[2] or 0 in (q.numel(), keys) or scale <= 0.0:
        return attention_triton.attention(q, k, v, mask, bias, key_mask, sinks, scale, left, right, softcap)
    o = empty((batch, queries, heads, dv), v.dtype, v.device)
    tile, stages, slots = tiles
    blocks = triton.cdiv(queries, 2 * QUERIES)
    together = max(1, L2_BYTES // (2 * keys * (d + dv)))  # kv heads whose keys and values fit
    section = min(together * (heads // kv_heads), batch * heads)
    programs = min(blocks * heads * batch, _multiprocessors(q.device))
    key_steps = (0, 0) if key_mask is None else key_mask.expand(batch, keys).stride()
    with on_device(q):
        launch(
            attention_hopper_kernel,
            (programs,),
            *_descriptors(q, k, v, o.transpose(1, 2), tile),
            q if key_mask is None else key_mask,
            q if bias is None else bias,
            q if sinks is None else sinks,
            batch,
            heads,
            heads // kv_heads,
            queries,
            keys,
            blocks,
            section,
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
            D2=parts(d)[1],
            DV2=parts(dv)[1],
            SLOTS=slots,
            STAGES=stages,
            PINGPONG=True,
            REGISTERS=REGISTERS,
            num_warps=4,
            maxnreg=168,
        )
    return o


def _supports(signature: Signature) -> str | None:
    reason = attention_triton.supports(signature)
    if reason is not None:
        return reason
    q, v = signature["q"], signature["v"]
    if INTERPRETED or compute_capability(q.device) != (9, 0):
        return "this kernel is for compute capability 9.0"
    if q.dtype == torch.float32:
        return "q is float32; this kernel takes float16 and bfloat16"
    d, dv = q.shape[3], v.shape[3]
    if d % 8 or dv % 8 or min(d, dv) < 33 or any(o > i for o, i in zip(parts(dv), parts(d), strict=True)):
        return f"head dimensions {d} and {dv}; it takes multiples of 8 above 32, values no wider than keys"
    if _tiles(d, dv) is None:
        return f"tiles of head dimensions {d} and {dv} do not fit in shared memory"
    if signature["mask"] is not None:
        return "it takes no mask for each pair of query and key"
    return None


KERNELS: Final = (Kernel(ops.attention, "gluon", attention, _supports),)
