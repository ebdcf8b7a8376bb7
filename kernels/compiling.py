"""Compiling without launching: the kernels of calls whose results nobody wants, several at a time."""

from __future__ import annotations

import contextlib
import contextvars
import os
import time
from collections.abc import Callable
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


class _Mode(triton.AsyncCompileMode):
    """One whose end nothing keeps from being reached: a hook of somebody else's that fails is passed over."""

    def submit(self, key: Any, compile_fn: Callable[[], Any], finalize_fn: Callable[[Any], Any]) -> Any:
        def finish(kernel: Any) -> None:
            with contextlib.suppress(Exception):
                finalize_fn(kernel)

        return super().submit(key, compile_fn, finish)


def compile_only(calls: Callable[[Callable[[], int]], None], until: float) -> None:
    """Run `calls`, in which our ops have their kernels compiled and launch nothing: what they return is arbitrary.

    It ends when all are compiled, or at `until` on the clock of `time.monotonic` but for what is being compiled just
    then. What is left, or cannot be compiled, is compiled when it is first launched.

    Args:
        calls: is given a function that takes in what is ready, and returns how many kernels that are.
    """
    contextvars.copy_context().run(_compile_only, calls, until)  # where the mode goes when it ends, however that is


def _compile_only(calls: Callable[[Callable[[], int]], None], until: float) -> None:
    with ThreadPoolExecutor(min(WORKERS, os.cpu_count() or 1)) as pool, _Mode(pool, ignore_errors=True) as mode:

        def ready() -> int:
            done = [k for k in mode.future_kernels.values() if k.future.done()]
            return sum(kernel.result(ignore_errors=True) is not None for kernel in done)

        try:
            with replay.launching_nothing(), _WithoutProducts():
                calls(ready)
            wait(mode.raw_futures, timeout=max(0.0, until - time.monotonic()))
        finally:
            for future in mode.raw_futures:
                future.cancel()
