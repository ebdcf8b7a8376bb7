"""Attention on pages: the reference against `attention` on contiguous keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from regraft.kernels.attention import attention
from regraft.kernels.paged_attention import paged_attention

NAN = float("nan")


@dataclass(frozen=True)
class Batch:
    """Sequences with their keys in order, and the same as arguments of the op."""

    k: list[Tensor]
    v: list[Tensor]
    arguments: dict[str, Any]


def batch(
    queries: list[int],
    keys: list[int],
    *,
    heads: int = 4,
    kv_heads: int = 2,
    width: int = 16,
    value_width: int = 16,
    page: int = 16,
    left: int = -1,
    padding: int = 0,
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
    generator: int = 0,
) -> Batch:
    """Pages in no order; NaN wherever no key of a sequence lies, and in the rows that the op is to write.

    `padding`: rows of q, k and v behind the last sequence, of slot -1. Entries of pages that no query sees are -1.
    """
    torch.manual_seed(generator)
    tokens = sum(queries) + padding
    q = torch.randn(tokens, heads, width)
    k, v = ([torch.randn(n, kv_heads, w) for n in keys] for w in (width, value_width))
    counts = [-(-n // page) for n in keys]
    order = torch.randperm(sum(counts) + 2).tolist()
    k_pages = torch.full((sum(counts) + 2, page, kv_heads, width), NAN)
    v_pages = torch.full((sum(counts) + 2, page, kv_heads, value_width), NAN)
    table = torch.full((len(keys), max(1, *counts) + 1), -1, dtype=torch.int32)
    slots = []
    for s, (new, length) in enumerate(zip(queries, keys, strict=True)):
        first = 0 if left < 0 else max(0, length - new - left) // page * page
        for j in range(length):
            if j % page == 0:
                number = order.pop()
            if j >= first:
                table[s, j // page] = number
            if j < length - new:
                k_pages[number, j % page], v_pages[number, j % page] = k[s][j], v[s][j]
            else:
                slots.append(number * page + j % page)
    slots += [-1] * padding
    rest = [torch.full((padding, kv_heads, w), NAN) for w in (width, value_width)]
    news = [torch.cat([*(t[len(t) - n :] for t, n in zip(x, queries, strict=True)), r]) for x, r in zip((k, v), rest)]
    floats = {"q": q, "k": news[0], "v": news[1], "k_pages": k_pages, "v_pages": v_pages}
    integers = {"slots": torch.tensor(slots), "block_table": table}
    integers["cu_seqlens_q"] = torch.tensor([0, *queries]).cumsum(0).int()
    integers["lengths"] = torch.tensor(keys).int()
    arguments: dict[str, Any] = {name: t.to(device, dtype) for name, t in floats.items()}
    arguments |= {name: t.to(device) for name, t in integers.items()}
    arguments |= {"max_q": max(queries), "scale": width**-0.5, "left": left}
    k, v = ([t.to(device, dtype) for t in x] for x in (k, v))
    return Batch(k, v, arguments)


def cloned(arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments with pages and scales of their own."""
    own = ("k_pages", "v_pages", "k_scale", "v_scale")
    return {n: t.clone() if n in own and t is not None else t for n, t in arguments.items()}


OPTIONS: dict[str, dict[str, Any]] = {
    "causal": {},
    "window": {"left": 20},
    "sinks": {"sinks": torch.tensor([0.5, 2.0, -1.0, 0.0])},
    "slopes": {"slopes": torch.tensor([0.5, 0.25, 0.125, 0.0625])},
    "softcap": {"softcap": 1.5},
}

STEPS = {
    "decode": ([1, 1, 1], [70, 1, 16]),
    "chunks": ([5, 33, 1, 20], [5, 50, 33, 61]),
    "runs": ([3, 1, 4], [40, 17, 4]),
    "empty": ([1, 0, 1], [30, 0, 5]),
}


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("step", STEPS)
def test_reference_is_attention_on_contiguous_keys(step: str, option: str) -> None:
    queries, keys = STEPS[step]
    named = dict(OPTIONS[option])
    made = batch(queries, keys, left=named.get("left", -1), value_width=8, padding=2)
    y = paged_attention(**{**made.arguments, **named})
    slopes = named.pop("slopes", None)
    row = 0
    for s, (new, length) in enumerate(zip(queries, keys, strict=True)):
        bias = None if slopes is None else slopes[:, None, None] * torch.arange(length)
        heads_first = (t.transpose(0, 1)[None] for t in (made.arguments["q"][row : row + new], made.k[s], made.v[s]))
        if new:
            expected = attention(*heads_first, bias=bias, scale=0.25, right=0, **named)[0]
            assert torch.allclose(y[row : row + new], expected, rtol=1e-12, atol=1e-12)
        row += new
    assert bool((y[row:] == 0).all())


def test_reference_writes_rows_to_their_slots() -> None:
    made = batch([3, 1], [18, 4], padding=2)
    before = cloned(made.arguments)
    paged_attention(**made.arguments)
    for name in ("k", "v"):
        expected = before[f"{name}_pages"].flatten(0, 1)
        expected[before["slots"][:4]] = before[name][:4]
        assert torch.equal(made.arguments[f"{name}_pages"].flatten(0, 1).nan_to_num(), expected.nan_to_num())


@pytest.mark.parametrize("pages", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_reference_divides_by_a_scale(pages: torch.dtype) -> None:
    """What is read is what was written to half a step: of the scale for int8, of three bits of mantissa for fp8."""
    made = batch([40], [40], dtype=torch.float32)
    arguments = dict(made.arguments)
    shape = arguments["k_pages"].shape[:3]
    for name in ("k", "v"):
        arguments[f"{name}_pages"] = torch.zeros(arguments[f"{name}_pages"].shape, dtype=pages)
        arguments[f"{name}_scale"] = torch.full(shape, NAN)
    arguments["k"][3, 1] = 0.0
    y = paged_attention(**arguments)
    assert bool(y.isfinite().all())
    at = arguments["slots"]
    for name in ("k", "v"):
        scale = arguments[f"{name}_scale"].flatten(0, 1)[at][..., None]
        read = arguments[f"{name}_pages"].float().flatten(0, 1)[at] * scale
        x = arguments[name]
        step = 0.5 * scale if pages == torch.int8 else x.abs() / 16 + scale * 2.0**-10
        assert bool(((read - x).abs() <= step * 1.001).all())
