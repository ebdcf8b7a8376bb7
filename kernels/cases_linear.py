"""Cases of GEMMs with what is fused into them. Their peer is cuBLAS with kernels of their own for the rest."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional as F

from .activation import activate, glu
from .case import Arguments, Case, plain, randn, some_rows
from .choice import choose
from .linear_act import gate_up, linear_act
from .op import Op

_LARGE: Final = (2048, 4096, 8192)
_SMALL: Final = (1, 2, 4, 8, 16, 32, 64)

_GEMMS: Final = (
    # of, N, K, activation, bias, whether the weight lies as [K, N]
    ("llama-8B qkv", 6144, 4096, "identity", False, False),
    ("llama-8B o", 4096, 4096, "identity", False, False),
    ("llama-8B down", 4096, 14336, "identity", False, False),
    ("llama-8B", 14336, 4096, "gelu_tanh", True, False),
    ("BERT", 2304, 768, "identity", True, False),
    ("BERT", 768, 768, "identity", True, False),
    ("BERT", 3072, 768, "gelu", True, False),
    ("BERT", 768, 3072, "identity", True, False),
    ("GPT-2", 3072, 768, "gelu_new", True, True),
    ("GPT-2", 768, 3072, "identity", True, True),
    ("GPT-2 vocabulary", 50257, 768, "identity", False, False),
)


def linears(dtype: torch.dtype) -> Iterator[Case]:
    """GEMMs with bias and activation, then products of few rows with weights of 34, 50, 117 and 235 MB."""
    for of, n, k, kind, bias, turned in _GEMMS:
        for rows in _LARGE:
            yield _linear(dtype, of, rows, n, k, kind, bias, turned)
    for n, k in ((4096, 4096), (6144, 4096), (4096, 14336), (28672, 4096)):
        for rows in _SMALL:
            yield _linear(dtype, "few rows", rows, n, k, "identity", False, False)


def _linear(dtype: torch.dtype, of: str, rows: int, n: int, k: int, kind: str, bias: bool, turned: bool) -> Case:
    def arguments(device: torch.device) -> Arguments:
        weight = randn(dtype, device, *((k, n) if turned else (n, k)), scale=k**-0.5)
        return {
            "x": randn(dtype, device, rows, k),
            "weight": weight.t() if turned else weight,
            "bias": randn(dtype, device, n) if bias else None,
            "kind": kind,
        }

    name = ", ".join([f"{of}: {rows} x {k} -> {n}", *["bias"] * bias, *[kind] * (kind != "identity")])
    names = "cuBLAS" if kind == "identity" else "cuBLAS, F.gelu" if kind in ("gelu", "gelu_tanh") else "cuBLAS, eager"
    return Case(linear_act, name, dtype, arguments, {names: plain(_linear_act)}, some_rows("x"))


def _linear_act(x: Tensor, weight: Tensor, bias: Tensor | None, kind: str) -> Tensor:
    y = F.linear(x, weight, bias)
    return y if kind == "identity" else activate(y, "gelu_tanh" if kind == "gelu_new" else kind)


def gate_ups(dtype: torch.dtype) -> Iterator[Case]:
    """llama-8B's gate and up, both as rows of one weight."""
    for rows in (*_SMALL, *_LARGE):

        def arguments(device: torch.device, rows: int = rows) -> Arguments:
            weight = randn(dtype, device, 2 * 14336, 4096, scale=4096**-0.5)
            return {"x": randn(dtype, device, rows, 4096), "weight": weight, "bias": None, "kind": "silu"}

        peers = {"cuBLAS, glu kernel": _gate_up, "cuBLAS, F.silu, mul": plain(gate_up.reference)}
        yield Case(gate_up, f"{rows} x 4096 -> 2 x 14336, silu", dtype, arguments, peers, some_rows("x"))


def _gate_up(arguments: Arguments) -> Callable[[], Tensor]:
    x, weight, kind = arguments["x"], arguments["weight"], arguments["kind"]
    gate, up = x.new_empty(*x.shape[:-1], weight.shape[0]).chunk(2, dim=-1)
    run = best_kernel(glu, gate, up, kind)
    return lambda: run(*F.linear(x, weight).chunk(2, dim=-1), kind)


def best_kernel(op: Op, *args: object) -> Callable[..., Tensor]:
    """What computes these arguments, all given by position: the kernel that the table chooses, or the reference."""
    from .table import PROVIDERS

    fitting = [k for k in PROVIDERS.get(op.name, ()) if k.supports(op.signature(*args)) is None]
    device = next(a.device for a in args if isinstance(a, Tensor))
    return choose(op, fitting, args, device).run if fitting else op.reference
