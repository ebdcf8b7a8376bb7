"""Attention: the definition in fp64, PyTorch's and transformers' own, and the Triton kernel with every option."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from kernel_checks import check_kernel, in_dtypes, on_devices, refusal
from torch import Tensor
from torch.nn import functional as F

from regraft.kernels import attention_triton
from regraft.kernels.attention import attention, visible_pairs
from regraft.kernels.table import select


def qkv(
    batch: int,
    heads: int,
    kv_heads: int,
    queries: int,
    keys: int,
    width: int,
    value_width: int,
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
) -> tuple[Tensor, Tensor, Tensor]:
    """Heads first, as views of tensors that have them last but one, like the slices of a fused projection."""
    q = torch.randn(batch, queries, heads, width, device=device)
    kv = torch.randn(batch, keys, kv_heads, width + value_width, device=device)
    k, v = kv.split((width, value_width), dim=-1)
    return tuple(t.to(dtype).transpose(1, 2) for t in (q, k, v))  # type: ignore[return-value]


def by_definition(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    """Row by row, without softmax's trick, in fp64."""
    mask, bias, key_mask, sinks = (options.get(n) for n in ("mask", "bias", "key_mask", "sinks"))
    scale, left, right, cap = (
        options["scale"],
        options.get("left", -1),
        options.get("right", -1),
        options.get("softcap"),
    )
    batch, heads, queries, _ = q.shape
    keys, group = k.shape[2], heads // k.shape[1]
    out = torch.zeros(batch, queries, heads, v.shape[3], dtype=torch.float64)
    shape = (batch, heads, queries, keys)
    for b in range(batch):
        for h in range(heads):
            for i in range(queries):
                position = i + keys - queries
                total = math.exp(sinks[h]) if sinks is not None else 0.0
                for j in range(keys):
                    s = float(q[b, h, i].dot(k[b, h // group, j])) * scale
                    s = cap * math.tanh(s / cap) if cap else s
                    s += float(bias.expand(shape)[b, h, i, j]) if bias is not None else 0.0
                    hidden = (left >= 0 and j < position - left) or (right >= 0 and j > position + right)
                    hidden = hidden or (mask is not None and not mask.expand(shape)[b, h, i, j])
                    hidden = hidden or (key_mask is not None and not key_mask[b, j])
                    if not hidden:
                        total += math.exp(s)
                        out[b, i, h] += math.exp(s) * v[b, h // group, j]
                out[b, i, h] /= total or 1.0
    return out


def padding(keys: int, device: str = "cpu") -> Tensor:
    """`[2, K]`: two keys missing on the left in one row, three on the right in the other."""
    index = torch.arange(keys, device=device)
    return torch.stack((index >= 2, index < keys - 3))


def options(name: str, heads: int, queries: int, keys: int, device: str = "cpu") -> dict[str, Any]:
    """The keyword arguments by name, for a batch of two."""
    bias = torch.randn(1, heads, queries, keys, device=device)
    mask = torch.rand(2, 1, queries, keys, device=device) > 0.4
    mask[1, 0, 0] = False  # a row without any key
    return {
        "nothing": {},
        "causal": {"right": 0},
        "window": {"left": 3, "right": 0},
        "two-sided window": {"left": 2, "right": 1},
        "left only": {"left": 2},
        "softcap": {"right": 0, "softcap": 1.5},
        "sinks": {"right": 0, "sinks": torch.randn(heads, device=device)},
        "padding": {"right": 0, "key_mask": padding(keys, device)},
        "mask": {"mask": mask},
        "bias": {"bias": bias},
        "ALiBi": {"right": 0, "bias": torch.randn(heads, 1, keys, device=device)},
        "everything": {
            "left": 5,
            "right": 0,
            "softcap": 2.0,
            "sinks": torch.randn(heads, device=device),
            "key_mask": padding(keys, device),
            "mask": mask,
            "bias": bias,
        },
    }[name]


OPTIONS = [
    "nothing",
    "causal",
    "window",
    "two-sided window",
    "left only",
    "softcap",
    "sinks",
    "padding",
    "mask",
    "bias",
    "ALiBi",
    "everything",
]


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize(("queries", "keys"), [(5, 5), (3, 7), (6, 4)])
def test_reference_is_the_definition(name: str, queries: int, keys: int) -> None:
    q, k, v = qkv(2, 4, 2, queries, keys, 8, 6)
    named = {n: t.double() if n in ("bias", "sinks") else t for n, t in options(name, 4, queries, keys).items()}
    y = attention(q, k, v, scale=0.3, **named)
    assert y.is_contiguous()
    assert y.dtype == torch.float64
    assert torch.allclose(y, by_definition(q, k, v, scale=0.3, **named), rtol=1e-12, atol=1e-12)


def test_reference_is_sdpa() -> None:
    q, k, v = qkv(2, 4, 4, 6, 6, 8, 8)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3).transpose(1, 2)
    assert torch.allclose(attention(q, k, v, scale=0.3, right=0), expected, rtol=1e-12, atol=1e-12)


def test_reference_is_eager_attention_with_sinks() -> None:
    from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward

    module = torch.nn.Module()
    module.num_key_value_groups, module.training = 2, False
    module.sinks = torch.nn.Parameter(torch.randn(4))
    q, k, v = qkv(2, 4, 2, 5, 5, 8, 8, torch.float32)
    causal = torch.full((5, 5), torch.finfo(torch.float32).min).triu(1)[None, None]
    with torch.no_grad():
        expected, _ = eager_attention_forward(module, q, k, v, causal, scaling=0.3)
        y = attention(q, k, v, sinks=module.sinks, scale=0.3, right=0)
    assert torch.allclose(y, expected, rtol=1e-5, atol=1e-6)


def test_rows_without_keys_are_zero_and_nan_is_kept() -> None:
    q, k, v = qkv(1, 2, 2, 4, 4, 8, 8, torch.float32)
    mask = torch.ones(1, 1, 4, 4, dtype=torch.bool)
    mask[0, 0, 1] = False
    y = attention(q, k, v, mask, scale=0.3)
    assert bool((y[0, 1] == 0).all())
    assert bool((y[0, 0] != 0).all())
    q[0, 0, 2] = math.nan
    y = attention(q, k, v, mask, scale=0.3)
    assert bool(y[0, 2, 0].isnan().all())
    assert int(y.isnan().sum()) == 8
    lowest = torch.full((1, 1, 4, 4), torch.finfo(torch.float32).min)  # as an additive mask that hides all
    assert bool(attention(k, k, v, bias=lowest, scale=0.3).isfinite().all())
    assert bool((attention(k, k, v, bias=lowest * math.inf, scale=0.3) == 0).all())


def test_visible_pairs_counts_the_window() -> None:
    for queries, keys in [(1, 9), (5, 5), (4, 9)]:
        position = torch.arange(queries)[:, None] + keys - queries
        key = torch.arange(keys)[None]
        for left, right in [(-1, -1), (-1, 0), (-1, 3), (2, -1), (0, -1), (3, 0), (1, 2), (20, 0), (-1, 20)]:
            seen = torch.ones(queries, keys, dtype=torch.bool)
            if left >= 0:
                seen &= key >= position - left
            if right >= 0:
                seen &= key <= position + right
            assert visible_pairs(queries, keys, left, right) == int(seen.sum()), (queries, keys, left, right)


@on_devices
@in_dtypes
@pytest.mark.parametrize("name", OPTIONS)
def test_triton_options(name: str, dtype: torch.dtype, device: str) -> None:
    for queries, keys in [(37, 37), (5, 40), (40, 21)]:
        q, k, v = qkv(2, 4, 2, queries, keys, 24, 24, dtype, device)
        check_kernel(attention, q, k, v, scale=0.2, **options(name, 4, queries, keys, device))


@on_devices
@in_dtypes
@pytest.mark.parametrize(
    ("width", "value_width"),
    [
        (8, 8),
        (16, 16),
        (32, 32),
        (64, 64),
        (72, 72),
        (80, 80),
        (96, 96),
        (128, 128),
        (192, 128),
        (40, 40),
        (40, 17),
        (256, 256),
    ],
)
def test_triton_head_dims(width: int, value_width: int, dtype: torch.dtype, device: str) -> None:
    q, k, v = qkv(1, 2, 1, 35, 35, width, value_width, dtype, device)
    check_kernel(attention, q, k, v, scale=width**-0.5, right=0)


@on_devices
@in_dtypes
@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (6, 2), (5, 1)])
def test_triton_groups(heads: int, kv_heads: int, dtype: torch.dtype, device: str) -> None:
    q, k, v = qkv(2, heads, kv_heads, 1, 33, 16, 16, dtype, device)
    check_kernel(attention, q, k, v, scale=0.25, right=0, key_mask=padding(33, device), ulps=8)


@on_devices
@in_dtypes
@pytest.mark.parametrize("name", ["causal", "sinks", "everything", "bias", "padding"])
def test_triton_divides_the_keys_of_few_queries(name: str, dtype: torch.dtype, device: str) -> None:
    """A decode step over a long cache, and a few tokens at once: parts of the keys are put together at the end."""
    for queries, keys in [(1, 700), (7, 533)]:
        q, k, v = qkv(2, 4, 2, queries, keys, 16, 24, dtype, device)
        check_kernel(attention, q, k, v, scale=0.25, ulps=8, **options(name, 4, queries, keys, device))


def test_as_many_splits_as_fill_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_triton, "multiprocessors", lambda device: 132)
    device = torch.device("cpu")
    assert [attention_triton.splits_of(n, 8192, device) for n in (8, 64, 132, 133, 1000)] == [33, 4, 2, 1, 1]
    assert [attention_triton.splits_of(8, keys, device) for keys in (1, 64, 128, 1000)] == [1, 1, 2, 15]


