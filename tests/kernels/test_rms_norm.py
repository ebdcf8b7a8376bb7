"""RMSNorm: bit-exact with the spellings it stands for, right in fp64, and the Triton kernel as good as PyTorch."""

from __future__ import annotations

import math

import pytest
import torch
from kernel_checks import as_tuple, assert_close, check_kernel, differing_share, in_dtypes, on_devices, refusal

from regraft.kernels.rms_norm import add_rms_norm, result_dtype, rms_norm
from regraft.kernels.table import select

EPS = 1e-6


def test_reference_is_the_definition() -> None:
    x = torch.randn(3, 7, dtype=torch.float64)
    weight = torch.randn(7, dtype=torch.float64)
    y = rms_norm(x, weight, EPS, 1.0)
    for row, out in zip(x.tolist(), y.tolist(), strict=True):
        scale = 1 / math.sqrt(math.fsum(v * v for v in row) / 7 + EPS)
        for v, w, actual in zip(row, weight.tolist(), out, strict=True):
            assert actual == pytest.approx(v * scale * (w + 1.0), rel=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_reference_has_the_bits_of_each_rounding(dtype: torch.dtype) -> None:
    from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm
    from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm
    from transformers.models.t5.modeling_t5 import T5LayerNorm

    x = (torch.randn(5, 77) * 3).to(dtype)
    roundings = {
        LlamaRMSNorm: (0.0, dtype, None),
        Olmo2RMSNorm: (0.0, None, dtype),
        GemmaRMSNorm: (1.0, None, dtype),
        T5LayerNorm: (0.0, None if dtype == torch.float32 else dtype, None),
    }
    for module, (offset, mid, out) in roundings.items():
        norm = module(77, eps=EPS).to(dtype)
        torch.nn.init.normal_(norm.weight)
        with torch.no_grad():
            assert torch.equal(norm(x), rms_norm(x, norm.weight, EPS, offset, mid, out)), module


def test_fp64_stays_fp64() -> None:
    x, weight = torch.randn(3, 8, dtype=torch.float64), torch.randn(8, dtype=torch.float64)
    y, s = add_rms_norm(x, x / 3, weight, EPS)
    assert y.dtype == s.dtype == torch.float64
    assert torch.equal(s, x + x / 3)
    assert torch.equal(y, rms_norm(s, weight, EPS))


def test_result_dtype_is_what_the_reference_returns() -> None:
    dtypes = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
    for x in dtypes:
        for weight in [None, *dtypes]:
            for mid in [None, *dtypes[:3]]:
                for offset in (0.0, 1.0):
                    w = None if weight is None else torch.ones(4, dtype=weight)
                    y = rms_norm(torch.ones(2, 4, dtype=x), w, EPS, offset, mid)
                    assert y.dtype == result_dtype(x, weight, offset, mid, None)


ROUNDINGS = {
    "before the weight": (0.0, True, False),
    "at the end": (0.0, False, True),
    "weight plus one": (1.0, False, True),
    "never": (0.0, False, False),
}


@on_devices
@in_dtypes
@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("shape", [(3, 5, 77), (1, 1, 1), (9, 1024), (2, 2500), (130,)], ids=str)
def test_triton_rms_norm(shape: tuple[int, ...], rounding: str, dtype: torch.dtype, device: str) -> None:
    offset, mid, out = ROUNDINGS[rounding]
    x = (torch.randn(shape, device=device) * 2).to(dtype)
    weight = torch.randn(shape[-1], device=device).to(dtype)
    check_kernel(rms_norm, x, weight, EPS, offset, dtype if mid else None, dtype if out else None)


@on_devices
@in_dtypes
def test_triton_without_weight_and_with_a_wider_one(dtype: torch.dtype, device: str) -> None:
    x = torch.randn(4, 33, device=device).to(dtype)
    check_kernel(rms_norm, x, None, EPS, 0.0, None, dtype)
    check_kernel(rms_norm, x, torch.randn(33, device=device), EPS, 0.0, dtype, None)


@on_devices
@in_dtypes
def test_triton_views(dtype: torch.dtype, device: str) -> None:
    qkv = torch.randn(2, 5, 3, 4, 24, device=device).to(dtype)
    weight = torch.randn(24, device=device).to(dtype)
    heads_first = qkv[:, :, 1].transpose(1, 2)  # [B, H, S, D], a slice of a fused projection
    check_kernel(rms_norm, heads_first, weight, EPS, 0.0, dtype)
    check_kernel(rms_norm, qkv.permute(3, 0, 2, 1, 4)[:, :, :2], weight, EPS, 0.0, dtype)  # needs a copy
    check_kernel(rms_norm, torch.randn(24, 7, device=device).to(dtype).t(), weight, EPS, 0.0, dtype)
    check_kernel(add_rms_norm, heads_first, qkv[:, :, 2].transpose(1, 2), weight, EPS, 0.0, dtype)


@on_devices
@in_dtypes
@pytest.mark.parametrize("shape", [(3, 5, 77), (1, 4096)], ids=str)
def test_triton_add_rms_norm(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    x, residual = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
    weight = torch.randn(shape[-1], device=device).to(dtype)
    check_kernel(add_rms_norm, x, residual, weight, EPS, 0.0, dtype, None)
    check_kernel(add_rms_norm, x, residual.float(), None, EPS)
    kernel, _ = select(add_rms_norm, add_rms_norm.signature(x, residual, weight, EPS))
    assert kernel is not None
    assert torch.equal(kernel.run(x, residual, weight, EPS)[1], x + residual)


@on_devices
def test_triton_rounds_where_the_reference_does(device: str) -> None:
    x = torch.randn(64, 256, device=device, dtype=torch.float16)
    weight = torch.randn(256, device=device, dtype=torch.float16)
    kernel, _ = select(rms_norm, rms_norm.signature(x, weight, EPS))
    assert kernel is not None
    before = (x, weight, EPS, 0.0, torch.float16, None)
    after = (x, weight, EPS, 0.0, None, torch.float16)
    assert differing_share(rms_norm(*before), rms_norm(*after)) > 0.1  # the two roundings do differ
    assert differing_share(kernel.run(*before), rms_norm(*before)) < 0.01
    assert differing_share(kernel.run(*after), rms_norm(*after)) < 0.01


@on_devices
def test_triton_offsets_and_empty(device: str) -> None:
    x = torch.empty(0, 5, device=device)
    kernel, _ = select(add_rms_norm, add_rms_norm.signature(x, x, None, EPS))
    assert kernel is not None
    assert [t.shape for t in as_tuple(kernel.run(x, x, None, EPS))] == [x.shape, x.shape]


@pytest.mark.gpu
def test_offsets_beyond_32_bits() -> None:
    x = torch.empty(2**31 // 4096 + 3, 4096, device="cuda", dtype=torch.float16)
    x[-2:] = torch.randn(2, 4096, device="cuda")
    kernel, _ = select(rms_norm, rms_norm.signature(x, None, EPS, 0.0, None, torch.float16))
    assert kernel is not None
    y = kernel.run(x, None, EPS, 0.0, None, torch.float16)[-2:]
    tail = x[-2:]
    exact = rms_norm(tail.double(), None, EPS)
    assert_close(y, rms_norm(tail, None, EPS, 0.0, None, torch.float16), exact)


@on_devices
def test_triton_refuses(device: str) -> None:
    x = torch.randn(2, 8, device=device)
    assert "float64" in refusal(rms_norm, x.double(), None, EPS)
    assert "mid_dtype" in refusal(rms_norm, x, None, EPS, 0.0, torch.float64)
    assert "differ in shape" in refusal(add_rms_norm, x, x[:1], None, EPS)
    assert "not one number" in refusal(
        rms_norm, torch.randn(2, 3, 8, device=device), torch.ones(3, 8, device=device), EPS
    )
    assert "takes 1 to" in refusal(rms_norm, torch.empty(1, 100_000, device=device), None, EPS)
