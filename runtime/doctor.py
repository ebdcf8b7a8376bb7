"""`regraft doctor`: what this machine has, and whether every kernel computes on it what its reference computes."""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..compiler.device import device_for
from ..compiler.verify import bound_for, distance, higher
from ..kernels.norm_products import JOINT
from ..kernels.op import Kernel
from ..kernels.table import PROVIDERS
from .report import versions


@dataclass(frozen=True)
class Finding:
    """One line of the examination."""

    what: str
    ok: bool
    detail: str


def examine(device: torch.device, dtype: torch.dtype) -> list[Finding]:
    """Versions, device, and each kernel on a small example of odd size."""
    found = [Finding(name, version != "not installed", version) for name, version in versions().items()]
    found.append(Finding("python", True, platform.python_version()))
    roofs = device_for(device)
    detail = f"{roofs.bytes_per_s / 1e12:.2f} TB/s, {roofs.flops_of(dtype) / 1e12:.1f} TFLOP/s {dtype} ({roofs.source})"
    found.append(Finding(f"device {device}", True, f"{roofs.name}: {detail}"))
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        found.append(Finding("compute capability", (major, minor) >= (8, 0), f"{major}.{minor}; Triton needs 8.0"))
    for op, arguments in examples(device, dtype).items():
        kernels = PROVIDERS.get(op, ())
        if not kernels:
            found.append(Finding(op, True, "no kernel on this machine, runs by its reference"))
        found += [_try(kernel, arguments) for kernel in kernels]
    return found


def _try(kernel: Kernel, arguments: dict[str, Any]) -> Finding:
    name = f"{kernel.op.name} ({kernel.provider})"
    refused = kernel.supports(kernel.op.signature(**arguments))
    if refused is not None:
        return Finding(name, True, f"runs by its reference here: {refused}")
    ordered = [arguments.get(a.name, a.default_value) for a in kernel.op.overload._schema.arguments]
    try:
        made = _tensors(kernel.run(*ordered))
    except Exception as error:  # noqa: BLE001 - whatever a kernel does wrong on this machine is what is asked for
        return Finding(name, False, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
    dtype = made[0].dtype
    wide = {k: _widen(v, higher(dtype)) for k, v in arguments.items()}
    oracle, plain = _tensors(kernel.op.reference(**wide)), _tensors(kernel.op.reference(**arguments))
    for new, old, best in zip(made, plain, oracle, strict=True):
        apart, bound = distance(new, best), bound_for(distance(old, best), best, dtype)
        if not apart <= bound:
            return Finding(name, False, f"error {apart.largest:.1e}, allowed {bound.largest:.1e}")
    return Finding(name, True, "agrees with its reference")


def examples(device: torch.device, dtype: torch.dtype) -> dict[str, dict[str, Any]]:
    """By op, small arguments of odd sizes."""
    generator = torch.Generator().manual_seed(0)

    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    row, heads = rand(3, 7, 96), rand(2, 4, 37, 64)
    angles = torch.arange(37.0)[:, None] * torch.linspace(0.1, 1.0, 32)[None]
    angles = torch.cat([angles, angles], -1)
    cos, sin = (t.to(device, dtype) for t in (angles.cos(), angles.sin()))
    kv = rand(2, 2, 37, 64)
    bias = rand(80)
    found: dict[str, dict[str, Any]] = {
        "rms_norm": {"x": row, "weight": rand(96), "eps": 1e-6},
        "add_rms_norm": {"x": row, "residual": rand(3, 7, 96), "weight": rand(96), "eps": 1e-6},
        "layer_norm": {"x": row, "weight": rand(96), "bias": rand(96), "eps": 1e-5},
        "add_layer_norm": {"x": row, "residual": rand(3, 7, 96), "weight": rand(96), "bias": rand(96), "eps": 1e-5},
        "softmax": {"x": row, "compute_dtype": torch.float32, "out_dtype": dtype},
        "rope": {"x": heads, "cos": cos, "sin": sin},
        "norm_rope": {"x": heads, "weight": rand(64), "cos": cos, "sin": sin, "eps": 1e-6},
        "attention": {"q": heads, "k": kv, "v": rand(2, 2, 37, 64), "scale": 0.125, "right": 0},
        "activation": {"x": row, "kind": "silu"},
        "glu": {"gate": row, "up": rand(3, 7, 96), "kind": "silu"},
        "linear_act": {"x": row, "weight": rand(80, 96) / 10, "bias": bias, "kind": "gelu"},
        "qkv_rope": {
            "x": rand(2, 37, 96),
            "weight": rand(8 * 64, 96) / 10,
            "bias": None,
            "cos": cos,
            "sin": sin,
            "q_weight": rand(64),
            "k_weight": rand(64),
            "q_heads": 4,
            "k_heads": 2,
            "head_dim": 64,
            "norm": True,
            "eps": 1e-6,
            "offset": 0.0,
            "mid_dtype": dtype,
            "layout": "half",
            "compute_dtype": None,
        },
        "varlen_attention": {
            "q": rand(50, 4, 64),
            "k": rand(50, 2, 64),
            "v": rand(50, 2, 64),
            "cu_seqlens_q": torch.tensor([0, 13, 50], dtype=torch.int32, device=device),
            "cu_seqlens_k": torch.tensor([0, 13, 50], dtype=torch.int32, device=device),
            "max_q": 37,
            "max_k": 37,
            "scale": 0.125,
            "right": 0,
        },
        "paged_attention": {
            "q": rand(38, 4, 64),
            "k": rand(38, 2, 64),
            "v": rand(38, 2, 64),
            "k_pages": rand(7, 16, 2, 64),
            "v_pages": rand(7, 16, 2, 64),
            "slots": torch.tensor([45, *range(64, 96), *range(16, 21)], device=device),
            "cu_seqlens_q": torch.tensor([0, 1, 38], dtype=torch.int32, device=device),
            "lengths": torch.tensor([30, 37], dtype=torch.int32, device=device),
            "block_table": torch.tensor([[6, 2, -1], [4, 5, 1]], dtype=torch.int32, device=device),
            "max_q": 37,
            "scale": 0.125,
        },
        "moe_experts": {
            "hidden": rand(5, 96),
            "top_k_index": torch.tensor([[0, 2], [1, 2], [2, 0], [0, 1], [1, 0]], device=device),
            "top_k_weights": rand(5, 2).abs(),
            "up": rand(3, 2 * 64, 96) / 10,
            "down": rand(3, 96, 64) / 10,
            "kind": "silu",
        },
        "gate_up": {"x": row, "weight": rand(160, 96) / 10, "bias": None, "kind": "silu"},
    }
    norm = {"norm_weight": rand(96), "norm_eps": 1e-6, "norm_offset": 0.0}
    rounded = {"norm_mid_dtype": dtype, "norm_out_dtype": dtype}
    for name, joint in JOINT.items():
        residual = rand(*found[name]["x"].shape)
        found[joint.name] = {"residual": residual, **norm, **rounded, **found[name]}
    return found


def _widen(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, torch.dtype):
        return dtype
    return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def _tensors(value: Any) -> list[torch.Tensor]:
    return [value] if isinstance(value, torch.Tensor) else list(value)


def doctor(device: torch.device, dtype: torch.dtype, say: Callable[[str], None]) -> bool:
    """Print the examination; True where nothing is wrong."""
    found = examine(device, dtype)
    for finding in found:
        say(f"{'ok  ' if finding.ok else 'FAIL'}  {finding.what:<26} {finding.detail}")
    return all(f.ok for f in found)
