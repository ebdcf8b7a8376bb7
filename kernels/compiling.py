"""Compiling without launching: the kernels of calls whose results nobody wants, several at a time.

    compile_only(calls, until)      # all of them, now
    compile_behind(calls, until)    # a few at a time while others run; who launches one of them waits for that one

A kernel is ready when it is on the device and its launcher, which a C compiler builds, is there.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import logging
import os
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Executor, Future, ThreadPoolExecutor, wait
from operator import itemgetter
from typing import Any, Final

import torch
import triton
from torch.utils._python_dispatch import TorchDispatchMode

from . import replay

aten = torch.ops.aten
log = logging.getLogger("regraft")

WORKERS: Final = 16
"""Kernels that are compiled at a time, at most. Nearly all of it runs outside of the interpreter's lock."""
BEHIND: Final = 4
"""While others run: they want the interpreter's lock too."""
SECONDS: Final = 60.0
"""What `ahead` takes at most, but for what is being compiled just then."""

Calls = Iterable[Callable[[], object]]


class _WithoutProducts(TorchDispatchMode):
    """Products by the vendor's library, which is nearly all that is left to compute, are not computed."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func in (aten.mm.default, aten.addmm.default):
            x, weight = args[-2:]
            return x.new_zeros(x.shape[0], weight.shape[1])
        return func(*args, **(kwargs or {}))


class _Late(Exception):
    """It was not begun in time."""


class _Held(Executor):
    """Begins with nothing before all is known, and then with what takes longest: Gluon's kernels."""

    def __init__(self, pool: ThreadPoolExecutor) -> None:
        self._pool = pool
        self._held: list[tuple[bool, Future[Any], Callable[[], Any]]] = []

    def submit(self, call: Callable[[], Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        kernel = replay.being_compiled()
        self._held.append((kernel is None or not kernel.is_gluon(), future, functools.partial(call, *args, **kwargs)))
        return future

    def begin(self) -> None:
        for _, future, call in sorted(self._held, key=itemgetter(0)):
            self._pool.submit(_run, future, call)
        self._held.clear()


def _run(future: Future[Any], call: Callable[[], Any]) -> None:
    if future.set_running_or_notify_cancel():
        try:
            future.set_result(call())
        except BaseException as error:  # noqa: BLE001 - whoever asks for the result gets it
            future.set_exception(error)


class _Mode(triton.AsyncCompileMode):
    """Kernels are made ready by the threads of `pool`, as soon as all are known, and until a time."""

    def __init__(self, pool: ThreadPoolExecutor, until: float) -> None:
        self.until, self.held = until, _Held(pool)
        super().__init__(self.held, ignore_errors=True)

    def submit(self, key: Any, compile_fn: Callable[[], Any], finalize_fn: Callable[[Any], Any]) -> Any:
        """From a call of which nothing is launched: have it compiled. From another: the one that is being compiled.

        Triton 3.7 takes what is returned into its cache at once, and would fail in each later launch if that failed.
        """
        if not replay.compiling():
            begun = self.future_kernels.get(key)
            if begun is None or begun.future.cancel():
                raise _Late
            try:
                return begun.result()
            except Exception as error:
                raise _Late from error
        other = replay.behind()
        begun = other.future_kernels.get(key) if other is not None else None
        if begun is not None and not begun.future.cancel():  # it is being compiled for somebody else
            self.future_kernels[key] = begun
            self.raw_futures.append(begun.future)
            return None

        def make() -> Any:
            if time.monotonic() > self.until:
                raise _Late
            kernel = compile_fn()
            _ = kernel.run
            with contextlib.suppress(Exception):  # a hook of somebody else's
                finalize_fn(kernel)
            return kernel

        super().submit(key, make, lambda kernel: None)
        return None

    def gather(self, calls: Calls) -> None:
        """Run the calls, and begin with what they need."""
        try:
            self.__enter__()
            with replay.launching_nothing(), _WithoutProducts():
                for call in calls:
                    call()
        finally:
            self.held.begin()

    def launch(self, call: Callable[[], Any]) -> Any:
        """A call that launches a kernel: it waits where that kernel is being compiled."""
        context = contextvars.copy_context()
        context.run(self.__enter__)
        try:
            return context.run(call)
        except _Late:
            return call()
        finally:
            if all(future.done() for future in self.raw_futures):
                replay.forget_behind(self)


def compile_only(calls: Calls, until: float) -> None:
    """Run `calls`, in which our ops have their kernels compiled and launch nothing: what they return is arbitrary.

    It ends when all are compiled, or at `until` on the clock of `time.monotonic` but for what is being compiled just
    then. What is left, or cannot be compiled, is compiled when it is first launched.
    """
    with _pool(WORKERS) as pool:
        mode = _Mode(pool, until)
        try:
            contextvars.copy_context().run(mode.gather, calls)  # where the mode stays, however that ends
            wait(mode.raw_futures, timeout=max(0.0, until - time.monotonic()))
        finally:
            mode.until = 0.0


def compile_behind(calls: Calls, until: float) -> None:
    """Run `calls` as `compile_only` does, but compile what they need while others run; nothing is begun after `until`.

    Until all is done, what is launched for the first time waits where its kernel is being compiled. At the end of the
    process those that are being compiled are waited for.
    """
    mode = _Mode(_pool(BEHIND), until)
    try:
        contextvars.copy_context().run(mode.gather, calls)
    finally:
        if mode.raw_futures:
            replay.set_behind(mode)


def settle() -> None:
    """Wait for all that is compiled while others run."""
    mode = replay.behind()
    if isinstance(mode, _Mode):
        wait(mode.raw_futures)


def ahead(calls: Calls) -> None:
    """Have the kernels of these calls before the first of them is run: whatever goes wrong costs time then."""

    def tried(call: Callable[[], object]) -> None:
        try:
            call()
        except Exception:
            log.debug("a call whose kernels are compiled when they are launched", exc_info=True)

    try:
        compile_only((functools.partial(tried, call) for call in calls), time.monotonic() + SECONDS)
    except Exception:
        log.debug("kernels are compiled when they are launched", exc_info=True)


def _pool(workers: int) -> ThreadPoolExecutor:
    """Threads whose current device is this thread's."""
    device = torch.cuda.current_device() if torch.cuda.is_initialized() else None
    choose = None if device is None else functools.partial(torch.cuda.set_device, device)
    return ThreadPoolExecutor(min(workers, os.cpu_count() or 1), "regraft-compile", initializer=choose)
