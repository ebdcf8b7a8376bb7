"""Cases of the q, k and v projection with rotation. Their peer is cuBLAS with a kernel for norm and rotation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final

import torch
from torch import Tensor

from .case import EPS, Arguments, Case, plain, randn, some_rows
from .qkv_rope import qkv_rope

_ROWS: Final = (1, 2, 4, 8, 16, 32, 64, 2048, 8192)
_MODELS: Final = (
    # of, width, q heads, kv heads, head dim, norm of q and k, bias
    ("llama-8B", 4096, 32, 8, 128, False, False),
    ("Qwen3-0.6B", 1024, 16, 8, 128, True, False),
    ("Qwen2.5-7B", 3584, 28, 4, 128, False, True),
)


def qkv_ropes(dtype: torch.dtype) -> Iterator[Case]:
    """The projections of three models at few rows and at many."""
    for of, width, heads, kv_heads, head, norm, bias in _MODELS:
        for rows in _ROWS:

            def arguments(
                device: torch.device,
                rows: int = rows,
                width: int = width,
                heads: int = heads,
                kv_heads: int = kv_heads,
                head: int = head,
                norm: bool = norm,
                bias: bool = bias,
            ) -> Arguments:
                n = (heads + 2 * kv_heads) * head
                gains = [randn(dtype, device, head) if norm else None for _ in range(2)]
                cos, sin = (randn(dtype, device, 1, rows, head) for _ in range(2))
                return {
                    "x": randn(dtype, device, 1, rows, width),
                    "weight": randn(dtype, device, n, width, scale=width**-0.5),
                    "bias": randn(dtype, device, n) if bias else None,
                    "cos": cos,
                    "sin": sin,
                    "q_weight": gains[0],
                    "k_weight": gains[1],
                    "q_heads": heads,
                    "k_heads": kv_heads,
                    "head_dim": head,
                    "norm": norm,
                    "eps": EPS,
                    "offset": 0.0,
                    "mid_dtype": dtype if norm else None,
                    "layout": "half",
                    "compute_dtype": None,
                }

            steps = "norm, rope" if norm else "bias, rope" if bias else "rope"
            name = f"{of}: {rows} x {width} -> {heads} + 2 x {kv_heads} heads of {head}, {steps}"
            peers = {f"cuBLAS, {steps} kernel in place": _two_kernels, "cuBLAS, eager": plain(qkv_rope.reference)}
            yield Case(qkv_rope, name, dtype, arguments, peers, some_rows("x", "cos", "sin"))


def _two_kernels(given: Arguments) -> Callable[[], Tensor]:
    """The product, then one kernel for the heads of q and k in place: no more memory traffic than separate ones."""
    if not given["x"].is_cuda:
        return lambda: qkv_rope.reference(**given)
    from . import qkv_rope_triton

    return lambda: qkv_rope_triton.qkv_rope(**given)
