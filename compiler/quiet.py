"""torch prints the whole graph and warns at length where an export fails; here failures are handled and reported."""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Iterator

_LOGGERS = ("torch.fx.experimental.symbolic_shapes", "torch.export", "torch.export.dynamic_shapes", "torch._export")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """While active, nothing but errors of torch's own loggers, and nothing on stderr."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
