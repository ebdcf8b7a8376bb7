"""Every model of the zoo on a GPU: captured, fused, lowered to Triton kernels and certified on its own weights."""

from __future__ import annotations

import collections
import warnings
from typing import Any

import pytest
import torch
import zoo

import regraft
from regraft.runtime.backend import backend

pytestmark = pytest.mark.gpu

HALF = ("llama", "gemma2", "gpt2", "bert", "qwen3moe", "whisper")
"""Also in float16."""


def _on_gpu(name: str, dtype: torch.dtype) -> tuple[Any, dict[str, Any]]:
    model, inputs = zoo.build(name, dtype=dtype)
    return model.cuda(), {n: t.cuda() for n, t in inputs.items()}


def _check(name: str, dtype: torch.dtype) -> None:
    model, inputs = _on_gpu(name, dtype)
    if name == "mamba2":  # its cache holds more than keys and values, and its scan fixes the length
        inputs |= {"use_cache": False}
    with warnings.catch_warnings():
        warnings.simplefilter("error", regraft.RegraftWarning)
        warnings.filterwarnings("ignore", "Gemma2.*: sdpa, which the model is configured with", regraft.RegraftWarning)
        optimized = regraft.optimize(model, example_inputs=inputs, verbose=False)
        optimized(**inputs)
        longer = {
            n: torch.cat([t, t[:, -2:]], 1) if n in ("input_ids", "attention_mask", "decoder_input_ids") else t
            for n, t in inputs.items()
        }
        optimized(**(inputs if name == "mamba2" else longer))
    report = optimized.report
    assert report.calls == {"graph": 2, "original": 0}
    assert not report.reverted, report.reverted
    (signature, *_) = report.signatures
    assert signature.certificate is not None and signature.certificate.passed
    kernels = collections.Counter(r.label for p in signature.passes if p.name == "lower" for r in p.rewrites)
    by_triton = {label.split(" -> ")[0] for label in kernels if "triton" in label.split(" -> ")[1].split(" or ")}
    by_reference = {label.split(" -> ")[0] for label in kernels if label.endswith("reference")}
    assert by_reference <= {"moe_experts"}, kernels
    assert {"rms_norm", "add_rms_norm", "layer_norm", "add_layer_norm"} & by_triton, kernels
    assert name == "mamba2" or "attention" in by_triton, kernels


@pytest.mark.parametrize("name", zoo.NAMES)
def test_bfloat16(name: str) -> None:
    _check(name, torch.bfloat16)


@pytest.mark.parametrize("name", HALF)
def test_float16(name: str) -> None:
    _check(name, torch.float16)


@pytest.mark.parametrize("name", ["llama", "bert", "t5"])
def test_torch_compile_backend(name: str) -> None:
    model, inputs = _on_gpu(name, torch.bfloat16)
    reports: list[Any] = []
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, options={"report": reports.append, "strict": True})
    with torch.no_grad():
        expected, found = model(**inputs), compiled(**inputs)
    for a, b in zip(expected.to_tuple(), found.to_tuple(), strict=True):
        if isinstance(a, torch.Tensor):
            assert (a.float() - b.float()).abs().max() <= 0.05 * a.float().abs().max()
    assert reports[0].calls == {"graph": 1, "original": 0}
    assert any(r.label.endswith("triton") for p in reports[0].passes if p.name == "lower" for r in p.rewrites)
