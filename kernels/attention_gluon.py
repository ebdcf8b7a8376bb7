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
from .launch import INTERPRETED, compute_capability, empty, launch, on_device, rows_aligned
from .op import Kernel, Signature

QUERIES: Final = 64
"""Rows of one warp group; a program has two."""
REGISTERS: Final = 240
"""For a thread of the two warp groups that compute; the warp that copies gets 24."""

TILES: Final = {64: (128, 3), 128: (128, 2)}
"""By head dimension: keys of a tile, tiles in flight."""


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _descriptor(x: Tensor, rows: int) -> TensorDescriptor:
    """Tiles `[1, 1, rows, D]` of x `[B, H, T, D]`."""
    layout = gl.NVMMASharedLayout(128, 8 * x.element_size(), rank=4)
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, 1, rows, x.shape[3]], layout)


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
    """As the op `attention`; views that TMA cannot read are left to the kernel that reads by address."""
    batch, heads, queries, d = q.shape
    kv_heads, keys = k.shape[1:3]
    readable = all(rows_aligned(t) and all(s > 0 for s in t.stride()) for t in (q, k, v))
    if not readable or keys == 0 or q.numel() == 0 or scale <= 0.0 or k.shape[0] != batch or v.shape[0] != batch:
        return attention_triton.attention(q, k, v, mask, bias, key_mask, sinks, scale, left, right, softcap)
    o = empty((batch, queries, heads, d), v.dtype, v.device)
    tile, stages = TILES[d]
    blocks = triton.cdiv(queries, 2 * QUERIES)
    programs = min(blocks * heads * batch, _multiprocessors(q.device))
    key_steps = (0, 0) if key_mask is None else key_mask.expand(batch, keys).stride()
    bias_steps = (0, 0, 0, 0) if bias is None else bias.expand(batch, heads, queries, keys).stride()
    with on_device(q):
        launch(
            attention_hopper_kernel,
            (programs,),
            _descriptor(q, QUERIES),
            _descriptor(k, tile),
            _descriptor(v, tile),
            _descriptor(o.transpose(1, 2), QUERIES),
            q if key_mask is None else key_mask,
            q if bias is None else bias,
            q if sinks is None else sinks,
            batch,
            heads,
            heads // kv_heads,
            queries,
            keys,
            blocks,
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
    q, v, bias = (signature[name] for name in ("q", "v", "bias"))
    if INTERPRETED or compute_capability(q.device) != (9, 0):
        return "this kernel is for compute capability 9.0"
    if q.dtype == torch.float32:
        return "q is float32; this kernel takes float16 and bfloat16"
    if q.shape[3] not in TILES or v.shape[3] != q.shape[3]:
        return f"head dimensions {q.shape[3]} and {v.shape[3]}; this kernel takes {sorted(TILES)}, equal ones"
    if signature["mask"] is not None:
        return "it takes no mask for each pair of query and key"
    if bias is not None and len(bias.shape) > 1 and bias.shape[-2] != 1:
        return "it takes no bias that differs between queries"
    return None


KERNELS: Final = (Kernel(ops.attention, "gluon", attention, _supports),)
