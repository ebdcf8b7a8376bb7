"""The other providers of attention: the kernel for Hopper and SDPA's backends, each against fp64, on the GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernel_checks import assert_close, layout, oracle
from torch import Tensor

from regraft.kernels import attention_gluon, attention_triton, varlen_attention_triton
from regraft.kernels.attention import attention
from regraft.kernels.op import Kernel
from regraft.kernels.table import PROVIDERS
from regraft.kernels.varlen_attention import varlen_attention

HALVES = [torch.float16, torch.bfloat16]
KERNELS = {kernel.provider: kernel for kernel in PROVIDERS.get("attention", ())}
PACKED = {kernel.provider: kernel for kernel in PROVIDERS.get("varlen_attention", ())}


def qkv(
    batch: int, heads: int, kv_heads: int, queries: int, keys: int, width: int, value_width: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Heads first, as views of tensors that have them last but one, like the slices of a fused projection."""
    q = torch.randn(batch, queries, heads, width, device="cuda")
    kv = torch.randn(batch, keys, kv_heads, width + value_width, device="cuda")
    q, k, v = (t.to(dtype).transpose(1, 2) for t in (q, *kv.split((width, value_width), dim=-1)))
    return q, k, v


def check(provider: str, *args: Any, ulps: float = 4.0, **named: Any) -> None:
    kernel: Kernel = KERNELS[provider]
    assert kernel.supports(attention.signature(*args, **named)) is None
    actual, reference = kernel.run(*args, **named), attention.reference(*args, **named)
    assert_close(actual, reference, oracle(attention, *args, **named)[0], ulps)
    assert layout(actual) == layout(reference)


def options(name: str, batch: int, heads: int, keys: int) -> dict[str, Any]:
    key_mask = torch.rand(batch, keys, device="cuda") > 0.3
    key_mask[-1] = False  # a sequence without any key
    sinks = torch.randn(heads, device="cuda")
    bias = torch.randn(heads, 1, keys, device="cuda")
    return {
        "nothing": {},
        "causal": {"right": 0},
        "window": {"left": 150, "right": 0},
        "two-sided window": {"left": 40, "right": 60},
        "left only": {"left": 100},
        "softcap": {"right": 0, "softcap": 1.5},
        "sinks": {"right": 0, "sinks": sinks},
        "padding": {"key_mask": key_mask},
        "ALiBi": {"right": 0, "bias": bias},
        "all": {"left": 90, "right": 0, "softcap": 2.0, "sinks": sinks, "key_mask": key_mask, "bias": bias},
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
    "ALiBi",
    "all",
]


@pytest.mark.gpu
@pytest.mark.parametrize("name", OPTIONS)
def test_gluon_options(name: str) -> None:
    """Lengths that no tile divides, more keys than queries and fewer, groups, more tiles than programs."""
    for batch, heads, kv_heads, queries, keys in [(2, 4, 2, 300, 300), (1, 4, 4, 257, 700), (2, 2, 1, 700, 257)]:
        q, k, v = qkv(batch, heads, kv_heads, queries, keys, 128, 128, torch.bfloat16)
        check("gluon", q, k, v, scale=0.1, **options(name, batch, heads, keys))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(
    ("width", "value_width"),
    [(40, 40), (64, 64), (72, 72), (80, 80), (96, 96), (128, 128), (160, 160), (192, 128), (256, 256)],
)
def test_gluon_head_dims(width: int, value_width: int, dtype: torch.dtype) -> None:
    q, k, v = qkv(2, 6, 2, 261, 261, width, value_width, dtype)
    check("gluon", q, k, v, scale=width**-0.5, right=0)


@pytest.mark.gpu
@pytest.mark.parametrize("width", [64, 128])
def test_gluon_walks_over_many_tiles(width: int) -> None:
    """Each program computes several tiles, of heads that do not fit in L2 together."""
    q, k, v = qkv(3, 32, 8, 1100, 1100, width, width, torch.bfloat16)
    for named in ({}, {"right": 0}, {"left": 300, "right": 0}):
        check("gluon", q, k, v, scale=width**-0.5, **named)


@pytest.mark.gpu
def test_gluon_takes_any_view(monkeypatch: pytest.MonkeyPatch) -> None:
    """What TMA cannot read goes to the other kernel: odd starts, expanded keys, a bias for each pair."""
    q, k, v = qkv(2, 4, 2, 200, 200, 64, 64, torch.bfloat16)
    check("gluon", q.contiguous(), k.contiguous(), v, scale=0.1, right=0)
    taken: list[int] = []
    other = attention_triton.attention
    monkeypatch.setattr(attention_triton, "attention", lambda *given: taken.append(1) or other(*given))
    odd = torch.randn(q.numel() + 1, device="cuda").bfloat16()[1:].view(q.shape)
    check("gluon", odd, k, v, scale=0.1, right=0)
    check("gluon", q, k[:1].expand(2, -1, -1, -1), v[:1].expand(2, -1, -1, -1), scale=0.1)
    check("gluon", q, k, v, bias=torch.randn(4, 200, 200, device="cuda"), scale=0.1)
    check("gluon", q, k, v, scale=-0.1)
    assert len(taken) == 4


