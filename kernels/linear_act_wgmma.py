"""Linear layers on Hopper's matrix units: which operands they take, and how `wgmma_kernel` is launched."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Final

import torch
import triton
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from . import linear_act as ops
from . import linear_act_torch, linear_act_triton
from .launch import INTERPRETED, compute_capability, empty, launch, on_device
from .op import Kernel, Signature, TensorSpec
from .tuning import Config, choose
from .wgmma_kernel import linear_kernel

BLOCK_M: Final = 128
BLOCK_K: Final = 64
NO_ROPE: Final = (0,) * 9
"""Stands for the numbers among the rope arguments of the kernel where nothing is rotated."""


@dataclass(frozen=True)
class WgmmaMemory:
    """Shared memory of a program: the ring of input tiles and the product that is handed over."""

    def __call__(self, config: Config) -> int:
        ring = config.num_stages * BLOCK_K * (BLOCK_M + config["BLOCK_N"]) * 2
        return ring + BLOCK_M * config["BLOCK_N"] * 2 + 1024


@dataclass(frozen=True)
class Rope:
    """What `linear_kernel` and `stream_heads_kernel` are told of norm and rotation, in the order of their arguments."""

    tensors: tuple[Tensor, Tensor, Tensor, Tensor]
    """cos, sin, the norm's weights of q and k (anything where there are none)."""
    numbers: tuple[float, ...]
    """Rows of a sequence, strides of cos and of sin by sequence and row, where q ends, where k ends, eps, offset."""
    traits: tuple[Any, ...]
    """The constexpr `ROPE`."""


@dataclass(frozen=True)
class Groups:
    """Neighbouring rows of x that have a weight of their own, cut into tiles of at most `BLOCK_M` rows."""

    tiles: Tensor
    """`[T, 3]` int32: group, first row, rows. Those without rows come last."""
    used: Tensor
    """`[1]` int32: the tiles that have rows."""
    rows: int
    """Of a group on average, by which the configuration is chosen."""


def fits(x: Tensor, weight: Tensor) -> bool:
    """Whether TMA can read x `[M, K]` and weight `[N, K]`, which may lie as `[K, N]`."""
    matrix = weight if weight.stride(1) == 1 else weight.t()
    return all(
        t.stride(1) == 1 and t.stride(0) % 8 == 0 and t.stride(0) >= t.shape[1] and t.data_ptr() % 16 == 0
        for t in (x, matrix)
    )


def multiply(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    y: Tensor,
    kind: str,
    gated: bool,
    rope: Rope | None = None,
    groups: Groups | None = None,
) -> None:
    """Write the epilogue of `x @ weight.T + bias` to y; x `[M, K]`, weight `[N, K]`, y `[M, N]` (gated: `[M, N / 2]`).

    With `rope`, `kind` is "identity". With `groups`, weight and bias have one more dimension, in front, whose steps are
    those of contiguous tensors. The operands must fit, y be contiguous, and no size be 0.
    """
    m, k = x.shape
    transposed = weight.stride(-1) != 1
    matrix = (weight.mT if transposed else weight).flatten(0, -2)
    features = {"M": m, "N": weight.shape[-2], "K": k, "gated": int(gated)}
    if groups is None:
        features["rope"] = 0 if rope is None else rope.traits[0]  # the width of a head
        config = choose("linear_wgmma", features, WgmmaMemory(), x.device)
        row_blocks = triton.cdiv(m, BLOCK_M)
    else:
        config = choose("moe_wgmma", {**features, "R": groups.rows}, WgmmaMemory(), x.device)
        row_blocks = len(groups.tiles)
    block_n, helpers = config["BLOCK_N"], config["HELPERS"]
    # with one stage, the loading warp would wait for a buffer that is given back once the next one is read
    if helpers not in (2, 4) or block_n not in (128, 256) or config.num_stages < 2:
        raise LookupError(f"linear_wgmma has no configuration {config.launch}")
    if rope is not None and block_n < rope.traits[0]:
        raise LookupError(f"tiles of {block_n} columns do not hold heads of {rope.traits[0]}")
    out_n = block_n // 2 if gated else block_n
    dtype = gl.bfloat16 if x.dtype == torch.bfloat16 else gl.float16
    x_block, w_block = [BLOCK_M // 2, BLOCK_K], [BLOCK_K, out_n] if transposed else [out_n, BLOCK_K]
    shared = gl.NVMMASharedLayout.get_default_for
    tiles = row_blocks * triton.cdiv(y.shape[-1], out_n)
    with on_device(x):
        launch(
            linear_kernel,
            (min(tiles, torch.cuda.get_device_properties(x.device).multi_processor_count),),
            TensorDescriptor(x, list(x.shape), list(x.stride()), x_block, shared(x_block, dtype)),
            TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), w_block, shared(w_block, dtype)),
            y,
            x if bias is None else bias,
            x if groups is None else groups.tiles,
            x if groups is None else groups.used,
            m,
            y.shape[-1],
            k,
            *((x, x, x, x) if rope is None else rope.tensors),
            *(NO_ROPE if rope is None else rope.numbers),
            HAS_BIAS=bias is not None,
            KIND=kind,
            GATED=gated,
            TRANSPOSED=transposed,
            ROPE=None if rope is None else rope.traits,
            GROUPED=groups is not None,
            VECTOR=math.gcd(y.shape[-1], 8),  # neighbours that a thread stores at once
            BLOCK_M=BLOCK_M,
            BLOCK_N=block_n,
            BLOCK_K=BLOCK_K,
            GROUP_M=config["GROUP_M"],
            HELPERS=helpers,
            STAGES=config.num_stages,
            num_warps=4,
            maxnreg=128 if helpers == 4 else 168,  # of 512 or 384 threads: all registers there are
        )


