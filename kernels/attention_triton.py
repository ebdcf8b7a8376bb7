"""Launches the attention kernel for the op `attention`: block sizes, packed heads, splits of the keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import torch
import triton
from torch import Tensor

from . import attention as ops
from .attention_kernel import attention_kernel, combine_kernel
from .launch import (
    ALIGNMENT,
    empty,
    launch,
    multiprocessors,
    on_device,
    refuse_mixed,
    refuse_tensors,
    refuse_vector,
    rows_aligned,
)
from .op import Kernel, Signature, TensorSpec
from .tuning import MANY, Config, choose, refuse_memory

MAX_HEAD_DIM: Final = 256
PACKED_ROWS: Final = 64
"""The heads of one kv head share a tile where all their queries are at most so many rows."""
KEYS_PER_SPLIT: Final = 64
MAX_SPLITS: Final = 64


@dataclass(frozen=True)
class AttentionMemory:
    """Shared memory of one program: queries and probabilities once; keys, values, mask and bias once a stage."""

    block_d: int
    block_dv: int
    itemsize: int
    pair_bytes: int
    """Bytes that mask and bias hold for one pair of query and key."""

    def __call__(self, config: Config) -> int:
        queries = config["BLOCK_M"] * self.block_d
        keys = config.num_stages * config["BLOCK_N"] * (self.block_d + self.block_dv)
        scores = config["BLOCK_M"] * config["BLOCK_N"]
        output = config["BLOCK_M"] * self.block_dv
        pairs = config.num_stages * scores * self.pair_bytes
        return max((queries + keys + scores) * self.itemsize + pairs, output * self.itemsize) + 1024


def parts(width: int) -> tuple[int, int]:
    """A head dimension as one power of two, or as two of which it wastes less: 80 = 64 + 16."""
    one = max(16, triton.next_power_of_2(width))
    first = one // 2
    if first < 16 or width <= first:
        return one, 0
    second = max(16, triton.next_power_of_2(width - first))
    return (one, 0) if second >= first else (first, second)


def _plan(
    d: int,
    dv: int,
    itemsize: int,
    queries: int,
    mask: Tensor | TensorSpec | None,
    bias: Tensor | TensorSpec | None,
    aligned: bool,
) -> tuple[dict[str, int], AttentionMemory]:
    """The features by which a configuration is chosen, and its need of shared memory; `queries`: rows of all tiles."""
    pair_bytes = sum(t.dtype.itemsize for t in (mask, bias) if t is not None)
    features = {
        "D": max(16, triton.next_power_of_2(max(d, dv))),
        "bytes": itemsize,
        "Q": queries,
        "aligned": int(aligned),
        "pairs": int(pair_bytes > 0),
    }
    return features, AttentionMemory(sum(parts(d)), sum(parts(dv)), itemsize, pair_bytes)


def splits_of(programs: int, keys: int, device: torch.device) -> int:
    """Into how many parts the keys are divided so that about two programs come to each multiprocessor."""
    wanted = 2 * multiprocessors(device) // max(programs, 1)
    return max(1, min(wanted, keys // KEYS_PER_SPLIT, MAX_SPLITS))


@dataclass(frozen=True)
class Call:
    """One attention over sequences of a batch (or of a packed batch), before blocks are chosen."""

    q: Tensor
    k: Tensor
    v: Tensor
    batch: int
    heads: int
    kv_heads: int
    queries: int
    keys: int
    steps: tuple[tuple[int, ...], ...]
    """Strides of q, k and v: batch (or page), head, token, element."""
    scale: float
    left: int
    right: int
    softcap: float
    mask: Tensor | None = None
    bias: Tensor | None = None
    key_mask: Tensor | None = None
    sinks: Tensor | None = None
    cu_q: Tensor | None = None
    cu_k: Tensor | None = None
    table: Tensor | None = None
    page: int = 1


def run(call: Call, o: Tensor) -> None:
    """Launches the kernel; o `[..., heads, DV]` is contiguous, one row for each query and head."""
    q, k, v, mask, bias = call.q, call.k, call.v, call.mask, call.bias
    d, dv = q.shape[-1], v.shape[-1]
    group = call.heads // call.kv_heads
    packed = group if call.queries * group <= PACKED_ROWS else 1
    aligned = all(rows_aligned(t) for t in (q, k, v))
    align = ALIGNMENT // q.element_size() if aligned else 1
    plan = _plan(d, dv, q.element_size(), call.queries * packed, mask, bias, aligned)
    config = choose("attention", *plan, q.device)
    blocks = triton.cdiv(call.queries * packed, config["BLOCK_M"])
    programs = blocks * (call.heads // packed) * call.batch
    seen = call.keys if call.left < 0 else min(call.keys, call.left + call.queries + max(call.right, 0))
    splits = splits_of(programs, seen, q.device)
    rows = o.numel() // dv
    out, state = o, o
    if splits > 1:
        out = empty((splits, rows, dv), torch.float32, q.device)
        state = empty((2, splits, rows), torch.float32, q.device)
    pairs = (call.batch, call.heads, call.queries, call.keys)
    mask_steps = (0, 0, 0, 0) if mask is None else mask.expand(pairs).stride()
    bias_steps = (0, 0, 0, 0) if bias is None else bias.expand(pairs).stride()
    key_steps = (0, 0) if call.key_mask is None else call.key_mask.expand(call.batch, call.keys).stride()
    natural = bias is not None or v.dtype == torch.float32 or call.scale <= 0.0
    furthest = max(config["BLOCK_N"] * s[2] + 256 * s[3] for s in call.steps)
    constants: dict[str, Any] = {"NATURAL": natural, "PRECISE": v.dtype == torch.float32, "DV": dv}
    with on_device(q):
        launch(
            attention_kernel,
            (programs, splits),
            q,
            k,
            v,
            q if mask is None else mask,
            q if bias is None else bias,
            q if call.key_mask is None else call.key_mask,
            q if call.sinks is None else call.sinks,
            out,
            state,
            q if call.cu_q is None else call.cu_q,
            q if call.cu_k is None else call.cu_k,
            q if call.table is None else call.table,
            call.batch,
            call.heads,
            group,
            call.queries,
            call.keys,
            blocks,
            splits,
            rows,
            *(step for s in call.steps for step in (*(step // align for step in s[:-1]), s[-1])),
            *mask_steps,
            *bias_steps,
            *key_steps,
            0 if call.sinks is None else call.sinks.stride(0),
            0 if call.table is None else call.table.stride(0),
            float(call.scale),
            float(call.softcap),
            call.left,
            call.right,
            MASK=_kind(mask, mask_steps, call.queries),
            BIAS=_kind(bias, bias_steps, call.queries),
            HAS_KEY_MASK=call.key_mask is not None,
            HAS_SINKS=call.sinks is not None and splits == 1,
            HAS_LEFT=call.left >= 0,
            HAS_RIGHT=call.right >= 0,
            HAS_SOFTCAP=call.softcap != 0.0,
            SPLIT=splits > 1,
            VARLEN=call.cu_q is not None,
            PAGED=call.table is not None,
            PAGE=call.page,
            ALIGN=align,
            WIDE=furthest >= 1 << 31,
            R=packed,
            D=d,
            BLOCK_D=parts(d)[0],
            BLOCK_D2=parts(d)[1],
            BLOCK_DV=parts(dv)[0],
            BLOCK_DV2=parts(dv)[1],
            **constants,
            **config.launch,
        )
        if splits > 1:
            launch(
                combine_kernel,
                (rows,),
                out,
                state,
                q if call.sinks is None else call.sinks,
                q if call.cu_q is None else call.cu_q,
                o,
                call.batch,
                call.heads,
                rows,
                splits,
                0 if call.sinks is None else call.sinks.stride(0),
                HAS_SINKS=call.sinks is not None,
                VARLEN=call.cu_q is not None,
                BLOCK_DV=max(16, triton.next_power_of_2(dv)),
                BLOCK_S=triton.next_power_of_2(splits),
                num_warps=4,
                **constants,
            )


def _kind(pairs: Tensor | None, steps: tuple[int, ...], queries: int) -> int:
    """0 without, 1 for the same numbers in every query, 2 for each pair its own."""
    if pairs is None:
        return 0
    return 1 if steps[2] == 0 or queries == 1 else 2


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
    """As the op `attention`."""
    batch, heads, queries, _ = q.shape
    kv_heads, keys, dv = v.shape[1:]
    o = empty((batch, queries, heads, dv), v.dtype, v.device)
    if o.numel() == 0:
        return o
    if k.shape[:3] != v.shape[:3]:
        raise ValueError(f"k {list(k.shape)} and v {list(v.shape)} do not belong together")
    k, v = (t if t.shape[0] == batch else t.expand(batch, -1, -1, -1) for t in (k, v))
    steps = tuple(t.stride() for t in (q, k, v))
    sizes = (batch, heads, kv_heads, queries, keys)
    run(Call(q, k, v, *sizes, steps, scale, left, right, softcap, mask, bias, key_mask, sinks), o)
    return o


def supports(signature: Signature) -> str | None:
    """Why the kernel cannot take the call, or `None`."""
    return (
        refuse_tensors(signature, ("q", "k", "v", "bias", "sinks"), ("mask", "key_mask"))
        or refuse_mixed(signature, ("q", "k", "v"))
        or _refuse_masks(signature)
        or _refuse_sizes(signature)
        or _refuse_memory(signature)
    )


def refuse_memory_of(
    q: TensorSpec, mask: TensorSpec | None, bias: TensorSpec | None, d: int, dv: int, rows: int = MANY
) -> str | None:
    """Why no configuration fits the device, or `None`; `rows` of a tile's heads and queries, if they are known."""
    for aligned in (True, False):
        plan = _plan(d, dv, q.dtype.itemsize, rows, mask, bias, aligned)
        reason = refuse_memory("attention", *plan, q.device)
        if reason is not None:
            return reason
    return None


