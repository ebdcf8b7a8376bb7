"""What to measure: for each op named cases with sizes of models in use, and how PyTorch computes them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .activation import activate, activation, glu
from .attention import attention
from .layer_norm import add_layer_norm, layer_norm
from .linear_act import gate_up, linear_act
from .norm_linear import norm_linear
from .op import Op
from .rms_norm import add_rms_norm, rms_norm
from .rope import norm_rope, rope

Arguments = dict[str, Any]
EPS = 1e-6


@dataclass(frozen=True)
class Case:
    """One measurement of an op.

    `arguments(device)` makes the op's keyword arguments, tensors filled with random numbers; `peer(**arguments)`
    computes the same with PyTorch.
    """

    op: Op
    name: str
    dtype: torch.dtype
    arguments: Callable[[torch.device], Arguments]
    peer_name: str
    peer: Callable[..., Any]

    def cost(self) -> tuple[int, int]:
        """FLOPs and bytes, from the op's cost on meta tensors."""
        cost = self.op.cost(**self.arguments(torch.device("meta")))
        return int(cost.flops), int(cost.bytes)


def _randn(dtype: torch.dtype, device: torch.device, *shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, dtype=dtype, device=device) * scale


def _norms(dtype: torch.dtype) -> Iterator[Case]:
    for rows, width in [(1, 4096), (4096, 4096), (16384, 8192)]:

        def one(device: torch.device, rows: int = rows, width: int = width) -> Arguments:
            return {"x": _randn(dtype, device, 1, rows, width), "weight": _randn(dtype, device, width), "eps": EPS}

        def added(device: torch.device, one: Callable[[torch.device], Arguments] = one) -> Arguments:
            arguments = one(device)
            return {**arguments, "residual": torch.randn_like(arguments["x"])}

        def biased(device: torch.device, one: Callable[[torch.device], Arguments] = one) -> Arguments:
            arguments = one(device)
            return {**arguments, "bias": torch.randn_like(arguments["weight"])}

        def added_biased(device: torch.device, biased: Callable[[torch.device], Arguments] = biased) -> Arguments:
            arguments = biased(device)
            return {**arguments, "residual": torch.randn_like(arguments["x"])}

        name = f"{rows} rows of {width}"
        yield Case(rms_norm, name, dtype, one, "F.rms_norm", _rms_norm)
        yield Case(add_rms_norm, name, dtype, added, "add, F.rms_norm", _add_rms_norm)
        yield Case(layer_norm, name, dtype, biased, "F.layer_norm", layer_norm.reference)
        yield Case(add_layer_norm, name, dtype, added_biased, "add, F.layer_norm", add_layer_norm.reference)


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], weight, eps)


def _add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    s = x + residual
    return F.rms_norm(s, s.shape[-1:], weight, eps), s


def _ropes(dtype: torch.dtype) -> Iterator[Case]:
    for batch, length, heads, width in [(1, 4096, 32, 128), (64, 1, 32, 128), (1, 4096, 16, 80)]:

        def one(device: torch.device, size: tuple[int, ...] = (batch, length, heads, width)) -> Arguments:
            table = _randn(dtype, device, size[0], 1, size[1], size[3])
            return {"x": _randn(dtype, device, *size).transpose(1, 2), "cos": table, "sin": table}

        def normed(device: torch.device, one: Callable[[torch.device], Arguments] = one) -> Arguments:
            arguments = one(device)
            weight = _randn(dtype, device, arguments["x"].shape[-1])
            return {**arguments, "weight": weight, "eps": EPS, "mid_dtype": dtype}

        name = f"batch {batch}, length {length}, {heads} heads of {width}"
        yield Case(rope, name, dtype, one, "eager", rope.reference)
        yield Case(norm_rope, name, dtype, normed, "eager", norm_rope.reference)