@pytest.mark.gpu
def test_gluon_keeps_nan_and_infinity_where_they_are() -> None:
    q, k, v = qkv(1, 2, 2, 300, 300, 64, 64, torch.bfloat16)
    q = q.clone()
    q[0, 1, 7, 3] = float("nan")
    y = KERNELS["gluon"].run(q, k, v, scale=0.1, right=0)
    assert bool(y[0, 7, 1].isnan().all())
    assert int(y.isnan().sum()) == 64


def ends(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int().cuda()


def packed(
    queries: int, keys: int, width: int, value_width: int, dtype: torch.dtype = torch.bfloat16
) -> tuple[Tensor, Tensor, Tensor]:
    """Eight heads on two; keys and values as slices of one tensor."""
    q = torch.randn(queries, 8, width, device="cuda").to(dtype)
    k, v = torch.randn(keys, 2, width + value_width, device="cuda").to(dtype).split((width, value_width), dim=-1)
    return q, k, v


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(("width", "value_width"), [(40, 40), (64, 64), (72, 72), (80, 80), (104, 104), (192, 128)])
def test_gluon_packed(width: int, value_width: int, dtype: torch.dtype) -> None:
    """Sequences shorter than a tile and longer, without queries, with fewer keys than queries; rows behind the last."""
    queries, keys = [300, 0, 1, 129, 64, 500], [300, 5, 40, 129, 700, 77]
    q, k, v = packed(sum(queries) + 150, sum(keys) + 3, width, value_width, dtype)
    sinks = torch.randn(8, device="cuda")
    options: list[dict[str, Any]] = [{}, {"right": 0}, {"left": 100, "right": 0, "sinks": sinks}, {"softcap": 2.0}]
    for named in options:
        args = (q, k, v, ends(queries), ends(keys), 500, 700)
        named["scale"] = width**-0.5
        assert PACKED["gluon"].supports(varlen_attention.signature(*args, **named)) is None
        actual, reference = PACKED["gluon"].run(*args, **named), varlen_attention.reference(*args, **named)
        assert_close(actual, reference, oracle(varlen_attention, *args, **named)[0])
        assert not bool(actual[sum(queries) :].any())


@pytest.mark.gpu
@pytest.mark.parametrize("length", [1, 60, 64, 100, 128, 200, 333])
@pytest.mark.parametrize("width", [64, 80, 128, 256])
def test_gluon_keeps_packed_sequences_apart(width: int, length: int) -> None:
    """A sequence between others whose queries, keys and values are all NaN or infinite."""
    lengths = [77, length, 300]
    own = slice(77, 77 + length)
    q, k, v = packed(sum(lengths), sum(lengths), width, width)
    kv = k._base
    assert kv is not None
    outside = torch.ones(sum(lengths), dtype=torch.bool, device="cuda")
    outside[own] = False
    at = (ends(lengths), ends(lengths), 300, 300)
    for right in (-1, 0):
        clean = PACKED["gluon"].run(q, k, v, *at, scale=0.1, right=right)[own]
        assert bool(clean.isfinite().all())
        for value in (float("nan"), float("inf")):
            foul, foul_kv = q.clone(), kv.clone()
            foul[outside], foul_kv[outside] = value, value
            y = PACKED["gluon"].run(foul, *foul_kv.split((width, width), dim=-1), *at, scale=0.1, right=right)
            assert torch.equal(y[own], clean)


@pytest.mark.gpu
def test_gluon_passes_over_blocks_without_queries() -> None:
    """One long sequence among many short ones, more tiles than programs; a batch with no queries at all."""
    lengths = [3] * 40 + [2000] + [0] * 30 + [130]
    q, k, v = packed(sum(lengths), sum(lengths), 64, 64)
    args = (q, k, v, ends(lengths), ends(lengths), 2000, 2000)
    actual, reference = (f(*args, scale=0.1, right=0) for f in (PACKED["gluon"].run, varlen_attention.reference))
    assert_close(actual, reference, oracle(varlen_attention, *args, scale=0.1, right=0)[0])
    none = PACKED["gluon"].run(q, k, v, ends([0] * 9), ends([5] * 9), 400, 400, scale=0.1)
    assert not bool(none.any())


@pytest.mark.gpu
def test_gluon_adds_biases_as_low_as_there_are() -> None:
    """A row whose bias is the lowest number everywhere sees all keys alike, as in eager code; minus infinity hides."""
    q, k, v = qkv(3, 2, 2, 200, 200, 64, 64, torch.bfloat16)
    bias = torch.zeros(3, 1, 1, 200, device="cuda")
    bias[0], bias[1, ..., 20:] = torch.finfo(torch.float32).min, torch.finfo(torch.bfloat16).min
    bias[2] = float("-inf")
    check("gluon", q, k, v, bias=bias, scale=0.1)
    check("triton", q, k, v, bias=bias, scale=0.1)
    y = KERNELS["gluon"].run(q, k, v, bias=bias, scale=0.1)
    assert not bool(y[2].any())
    mean = v[0].float().mean(dim=1)
    assert torch.allclose(y[0].float(), mean.expand(200, -1, -1), atol=2e-3)


@pytest.mark.gpu
def test_gluon_refuses() -> None:
    q, k, v = qkv(1, 4, 2, 30, 30, 64, 64, torch.bfloat16)
    supports = KERNELS["gluon"].supports

    def refusal(*args: Any, **named: Any) -> str:
        return str(supports(attention.signature(*args, **named)))

    assert "mask for each pair" in refusal(q, k, v, torch.ones(30, 30, device="cuda").bool())
    assert "float32" in refusal(q.float(), k.float(), v.float())
    assert "head dimensions" in refusal(q[..., :17], k[..., :17], v)
    assert "wider" in refusal(q, k, torch.cat((v, v), dim=-1))
    at = (ends([30]), ends([30]), 30, 30)
    pages = torch.zeros(2, 16, 2, 64, device="cuda").bfloat16()
    paged = varlen_attention.signature(q[0].transpose(0, 1), pages, pages, *at, torch.zeros(1, 2).int().cuda())
    assert "pages" in str(PACKED["gluon"].supports(paged))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("provider", ["cudnn", "flash"])
def test_sdpa_backends(provider: str, dtype: torch.dtype) -> None:
    for width in (64, 80, 128):
        q, k, v = qkv(2, 4, 2, 261, 261, width, width, dtype)
        check(provider, q, k, v, scale=0.1, right=0)
        check(provider, q, k[:, :, :77], v[:, :, :77], scale=0.1)


@pytest.mark.gpu
@pytest.mark.parametrize("provider", ["cudnn", "flash"])
def test_sdpa_backends_refuse_what_they_would_compute_otherwise(provider: str) -> None:
    q, k, v = qkv(2, 4, 2, 64, 64, 64, 64, torch.bfloat16)
    supports = KERNELS[provider].supports
    refused: list[dict[str, Any]] = [
        {"softcap": 1.0},
        {"left": 3, "right": 0},
        {"right": 1},
        {"sinks": torch.ones(4, device="cuda")},
        {"bias": torch.ones(64, device="cuda")},
        {"key_mask": torch.ones(2, 64, device="cuda").bool()},
        {"mask": torch.ones(64, 64, device="cuda").bool()},
    ]
    for named in refused:
        assert supports(attention.signature(q, k, v, **named)) is not None, named
    assert supports(attention.signature(q[:, :, :5], k, v, right=0)) is not None
    assert supports(attention.signature(q[:, :, :5], k, v)) is None
    assert supports(attention.signature(q.float(), k.float(), v.float())) is not None


@pytest.mark.parametrize(("max_q", "max_k"), [(5, 0), (0, 3)])
def test_packed_sequences_without_keys_or_queries(max_q: int, max_k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows may lie behind the last sequence though the longest one has none: nothing is divided among its tiles."""
    q, k = torch.randn(5, 2, 64), torch.randn(7, 2, 64)
    cu_q, cu_k = (torch.tensor([0, most], dtype=torch.int32) for most in (max_q, max_k))
    monkeypatch.setattr(varlen_attention_triton, "varlen_attention", varlen_attention.reference)
    found = attention_gluon.varlen_attention(q, k, k, cu_q, cu_k, max_q, max_k)
    assert torch.equal(found, torch.zeros_like(q))


def test_tiles_fit_in_shared_memory_and_registers() -> None:
    for width in range(40, 257, 8):
        tiles = attention_gluon._tiles(width, width)
        assert tiles is not None
        keys, stages, slots = tiles
        whole = sum(attention_triton.parts(width))
        assert width <= whole < 2 * width
        assert 2 * whole * (slots * 128 + stages * 2 * keys) < 232_448
        assert whole // 2 + keys // 2 + keys // 4 < 232


def test_sections_divide_the_heads() -> None:
    assert attention_gluon._section(384, 95) == 64
    assert attention_gluon._section(384, 1000) == 384
    assert attention_gluon._section(64, 6) == 4
    assert attention_gluon._section(13, 6) == 13  # a prime: one by one would leave most of the chip idle


def test_head_dimensions_in_parts() -> None:
    known = {17: (32, 0), 40: (32, 16), 64: (64, 0), 72: (64, 16), 80: (64, 16), 96: (64, 32), 100: (128, 0)}
    known |= {112: (128, 0), 160: (128, 32), 192: (128, 64), 256: (256, 0), 8: (16, 0)}
    assert {width: attention_triton.parts(width) for width in known} == known