@on_devices
@in_dtypes
def test_triton_strides(dtype: torch.dtype, device: str) -> None:
    """Last dimension not contiguous, keys and values expanded over the batch, queries contiguous heads first."""
    q = torch.randn(2, 2, 24, 19, device=device).to(dtype).transpose(2, 3)
    k, v = torch.randn(2, 1, 2, 19, 24, device=device).to(dtype).expand(2, 2, 2, 19, 24)
    check_kernel(attention, q, k, v, scale=0.2, right=0)
    check_kernel(attention, q.contiguous(), k, v, scale=0.2)


@on_devices
@in_dtypes
def test_triton_bias_in_low_precision(dtype: torch.dtype, device: str) -> None:
    q, k, v = qkv(2, 2, 2, 9, 21, 16, 16, dtype, device)
    bias = torch.randn(1, 2, 9, 21, device=device).to(dtype)
    bias[0, :, 3, 4:] = torch.finfo(dtype).min
    bias[0, 1, 5] = -math.inf
    check_kernel(attention, q, k, v, bias=bias, scale=0.25)


@on_devices
def test_triton_large_scores(device: str) -> None:
    """exp of the scores themselves would overflow."""
    q, k, v = qkv(1, 2, 2, 9, 9, 16, 16, torch.float32, device)
    check_kernel(attention, q * 30, k * 30, v, scale=1.0, right=0)


