"""What went wrong while a model was captured, said so that its owner can act on it."""

from __future__ import annotations

import inspect
import linecache
import traceback
from types import TracebackType

from torch import nn


class CaptureError(RuntimeError):
    """The model, or this part of it, cannot become one graph.

    `module` is its qualified name ("" is the model itself), `reason` says what was in the way, `source` is the line in
    the model's file (`modeling_x.py:12 code`), empty where none is to blame, `hint` how to go on.
    """

    def __init__(self, module: str, reason: str, source: str = "", hint: str = "") -> None:
        self.module, self.reason, self.source, self.hint = module, reason, source, hint
        where = f" at {source}" if source else ""
        super().__init__(f"{module or 'the model'}: {reason}{where}" + (f". {hint}" if hint else ""))


class RefusedError(CaptureError):
    """The model's own forward fails on these arguments."""


def model_files(model: nn.Module) -> frozenset[str]:
    """Files that define the classes of the model's modules, without torch's own."""
    files = set()
    for kind in {type(m) for m in model.modules()}:
        if not kind.__module__.startswith("torch."):
            try:
                files.add(inspect.getfile(kind))
            except (TypeError, OSError):  # a class made in an interactive session has no file
                continue
    return frozenset(files)


def source_line(error: BaseException, files: frozenset[str]) -> str:
    """The deepest line of the model's own files that the error, or what caused it, went through."""
    seen: BaseException | None = error
    while seen is not None:
        found = _deepest(seen.__traceback__, files)
        if found:
            return found
        seen = seen.__cause__ or seen.__context__
    return ""


def _deepest(trace: TracebackType | None, files: frozenset[str]) -> str:
    found = ""
    for frame, line in traceback.walk_tb(trace):
        name = frame.f_code.co_filename
        if name in files:
            found = f"{name.rsplit('/', 1)[-1]}:{line} {linecache.getline(name, line).strip()}"
    return found


def first_lines(error: BaseException, limit: int = 300) -> str:
    """The type and the first sentence or two of an error message, on one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:limit]}{'...' if len(text) > limit else ''}"
