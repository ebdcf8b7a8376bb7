"""Cases of ops on rows: norms, softmax, rotary embedding, activations. Their peer is PyTorch, their limit a copy."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from .activation import activation, glu
from .case import EPS, Arguments, Case, plain, randn, some_rows, whole
from .layer_norm import add_layer_norm, layer_norm
from .rms_norm import add_rms_norm, rms_norm
from .rope import norm_rope, rope
from .softmax import softmax


def norms(dtype: torch.dtype) -> Iterator[Case]:
    """One row, then 64 MB and more."""
    for rows, width in [(1, 4096), (8192, 4096), (16384, 8192), (65536, 768)]:

        def one(device: torch.device, rows: int = rows, width: int = width) -> Arguments:
            weight = randn(dtype, device, width)
            return {"x": randn(dtype, device, 1, rows, width), "weight": weight, "eps": EPS, "mid_dtype": dtype}

        def added(device: torch.device, one: Callable[[torch.device], Arguments] = one) -> Arguments:
            arguments = one(device)
            return {**arguments, "residual": torch.randn_like(arguments["x"])}

        def biased(device: torch.device, one: Callable[[torch.device], Arguments] = one) -> Arguments:
            arguments = one(device)
            del arguments["mid_dtype"]
            return {**arguments, "bias": torch.randn_like(arguments["weight"])}

        def added_biased(device: torch.device, biased: Callable[[torch.device], Arguments] = biased) -> Arguments:
            arguments = biased(device)
            return {**arguments, "residual": torch.randn_like(arguments["x"])}

        name, one_row, two_rows = f"{rows} rows of {width}", some_rows("x"), some_rows("x", "residual")
        yield Case(rms_norm, name, dtype, one, {"F.rms_norm": plain(_rms_norm)}, one_row)
        yield Case(add_rms_norm, name, dtype, added, {"add, F.rms_norm": plain(_add_rms_norm)}, two_rows)
        yield Case(layer_norm, name, dtype, biased, {"F.layer_norm": plain(layer_norm.reference)}, one_row)
        peers = {"add, F.layer_norm": plain(add_layer_norm.reference)}
        yield Case(add_layer_norm, name, dtype, added_biased, peers, two_rows)


def _rms_norm(x: Tensor, weight: Tensor, eps: float, mid_dtype: torch.dtype) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], weight, eps)


def _add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, mid_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    s = x + residual
    return F.rms_norm(s, s.shape[-1:], weight, eps), s


def softmaxes(dtype: torch.dtype) -> Iterator[Case]:
    """One row of router logits, then 64 MB and more; the last does not fit into a program's registers."""
    for rows, width in [(1, 4096), (65536, 128), (65536, 768), (8192, 4096), (4096, 16384), (1024, 128256)]:

        def one(device: torch.device, rows: int = rows, width: int = width) -> Arguments:
            x = randn(dtype, device, rows, width, scale=2.0)
            return {"x": x, "compute_dtype": torch.float32, "out_dtype": dtype}

        peers = {"softmax, to": plain(softmax.reference), "softmax": plain(_softmax)}
        yield Case(softmax, f"{rows} rows of {width}", dtype, one, peers, some_rows("x"))


def _softmax(x: Tensor, compute_dtype: torch.dtype, out_dtype: torch.dtype) -> Tensor:
    return torch.softmax(x, -1)


def ropes(dtype: torch.dtype) -> Iterator[Case]:
    """A prompt, a batch of single tokens, and a head dimension that is no power of two."""
    for batch, length, heads, width in [(1, 4096, 32, 128), (64, 1, 32, 128), (1, 4096, 16, 80)]:

        def one(device: torch.device, size: tuple[int, ...] = (batch, length, heads, width)) -> Arguments:
            table = randn(dtype, device, size[0], 1, size[1], size[3])
            return {"x": randn(dtype, device, *size).transpose(1, 2), "cos": table, "sin": table}

        def normed(device: torch.device, one: Callable[[torch.device], Arguments] = one) -> Arguments:
            arguments = one(device)
            weight = randn(dtype, device, arguments["x"].shape[-1])
            return {**arguments, "weight": weight, "eps": EPS, "mid_dtype": dtype}

        name = f"batch {batch}, length {length}, {heads} heads of {width}"
        yield Case(rope, name, dtype, one, {"eager": plain(rope.reference)}, whole)
        yield Case(norm_rope, name, dtype, normed, {"eager": plain(norm_rope.reference)}, whole)


def elementwise(dtype: torch.dtype) -> Iterator[Case]:
    """One row, then 117 MB."""
    for rows, width in [(1, 14336), (4096, 14336)]:
        for kind in ("gelu", "gelu_tanh"):

            def one(device: torch.device, rows: int = rows, width: int = width, kind: str = kind) -> Arguments:
                return {"x": randn(dtype, device, rows, width), "kind": kind}

            name = f"{rows} rows of {width}, {kind}"
            yield Case(activation, name, dtype, one, {"F.gelu": plain(activation.reference)}, some_rows("x"))

        def two(device: torch.device, rows: int = rows, width: int = width) -> Arguments:
            gate, up = randn(dtype, device, rows, 2 * width).chunk(2, dim=-1)
            return {"gate": gate, "up": up, "kind": "silu"}

        name = f"{rows} rows of {width}, silu"
        yield Case(glu, name, dtype, two, {"F.silu, mul": plain(glu.reference)}, some_rows("gate", "up"))
