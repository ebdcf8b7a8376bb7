"""`paged_attention` of sequences that begin in this call: pages are only written.

All their keys are k and v, which attention reads where the projections left them, by whichever kernel for packed
sequences is the fastest. Calls of another kind run as in the kernel that reads pages.
"""

from __future__ import annotations

from typing import Final

from torch import Tensor

from . import attention_gluon, choice, paged_attention_triton, varlen_attention_triton
from . import paged_attention as ops
from .launch import on_device
from .op import Kernel, Signature
from .varlen_attention import varlen_attention

_PACKED: Final = tuple(
    kernel
    for module in (varlen_attention_triton, attention_gluon)
    for kernel in module.KERNELS
    if kernel.op is varlen_attention
)


def paged_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    slots: Tensor,
    cu_seqlens_q: Tensor,
    lengths: Tensor,
    block_table: Tensor,
    max_q: int,
    sinks: Tensor | None = None,
    slopes: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    scale: float = 1.0,
    left: int = -1,
    softcap: float = 0.0,
    fresh: bool = False,
    relative: Tensor | None = None,
) -> Tensor:
    """As the op `paged_attention`, without slopes, a table of biases and scales."""
    if not fresh:
        args = (q, k, v, k_pages, v_pages, slots, cu_seqlens_q, lengths, block_table, max_q)
        return paged_attention_triton.paged_attention(*args, sinks, slopes, k_scale, v_scale, scale, left, softcap)
    k, v = (paged_attention_triton.dense(t) for t in (k, v))
    with on_device(q):
        paged_attention_triton.write_pages(k, v, k_pages, v_pages, slots)
    packed = (q, k, v, cu_seqlens_q, cu_seqlens_q, max_q, max_q, None, sinks, scale, left, 0, softcap)
    signature = varlen_attention.signature(*packed)
    kernels = [kernel for kernel in _PACKED if kernel.supports(signature) is None]
    found: Tensor = choice.choose(varlen_attention, kernels, packed, q.device).run(*packed)
    return found


def _supports(signature: Signature) -> str | None:
    for name in ("slopes", "relative", "k_scale", "v_scale"):
        if signature[name] is not None:
            return f"{name} is given"
    packed = {name: signature[name] for name in ("q", "k", "v", "cu_seqlens_q", "sinks", "scale", "left", "softcap")}
    packed |= {"cu_seqlens_k": signature["cu_seqlens_q"], "max_k": signature["max_q"], "max_q": signature["max_q"]}
    packed |= {"block_table": None, "right": 0}
    reads_pages = paged_attention_triton.KERNELS[0].supports(signature)
    return reads_pages or varlen_attention_triton.supports(packed)


KERNELS: Final = (Kernel(ops.paged_attention, "contiguous", paged_attention, _supports),)
