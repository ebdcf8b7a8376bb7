"""Kernels that are about to be needed, compiled several at a time instead of one after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch


def compile_ahead(device: torch.device, calls: Iterable[Callable[[], object]]) -> None:
    """Have the kernels of these calls on the device: nothing is launched, and what the calls return is arbitrary.

    Whatever goes wrong costs time when they are run.
    """
    from ..kernels.table import PROVIDERS

    if device.type == "cuda" and PROVIDERS:
        from ..kernels.compiling import ahead  # Triton is not there on every platform

        with torch.no_grad(), torch.cuda.device(device):
            ahead(calls)
