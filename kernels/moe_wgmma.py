"""Mixture of experts on Hopper's matrix units: two products over rows sorted by expert, the gate in the first one.

The rows of each token are copied to the places of its slots, so that an expert's rows lie together and TMA can read
them. Which tiles of rows there are is found on the device and read by the products there.
"""

from __future__ import annotations

from typing import Final

import triton
from torch import Tensor

from . import moe as ops
from .activation_triton import refuse_kind
from .launch import empty, launch, on_device, refuse_mixed, refuse_tensors
from .linear_act_wgmma import BLOCK_M, Groups, fits, multiply, refuse_operands
from .moe_products_triton import spread_rows_kernel, weigh_slots_kernel
from .moe_routing_triton import route
from .moe_triton import moe_experts as moe_experts_by_tiles
from .op import Kernel, Signature, TensorSpec
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
    experts, width = up.shape[0], hidden.shape[1]
    first, second = (up.mT, down.mT) if transposed else (up, down)  # [E, 2 I, H], [E, H, I]
    if (
        hidden.numel() == 0
        or hidden.stride(1) != 1
        or not _readable(first, up_bias)
        or not _readable(second, down_bias)
    ):
        return moe_experts_by_tiles(
            hidden, top_k_index, top_k_weights, up, down, up_bias, down_bias, kind, gated, transposed
        )
    pairs = tokens * top
    y = empty((tokens, width), hidden.dtype, hidden.device)
    with on_device(hidden):
        _, places, tiles, _, used = route(top_k_index, experts, BLOCK_M)
        groups = Groups(tiles, used, triton.cdiv(pairs, experts))
        rows = empty((pairs, width), hidden.dtype, hidden.device)
        blocks = triton.cdiv(width, _BLOCK)
        sizes = {"TOP": top, "BLOCK": _BLOCK, **overlaps(hidden)}
        launch(spread_rows_kernel, (pairs, blocks), hidden, places, rows, width, hidden.stride(0), **sizes, num_warps=4)
        inner = empty((pairs, second.shape[2]), hidden.dtype, hidden.device)
        multiply(rows, first, up_bias, inner, kind, gated, groups=groups)
        parts = empty((pairs, width), hidden.dtype, hidden.device)
        multiply(inner, second, down_bias, parts, "identity", False, groups=groups)
        router = top_k_weights
        strides = (router.stride(0), router.stride(1))
        launch(weigh_slots_kernel, (tokens, blocks), parts, places, router, y, width, *strides, **sizes, num_warps=4)
    return y


def _readable(weight: Tensor, bias: Tensor | None) -> bool:
    """Whether TMA can read the experts' weights `[E, N, K]` as one matrix, and the biases lie one after the other."""
    stored = weight if weight.stride(2) == 1 else weight.mT
    # the depth ends inside a tile: what follows would be the next expert's, which only zeros make harmless
    depth_fits = stored is weight or weight.shape[2] % 64 == 0
    return (
        depth_fits and stored.is_contiguous() and fits(stored[0], stored[0]) and (bias is None or bias.is_contiguous())
    )


def _supports(signature: Signature) -> str | None:
    floats = ("hidden", "up", "down")
    refused = (
        refuse_tensors(signature, (*floats, "up_bias", "down_bias", "top_k_weights"), ("top_k_index",))
        or refuse_mixed(signature, floats)
        or refuse_kind(signature)
    )
    if refused is not None:
        return refused
    hidden, up, down = signature["hidden"], signature["up"], signature["down"]
    if any(signature[name] for name in ("interleaved", "limit", "alpha", "up_offset")):
        return "the gate is more than an activation"
    if len(hidden.shape) != 2 or len(up.shape) != 3 or len(down.shape) != 3:
        return "hidden, up and down are not [T, H], [E, N, H] and [E, H, I]"
    if signature["top_k_index"].shape[1] is None or any(
        size is None or size % 8 for size in (*up.shape[1:], *down.shape[1:])
    ):
        return f"up {list(up.shape)} and down {list(down.shape)} have rows that 16 bytes do not divide"
    return _refuse(hidden, up) or _refuse(hidden, down)


def _refuse(hidden: TensorSpec, weight: TensorSpec) -> str | None:
    return refuse_operands({"x": hidden, "weight": weight})


KERNELS: Final = (Kernel(ops.moe_experts, "wgmma", moe_experts, _supports),)
