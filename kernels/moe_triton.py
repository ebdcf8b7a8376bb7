# mypy: disallow-untyped-defs=False
"""Mixture of experts in Triton: two products, each with its epilogue, over the rows that each expert gets.

Few pairs (token, slot) read their experts' weights as sums of products, one program for some rows of a weight and one
pair. More pairs are sorted by expert (`moe_routing_triton`), and tiles of the weights and of the rows are multiplied in
the tensor cores. The first product is gated in its epilogue; the second is weighted by the router, and the slots of a
token are added in their order, so that equal inputs give equal bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import torch
import triton
from torch import Tensor

from . import moe as ops
from .activation_triton import refuse_kind
from .launch import empty, launch, on_device, refuse_mixed, refuse_tensors, rows_aligned
from .moe_products_triton import add_slots_kernel, down_gemv_kernel, grouped_kernel, up_gemv_kernel
from .moe_routing_triton import max_tiles, route
from .op import Kernel, Signature
from .overlap import overlaps
from .tuning import Config, choose


@dataclass(frozen=True)
class GroupedMemory:
    """Shared memory of one program: each pipeline stage holds a tile of the rows and one or two of the weight."""

    weights: int

    def __call__(self, config: Config) -> int:
        tile = config["BLOCK_K"] * (config["BLOCK_T"] + self.weights * config["BLOCK_N"]) * 2
        sums = max(config["PARTS"], 1) * config["BLOCK_N"] * config["BLOCK_T"] * 4
        return max(config.num_stages * tile, sums) + 1024


def gemv_memory(config: Config) -> int:
    """Shared memory of one program without tensor cores: sums over warps."""
    return config["ROWS"] * 128 + 1024


@dataclass(frozen=True)
class _Weight:
    """The weight of all experts `[E, N, K]` by strides, with its bias; of a gated one, the rows of gate."""

    tensor: Tensor
    bias: Tensor | None
    n: int
    k: int
    stride_n: int
    stride_k: int
    up: int
    bias_step: int
    bias_up: int

    def strides(self) -> tuple[int, ...]:
        bias_stride = 0 if self.bias is None else self.bias.stride(0)
        return (self.tensor.stride(0), self.stride_n, self.stride_k, bias_stride, self.bias_step)


def _weight(w: Tensor, bias: Tensor | None, transposed: bool, gated: bool, interleaved: bool) -> _Weight:
    matrix = w.mT if transposed else w
    rows, k = matrix.shape[1:]
    stride_n, stride_k = matrix.stride(1), matrix.stride(2)
    stride_b = 0 if bias is None else bias.stride(1)
    if not gated:
        return _Weight(w, bias, rows, k, stride_n, stride_k, 0, stride_b, 0)
    n = rows // 2
    if interleaved:
        return _Weight(w, bias, n, k, 2 * stride_n, stride_k, stride_n, 2 * stride_b, stride_b)
    return _Weight(w, bias, n, k, stride_n, stride_k, n * stride_n, stride_b, n * stride_b)


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
    """As the op `moe_experts`."""
    first = _weight(up, up_bias, transposed, gated, interleaved)
    second = _weight(down, down_bias, transposed, False, False)
    epilogue = {
        "GATED": gated,
        "KIND": kind,
        "LIMIT": (2 if limit_after else 1) if limit else 0,
        "ALPHA": alpha != 0.0,
    }
    numbers = (float(limit), float(alpha), float(up_offset))
    y = empty(tuple(hidden.shape), hidden.dtype, hidden.device)
    if y.numel() == 0:
        return y
    rows = hidden if hidden.stride(1) == 1 else hidden.contiguous()
    with on_device(hidden):
        call = _Call(rows, top_k_index, top_k_weights, first, second, y, epilogue, numbers)
        if _by_pair(call):
            _run_pairs(call)
        else:
            _run_grouped(call)
    return y


@dataclass(frozen=True)
class _Call:
    x: Tensor
    index: Tensor
    router: Tensor
    first: _Weight
    second: _Weight
    y: Tensor
    epilogue: dict[str, Any]
    numbers: tuple[float, float, float]

    @property
    def pairs(self) -> int:
        return self.index.numel()

    def features(self, weight: _Weight) -> dict[str, int]:
        """P pairs, R of them for each expert that can have some, the weight's sizes, whether it is read along K."""
        experts = weight.tensor.shape[0]
        return {
            "P": self.pairs,
            "R": -(-self.pairs // min(experts, self.pairs)),
            "E": experts,
            "N": weight.n,
            "K": weight.k,
            "gated": int(weight is self.first and self.epilogue["GATED"]),
            "along_k": int(weight.stride_k == 1 and rows_aligned(weight.tensor)),
        }


PAIRS: Final = 8
"""Up to so many pairs, each reads its expert for itself."""


def _by_pair(call: _Call) -> bool:
    return call.pairs <= PAIRS


def _run_pairs(call: _Call) -> None:
    first, second = call.first, call.second
    tokens, top = call.index.shape
    experts = first.tensor.shape[0]
    inner = empty((call.pairs, first.n), call.x.dtype, call.x.device)
    config = choose("moe_gemv", call.features(first), gemv_memory, call.x.device)
    launch(
        up_gemv_kernel,
        (call.pairs, triton.cdiv(first.n, config["ROWS"])),
        call.x,
        call.index,
        first.tensor,
        first.tensor if first.bias is None else first.bias,
        inner,
        tokens,
        experts,
        first.n,
        first.k,
        call.x.stride(0),
        call.index.stride(0),
        call.index.stride(1),
        *first.strides(),
        first.up,
        first.bias_up,
        *call.numbers,
        TOP=top,
        HAS_BIAS=first.bias is not None,
        **call.epilogue,
        EVEN_K=first.k % config["BLOCK_K"] == 0,
        **overlaps(call.x),
        **config.launch,
    )
    config = choose("moe_gemv", call.features(second), gemv_memory, call.x.device)
    launch(
        down_gemv_kernel,
        (tokens, triton.cdiv(second.n, config["ROWS"])),
        inner,
        call.index,
        call.router,
        second.tensor,
        second.tensor if second.bias is None else second.bias,
        call.y,
        tokens,
        experts,
        second.n,
        second.k,
        call.index.stride(0),
        call.index.stride(1),
        call.router.stride(0),
        call.router.stride(1),
        *second.strides(),
        TOP=top,
        SLOTS=triton.next_power_of_2(top),
        HAS_BIAS=second.bias is not None,
        EVEN_K=second.k % config["BLOCK_K"] == 0,
        **overlaps(call.x),
        **config.launch,
    )


def _run_grouped(call: _Call) -> None:
    first, second = call.first, call.second
    tokens, top = call.index.shape
    experts = first.tensor.shape[0]
    memory = GroupedMemory(2 if call.epilogue["GATED"] else 1)
    config = choose("moe_grouped", call.features(first), memory, call.x.device)
    block_t = config["BLOCK_T"]
    order, _, tiles, *_ = route(call.index, experts, block_t)
    inner = empty((call.pairs, first.n), call.x.dtype, call.x.device)
    _grouped(call, True, config, call.x, order, tiles, inner)
    features = {**call.features(second), "BLOCK_T": block_t}
    config = choose("moe_grouped_down", features, GroupedMemory(1), call.x.device)
    if config["BLOCK_T"] != block_t:
        raise LookupError(f"the products have tiles of {block_t} and {config['BLOCK_T']} rows")
    parts = empty((call.pairs, second.n), call.x.dtype, call.x.device)
    _grouped(call, False, config, inner, order, tiles, parts)
    launch(
        add_slots_kernel,
        (tokens, triton.cdiv(second.n, 1024)),
        parts,
        call.index,
        call.y,
        experts,
        second.n,
        call.index.stride(0),
        call.index.stride(1),
        TOP=top,
        BLOCK=1024,
        **overlaps(call.x),
        num_warps=4,
    )


def _grouped(call: _Call, first: bool, config: Config, x: Tensor, order: Tensor, tiles: Tensor, y: Tensor) -> None:
    weight = call.first if first else call.second
    many = max_tiles(call.pairs, weight.tensor.shape[0], config["BLOCK_T"])
    launch(
        grouped_kernel,
        (many * triton.cdiv(weight.n, config["BLOCK_N"]),),
        x,
        order,
        tiles,
        call.router,
        weight.tensor,
        weight.tensor if weight.bias is None else weight.bias,
        y,
        weight.n,
        weight.k,
        many,
        x.stride(0),
        call.router.stride(0),
        call.router.stride(1),
        *weight.strides(),
        weight.up,
        weight.bias_up,
        *call.numbers,
        TOP=call.index.shape[1],
        FIRST=first,
        HAS_BIAS=weight.bias is not None,
        **({**call.epilogue} if first else {**call.epilogue, "GATED": False, "LIMIT": 0, "ALPHA": False}),
        EVEN_K=weight.k % config["BLOCK_K"] == 0,
        STAGES=config.num_stages,
        **overlaps(x),
        **config.launch,
    )


def _supports(signature: Signature) -> str | None:
    floats = ("hidden", "up", "down", "up_bias", "down_bias")
    refused = (
        refuse_tensors(signature, (*floats, "top_k_weights"), ("top_k_index",))
        or refuse_mixed(signature, ("hidden", "up", "down"))
        or (None if signature["alpha"] and signature["gated"] else refuse_kind(signature))
    )
    if refused is not None:
        return refused
    if signature["hidden"].dtype == torch.float32:
        return "hidden is float32; the tensor cores would round the experts' products"
    if len(signature["hidden"].shape) != 2 or len(signature["up"].shape) != 3 or len(signature["down"].shape) != 3:
        return "hidden, up and down are not [T, H], [E, N, H] and [E, H, I]"
    if signature["top_k_index"].shape[1] is None or None in signature["up"].shape:
        return "the number of experts, or of slots, is not known"
    return None


KERNELS: Final = (Kernel(ops.moe_experts, "triton", moe_experts, _supports),)
