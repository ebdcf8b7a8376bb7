"""Launches the kernel for attention of few queries on pages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import torch
import triton
from torch import Tensor

from .attention_triton import AttentionMemory
from .config import Config
from .counters import counters
from .launch import empty, launch, library, multiprocessors
from .paged_decode_kernel import decode_kernel
from .tuning import choose

MAX_ROWS: Final = 32
"""Queries of a sequence times heads that read one kv head, at most: they lie in one tile."""
MAX_SPLITS: Final = 64


@dataclass(frozen=True)
class DecodeMemory:
    """Shared memory of one program: as attention's, and the new keys or values."""

    attention: AttentionMemory
    rows: int
    news: int

    def __call__(self, config: Config) -> int:
        blocks = Config((("BLOCK_M", self.rows), *config.blocks), config.num_warps, config.num_stages)
        new = max(self.attention.block_d, self.attention.block_dv) * self.attention.itemsize
        return self.attention(blocks) + self.news * new


def plan(
    d: int, dv: int, itemsize: int, page_bytes: int, rows: int, programs: int, pair_bytes: int = 0
) -> tuple[dict[str, int], DecodeMemory]:
    """The features by which a configuration is chosen, and its need of shared memory.

    `rows`: queries of a sequence times the heads that read one kv head. `programs`: sequences times kv heads.
    """
    blocks = max(16, triton.next_power_of_2(d)), max(16, triton.next_power_of_2(dv))
    block_m = max(16, triton.next_power_of_2(rows))
    features = {"D": max(blocks), "bytes": itemsize, "page_bytes": page_bytes, "rows": rows, "programs": programs}
    return features, DecodeMemory(AttentionMemory(*blocks, itemsize, pair_bytes), block_m, block_m)


def splits_of(programs: int, keys: int, least: int, device: torch.device, resident: int = 2) -> int:
    """Into how many parts of at least `least` the keys may be divided, at most `keys` of a sequence.

    `resident`: programs that a multiprocessor is to run at a time.
    """
    wanted = resident * multiprocessors(device) // max(programs, 1)
    return max(1, min(wanted, keys // least, MAX_SPLITS))


def attend(
    o: Tensor,
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
    sinks: Tensor | None,
    slopes: Tensor | None,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    scale: float,
    left: int,
    softcap: float,
    relative: Tensor | None,
    align: int,
    page_align: int,
    same: dict[str, Any],
) -> None:
    """Writes k and v into pages and the result into o; see `paged_attention`, whose arguments are dense here.

    `align` and `page_align`: elements that divide the steps of q, k, v and of pages. `same`: what all kernels are told.
    """
    (tokens, heads, d), (kv_heads, dv) = q.shape, v.shape[1:]
    sequences, page, group = lengths.shape[0], k_pages.shape[1], heads // kv_heads
    rows, programs = max_q * group, sequences * kv_heads
    pair_bytes = 0 if relative is None else relative.element_size()
    config = choose(
        "paged_decode", *plan(d, dv, q.element_size(), k_pages.element_size(), rows, programs, pair_bytes), q.device
    )
    keys = block_table.shape[1] * page
    keys = keys if left < 0 else min(keys, left + max_q)
    splits = splits_of(programs, keys, config["LEAST"], q.device, config["RESIDENT"])
    part, state, ready = o, o, o
    if splits > 1:
        part = empty((tokens, heads, splits, dv), torch.float32, q.device)
        state = empty((2, tokens, heads, splits), torch.float32, q.device)
        ready = library(counters, programs, q.device)
    largest = 0.0
    if k_scale is not None:
        largest = 127.0 if k_pages.dtype == torch.int8 else 448.0
    launch(
        decode_kernel,
        (programs, splits),
        q,
        k,
        v,
        k_pages,
        v_pages,
        slots,
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
        ready,
        tokens,
        sequences,
        splits,
        kv_heads,
        *(t.stride(i) // align for t in (q, k, v) for i in (0, 1)),
        *(step // page_align for t in (k_pages, v_pages) for step in t.stride()[:3]),
        *((0, 0, 0) if k_scale is None else k_scale.stride()),
        block_table.stride(0),
        float(scale),
        float(softcap),
        left,
        HAS_SOFTCAP=softcap != 0.0,
        RELATIVE=0 if relative is None else relative.shape[1],
        LARGEST=largest,
        SPLIT=splits > 1,
        ALIGN=align,
        PAGE_ALIGN=page_align,
        WIDE=any(t.shape[0] * t.stride(0) // page_align >= 2**31 for t in (k_pages, v_pages)),
        PAGE=page,
        D=d,
        DV=dv,
        BLOCK_D=max(16, triton.next_power_of_2(d)),
        BLOCK_DV=max(16, triton.next_power_of_2(dv)),
        ROWS=triton.next_power_of_2(rows),
        ONE=max_q == 1,
        NEWS=max(16, triton.next_power_of_2(rows if max_q == 1 else max_q)),
        BLOCK_M=max(16, triton.next_power_of_2(rows)),
        STAGES=config.num_stages,
        **same,
        **{name: value for name, value in config.launch.items() if name != "RESIDENT"},
    )