@on_devices
def test_triton_keeps_nan(device: str) -> None:
    q, k, v = qkv(1, 2, 2, 20, 20, 16, 16, torch.float32, device)
    q = q.clone()
    q[0, 1, 7, 3] = math.nan
    kernel, _ = select(attention, attention.signature(q, k, v, scale=0.25, right=0))
    assert kernel is not None
    y = kernel.run(q, k, v, scale=0.25, right=0)
    assert bool(y[0, 7, 1].isnan().all())
    assert int(y.isnan().sum()) == 16


@on_devices
def test_triton_empty(device: str) -> None:
    q, k, v = qkv(0, 2, 2, 4, 4, 16, 16, torch.float32, device)
    kernel, _ = select(attention, attention.signature(q, k, v, scale=0.25))
    assert kernel is not None
    assert kernel.run(q, k, v, scale=0.25).shape == (0, 4, 2, 16)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [64, 80, 128, 256])
def test_long_sequences_on_the_gpu(width: int, dtype: torch.dtype) -> None:
    for queries, keys, named in [
        (1031, 1031, {"right": 0}),
        (517, 1031, {"left": 200, "right": 0}),
        (1, 1031, {"right": 0}),
    ]:
        q, k, v = qkv(2, 4, 2, queries, keys, width, width, dtype, "cuda")
        check_kernel(attention, q, k, v, scale=width**-0.5, **named)


