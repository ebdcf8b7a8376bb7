"""Cases of attention. Peers: each backend of SDPA, and FlexAttention, compiled, for what SDPA has no argument for."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from .attention import attention
from .case import Arguments, Case, Part, Peer, randn

_BACKENDS: Final = {
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "FA2": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
_FEW_QUERIES: Final = 16


@dataclass(frozen=True)
class _Shape:
    batch: int
    heads: int
    kv_heads: int
    queries: int
    keys: int
    width: int
    value_width: int = 0
    causal: bool = True
    window: int = 0
    """Keys that a query sees; 0 for all."""
    softcap: float = 0.0
    sinks: bool = False
    alibi: bool = False

    @property
    def name(self) -> str:
        """`causal, 8x2048, 32/8 heads of 128, window 4096`."""
        size = f"{self.batch}x{self.queries}" + (f" on {self.keys}" if self.keys != self.queries else "")
        values = f"/{self.value_width}" if self.value_width else ""
        parts = ["causal" if self.causal else "bidirectional", size]
        parts.append(f"{self.heads}/{self.kv_heads} heads of {self.width}{values}")
        parts += [f"window {self.window}"] if self.window else []
        parts += [f"softcap {self.softcap:g}"] if self.softcap else []
        return ", ".join(parts + ["sinks"] * self.sinks + ["ALiBi"] * self.alibi)

    @property
    def plain(self) -> bool:
        """Whether SDPA has arguments for all of it."""
        return not (self.window or self.softcap or self.sinks or self.alibi)


_SHAPES: Final = (
    _Shape(8, 32, 8, 2048, 2048, 128),
    _Shape(2, 32, 8, 8192, 8192, 128),
    _Shape(1, 32, 8, 16384, 16384, 128),
    _Shape(32, 32, 8, 512, 512, 128),
    _Shape(1, 32, 8, 512, 512, 128),
    _Shape(32, 12, 12, 512, 512, 64, causal=False),
    _Shape(64, 12, 12, 197, 197, 64, causal=False),
    _Shape(8, 32, 8, 2048, 2048, 128, causal=False),
    _Shape(8, 12, 12, 512, 512, 64),
    _Shape(8, 16, 16, 2048, 2048, 80, causal=False),
    _Shape(8, 16, 16, 2048, 2048, 80),
    _Shape(8, 16, 16, 2048, 2048, 96, causal=False),
    _Shape(8, 16, 16, 2048, 2048, 96),
    _Shape(4, 16, 16, 2048, 2048, 256, causal=False),
    _Shape(4, 8, 4, 4096, 4096, 256),
    _Shape(4, 16, 16, 2048, 2048, 192, 128),
    _Shape(1, 32, 8, 16384, 16384, 128, window=4096),
    _Shape(1, 8, 4, 4096, 4096, 256, softcap=50.0),
    _Shape(2, 32, 8, 8192, 8192, 128, softcap=50.0),
    _Shape(2, 64, 8, 4096, 4096, 64, sinks=True),
    _Shape(2, 64, 8, 4096, 4096, 64, window=128, sinks=True),
    _Shape(2, 32, 32, 2048, 2048, 128, alibi=True),
    _Shape(1, 32, 8, 1, 8192, 128),
)


def attentions(dtype: torch.dtype) -> Iterator[Case]:
    """Prompts of 16k tokens in all, encoders, other head dimensions, variants, one query on a cache."""
    for shape in _SHAPES:
        peers: dict[str, Peer] = {}
        if shape.plain:
            peers = {f"SDPA {name}": _sdpa(shape, backend) for name, backend in _BACKENDS.items()}
        else:
            peers = {"FlexAttention": functools.partial(_flex, shape)}
        yield Case(attention, shape.name, dtype, functools.partial(_arguments, shape, dtype), peers, _parts)


def _arguments(shape: _Shape, dtype: torch.dtype, device: torch.device) -> Arguments:
    spread = shape.softcap or 1.0  # of the scores: a third of them is beyond the cap
    q = randn(dtype, device, shape.batch, shape.queries, shape.heads, shape.width, scale=spread).transpose(1, 2)
    k = randn(dtype, device, shape.batch, shape.keys, shape.kv_heads, shape.width).transpose(1, 2)
    v = randn(dtype, device, shape.batch, shape.keys, shape.kv_heads, shape.value_width or shape.width).transpose(1, 2)
    made: Arguments = {"q": q, "k": k, "v": v, "scale": shape.width**-0.5, "softcap": shape.softcap}
    made |= {"left": shape.window - 1 if shape.window else -1, "right": 0 if shape.causal else -1}
    if shape.sinks:
        made["sinks"] = randn(dtype, device, shape.heads)
    if shape.alibi:
        bias = _alibi(shape, dtype, device)[None, :, None, :]
        made["bias"] = bias.expand(shape.batch, -1, shape.queries, -1)
    return made


def _sdpa(shape: _Shape, backend: SDPBackend) -> Peer:
    def prepare(arguments: Arguments) -> Callable[[], Tensor]:
        q, k, v = arguments["q"], arguments["k"], arguments["v"]
        causal = shape.causal and shape.queries > 1

        def call() -> Tensor:
            with sdpa_kernel(backend):
                y = scaled_dot_product_attention(
                    q, k, v, is_causal=causal, scale=arguments["scale"], enable_gqa=shape.heads != shape.kv_heads
                )
            return y.transpose(1, 2).contiguous()

        return call

    return prepare


def compiled(function: Callable[..., Any]) -> Any:
    """For one case: without those before it there is no limit of recompilations to reach."""
    torch.compiler.reset()
    return torch.compile(function, dynamic=False)


def compiled_flex() -> Any:
    """FlexAttention alone, compiled."""
    from torch.nn.attention.flex_attention import flex_attention

    return compiled(flex_attention)


@functools.lru_cache(maxsize=1)
def _flex_of(shape: _Shape, dtype: torch.dtype, device: torch.device) -> tuple[Any, dict[str, Any]]:
    """What all copies of a case's arguments share, so that it is compiled once: the function and its options."""
    from torch.nn.attention.flex_attention import create_block_mask

    window, softcap = shape.window, shape.softcap
    bias = _alibi(shape, dtype, device) if shape.alibi else None

    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        if window:
            return (j <= i) & (j > i - window)
        return j <= i

    def score(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        if softcap:
            s = softcap * torch.tanh(s / softcap)
        return s if bias is None else s + bias[h, j]

    mask = create_block_mask(visible, None, None, shape.queries, shape.keys, device=device)
    options = {"block_mask": mask, "scale": shape.width**-0.5, "enable_gqa": shape.heads != shape.kv_heads}
    options |= {"score_mod": score} if softcap or bias is not None else {}
    return compiled(_flex_whole), options


def _alibi(shape: _Shape, dtype: torch.dtype, device: torch.device) -> Tensor:
    """`[H, K]`: a slope a head times the key's position, as in BLOOM."""
    slopes = torch.exp2(-8.0 * torch.arange(1, shape.heads + 1, device=device) / shape.heads)
    return (slopes[:, None] * torch.arange(shape.keys, device=device)).to(dtype)


def _flex(shape: _Shape, arguments: Arguments) -> Callable[[], Tensor]:
    q, k, v, sinks = arguments["q"], arguments["k"], arguments["v"], arguments.get("sinks")
    run, options = _flex_of(shape, q.dtype, q.device)

    return lambda: run(q, k, v, sinks, options)


def _flex_whole(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, options: dict[str, Any]) -> Tensor:
    """FlexAttention with what follows it, in one compiled function."""
    from torch.nn.attention.flex_attention import flex_attention

    if sinks is None:
        y: Tensor = flex_attention(q, k, v, **options)
        return y.transpose(1, 2).contiguous()
    y, lse = flex_attention(q, k, v, return_lse=True, **options)
    y = y * torch.sigmoid(lse - sinks[None, :, None])[..., None]
    return y.to(q.dtype).transpose(1, 2).contiguous()


def _parts(arguments: Arguments) -> list[Part]:
    """A few queries from the beginning, the middle and the end of the first and the last sequence.

    With K' = K - Q + stop keys the last of `stop` queries stands where it stood, so positions stay.
    """
    queries, keys = arguments["q"].shape[2], arguments["k"].shape[2]
    parts: list[Part] = []
    for start in sorted({0, max(0, queries // 2 - _FEW_QUERIES // 2), max(0, queries - _FEW_QUERIES)}):
        stop = min(start + _FEW_QUERIES, queries)
        seen = keys - queries + stop if arguments["right"] == 0 else keys
        for batch in sorted({0, arguments["q"].shape[0] - 1}):
            small = dict(arguments)
            small["q"] = arguments["q"][batch : batch + 1, :, start:stop]
            for name in ("k", "v"):
                small[name] = arguments[name][batch : batch + 1, :, :seen]
            if "bias" in arguments:
                small["bias"] = arguments["bias"][batch : batch + 1, :, start:stop, :seen]
            parts.append((small, functools.partial(_cut, batch, slice(start, stop))))
    return parts


def _cut(batch: int, queries: slice, out: Tensor) -> Tensor:
    return out[batch : batch + 1, queries]
