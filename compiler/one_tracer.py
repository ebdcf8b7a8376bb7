"""One thread traces at a time, and others keep out of it.

While `torch.export` traces a module, its parameters are stand-ins and every call of any module in any thread goes
through the tracer. So other threads wait before they run the module, and get past the tracer on their way there.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

from torch.fx.experimental.proxy_tensor import _ModuleStackTracer

_lock = threading.RLock()
_owner: int | None = None


@contextlib.contextmanager
def tracing_alone() -> Iterator[None]:
    """This thread traces in the block."""
    global _owner
    with _lock:
        before, _owner = _owner, threading.get_ident()
        try:
            yield
        finally:
            _owner = before


def wait_for_tracer() -> None:
    """Returns when no other thread is tracing."""
    if _elsewhere():
        with _lock:
            pass


def _elsewhere() -> bool:
    return _owner is not None and _owner != threading.get_ident()


def _keep_out() -> None:
    """Has the tracer leave calls and attributes of other threads alone."""
    call, attribute = _ModuleStackTracer.call_module, _ModuleStackTracer.getattr

    def call_module(self: Any, m: Any, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        return forward(*args, **kwargs) if _elsewhere() else call(self, m, forward, args, kwargs)

    def getattr(self: Any, attr: str, attr_val: object, parameter_proxy_cache: Any) -> object:
        return attr_val if _elsewhere() else attribute(self, attr, attr_val, parameter_proxy_cache)

    _ModuleStackTracer.call_module = call_module  # type: ignore[method-assign]
    _ModuleStackTracer.getattr = getattr  # type: ignore[method-assign]


_keep_out()
