"""Cases of norms and the products behind them at one row. Their peer is the best kernel of each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Final

import torch
from torch import Tensor

from .case import EPS, Arguments, Case, randn, whole
from .cases_linear import best_kernel
from .cases_qkv import qkv_ropes
from .linear_act import gate_up, linear_act
from .norm_products import JOINT, NORM
from .op import Op
from .rms_norm import add_rms_norm

_WIDTHS: Final = (
    # of, width, columns of the gated product, columns of the plain one
    ("llama-8B", 4096, 14336, 6144),
    ("llama-1B", 2048, 8192, 3072),
    ("Qwen3-0.6B", 1024, 3072, 4096),
)


def joints(dtype: torch.dtype) -> Iterator[Case]:
    """The products behind the norms of three models."""
    for of, width, gated, columns in _WIDTHS:
        for op, n in ((gate_up, gated), (linear_act, columns)):
            kind = "silu" if op is gate_up else "identity"

            def product(
                device: torch.device, k: int = width, n: int = n * (1 + (op is gate_up)), kind: str = kind
            ) -> Arguments:
                return {"weight": randn(dtype, device, n, k, scale=k**-0.5), "bias": None, "kind": kind}

            yield _joint(op, f"{of}: norm, 1 x {width} -> {n}, {kind}", dtype, width, product)
    for case in qkv_ropes(dtype):
        x = case.arguments(torch.device("meta"))["x"]
        if x.shape[1] == 1:
            yield _joint(case.op, f"norm, {case.name}", dtype, x.shape[2], case.arguments)


def _joint(
    op: Op, name: str, dtype: torch.dtype, width: int, product: Callable[[torch.device], Arguments]
) -> Case:  # fmt: skip
    joint = JOINT[op.name]

    def arguments(device: torch.device) -> Arguments:
        x, residual = (randn(dtype, device, 1, 1, width) for _ in range(2))
        norm = (x, residual, randn(dtype, device, width), EPS, 0.0, dtype, dtype)
        names = [a.name for a in joint.overload._schema.arguments]
        given = product(device)
        return {**dict(zip(names, norm, strict=False)), **{n: given[n] for n in names[NORM:]}}

    def separate(given: Arguments) -> Callable[[], tuple[Tensor, Tensor]]:
        args: list[Any] = list(given.values())
        first, second = best_kernel(add_rms_norm, *args[:NORM]), best_kernel(op, args[0], *args[NORM:])

        def run() -> tuple[Tensor, Tensor]:
            y, s = first(*args[:NORM])
            return second(y, *args[NORM:]), s

        return run

    return Case(joint, name, dtype, arguments, {"the norm's kernel, the product's": separate}, whole)