def _run(x: Tensor, weight: Tensor, bias: Tensor | None, kind: str, gated: bool) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])  # a copy only where the leading dimensions cannot be merged
    n = weight.shape[0] // 2 if gated else weight.shape[0]
    contiguous_bias = bias is None or bias.stride(0) == 1
    # tiles of up begin at column n of a weight that lies as [K, N], and TMA's begin at multiples of 16 bytes in a row
    tiles_begin = weight.stride(1) == 1 or n % 8 == 0
    if min(*rows.shape, *weight.shape) == 0 or not contiguous_bias or not tiles_begin or not fits(rows, weight):
        return (linear_act_torch.gate_up if gated else linear_act_torch.linear_act)(x, weight, bias, kind)
    y = empty((*x.shape[:-1], n), x.dtype, x.device)
    multiply(rows, weight, bias, y, kind, gated)
    return y


def refuse_operands(signature: Signature) -> str | None:
    """Why TMA and wgmma cannot be used for x and weight of this signature, or `None`."""
    x, weight = signature["x"], signature["weight"]
    if INTERPRETED or x.device.type != "cuda" or compute_capability(x.device)[0] != 9:
        return "the device is no Hopper GPU"
    for name, spec in (("x", x), ("weight", weight)):
        if not isinstance(spec, TensorSpec) or spec.dtype not in (torch.float16, torch.bfloat16):
            return f"{name} is not of 16 bits"
    if weight.shape[-2] is None or weight.shape[-1] is None or weight.shape[-1] % 8:
        return f"weight {list(weight.shape)} has rows that 16 bytes do not divide"
    return None


def _supports(signature: Signature) -> str | None:
    return linear_act_triton.refuse_linear(signature) or refuse_operands(signature)


def _supports_gate_up(signature: Signature) -> str | None:
    return linear_act_triton.refuse_gate_up(signature) or refuse_operands(signature)


def linear_act(x: Tensor, weight: Tensor, bias: Tensor | None, kind: str) -> Tensor:
    """As the op `linear_act`."""
    return _run(x, weight, bias, kind, gated=False)


def gate_up(x: Tensor, weight: Tensor, bias: Tensor | None, kind: str) -> Tensor:
    """As the op `gate_up`."""
    return _run(x, weight, bias, kind, gated=True)


KERNELS: Final = (
    Kernel(ops.linear_act, "wgmma", linear_act, _supports),
    Kernel(ops.gate_up, "wgmma", gate_up, _supports_gate_up),
)
