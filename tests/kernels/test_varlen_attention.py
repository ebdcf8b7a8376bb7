"""Attention over packed sequences: the reference against `attention` of each, the kernel against the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernel_checks import check_kernel, in_dtypes, on_devices, refusal
from torch import Tensor

from regraft.kernels.attention import attention
from regraft.kernels.table import PROVIDERS
from regraft.kernels.varlen_attention import varlen_attention

QUERIES, KEYS = [5, 0, 37, 1, 20], [5, 3, 40, 33, 12]


def ends(lengths: list[int], device: str = "cpu") -> Tensor:
    """`[S + 1]` int32: where each sequence begins, and the end of the last."""
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32).to(device)


def packed(width: int, value_width: int, dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    q = torch.randn(sum(QUERIES), 4, width, device=device)
    kv = torch.randn(sum(KEYS), 2, width + value_width, device=device)
    return tuple(t.to(dtype) for t in (q, *kv.split((width, value_width), dim=-1)))  # type: ignore[return-value]


def in_pages(k: Tensor, page: int, spare: int = 2) -> tuple[Tensor, Tensor]:
    """The rows of every sequence in pages that lie in no order, and the table that finds them."""
    counts = [-(-length // page) for length in KEYS]
    order = torch.randperm(sum(counts) + spare)[: sum(counts)]
    pages = torch.full((sum(counts) + spare, page, *k.shape[1:]), float("nan"), dtype=k.dtype, device=k.device)
    table = torch.zeros(len(KEYS), max(counts), dtype=torch.int32, device=k.device)
    row, used = 0, 0
    for s, length in enumerate(KEYS):
        for i in range(counts[s]):
            number = int(order[used])
            used += 1
            here = min(page, length - i * page)
            pages[number, :here] = k[row : row + here]
            table[s, i] = number
            row += here
    return pages, table


OPTIONS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "causal": {"right": 0},
    "window": {"left": 6, "right": 0},
    "softcap": {"right": 0, "softcap": 1.5},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_reference_is_attention_of_each_sequence(name: str) -> None:
    q, k, v = packed(8, 6, torch.float64)
    cu_q, cu_k = ends(QUERIES), ends(KEYS)
    sinks = torch.randn(4, dtype=torch.float64)
    y = varlen_attention(q, k, v, cu_q, cu_k, 37, 40, sinks=sinks, scale=0.3, **OPTIONS[name])
    for s in range(len(QUERIES)):
        own, of_k = slice(int(cu_q[s]), int(cu_q[s + 1])), slice(int(cu_k[s]), int(cu_k[s + 1]))
        heads_first = (t.transpose(0, 1)[None] for t in (q[own], k[of_k], v[of_k]))
        expected = attention(*heads_first, sinks=sinks, scale=0.3, **OPTIONS[name])[0]
        assert torch.allclose(y[own], expected, rtol=1e-12, atol=1e-12)


def test_pages_hold_the_same_keys() -> None:
    q, k, v = packed(8, 6, torch.float64)
    (k_pages, table), _ = in_pages(k, 4), None
    v_pages = torch.zeros(k_pages.shape[0], 4, 2, 6, dtype=v.dtype)
    row = 0
    for s, length in enumerate(KEYS):
        for j in range(length):
            v_pages[table[s, j // 4], j % 4] = v[row]
            row += 1
    cu = (ends(QUERIES), ends(KEYS))
    y = varlen_attention(q, k_pages, v_pages, *cu, 37, 40, table, scale=0.3, right=0)
    assert torch.allclose(y, varlen_attention(q, k, v, *cu, 37, 40, scale=0.3, right=0), rtol=1e-12, atol=1e-12)


@on_devices
@in_dtypes
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize(("width", "value_width"), [(16, 16), (40, 24)])
def test_triton(name: str, width: int, value_width: int, dtype: torch.dtype, device: str) -> None:
    q, k, v = packed(width, value_width, dtype, device)
    sinks = torch.randn(4, device=device) if name == "window" else None
    cu = (ends(QUERIES, device), ends(KEYS, device))
    check_kernel(varlen_attention, q, k, v, *cu, 37, 40, sinks=sinks, scale=0.25, **OPTIONS[name])


@on_devices
@in_dtypes
@pytest.mark.parametrize("page", [16, 12, 64])
def test_triton_pages(page: int, dtype: torch.dtype, device: str) -> None:
    """Pages smaller than a tile, of a size that divides none, and larger; what is not used in them is NaN."""
    q, k, v = packed(32, 32, dtype, device)
    kv, table = in_pages(torch.cat((k, v), dim=-1), page)
    k_pages, v_pages = kv.split((32, 32), dim=-1)
    cu = (ends(QUERIES, device), ends(KEYS, device))
    named = {"block_table": table, "scale": 0.2, "left": 20, "right": 0}
    check_kernel(varlen_attention, q, k_pages.nan_to_num(), v_pages.nan_to_num(), *cu, 37, 40, **named)
    finite = varlen_attention.reference(q, k_pages, v_pages, *cu, 37, 40, **named)
    assert bool(finite.isfinite().all())
    check_kernel(varlen_attention, q, k_pages, v_pages, *cu, 37, 40, **named)


@on_devices
@in_dtypes
def test_triton_splits_the_keys_of_a_decode_step(dtype: torch.dtype, device: str) -> None:
    """One query each over long keys: few programs, so the keys are divided among several."""
    lengths = [900, 257, 1]
    q = torch.randn(3, 4, 16, device=device).to(dtype)
    k, v = torch.randn(2, sum(lengths), 1, 16, device=device).to(dtype)
    cu = (ends([1, 1, 1], device), ends(lengths, device))
    sinks = torch.randn(4, device=device)
    check_kernel(varlen_attention, q, k, v, *cu, 1, 900, sinks=sinks, scale=0.25, right=0, ulps=8)


@on_devices
@in_dtypes
@pytest.mark.parametrize("queries", [QUERIES, [1, 1, 1, 1, 1]], ids=["prefill", "decode"])
def test_triton_keeps_to_the_sequences(queries: list[int], dtype: torch.dtype, device: str) -> None:
    """Rows behind the last sequence give zeros, with their keys divided among programs or not."""
    rows = sum(queries)
    q = torch.randn(rows + 40, 4, 24, device=device).to(dtype)
    k, v = torch.randn(2, sum(KEYS) + 9, 2, 24, device=device).to(dtype)
    q[rows:], k[sum(KEYS) :], v[sum(KEYS) :] = float("nan"), float("nan"), float("nan")
    cu = (ends(queries, device), ends(KEYS, device))
    sinks = torch.randn(4, device=device)
    check_kernel(varlen_attention, q, k, v, *cu, max(queries), 400, sinks=sinks, scale=0.25, right=0, ulps=8)
    kernel = next(kernel for kernel in PROVIDERS["varlen_attention"] if kernel.provider == "triton")
    assert not bool(kernel.run(q, k, v, *cu, max(queries), 400, scale=0.25)[rows:].any())
    nothing = torch.zeros(1, dtype=torch.int32, device=device)
    assert not bool(kernel.run(q, k, v, nothing, nothing, 5, 5, scale=0.25).any())


@on_devices
def test_triton_refuses(device: str) -> None:
    q, k, v = packed(16, 16, torch.float32, device)
    cu = (ends(QUERIES, device), ends(KEYS, device))
    assert "not int32" in refusal(varlen_attention, q, k, v, cu[0].long(), cu[1], 37, 40)
    assert "heads" in refusal(varlen_attention, q[:, :3], k, v, *cu, 37, 40)
    assert "dimensions" in refusal(varlen_attention, q, k[None], v[None], *cu, 37, 40)
