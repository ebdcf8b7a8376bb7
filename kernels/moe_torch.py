"""Mixture of experts by PyTorch's grouped matrix product, with our sort, activation and weighted sum around it.

Its kernels are cuBLAS's and CUTLASS's, so it is a peer to choose where it was measured to be faster. Where the rows of
an expert end stays on the device.
"""

from __future__ import annotations

from typing import Final

import torch
import triton
from torch import Tensor

from . import moe as ops
from .activation_triton import activation, glu, refuse_kind
from .launch import compute_capability, launch, on_device, refuse_mixed, refuse_tensors
from .moe_products_triton import spread_rows_kernel, weigh_slots_kernel
from .moe_routing_triton import route
from .op import Kernel, Signature
from .overlap import overlaps

_BLOCK: Final = 1024


def moe_experts(
    hidden: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    up: Tensor,
    down: Tensor,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    kind: str = "silu",
    gated: bool = True,
    transposed: bool = False,
    interleaved: bool = False,
    limit: float = 0.0,
    limit_after: bool = False,
    alpha: float = 0.0,
    up_offset: float = 0.0,
) -> Tensor:
    """As the op `moe_experts`, for calls that `KERNELS` supports."""
    tokens, top = top_k_index.shape
    width = hidden.shape[1]
    y = torch.empty_like(hidden, memory_format=torch.contiguous_format)  # not of `empty`: this cannot be replayed
    if y.numel() == 0:
        return y
    rows = hidden if hidden.stride(1) == 1 else hidden.contiguous()
    with on_device(hidden):
        _, places, _, ends, _ = route(top_k_index, up.shape[0], 128)
        x = torch.empty(tokens * top, width, dtype=hidden.dtype, device=hidden.device)
        blocks = triton.cdiv(width, _BLOCK)
        sizes = {"TOP": top, "BLOCK": _BLOCK, **overlaps(hidden)}
        launch(spread_rows_kernel, (tokens * top, blocks), rows, places, x, width, rows.stride(0), **sizes, num_warps=4)
        x = torch._grouped_mm(x, up if transposed else up.mT, offs=ends)
        if gated:
            gate_half, up_half = x.chunk(2, dim=-1)
            x = glu(gate_half, up_half, kind)
        else:
            x = activation(x, kind)
        x = torch._grouped_mm(x, down if transposed else down.mT, offs=ends)
        router = top_k_weights
        strides = (router.stride(0), router.stride(1))
        launch(weigh_slots_kernel, (tokens, blocks), x, places, router, y, width, *strides, **sizes, num_warps=4)
    return y


def _supports(signature: Signature) -> str | None:
    floats = ("hidden", "up", "down")
    refused = refuse_tensors(signature, (*floats, "top_k_weights"), ("top_k_index",)) or refuse_mixed(signature, floats)
    if refused is not None:
        return refused
    hidden, up, down = signature["hidden"], signature["up"], signature["down"]
    if hidden.dtype != torch.bfloat16 or compute_capability(hidden.device) < (9, 0):
        return "torch._grouped_mm takes bfloat16 on compute capability 9.0 and later"
    if any(signature[name] for name in ("interleaved", "limit", "alpha", "up_offset")):
        return "the gate is more than an activation"
    if signature["up_bias"] is not None or signature["down_bias"] is not None:
        return "the experts have biases"
    if signature["top_k_index"].shape[1] is None or any(
        size is None or size % 8 for size in (*up.shape[1:], *down.shape[1:])
    ):
        return f"up {list(up.shape)} and down {list(down.shape)} have rows that 16 bytes do not divide"
    return refuse_kind(signature)


KERNELS: Final = (Kernel(ops.moe_experts, "grouped", moe_experts, _supports),)