@pytest.mark.gpu
def test_offsets_beyond_32_bits() -> None:
    """The last head of the last batch entry lies more than 2^31 elements behind the first."""
    q, k, v = (torch.empty(5, 5, 1024 * 832, 128, dtype=torch.float16, device="cuda")[:, :, :40] for _ in range(3))
    for t in (q, k, v):
        t.normal_()
    assert (q.stride(0) + q.stride(1)) * 4 > 2**31
    kernel, _ = select(attention, attention.signature(q, k, v, scale=0.1, right=0))
    assert kernel is not None
    last = [t[-1:, -1:].clone() for t in (q, k, v)]
    assert torch.equal(kernel.run(q, k, v, scale=0.1, right=0)[-1:, :, -1:], kernel.run(*last, scale=0.1, right=0))


@pytest.mark.gpu
def test_a_new_length_compiles_nothing() -> None:
    """Heads packed into small and larger tiles, one head a tile, keys divided: each is compiled once."""
    cache = attention_triton.attention_kernel.device_caches[0][0]

    def compiled(sizes: list[tuple[int, int]]) -> int:
        for queries, keys in sizes:
            q, k, v = qkv(2, 4, 2, queries, keys, 48, 48, torch.float16, "cuda")
            check_kernel(attention, q, k, v, scale=0.2, right=0, ulps=8)
        return len(cache)

    before = compiled([(1, 33), (20, 80), (65, 64), (16, 1600)])  # 64 rows and fewer have tiles of their own
    assert compiled([(5, 60), (31, 90), (70, 117), (25, 1700)]) == before


@on_devices
def test_triton_refuses(device: str) -> None:
    q, k, v = qkv(1, 4, 2, 3, 3, 16, 16, torch.float32, device)
    assert "dtypes differ" in refusal(attention, q, k.half(), v)
    assert "mask is torch.float32" in refusal(attention, q, k, v, torch.ones(3, 3, device=device))
    assert "more than 2" in refusal(attention, q, k, v, key_mask=torch.ones(1, 1, 3, device=device).bool())
    assert "not one number" in refusal(attention, q, k, v, sinks=torch.ones(1, device=device))
    assert "heads" in refusal(attention, q[:, :3], k, v)
    assert "320" in refusal(attention, *qkv(1, 1, 1, 3, 3, 320, 16, torch.float32, device))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [*range(1, 70, 4), *range(8, 260, 8)])
def test_every_head_dim_on_the_gpu(width: int, dtype: torch.dtype) -> None:
    """Odd widths are read element by element, the others in wide loads: other code, other shared memory."""
    value_width = width if width % 8 == 0 else width + 3
    for keys in (131, 67):
        q, k, v = qkv(1, 3, 1, 67, keys, width, value_width, dtype, "cuda")
        check_kernel(attention, q, k, v, scale=width**-0.5, right=0)
