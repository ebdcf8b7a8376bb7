"""Compiling without launching: the kernels of calls whose results nobody wants, several at a time."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import logging
import os
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any, Final

import torch
import triton
from torch.utils._python_dispatch import TorchDispatchMode

from . import replay

aten = torch.ops.aten

WORKERS: Final = 16
"""Kernels that are compiled at a time, at most. Nearly all of it runs outside of the interpreter's lock."""
SECONDS: Final = 60.0
"""What `ahead` takes at most, but for what is being compiled just then."""

log = logging.getLogger("regraft")


class _WithoutProducts(TorchDispatchMode):
    """Products by the vendor's library, which is nearly all that is left to compute, are not computed."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func in (aten.mm.default, aten.addmm.default):
            x, weight = args[-2:]
            return x.new_zeros(x.shape[0], weight.shape[1])
        return func(*args, **(kwargs or {}))


class _Mode(triton.AsyncCompileMode):
    """One that makes kernels ready to be launched, on the device with their launchers, which a C compiler builds.

    Nothing keeps its end from being reached: a hook of somebody else's that fails is passed over.
    """

    def submit(self, key: Any, compile_fn: Callable[[], Any], finalize_fn: Callable[[Any], Any]) -> Any:
        def make() -> Any:
            kernel = compile_fn()
            _ = kernel.run
            return kernel

        def finish(kernel: Any) -> None:
            with contextlib.suppress(Exception):
                finalize_fn(kernel)

        return super().submit(key, make, finish)


def ahead(calls: Iterable[Callable[[], object]]) -> None:
    """Have the kernels of these calls before the first of them is run: whatever goes wrong costs time then."""

    def run(ready: Callable[[], int]) -> None:
        for call in calls:
            try:
                call()
            except Exception:
                log.debug("a call whose kernels are compiled when they are launched", exc_info=True)
            ready()

    try:
        compile_only(run, time.monotonic() + SECONDS)
    except Exception:
        log.debug("kernels are compiled when they are launched", exc_info=True)


def compile_only(calls: Callable[[Callable[[], int]], None], until: float) -> None:
    """Run `calls`, in which our ops have their kernels compiled and launch nothing: what they return is arbitrary.

    It ends when all are compiled, or at `until` on the clock of `time.monotonic` but for what is being compiled just
    then. What is left, or cannot be compiled, is compiled when it is first launched.

    Args:
        calls: is given a function that takes in what is ready, and returns how many kernels that are.
    """
    contextvars.copy_context().run(_compile_only, calls, until)  # where the mode goes when it ends, however that is


def _compile_only(calls: Callable[[Callable[[], int]], None], until: float) -> None:
    workers = min(WORKERS, os.cpu_count() or 1)
    with ThreadPoolExecutor(workers, initializer=_choose_device()) as pool, _Mode(pool, ignore_errors=True) as mode:

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


def _choose_device() -> Callable[[], None] | None:
    """What makes the current device of this thread that of another."""
    if not torch.cuda.is_initialized():
        return None
    return functools.partial(torch.cuda.set_device, torch.cuda.current_device())
