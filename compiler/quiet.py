"""torch prints the whole graph and warns at length where an export fails; here failures are handled and reported."""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Iterator

_LOGGERS = (
    "torch.fx.experimental.symbolic_shapes",
    "torch.export",
    "torch.export.dynamic_shapes",
    "torch._export",
    "torch._subclasses.fake_tensor",
)


@contextlib.contextmanager
def loggers_quiet() -> Iterator[None]:
    """While active, nothing of torch's own loggers that an exception says as well."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """And nothing on stderr."""
    with loggers_quiet(), contextlib.redirect_stderr(io.StringIO()):
        yield