def _attentions(dtype: torch.dtype) -> Iterator[Case]:
    sizes = [
        # batch, heads, kv heads, queries, keys, head dim of q and k, of v, window
        (1, 32, 8, 4096, 4096, 128, 128, -1),
        (4, 16, 16, 2048, 2048, 64, 64, -1),
        (1, 16, 16, 2048, 2048, 80, 80, -1),
        (1, 16, 8, 8192, 8192, 256, 256, 4095),
        (1, 32, 32, 2048, 2048, 192, 128, -1),
        (1, 32, 8, 1, 8192, 128, 128, -1),
    ]
    for batch, heads, kv_heads, queries, keys, width, value_width, left in sizes:

        def one(
            device: torch.device,
            q: tuple[int, ...] = (batch, queries, heads, width),
            k: tuple[int, ...] = (batch, keys, kv_heads, width),
            v: tuple[int, ...] = (batch, keys, kv_heads, value_width),
            left: int = left,
        ) -> Arguments:
            tensors = {n: _randn(dtype, device, *s).transpose(1, 2) for n, s in (("q", q), ("k", k), ("v", v))}
            return {**tensors, "scale": q[3] ** -0.5, "left": left, "right": 0}

        name = f"batch {batch}, {heads}/{kv_heads} heads of {width}/{value_width}, {queries} on {keys}, window {left}"
        yield Case(attention, name, dtype, one, "SDPA", _sdpa)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float, left: int, right: int) -> Tensor:
    """Causal; with a window, SDPA needs the mask as a tensor."""
    queries, keys = q.shape[2], k.shape[2]
    mask = None
    if left >= 0:
        mask = torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril(keys - queries)
        mask = mask.triu(keys - queries - left)
    causal = mask is None and queries > 1
    y = F.scaled_dot_product_attention(
        q, k, v, mask, is_causal=causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    return y.transpose(1, 2).contiguous()


def _elementwise(dtype: torch.dtype) -> Iterator[Case]:
    for rows, width in [(1, 14336), (4096, 14336)]:

        def one(device: torch.device, rows: int = rows, width: int = width) -> Arguments:
            return {"x": _randn(dtype, device, rows, width), "kind": "gelu_tanh"}

        def two(device: torch.device, rows: int = rows, width: int = width) -> Arguments:
            gate, up = _randn(dtype, device, rows, 2 * width).chunk(2, dim=-1)
            return {"gate": gate, "up": up, "kind": "silu"}

        name = f"{rows} rows of {width}"
        yield Case(activation, name, dtype, one, "F.gelu", activation.reference)
        yield Case(glu, name, dtype, two, "F.silu, mul", glu.reference)


def _linears(dtype: torch.dtype) -> Iterator[Case]:
    for rows in (1, 16, 512, 4096):

        def plain(device: torch.device, rows: int = rows) -> Arguments:
            weight = _randn(dtype, device, 3072, 768, scale=0.03)
            return {
                "x": _randn(dtype, device, rows, 768),
                "weight": weight,
                "bias": weight[:, 0].clone(),
                "kind": "gelu",
            }

        def gated(device: torch.device, rows: int = rows) -> Arguments:
            weight = _randn(dtype, device, 2 * 14336, 4096, scale=0.01)
            return {"x": _randn(dtype, device, rows, 4096), "weight": weight, "bias": None, "kind": "silu"}

        def normed(device: torch.device, rows: int = rows) -> Arguments:
            gain, weight = _randn(dtype, device, 4096), _randn(dtype, device, 6144, 4096, scale=0.02)
            x = _randn(dtype, device, rows, 4096)
            return {"x": x, "norm_weight": gain, "weight": weight, "bias": None, "eps": EPS, "mid_dtype": dtype}

        yield Case(norm_linear, f"{rows} x 4096 -> 6144", dtype, normed, "F.rms_norm, F.linear", _norm_linear)
        yield Case(linear_act, f"{rows} x 768 -> 3072", dtype, plain, "F.linear, F.gelu", _linear_act)
        yield Case(gate_up, f"{rows} x 4096 -> 2 x 14336", dtype, gated, "F.linear, F.silu, mul", gate_up.reference)


def _linear_act(x: Tensor, weight: Tensor, bias: Tensor | None, kind: str) -> Tensor:
    return activate(F.linear(x, weight, bias), kind)


def _norm_linear(
    x: Tensor, norm_weight: Tensor, weight: Tensor, bias: Tensor | None, eps: float, mid_dtype: torch.dtype
) -> Tensor:
    return F.linear(F.rms_norm(x, x.shape[-1:], norm_weight, eps).to(mid_dtype), weight, bias)


def cases(dtype: torch.dtype = torch.bfloat16) -> Mapping[str, tuple[Case, ...]]:
    """The cases by op name, with tensors of this dtype."""
    found: dict[str, tuple[Case, ...]] = {}
    for make in (_norms, _ropes, _attentions, _elementwise, _linears):
        for case in make(dtype):
            found[case.op.name] = (*found.get(case.op.name, ()), case)
    return found
