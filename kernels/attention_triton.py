# mypy: disallow-untyped-defs=False
"""Flash attention in Triton (Dao, arXiv 2307.08691): a program owns BLOCK_M queries of one head, walks over keys.

Scores never leave the chip: running maximum m, running total and accumulator acc are rescaled whenever m grows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import attention as ops
from .activation_triton import tanh
from .launch import ALIGNMENT, empty, launch, on_device, refuse_mixed, refuse_tensors, refuse_vector, rows_aligned
from .op import Kernel, Signature, TensorSpec
from .tuning import MANY, Config, choose, refuse_memory

MAX_HEAD_DIM: Final = 256


@triton.jit
def _exp(x, PRECISE: tl.constexpr):
    """exp(x) for x <= 0: the hardware's, or with PRECISE Cephes' expf.c, for probabilities that stay in fp32.

    The hardware rounds x * log2(e) first, which costs an ulp for each doubling of |x|.
    """
    if PRECISE:
        x = tl.where(x < -150.0, -150.0, x)  # zero in fp32, and no infinity below
        n = tl.floor(x * 1.4426950408889634 + 0.5)
        r = (x - n * 0.693359375) + n * 2.12194440054690583e-4  # x - n ln 2, in two steps
        p = ((1.9875691500e-4 * r + 1.3981999507e-3) * r + 8.3334519073e-3) * r + 4.1665795894e-2
        p = (p * r + 1.6666665459e-1) * r + 5.0000001201e-1
        y = tl.exp2(n) * (p * r * r + r + 1.0)
    else:
        y = tl.exp(x)
    return y


# Sizes, and the strides that change with them, are not specialised: a new length must not compile a new kernel.
_DYNAMIC: Final = ("Q", "K", "Q_BLOCKS", "left", "right")
_STRIDES: Final = tuple(f"stride_{name}" for name in ("qb", "qh", "qq", "kb", "kh", "kk", "vb", "vh", "vk", "ob"))


@triton.jit(do_not_specialize=[*_DYNAMIC, *_STRIDES])
def _attention_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    mask_ptr,
    bias_ptr,
    key_mask_ptr,
    sink_ptr,
    o_ptr,
    H,
    GROUP,
    Q,
    K,
    Q_BLOCKS,
    stride_qb,
    stride_qh,
    stride_qq,
    stride_qd,
    stride_kb,
    stride_kh,
    stride_kk,
    stride_kd,
    stride_vb,
    stride_vh,
    stride_vk,
    stride_vd,
    stride_ob,
    stride_oh,
    stride_oq,
    stride_mb,
    stride_mh,
    stride_mq,
    stride_mk,
    stride_bb,
    stride_bh,
    stride_bq,
    stride_bk,
    stride_pb,
    stride_pk,
    stride_sh,
    scale,
    softcap,
    left,
    right,
    HAS_MASK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_KEY_MASK: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    PRECISE: tl.constexpr,
    ALIGN: tl.constexpr,  # strides of q, k, v and o are given in units of so many elements
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    pid = tl.program_id(0)
    block = pid % Q_BLOCKS
    head = ((pid // Q_BLOCKS) % H).to(tl.int64)
    batch = (pid // Q_BLOCKS // H).to(tl.int64)
    kv_head = head // GROUP
    query = block * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    row = query.to(tl.int64)
    position = query + (K - Q)  # where each query stands among the keys
    d = tl.arange(0, BLOCK_D)  # [BLOCK_D]
    dv = tl.arange(0, BLOCK_DV)  # [BLOCK_DV]
    is_query = query < Q
    q_base = q_ptr + (batch * stride_qb + head * stride_qh) * ALIGN
    k_base = k_ptr + (batch * stride_kb + kv_head * stride_kh) * ALIGN
    v_base = v_ptr + (batch * stride_vb + kv_head * stride_vh) * ALIGN
    q = tl.load(
        q_base + row[:, None] * stride_qq * ALIGN + d[None, :] * stride_qd,
        mask=is_query[:, None] & (d < D)[None, :],
        other=0.0,
    )  # [BLOCK_M, BLOCK_D]
    first = 0
    stop = K
    if HAS_LEFT:
        first = tl.maximum(block * BLOCK_M + (K - Q) - left, 0) // BLOCK_N * BLOCK_N
    if HAS_RIGHT:
        stop = tl.minimum(block * BLOCK_M + BLOCK_M + (K - Q) + right, K)

    m = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK_M,), dtype=tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_DV), dtype=tl.float32)
    for start in range(first, stop, BLOCK_N):
        key = start + tl.arange(0, BLOCK_N)  # [BLOCK_N]
        col = key.to(tl.int64)
        is_key = key < K
        k = tl.load(
            k_base + col[None, :] * stride_kk * ALIGN + d[:, None] * stride_kd,
            mask=is_key[None, :] & (d < D)[:, None],
            other=0.0,
        )  # [BLOCK_D, BLOCK_N]
        s = tl.dot(q, k, input_precision="ieee") * scale  # [BLOCK_M, BLOCK_N]
        if HAS_SOFTCAP:
            s = softcap * tanh(s / softcap)
        inside = is_query[:, None] & is_key[None, :]  # [BLOCK_M, BLOCK_N]
        if HAS_BIAS:
            bias_ptrs = bias_ptr + batch * stride_bb + head * stride_bh
            bias_ptrs += row[:, None] * stride_bq + col[None, :] * stride_bk
            s += tl.load(bias_ptrs, mask=inside, other=0.0).to(tl.float32)
        visible = is_key[None, :]
        if HAS_LEFT:
            visible = visible & (key[None, :] >= position[:, None] - left)
        if HAS_RIGHT:
            visible = visible & (key[None, :] <= position[:, None] + right)
        if HAS_KEY_MASK:
            real = tl.load(key_mask_ptr + batch * stride_pb + col * stride_pk, mask=is_key, other=0)
            visible = visible & (real != 0)[None, :]
        if HAS_MASK:
            mask_ptrs = mask_ptr + batch * stride_mb + head * stride_mh
            mask_ptrs += row[:, None] * stride_mq + col[None, :] * stride_mk
            visible = visible & (tl.load(mask_ptrs, mask=inside, other=0) != 0)
        s = tl.where(visible, s, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, axis=1))
        m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)  # a row that has seen no key yet
        p = _exp(s - m_safe[:, None], PRECISE)
        alpha = _exp(m - m_safe, PRECISE)
        total = total * alpha + tl.sum(p, axis=1)
        v = tl.load(
            v_base + col[:, None] * stride_vk * ALIGN + dv[None, :] * stride_vd,
            mask=is_key[:, None] & (dv < DV)[None, :],
            other=0.0,
        )  # [BLOCK_N, BLOCK_DV]
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision="ieee")
        m = m_new
    if HAS_SINKS:
        sink = tl.load(sink_ptr + head * stride_sh).to(tl.float32)
        m_new = tl.maximum(m, sink)
        alpha = _exp(m - m_new, PRECISE)
        total = total * alpha + _exp(sink - m_new, PRECISE)
        acc = acc * alpha[:, None]
    o = tl.div_rn(acc, tl.where(total == 0.0, 1.0, total)[:, None])
    tl.store(
        o_ptr + (batch * stride_ob + head * stride_oh + row[:, None] * stride_oq) * ALIGN + dv[None, :],
        o.to(o_ptr.dtype.element_ty),
        mask=is_query[:, None] & (dv < DV)[None, :],
    )


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


def _block(width: int) -> int:
    return max(16, triton.next_power_of_2(width))


def _plan(
    d: int,
    dv: int,
    itemsize: int,
    queries: int,
    mask: Tensor | TensorSpec | None,
    bias: Tensor | TensorSpec | None,
    aligned: bool,
) -> tuple[dict[str, int], AttentionMemory]:
    """The features by which a configuration is chosen, and its need of shared memory."""
    pair_bytes = sum(t.dtype.itemsize for t in (mask, bias) if t is not None)
    features = {"D": _block(max(d, dv)), "bytes": itemsize, "Q": queries, "aligned": int(aligned)}
    return features, AttentionMemory(_block(d), _block(dv), itemsize, pair_bytes)


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
    batch, heads, queries, d = q.shape
    kv_heads, keys, dv = v.shape[1:]
    o = empty((batch, queries, heads, dv), v.dtype, v.device)
    if o.numel() == 0:
        return o
    shape = (batch, heads, queries, keys)
    absent = (0, 0, 0, 0)
    if k.shape[:3] != v.shape[:3]:
        raise ValueError(f"k {list(k.shape)} and v {list(v.shape)} do not belong together")
    k, v = (t if t.shape[0] == batch else t.expand(batch, -1, -1, -1) for t in (k, v))
    aligned = all(rows_aligned(t) for t in (q, k, v))
    align = ALIGNMENT // q.element_size() if aligned else 1
    config = choose("attention", *_plan(d, dv, q.element_size(), queries, mask, bias, aligned), q.device)
    q_blocks = triton.cdiv(queries, config["BLOCK_M"])
    with on_device(q):
        launch(
            _attention_kernel,
            (q_blocks * heads * batch,),
            q,
            k,
            v,
            q if mask is None else mask,
            q if bias is None else bias,
            q if key_mask is None else key_mask,
            q if sinks is None else sinks,
            o,
            heads,
            heads // kv_heads,
            queries,
            keys,
            q_blocks,
            *(step for t in (q, k, v) for step in (*(step // align for step in t.stride()[:-1]), t.stride(-1))),
            o.stride(0) // align,
            o.stride(2) // align,
            o.stride(1) // align,
            *(absent if mask is None else mask.expand(shape).stride()),
            *(absent if bias is None else bias.expand(shape).stride()),
            *((0, 0) if key_mask is None else key_mask.expand(batch, keys).stride()),
            0 if sinks is None else sinks.stride(0),
            scale,
            softcap,
            left,
            right,
            HAS_MASK=mask is not None,
            HAS_BIAS=bias is not None,
            HAS_KEY_MASK=key_mask is not None,
            HAS_SINKS=sinks is not None,
            HAS_LEFT=left >= 0,
            HAS_RIGHT=right >= 0,
            HAS_SOFTCAP=softcap != 0.0,
            PRECISE=v.dtype == torch.float32,
            ALIGN=align,
            D=d,
            DV=dv,
            BLOCK_D=_block(d),
            BLOCK_DV=_block(dv),
            **config.launch,
        )
    return o


def _supports(signature: Signature) -> str | None:
    return (
        refuse_tensors(signature, ("q", "k", "v", "bias", "sinks"), ("mask", "key_mask"))
        or refuse_mixed(signature, ("q", "k", "v"))
        or _refuse_masks(signature)
        or _refuse_sizes(signature)
        or _refuse_memory(signature)
    )


def _refuse_memory(signature: Signature) -> str | None:
    q, v = signature["q"], signature["v"]
    queries = MANY if q.shape[2] is None else q.shape[2]
    for aligned in (True, False):
        plan = _plan(q.shape[3], v.shape[3], q.dtype.itemsize, queries, signature["mask"], signature["bias"], aligned)
        reason = refuse_memory("attention", *plan, q.device)
        if reason is not None:
            return reason
    return None


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


KERNELS: Final = (Kernel(ops.attention, "triton", attention, _supports),)
