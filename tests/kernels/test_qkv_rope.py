"""The q, k and v projection with norm and rotation: its definition, and both kernels as good as PyTorch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernel_checks import DTYPES, assert_close, in_dtypes, layout, on_devices, on_hopper, to_double

from regraft.kernels import choice, qkv_rope_triton, qkv_rope_wgmma
from regraft.kernels.op import Kernel
from regraft.kernels.qkv_rope import qkv_rope
from regraft.kernels.rope import norm_rope, rope

CUBLAS, SKINNY = qkv_rope_triton.KERNELS
WGMMA = qkv_rope_wgmma.KERNELS[0]


def given(
    lead: tuple[int, ...],
    heads: tuple[int, int, int],
    head: int,
    depth: int,
    dtype: torch.dtype,
    device: str,
    *,
    rotary: int | None = None,
    table: torch.dtype | None = None,
    bias: bool = False,
    norm: bool = False,
    weighted: bool = True,
    offset: float = 0.0,
    mid: torch.dtype | None = None,
    style: str = "half",
    compute: torch.dtype | None = None,
) -> tuple[Any, ...]:
    """Arguments of the op, the heads of q, k and v; cos and sin hold for all sequences."""
    n = sum(heads) * head
    width = rotary or head
    x = torch.randn(*lead, depth, device=device).to(dtype)
    weight = (torch.randn(n, depth, device=device) / depth**0.5).to(dtype)
    added = torch.randn(n, device=device).to(dtype) if bias else None
    steps = 10000.0 ** (-torch.arange(0, width, 2, device=device) / width)
    angle = torch.arange(lead[-1], device=device)[:, None] * steps
    angle = torch.cat((angle, angle), -1) if style == "half" else angle.repeat_interleave(2, -1)
    angle = angle.view(*[1] * (len(lead) - 1), *angle.shape)
    cos, sin = (t.to(table or dtype) for t in (angle.cos(), angle.sin()))
    gains = [torch.rand(head, device=device).to(dtype) + 0.5 if norm and weighted else None for _ in range(2)]
    return (
        x, weight, added, cos, sin, *gains, heads[0], heads[1], head,
        norm, 1e-6 if norm else 0.0, offset, mid, style, compute,
    )  # fmt: skip


def check(kernel: Kernel, args: tuple[Any, ...]) -> None:
    assert kernel.supports(qkv_rope.signature(*args)) is None
    actual, reference = kernel.run(*args), qkv_rope.reference(*args)
    exact = qkv_rope.reference(*[to_double(a) for a in args])
    assert_close(actual, reference, exact)
    assert layout(actual) == layout(reference)


@pytest.mark.parametrize("norm", [False, True])
def test_reference_is_the_separate_ops(norm: bool) -> None:
    args = given((2, 5), (4, 2, 2), 8, 12, torch.float32, "cpu", bias=True, norm=norm, mid=torch.float32)
    x, weight, bias, cos, sin, q_gain, k_gain, *_ = args
    y = torch.nn.functional.linear(x, weight, bias)
    q, k = (t.unflatten(-1, (-1, 8)).transpose(1, 2) for t in (y[..., :32], y[..., 32:48]))
    found = qkv_rope(*args)
    for part, gain, result in ((q, q_gain, found[..., :32]), (k, k_gain, found[..., 32:48])):
        if norm:
            expected = norm_rope(part, gain, cos[:, None], sin[:, None], 1e-6, 0.0, torch.float32)
        else:
            expected = rope(part, cos[:, None], sin[:, None])
        assert torch.equal(result.unflatten(-1, (-1, 8)).transpose(1, 2), expected)
    assert torch.equal(found[..., 48:], y[..., 48:])


VARIANTS: list[dict[str, Any]] = [
    {},
    {"bias": True, "table": torch.float32},
    {"norm": True, "mid": "dtype"},
    {"norm": True, "offset": 1.0, "bias": True},
    {"norm": True, "weighted": False, "compute": torch.float32},
]


def variant(number: int, dtype: torch.dtype) -> dict[str, Any]:
    return {name: dtype if value == "dtype" else value for name, value in VARIANTS[number].items()}


@on_devices
@in_dtypes
@pytest.mark.parametrize("number", range(len(VARIANTS)))
def test_behind_a_product(number: int, dtype: torch.dtype, device: str) -> None:
    options = variant(number, dtype)
    check(CUBLAS, given((2, 5), (4, 2, 2), 16, 24, dtype, device, **options))
    check(SKINNY, given((2, 5), (4, 2, 2), 16, 24, dtype, device, **options))
    check(SKINNY, given((1, 1), (4, 2, 2), 16, 24, dtype, device, **options))
    check(CUBLAS, given((7,), (3, 1, 2), 20, 9, dtype, device, rotary=8, **options))
    check(CUBLAS, given((2, 3), (2, 2, 1), 12, 17, dtype, device, rotary=6, style="interleaved", **options))


@on_devices
@pytest.mark.parametrize("dtype", DTYPES[:1])
def test_tables_of_each_sequence_and_views(dtype: torch.dtype, device: str) -> None:
    args = list(given((3, 5), (4, 2, 2), 16, 24, dtype, device))
    args[3], args[4] = (t.expand(3, 5, 16) + torch.randn(3, 5, 16, device=device).to(dtype) for t in args[3:5])
    check(CUBLAS, tuple(args))
    args[3] = torch.randn(3, 16, 5, device=device).to(dtype).transpose(1, 2)
    args[0] = torch.randn(5, 3, 24, device=device).to(dtype).transpose(0, 1)
    args[1] = args[1].t().contiguous().t()
    check(CUBLAS, tuple(args))
    args[0], args[3], args[4] = args[0][None].expand(2, 3, 5, 24), args[3][None], args[4][None]
    check(CUBLAS, tuple(args))


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head", [64, 128, 256])
@pytest.mark.parametrize("number", range(len(VARIANTS)))
def test_wgmma(number: int, head: int, dtype: torch.dtype) -> None:
    options = variant(number, dtype)
    for lead, heads, depth in (((2, 77), (3, 2, 1), 136), ((700,), (6, 2, 2), 520), ((3, 500), (16, 8, 8), 2056)):
        check(WGMMA, given(lead, heads, head, depth, dtype, "cuda", **options))


@pytest.mark.gpu
@on_hopper
def test_wgmma_of_views() -> None:
    args = list(given((3, 50), (4, 2, 2), 128, 264, torch.bfloat16, "cuda", norm=True))
    args[3], args[4] = (torch.randn(3, 50, 256, device="cuda").bfloat16()[..., :128] for _ in range(2))
    check(WGMMA, tuple(args))
    args[1] = args[1].t().contiguous().t()
    args[0] = torch.randn(50, 3, 264, device="cuda").bfloat16().transpose(0, 1)
    check(WGMMA, tuple(args))
    args[3] = torch.randn(3, 128, 50, device="cuda").bfloat16().transpose(1, 2)
    check(WGMMA, tuple(args))  # cos cannot be read in rows: behind PyTorch's product


@pytest.mark.gpu
@on_hopper
def test_plans_repeat_the_launches() -> None:
    for kernel in (CUBLAS, SKINNY, WGMMA):
        bound = choice.bind(qkv_rope, [kernel])
        for _ in range(3):
            args = given((2, 77), (4, 2, 2), 128, 136, torch.bfloat16, "cuda", norm=True)
            assert torch.equal(bound(*args), kernel.run(*args))


@on_devices
def test_refusals(device: str) -> None:
    args = given((2, 5), (4, 2, 2), 16, 24, torch.float32, device)
    signature = qkv_rope.signature(*args)
    assert WGMMA.supports(signature) is not None
    assert "layout" in str(CUBLAS.supports({**signature, "layout": "neox"}))
    assert "heads" in str(CUBLAS.supports({**signature, "q_heads": 9}))
    assert "norm weight" in str(CUBLAS.supports({**signature, "q_weight": signature["x"]}))
