"""PyTorch's fused attention as a provider of `attention`: the backends cuDNN and FlashAttention, where they are exact.

They take causal attention with as many queries as keys, and attention that sees everything.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor

from . import attention as ops
from . import attention_triton
from .launch import compute_capability, rows_aligned
from .op import Kernel, Signature

_DTYPES: Final = (torch.float16, torch.bfloat16)


def _cudnn(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> Tensor:
    run: Any = torch.ops.aten._scaled_dot_product_cudnn_attention
    return run(q, k, v, None, False, 0.0, causal, False, scale=scale)[0]


def _flash(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> Tensor:
    run: Any = torch.ops.aten._scaled_dot_product_flash_attention
    return run(q, k, v, 0.0, causal, False, scale=scale)[0]


def _attention(backend: Callable[..., Tensor]) -> Callable[..., Tensor]:
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
        """As the op `attention`; by our own kernel for sizes that PyTorch's cannot take."""
        shifted = right == 0 and q.shape[2] != k.shape[2]
        if 0 in (q.shape[0], q.shape[2], k.shape[2]) or shifted or not all(map(rows_aligned, (q, k, v))):
            return attention_triton.attention(q, k, v, scale=scale, right=right)
        return backend(q, k, v, right == 0, scale).transpose(1, 2).contiguous()

    return attention


def _supports(signature: Signature) -> str | None:
    for name in ("mask", "bias", "key_mask", "sinks"):
        if signature[name] is not None:
            return f"it takes no {name}"
    if signature["softcap"] != 0.0:
        return "it has no softcap"
    q, k, v = (signature[name] for name in "qkv")
    if q.device.type != "cuda" or compute_capability(q.device) < (9, 0):
        return "it was measured on compute capability 9.0 and is left to it"
    if q.dtype not in _DTYPES or not q.dtype == k.dtype == v.dtype:
        return f"q {q.dtype}, k {k.dtype}, v {v.dtype}; it takes float16 and bfloat16, one of them"
    if not len(q.shape) == len(k.shape) == len(v.shape) == 4:
        return "four dimensions each are needed"
    width = q.shape[3]
    if width is None or width % 8 or width > 256 or k.shape[3] != width or v.shape[3] != width:
        return f"head dimensions {q.shape[3]}, {k.shape[3]} and {v.shape[3]}; it takes equal multiples of 8, up to 256"
    heads, kv_heads = q.shape[1], k.shape[1]
    if heads is None or kv_heads is None or heads % kv_heads or v.shape[1] != kv_heads:
        return f"{heads} heads on {kv_heads} key and {v.shape[1]} value heads"
    if 0 in (q.shape[2], k.shape[2], q.shape[0]):
        return "there is nothing to compute"
    return _refuse_window(signature, q.shape[2], k.shape[2])


def _refuse_window(signature: Signature, queries: int | None, keys: int | None) -> str | None:
    left, right = signature["left"], signature["right"]
    if left >= 0 or right > 0:
        return "it has no window"
    if right == 0 and queries != keys and None not in (queries, keys):
        return f"{queries} causal queries on {keys} keys; its alignment is right only for as many"
    return None


KERNELS: Final = (
    Kernel(ops.attention, "cudnn", _attention(_cudnn), _supports),
    Kernel(ops.attention, "flash", _attention(_flash), _supports),
)
