"""Launches the attention kernel for `varlen_attention`."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor

from . import varlen_attention as ops
from .attention_triton import MAX_HEAD_DIM, Call, refuse_memory_of, run
from .launch import empty, refuse_mixed, refuse_tensors, refuse_vector
from .op import Kernel, Signature


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
    """As the op `varlen_attention`."""
    o = empty((q.shape[0], q.shape[1], v.shape[-1]), v.dtype, v.device)
    if 0 in (o.numel(), max_q, cu_seqlens_q.shape[0] - 1):
        return o.zero_()
    paged = block_table is not None
    call = Call(
        q,
        k,
        v,
        cu_seqlens_q.shape[0] - 1,
        q.shape[1],
        k.shape[-2],
        max_q,
        max_k,
        ((0, q.stride(1), q.stride(0), q.stride(2)), *(_steps(t, paged) for t in (k, v))),
        scale,
        left,
        right,
        softcap,
        sinks=sinks,
        cu_q=cu_seqlens_q,
        cu_k=cu_seqlens_k,
        table=block_table,
        page=k.shape[1] if paged else 1,
    )
    run(call, o)
    return o


def _steps(x: Tensor, paged: bool) -> tuple[int, ...]:
    """Strides of page, head, token and element."""
    return (x.stride(0) if paged else 0, x.stride(-2), x.stride(-3), x.stride(-1))


def supports(signature: Signature) -> str | None:
    """Why the kernel cannot take the call, or `None`."""
    integers = ("cu_seqlens_q", "cu_seqlens_k", "block_table")
    return (
        refuse_tensors(signature, ("q", "k", "v", "sinks"), integers)
        or refuse_mixed(signature, ("q", "k", "v"))
        or _refuse_indices(signature, integers)
        or _refuse_sizes(signature)
        or refuse_memory_of(signature["q"], None, None, signature["q"].shape[2], signature["v"].shape[-1])
    )


def _refuse_indices(signature: Signature, names: tuple[str, ...]) -> str | None:
    for name, rank in zip(names, (1, 1, 2), strict=True):
        spec: Any = signature[name]
        if spec is not None and (spec.dtype != torch.int32 or len(spec.shape) != rank):
            return f"{name} is {spec.dtype} with {len(spec.shape)} dimensions, not int32 with {rank}"
    return None


def _refuse_sizes(signature: Signature) -> str | None:
    q, k, v = (signature[name].shape for name in "qkv")
    rank = 3 if signature["block_table"] is None else 4
    if len(q) != 3 or len(k) != rank or len(v) != rank:
        return f"q {list(q)}, k {list(k)}, v {list(v)}: three dimensions, and {rank} of k and v, are needed"
    if rank == 4 and k[1] is None:
        return "the size of a page is not known"
    heads, kv_heads = q[1], k[-2]
    if heads is None or kv_heads is None or heads % kv_heads or v[-2] != kv_heads:
        return f"{heads} heads on {kv_heads} key and {v[-2]} value heads"
    for width in (q[2], k[-1], v[-1]):
        if width is None or not 0 < width <= MAX_HEAD_DIM:
            return f"a head dimension is {width}; this kernel takes 1 to {MAX_HEAD_DIM}"
    if q[2] != k[-1]:
        return f"q has head dimension {q[2]}, k {k[-1]}"
    return refuse_vector(signature, "sinks", heads)


KERNELS: Final = (Kernel(ops.varlen_attention, "triton", varlen_attention, supports),)
