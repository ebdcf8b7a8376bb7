"""Mixture of experts in Triton: the sort on the device, every gate and layout of the op, few and many pairs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernel_checks import assert_close, layout, on_devices, on_hopper, oracle
from torch import Tensor

from regraft.kernels import linear_act_wgmma, moe_routing_triton, moe_torch, moe_triton, moe_wgmma
from regraft.kernels.launch import INTERPRETED
from regraft.kernels.moe import moe_experts
from regraft.kernels.tuning import Config

HALVES = [torch.float16] if INTERPRETED else [torch.float16, torch.bfloat16]
in_halves = pytest.mark.parametrize("dtype", HALVES, ids=lambda dtype: str(dtype).removeprefix("torch."))

VARIANTS: dict[str, dict[str, Any]] = {
    "silu": {},
    "not gated": {"kind": "gelu", "gated": False},
    "gpt-oss": {"interleaved": True, "limit": 0.7, "alpha": 1.702, "up_offset": 1.0, "transposed": True},
    "transposed": {"kind": "gelu_tanh", "transposed": True},
    "clamped after": {"limit": 0.3, "limit_after": True},
    "interleaved": {"kind": "relu2", "interleaved": True},
}


def check(*args: Any, **kwargs: Any) -> None:
    (kernel,) = moe_triton.KERNELS
    assert kernel.supports(moe_experts.signature(*args, **kwargs)) is None
    actual, reference = kernel.run(*args, **kwargs), moe_experts.reference(*args, **kwargs)
    assert_close(actual, reference, oracle(moe_experts, *args, **kwargs)[0])
    assert layout(actual) == layout(reference)


def experts(
    tokens: int,
    top: int,
    count: int,
    width: int,
    inner: int,
    dtype: torch.dtype,
    device: str,
    biased: bool,
    **named: Any,
) -> tuple[Tensor | None, ...]:
    rows = 2 * inner if named.get("gated", True) else inner

    def randn(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, device=device) * scale).to(dtype)

    up, down = randn(count, rows, width, scale=width**-0.5), randn(count, width, inner, scale=inner**-0.5)
    if named.get("transposed"):
        up, down = up.mT.contiguous(), down.mT.contiguous()
    weights, index = torch.randn(tokens, count, device=device).softmax(-1).topk(top, dim=-1)
    biases = (randn(count, rows), randn(count, width)) if biased else (None, None)
    return randn(tokens, width), index, weights.to(dtype), up, down, *biases


@on_devices
@pytest.mark.parametrize(("tokens", "top", "count"), [(1, 2, 8), (13, 2, 5), (300, 4, 60), (50, 1, 3), (2, 8, 8)])
@pytest.mark.parametrize("block", [8, 64])
def test_rows_by_expert(tokens: int, top: int, count: int, block: int, device: str) -> None:
    index = torch.rand(tokens, count, device=device).topk(top, dim=-1).indices
    if tokens == 13:
        index[0, 0], index[1, 1] = count, -1
    order, places, tiles, ends, used = moe_routing_triton.route(index, count, block)
    flat = index.flatten()
    valid = (flat >= 0) & (flat < count)
    wanted = torch.sort(torch.where(valid, flat, count), stable=True)[1][: int(valid.sum())]
    assert torch.equal(order[: len(wanted)].long(), wanted)
    assert torch.equal(ends.long(), torch.bincount(flat[valid], minlength=count).cumsum(0))
    assert torch.equal(
        torch.where(valid, order[places.clamp(min=0).long()].long(), -1),
        torch.where(valid, torch.arange(tokens * top, device=device), -1),
    )
    assert bool((places[~valid] == -1).all())
    assert int(used) == int((tiles[:, 2] > 0).sum())
    assert bool((tiles[: int(used), 2] > 0).all())
    times = torch.zeros(len(wanted), dtype=torch.int32)
    for e, first, rows in tiles.tolist():
        if rows > 0:
            assert rows <= block
            assert bool((flat[order[first : first + rows].long()] == e).all())
            times[first : first + rows] += 1
    assert bool((times == 1).all())
    assert len(tiles) == moe_routing_triton.max_tiles(tokens * top, count, block)


@on_devices
@in_halves
@pytest.mark.parametrize("tokens", [3, 19])
@pytest.mark.parametrize("variant", list(VARIANTS))
def test_against_pytorch(variant: str, tokens: int, dtype: torch.dtype, device: str) -> None:
    named = VARIANTS[variant]
    for width, inner, biased in [(72, 40, True), (33, 21, False)]:
        check(*experts(tokens, 2, 5, width, inner, dtype, device, biased, **named), **named)


@on_devices
@in_halves
def test_rows_without_an_expert(dtype: torch.dtype, device: str) -> None:
    for tokens in (2, 20):
        args = experts(tokens, 3, 6, 64, 48, dtype, device, True)
        assert args[1] is not None
        args[1][0] = 6
        args[1][1, 0] = -1
        check(*args)


@on_devices
def test_equal_bits_every_time(device: str) -> None:
    for tokens in (2, 40):
        args = experts(tokens, 4, 8, 64, 96, torch.float16, device, False)
        assert torch.equal(moe_triton.moe_experts(*args), moe_triton.moe_experts(*args))  # type: ignore[arg-type]


@on_devices
def test_views_and_other_router_dtypes(device: str) -> None:
    hidden, index, weights, up, down, _, _ = experts(19, 2, 4, 64, 32, torch.float16, device, False)
    assert hidden is not None and index is not None and weights is not None and up is not None and down is not None
    wide = torch.randn(19, 130, device=device).half()
    check(wide[:, 3:67], index.int(), weights.float(), up, down)
    check(hidden.repeat(1, 2)[:, :64], index.t().contiguous().t(), weights.t().contiguous().t(), up, down)
    assert moe_triton.moe_experts(hidden[:0], index[:0], weights[:0], up, down).shape == (0, 64)


@on_devices
def test_refuses(device: str) -> None:
    args = experts(3, 2, 4, 16, 8, torch.float32, device, False)
    (kernel,) = moe_triton.KERNELS
    assert "float32" in (kernel.supports(moe_experts.signature(*args)) or "")
    half = experts(3, 2, 4, 16, 8, torch.float16, device, False)
    assert "silu9" in (kernel.supports(moe_experts.signature(*half, kind="silu9")) or "")


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 2, 8, 64, 300, 2000])
def test_each_configuration_on_the_gpu(tokens: int) -> None:
    for top, count, width, inner in [(2, 8, 1024, 1792), (8, 128, 2048, 768), (4, 32, 2880, 1440)]:
        for variant in ("silu", "gpt-oss"):
            named = VARIANTS[variant]
            check(*experts(tokens, top, count, width, inner, torch.bfloat16, "cuda", True, **named), **named)


@pytest.mark.gpu
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("gated", [False, True])
def test_grouped_by_pytorch_on_the_gpu(gated: bool, transposed: bool) -> None:
    named = {"kind": "gelu", "gated": gated, "transposed": transposed}
    args = experts(70, 3, 6, 128, 96, torch.bfloat16, "cuda", False, **named)
    assert args[1] is not None
    args[1][3, 1], args[1][5] = 6, -1
    (kernel,) = moe_torch.KERNELS
    assert kernel.supports(moe_experts.signature(*args, **named)) is None
    actual, reference = kernel.run(*args, **named), moe_experts.reference(*args, **named)
    assert_close(actual, reference, oracle(moe_experts, *args, **named)[0])


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("variant", ["silu", "not gated", "transposed"])
@pytest.mark.parametrize(
    ("tokens", "top", "count", "width", "inner"),
    [(70, 3, 6, 128, 104), (700, 2, 5, 320, 264), (1500, 2, 8, 1024, 1792), (900, 8, 60, 256, 64)],
)
def test_wgmma(tokens: int, top: int, count: int, width: int, inner: int, variant: str) -> None:
    """Blocks that end in their upper and in their lower half, experts without rows, pairs without an expert."""
    named = VARIANTS[variant]
    (kernel,) = moe_wgmma.KERNELS
    for dtype, biased in ((torch.bfloat16, True), (torch.float16, False)):
        args = experts(tokens, top, count, width, inner, dtype, "cuda", biased, **named)
        assert args[1] is not None
        args[1][3, 1], args[1][5] = count, -1
        args[1][args[1] == 1] = 0  # twice the same expert for some tokens, none for expert 1
        assert kernel.supports(moe_experts.signature(*args, **named)) is None
        actual, reference = kernel.run(*args, **named), moe_experts.reference(*args, **named)
        assert_close(actual, reference, oracle(moe_experts, *args, **named)[0])
        assert layout(actual) == layout(reference)


@pytest.mark.gpu
@on_hopper
def test_what_tma_cannot_read_is_left_to_the_other_kernel() -> None:
    hidden, index, weights, up, down, _, _ = experts(90, 2, 4, 72, 40, torch.bfloat16, "cuda", False)
    assert hidden is not None and index is not None and weights is not None and up is not None and down is not None
    (kernel,) = moe_wgmma.KERNELS
    for x, w, v in (
        (hidden, up[:, :, ::2], down[:, ::2]),  # strides
        (hidden.repeat(1, 2)[:, ::2], up, down),
        (hidden, up.mT.contiguous().mT, down.mT.contiguous().mT),  # 72 and 40 end inside a tile of the depth
    ):
        x = x[:, : w.shape[2]]
        truth = oracle(moe_experts, x, index, weights, w, v)[0]
        assert_close(kernel.run(x, index, weights, w, v), moe_experts.reference(x, index, weights, w, v), truth)
    assert kernel.run(hidden[:0], index[:0], weights[:0], up, down).shape == (0, 72)


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize(("helpers", "width"), [(2, 128), (2, 256), (4, 128), (4, 256)])
def test_each_configuration_of_wgmma(helpers: int, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    config = Config((("BLOCK_N", width), ("GROUP_M", 4), ("HELPERS", helpers)), 4, 3)
    monkeypatch.setattr(linear_act_wgmma, "choose", lambda *args: config)
    (kernel,) = moe_wgmma.KERNELS
    args = experts(2000, 2, 5, 264, 1544, torch.bfloat16, "cuda", True)  # several tiles a program
    assert_close(kernel.run(*args), moe_experts.reference(*args), oracle(moe_experts, *args)[0])


@on_devices
def test_wgmma_refuses(device: str) -> None:
    (kernel,) = moe_wgmma.KERNELS
    args = experts(3, 2, 4, 16, 8, torch.float16, device, True)
    assert "more than an activation" in (kernel.supports(moe_experts.signature(*args, limit=1.0)) or "")
    odd = experts(3, 2, 4, 20, 8, torch.float16, device, True)
    assert "16 bytes" in (kernel.supports(moe_experts.signature(*odd)) or "")


@on_devices
def test_grouped_by_pytorch_refuses(device: str) -> None:
    args = experts(3, 2, 4, 16, 8, torch.float16, device, True)
    (kernel,) = moe_torch.KERNELS
    assert "bfloat16" in (kernel.supports(moe_experts.signature(*args)) or "")
    args = tuple(None if a is None else a.bfloat16() if a.is_floating_point() else a for a in args)
    assert kernel.supports(moe_experts.signature(*args)) is not None
