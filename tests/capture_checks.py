"""Run a captured program with the model's weights, and compare it with the model's own eager attention."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from regraft.compiler.huggingface import attention_configs
from regraft.compiler.program import InputKind, Program


def run(program: Program, model: nn.Module, tensors: dict[str, Tensor]) -> Any:
    """What the graph returns for these inputs, put together as the model's forward does."""
    reason = program.limits.violation(tensors)
    assert reason is None, reason
    state = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    values = []
    for made in program.inputs:
        if made.kind is InputKind.USER:
            values.append(tensors[made.target])
        else:
            values.append(made.value if made.value is not None else state[made.target])
    with torch.no_grad():
        return program.rebuild(program.gm(*values))


@contextmanager
def eager_attention(model: nn.Module) -> Iterator[None]:
    """The model with transformers' eager attention, whatever it was loaded with."""
    configs = [(c, c._attn_implementation_internal) for c in attention_configs(model)]
    try:
        for config, _ in configs:
            config._attn_implementation_internal = "eager"
        yield
    finally:
        for config, before in configs:
            config._attn_implementation_internal = before


def eager(model: nn.Module, tensors: dict[str, Tensor], static: dict[str, Any]) -> Any:
    """The original forward with eager attention, by the class's function."""
    with torch.no_grad(), eager_attention(model):
        return type(model).forward(model, **tensors, **static)


def oracle(model: nn.Module, tensors: dict[str, Tensor], static: dict[str, Any]) -> Any:
    """The same for a model of 16 bits, in fp32. (Not fp64: eager softmax is fp32 whatever it is given.)"""
    up = copy.deepcopy(model).float()
    return eager(up, {n: t.float() if t.is_floating_point() else t for n, t in tensors.items()}, static)


def assert_same(found: Tensor, own: Tensor, rows: Tensor | None = None) -> None:
    """Equal but for the rounding of fp32 sums in another order: 64 units in the last place of the largest value."""
    assert found.shape == own.shape and found.dtype == own.dtype
    assert found.isfinite().all(), "not finite"
    if rows is not None:
        found, own = found[rows], own[rows]
    error = (found - own).abs().max().item()
    bound = 64 * torch.finfo(own.dtype).eps * own.abs().max().item()
    assert error <= bound, f"difference {error:.2e}, fp32 allows {bound:.2e}"


def assert_no_worse(found: Tensor, own: Tensor, exact: Tensor, rows: Tensor | None = None) -> None:
    """For 16 bits: the error against the oracle is at most twice the model's own, plus two units in the last place."""
    assert found.shape == own.shape and found.dtype == own.dtype
    assert found.isfinite().all(), "not finite"
    ulp = torch.finfo(own.dtype).eps * exact.abs().max().item()
    found, own = found.float(), own.float()
    if rows is not None:
        found, own, exact = found[rows], own[rows], exact[rows]
    bound = 2 * (own - exact).abs().max().item() + 2 * ulp
    error = (found - exact).abs().max().item()
    assert error <= bound, f"error {error:.2e}, the model's own allows {bound:.2e}"


def tensors_in(value: Any) -> list[Tensor]:
    """Tensors of a returned object in order, keys and values of caches among them."""
    if isinstance(value, Tensor):
        return [value]
    if hasattr(value, "self_attention_cache"):
        return tensors_in([value.self_attention_cache, value.cross_attention_cache])
    if hasattr(value, "layers") and not isinstance(value, dict):
        return [t for layer in value.layers if layer.is_initialized for t in (layer.keys, layer.values)]
    if isinstance(value, dict):
        return [t for item in value.values() for t in tensors_in(item)]
    if isinstance(value, tuple | list):
        return [t for item in value for t in tensors_in(item)]
    return []
