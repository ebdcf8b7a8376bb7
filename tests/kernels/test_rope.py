"""Rotary embedding: complex multiplication in fp64, bit-exact with the spellings, and the Triton kernel."""

from __future__ import annotations

import pytest
import torch
from kernel_checks import check_kernel, differing_share, in_dtypes, on_devices, refusal

from regraft.kernels.rms_norm import rms_norm
from regraft.kernels.rope import norm_rope, rope
from regraft.kernels.table import select

EPS = 1e-6


def angles(length: int, width: int, device: str = "cpu") -> torch.Tensor:
    frequencies = 10000.0 ** (-torch.arange(0, width, 2, dtype=torch.float64, device=device) / width)
    return torch.arange(length, dtype=torch.float64, device=device)[:, None] * frequencies


def tables(length: int, width: int, layout: str, device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin `[length, width]` in fp64, repeated as the layout wants it."""
    angle = angles(length, width, device)
    angle = torch.cat((angle, angle), -1) if layout == "half" else angle.repeat_interleave(2, -1)
    return angle.cos(), angle.sin()


@pytest.mark.parametrize("layout", ["half", "interleaved"])
def test_reference_is_a_complex_rotation(layout: str) -> None:
    x = torch.randn(2, 3, 5, 12, dtype=torch.float64)
    y = rope(x, *tables(5, 8, layout), layout)
    turned = torch.polar(torch.ones(5, 4, dtype=torch.float64), angles(5, 8))
    pairs = slice(0, 4), slice(4, 8)
    if layout == "interleaved":
        pairs = slice(0, 8, 2), slice(1, 8, 2)
    expected = torch.complex(x[..., pairs[0]], x[..., pairs[1]]) * turned
    assert torch.allclose(y[..., pairs[0]], expected.real, rtol=1e-13, atol=1e-13)
    assert torch.allclose(y[..., pairs[1]], expected.imag, rtol=1e-13, atol=1e-13)
    assert torch.equal(y[..., 8:], x[..., 8:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_reference_has_the_bits_of_both_spellings(dtype: torch.dtype) -> None:
    from transformers.models.gptj.modeling_gptj import apply_rotary_pos_emb as interleaved
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as half

    q, k = torch.randn(2, 2, 3, 5, 16).to(dtype)
    cos, sin = (t[None].to(dtype) for t in tables(5, 16, "half"))
    for expected, x in zip(half(q, k, cos, sin), (q, k), strict=True):
        assert torch.equal(rope(x, cos[:, None], sin[:, None]), expected)
    sin, cos = angles(5, 16).sin()[None].to(dtype), angles(5, 16).cos()[None].to(dtype)
    x = q.transpose(1, 2)
    repeated = (t.repeat_interleave(2, -1)[:, :, None] for t in (cos, sin))
    assert torch.equal(rope(x, *repeated, "interleaved"), interleaved(x, sin, cos))


def test_an_unknown_layout_is_an_error() -> None:
    with pytest.raises(ValueError, match="half"):
        rope(torch.randn(1, 4), torch.randn(1, 4), torch.randn(1, 4), "neox")


def test_norm_rope_is_the_two_ops() -> None:
    x, weight = torch.randn(2, 3, 5, 16).bfloat16(), torch.randn(16).bfloat16()
    cos, sin = (t.bfloat16() for t in tables(5, 16, "half"))
    normed = rms_norm(x, weight, EPS, 0.0, torch.bfloat16)
    assert torch.equal(norm_rope(x, weight, cos, sin, EPS, 0.0, torch.bfloat16), rope(normed, cos, sin))


WIDTHS = [(64, 64), (80, 80), (80, 32), (24, 18), (2, 2)]


@on_devices
@in_dtypes
@pytest.mark.parametrize("layout", ["half", "interleaved"])
@pytest.mark.parametrize(("width", "rotary"), WIDTHS)
def test_triton_rope(width: int, rotary: int, layout: str, dtype: torch.dtype, device: str) -> None:
    x = torch.randn(2, 7, 3, width, device=device).to(dtype).transpose(1, 2)  # [B, H, S, D]
    cos, sin = tables(7, rotary, layout, device)
    check_kernel(rope, x, cos.to(dtype), sin.to(dtype), layout)
    check_kernel(rope, x, cos.float()[None, None], sin.float()[None, None], layout, torch.float32)


@on_devices
@in_dtypes
@pytest.mark.parametrize("layout", ["half", "interleaved"])
@pytest.mark.parametrize(("width", "rotary"), WIDTHS)
def test_triton_norm_rope(width: int, rotary: int, layout: str, dtype: torch.dtype, device: str) -> None:
    qkv = torch.randn(2, 7, 3, 4, width, device=device).to(dtype)
    x = qkv[:, :, 1].transpose(1, 2)  # [B, H, S, D], a slice of a fused projection
    weight = torch.randn(width, device=device).to(dtype)
    cos, sin = (t.to(dtype).expand(2, 1, 7, rotary) for t in tables(7, rotary, layout, device))
    check_kernel(norm_rope, x, weight, cos, sin, EPS, 0.0, dtype, None, layout)
    check_kernel(norm_rope, x, weight, cos, sin, EPS, 1.0, None, dtype, layout)
    check_kernel(norm_rope, x, None, cos, sin, EPS, 0.0, None, None, layout)


@on_devices
@in_dtypes
def test_triton_views(dtype: torch.dtype, device: str) -> None:
    cos, sin = (t.to(dtype) for t in tables(5, 16, "half", device))
    x = torch.randn(2, 2, 3, 4, 5, 16, device=device).to(dtype).transpose(1, 3)[:, :, 1:]
    check_kernel(rope, x, cos, sin)  # five dimensions: needs a copy
    check_kernel(rope, torch.randn(5, 16, device=device).to(dtype), cos, sin)
    # flat tokens [1, T, H, D], one row of cos and sin a token
    check_kernel(rope, torch.randn(1, 5, 4, 16, device=device).to(dtype), cos[None, :, None], sin[None, :, None])


@on_devices
def test_triton_rounds_where_the_reference_does(device: str) -> None:
    x = torch.randn(1, 8, 64, 64, device=device, dtype=torch.float16)
    cos, sin = (t.half() for t in tables(64, 64, "half", device))
    kernel, _ = select(rope, rope.signature(x, cos, sin))
    assert kernel is not None
    wide = rope(x, cos, sin, "half", torch.float32)
    assert differing_share(rope(x, cos, sin), wide) > 0.1  # rounding each product does make a difference
    assert differing_share(kernel.run(x, cos, sin), rope(x, cos, sin)) == 0
    assert differing_share(kernel.run(x, cos, sin, "half", torch.float32), wide) < 0.01


@on_devices
def test_triton_refuses(device: str) -> None:
    x = torch.randn(2, 4, 8, device=device)
    cos = torch.randn(4, 8, device=device)
    assert "neox" in refusal(rope, x, cos, cos, "neox")
    assert "no more than x" in refusal(rope, x, cos[None, None], cos)
    assert "even" in refusal(rope, x, cos[:, :3], cos[:, :3])
    assert "at most 8" in refusal(rope, x, torch.randn(4, 16, device=device), torch.randn(4, 16, device=device))
    assert "sin 4" in refusal(rope, x, cos, cos[:, :4])