def _refuse_memory(signature: Signature) -> str | None:
    q, k, v = (signature[name] for name in "qkv")
    queries = MANY if q.shape[2] is None else q.shape[2]
    rows = queries * (q.shape[1] // k.shape[1])
    rows = rows if rows <= PACKED_ROWS else queries
    return refuse_memory_of(q, signature["mask"], signature["bias"], q.shape[3], v.shape[3], rows)


def _refuse_masks(signature: Signature) -> str | None:
    for name in ("mask", "key_mask"):
        if signature[name] is not None and signature[name].dtype != torch.bool:
            return f"{name} is {signature[name].dtype}, not bool"
    for name, most in (("mask", 4), ("bias", 4), ("key_mask", 2)):
        if signature[name] is not None and len(signature[name].shape) > most:
            return f"{name} has {len(signature[name].shape)} dimensions, more than {most}"
    return None


def _refuse_sizes(signature: Signature) -> str | None:
    q, k, v = (signature[name].shape for name in "qkv")
    if not len(q) == len(k) == len(v) == 4:
        return f"q {list(q)}, k {list(k)}, v {list(v)}: four dimensions each are needed"
    heads, kv_heads = q[1], k[1]
    if heads is None or kv_heads is None or heads % kv_heads or v[1] != kv_heads:
        return f"{heads} heads on {kv_heads} key and {v[1]} value heads"
    for name, width in (("q", q[3]), ("k", k[3]), ("v", v[3])):
        if width is None or not 0 < width <= MAX_HEAD_DIM:
            return f"the head dimension of {name} is {width}; this kernel takes 1 to {MAX_HEAD_DIM}"
    if q[3] != k[3]:
        return f"q has head dimension {q[3]}, k {k[3]}"
    return refuse_vector(signature, "sinks", heads)


KERNELS: Final = (Kernel(ops.attention, "triton", attention, supports),)
