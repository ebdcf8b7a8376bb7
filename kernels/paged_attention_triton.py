"""Launches the kernels of `paged_attention`: what shares a tile, and into how many parts the keys are divided."""

from __future__ import annotations

from typing import Any, Final

import torch
import triton
from torch import Tensor

from . import paged_attention as ops
from .attention_triton import MAX_HEAD_DIM, AttentionMemory
from .launch import (
    ALIGNMENT,
    INTERPRETED,
    TL_DTYPES,
    compute_capability,
    empty,
    launch,
    library,
    on_device,
    refuse_mixed,
    refuse_tensors,
    refuse_vector,
    rows_aligned,
)
from .op import Kernel, Signature
from .overlap import overlaps
from .paged_attention_kernel import combine_kernel, paged_kernel, write_kernel
from .paged_decode_triton import MAX_ROWS, MAX_SPLITS, attend, splits_of
from .paged_decode_triton import plan as decode_plan
from .tuning import MANY, choose, refuse_memory

KEYS_PER_SPLIT: Final = 128


def _plan(
    d: int, dv: int, itemsize: int, page_bytes: int, rows: int, aligned: bool, pair_bytes: int = 0
) -> tuple[dict[str, int], AttentionMemory]:
    """The features by which a configuration is chosen, and its need of shared memory.

    `rows`: queries of a sequence times the heads that read one kv head. `pair_bytes`: of a table of biases, what is
    read of it for one pair of query and key.
    """
    blocks = max(16, triton.next_power_of_2(d)), max(16, triton.next_power_of_2(dv))
    features = {"D": max(blocks), "bytes": itemsize, "page_bytes": page_bytes, "rows": rows}
    features["aligned"] = int(aligned)
    return features, AttentionMemory(*blocks, itemsize, pair_bytes)


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
    """As the op `paged_attention`. Raises ValueError for pages whose rows are not contiguous."""
    tokens, heads, d = q.shape
    kv_heads, dv = v.shape[1:]
    sequences = lengths.shape[0]
    o = empty((tokens, heads, dv), v.dtype, v.device)
    if 0 in (o.numel(), max_q, sequences):
        return o.zero_()
    if k_pages.stride(-1) != 1 or v_pages.stride(-1) != 1:
        raise ValueError("the rows of the pages are not contiguous")
    scale_steps = tuple((0, 0, 0) if t is None else t.stride() for t in (k_scale, v_scale))
    if (k_scale is None) != (v_scale is None) or scale_steps[0] != scale_steps[1]:
        raise ValueError("k_scale and v_scale do not belong together")
    q, k, v = (dense(t) for t in (q, k, v))
    sinks, slopes = (None if t is None else dense(t) for t in (sinks, slopes))
    relative = None if relative is None else library(torch.Tensor.contiguous, relative)
    align, page_align = _unit(q, k, v), _unit(k_pages, v_pages)
    group, page = heads // kv_heads, k_pages.shape[1]
    rows = max_q * group
    same: dict[str, Any] = {"HAS_LEFT": left >= 0, "HAS_SINKS": sinks is not None, "HAS_SLOPES": slopes is not None}
    same |= {"PRECISE": v.dtype == torch.float32, "R": group, **overlaps(q)}
    if rows <= MAX_ROWS:
        with on_device(q):
            attend(o, q, k, v, k_pages, v_pages, slots, cu_seqlens_q, lengths, block_table, max_q, sinks, slopes,
                   k_scale, v_scale, scale, left, softcap, relative, align, page_align, same)  # fmt: skip
        return o
    aligned = all(rows_aligned(t) for t in (q, k_pages, v_pages))
    pair_bytes = 0 if relative is None else relative.element_size()
    plan = _plan(d, dv, q.element_size(), k_pages.element_size(), rows, aligned, pair_bytes)
    config = choose("paged_attention", *plan, q.device)
    blocks = triton.cdiv(rows, config["BLOCK_M"])
    programs = sequences * kv_heads * blocks
    keys = block_table.shape[1] * page
    splits = splits_of(programs, keys if left < 0 else min(keys, left + max_q), KEYS_PER_SPLIT, q.device)
    part, state = o, o
    if splits > 1:
        part = empty((tokens, heads, splits, dv), torch.float32, q.device)
        state = empty((2, tokens, heads, splits), torch.float32, q.device)
    of_pages = (step // page_align for t in (k_pages, v_pages) for step in t.stride()[:3])
    into = (*of_pages, *scale_steps[0])
    shape: dict[str, Any] = {"PAGE": page, "D": d, "DV": dv, "ALIGN": align, "PAGE_ALIGN": page_align}
    shape |= {"SCALED": k_scale is not None}
    shape |= {"BLOCK_D": max(16, triton.next_power_of_2(d)), "BLOCK_DV": max(16, triton.next_power_of_2(dv))}
    with on_device(q):
        write_pages(k, v, k_pages, v_pages, slots, k_scale, v_scale)
        launch(
            paged_kernel,
            (programs, splits),
            q,
            k_pages,
            v_pages,
            cu_seqlens_q,
            lengths,
            block_table,
            q if sinks is None else sinks,
            q if slopes is None else slopes,
            q if relative is None else relative,
            q if k_scale is None else k_scale,
            q if v_scale is None else v_scale,
            o,
            part,
            state,
            tokens,
            sequences,
            blocks,
            splits,
            kv_heads,
            q.stride(0) // align,
            q.stride(1) // align,
            *into,
            block_table.stride(0),
            float(scale),
            float(softcap),
            left,
            HAS_SOFTCAP=softcap != 0.0,
            RELATIVE=0 if relative is None else relative.shape[1],
            SPLIT=splits > 1,
            STAGES=config.num_stages,
            **shape,
            **same,
            **config.launch,
        )
        if splits > 1:
            launch(
                combine_kernel,
                (sequences * heads, max_q),
                part,
                state,
                cu_seqlens_q,
                lengths,
                q if sinks is None else sinks,
                q if slopes is None else slopes,
                o,
                tokens,
                sequences,
                splits,
                heads,
                left,
                DV=dv,
                BLOCK_DV=shape["BLOCK_DV"],
                BLOCK_M=config["BLOCK_M"],
                BLOCK_N=config["BLOCK_N"],
                BLOCK_S=8 if splits <= 8 else MAX_SPLITS,  # not one for each power of two: prompts come in all lengths
                num_warps=4,
                **same,
            )
    return o


def write_pages(
    k: Tensor,
    v: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    slots: Tensor,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> None:
    """Rows of k and v into pages, as `write_rows` does; steps of k_scale and v_scale are equal."""
    (tokens, kv_heads, d), dv = k.shape, v.shape[-1]
    align, page_align = _unit(k, v), _unit(k_pages, v_pages)
    block_t = 4 if tokens < 512 else 16
    launch(
        write_kernel,
        (triton.cdiv(tokens, block_t), kv_heads),
        k,
        v,
        k_pages,
        v_pages,
        slots,
        k if k_scale is None else k_scale,
        k if v_scale is None else v_scale,
        tokens,
        *(t.stride(i) // align for t in (k, v) for i in (0, 1)),
        *(step // page_align for t in (k_pages, v_pages) for step in t.stride()[:3]),
        *((0, 0, 0) if k_scale is None else k_scale.stride()),
        LARGEST=127.0 if k_pages.dtype == torch.int8 else 448.0,
        INTEGER=k_pages.dtype == torch.int8,
        BLOCK_T=block_t,
        PAGE=k_pages.shape[1],
        D=d,
        DV=dv,
        BLOCK_D=max(16, triton.next_power_of_2(d)),
        BLOCK_DV=max(16, triton.next_power_of_2(dv)),
        ALIGN=align,
        PAGE_ALIGN=page_align,
        SCALED=k_scale is not None,
        num_warps=4,
        **overlaps(k),
    )


def dense(x: Tensor) -> Tensor:
    """With contiguous rows: nearly always x itself."""
    return x if x.stride(-1) == 1 else library(torch.Tensor.contiguous, x)


def _unit(*tensors: Tensor) -> int:
    """How many elements divide all steps from token to token and from head to head, and where rows begin."""
    elements = ALIGNMENT // tensors[0].element_size()
    steps = (s for t in tensors for s in (*t.stride()[:-1], t.data_ptr() // t.element_size()))
    return elements if all(s % elements == 0 for s in steps) else 1


def _supports(signature: Signature) -> str | None:
    integers = ("slots", "cu_seqlens_q", "lengths", "block_table")
    others = (*integers, "k_pages", "v_pages", "k_scale", "v_scale")
    return (
        refuse_tensors(signature, ("q", "k", "v", "sinks", "slopes", "relative"), others)
        or refuse_mixed(signature, ("q", "k", "v"))
        or _refuse_indices(signature, integers)
        or _refuse_sizes(signature)
        or _refuse_pages(signature)
        or _refuse_memory(signature)
    )


def _refuse_indices(signature: Signature, names: tuple[str, ...]) -> str | None:
    for name, rank in zip(names, (1, 1, 1, 2), strict=True):
        spec, wanted = signature[name], torch.int64 if name == "slots" else torch.int32
        if spec.dtype != wanted or len(spec.shape) != rank:
            return f"{name} is {spec.dtype} with {len(spec.shape)} dimensions, not {wanted} with {rank}"
    return None


def _refuse_sizes(signature: Signature) -> str | None:
    q, k, v, k_pages, v_pages = (signature[name].shape for name in ("q", "k", "v", "k_pages", "v_pages"))
    if [len(s) for s in (q, k, v, k_pages, v_pages)] != [3, 3, 3, 4, 4]:
        return f"q {list(q)}, k {list(k)}, v {list(v)}, pages {list(k_pages)}, {list(v_pages)}: 3 and 4 dimensions"
    if None in (*q[1:], *k[1:], *v[1:], *k_pages[2:], *v_pages[2:]):
        return "heads or their dimensions are not known"
    if k_pages[1] != v_pages[1] or k_pages[2:] != k[1:] or v_pages[2:] != v[1:]:
        return f"k {list(k)} and v {list(v)} do not fit pages {list(k_pages)} and {list(v_pages)}"
    if q[1] % k[1] or k[1] != v[1] or q[2] != k[2]:
        return f"{q[1]} heads of {q[2]} on {k[1]} key heads of {k[2]} and {v[1]} value heads"
    for width in (q[2], v[2]):
        if not 0 < width <= MAX_HEAD_DIM:
            return f"a head dimension is {width}; this kernel takes 1 to {MAX_HEAD_DIM}"
    relative = signature["relative"]
    if relative is not None and (len(relative.shape) != 2 or relative.shape[0] != q[1] or not relative.shape[1]):
        return f"relative is {list(relative.shape)} for {q[1]} heads"
    return refuse_vector(signature, "sinks", q[1]) or refuse_vector(signature, "slopes", q[1])


def _refuse_pages(signature: Signature) -> str | None:
    pages, scales = [signature[n] for n in ("k_pages", "v_pages")], [signature[n] for n in ("k_scale", "v_scale")]
    if pages[0].dtype != pages[1].dtype:
        return f"pages of keys are {pages[0].dtype}, of values {pages[1].dtype}"
    if pages[0].dtype not in ops.PAGE_DTYPES:
        known = pages[0].dtype in TL_DTYPES and not (INTERPRETED and pages[0].dtype == torch.bfloat16)
        return None if known and scales == [None, None] else f"pages are {pages[0].dtype}"
    if any(s is None or s.dtype != torch.float32 or len(s.shape) != 3 for s in scales):
        return f"pages of {pages[0].dtype} need scales of float32 with three dimensions"
    if pages[0].dtype == torch.float8_e4m3fn and INTERPRETED:
        return "pages are float8_e4m3fn, to which Triton's interpreter truncates instead of rounding"
    if pages[0].dtype == torch.float8_e4m3fn and compute_capability(pages[0].device) < (8, 9):
        return "float8_e4m3fn needs compute capability 8.9"
    return None


def _refuse_memory(signature: Signature) -> str | None:
    q, k_pages, v, relative = (signature[name] for name in ("q", "k_pages", "v", "relative"))
    pair_bytes = 0 if relative is None else relative.dtype.itemsize
    of = q.shape[2], v.shape[2], q.dtype.itemsize, k_pages.dtype.itemsize
    for aligned in (True, False):
        reason = refuse_memory("paged_attention", *_plan(*of, MANY, aligned, pair_bytes), q.device)
        if reason is not None:
            return reason
    return refuse_memory("paged_decode", *decode_plan(*of, MAX_ROWS, 1, pair_bytes), q.device)


KERNELS: Final = (Kernel(ops.paged_attention, "triton", paged_attention, _supports),)
