"""Compiling without launching: the kernels of calls whose results nobody wants, several at a time."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any, Final

import torch
import triton
from torch.utils._python_dispatch import TorchDispatchMode

from . import replay

aten = torch.ops.aten

WORKERS: Final = 8
"""Kernels that are compiled at a time, at most. Much of it runs outside of the interpreter's lock."""


class _WithoutProducts(TorchDispatchMode):
    """Products by the vendor's library, which is nearly all that is left to compute, are not computed."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func in (aten.mm.default, aten.addmm.default):
            x, weight = args[-2:]
            return x.new_empty(x.shape[0], weight.shape[1])
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def compiling(until: float) -> Iterator[Callable[[], int]]:
    """Calls of our ops in the block have their kernels compiled and launch nothing: what they return is arbitrary.

    The block is left when all are compiled, or at `until` on the clock of `time.monotonic`, but for what is being
    compiled just then; the rest is compiled when it is first launched. So is what cannot be compiled, which says so
    then. Yields a function that takes in what is ready, and returns how many kernels that are.
    """
    with ThreadPoolExecutor(min(WORKERS, os.cpu_count() or 1)) as pool:
        mode = triton.AsyncCompileMode(pool, ignore_errors=True)

        def ready() -> int:
            done = [k for k in mode.future_kernels.values() if k.future.done()]
            return sum(kernel.result(ignore_errors=True) is not None for kernel in done)

        with mode:
            try:
                with replay.launching_nothing(), _WithoutProducts():
                    yield ready
                wait(mode.raw_futures, timeout=max(0.0, until - time.monotonic()))
            finally:
                for future in mode.raw_futures:
                    future.cancel()
