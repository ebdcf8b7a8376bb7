"""A model's code as it runs without a compiler.

transformers' code asks `is_torchdynamo_compiling()`, which says yes to an export, and some of it then leaves out what
the rest of the forward relies on (LongT5, Switch: a mask of ones where the caller gave none).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

_ASKS = "is_torchdynamo_compiling"


@contextmanager
def eager_branches(model: nn.Module) -> Iterator[bool]:
    """While active, the files of a model's modules are told that nothing compiles them; whether any of them asks."""
    files = {type(m).__module__ for m in model.modules()}
    held = [vars(sys.modules[name]) for name in files if _ASKS in vars(sys.modules[name])]
    before = [names[_ASKS] for names in held]
    try:
        for names in held:
            names[_ASKS] = lambda: False
        yield bool(held)
    finally:
        for names, function in zip(held, before, strict=True):
            names[_ASKS] = function
