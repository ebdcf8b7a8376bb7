"""What can go wrong, as exceptions: each says what failed, where, and how to go on without it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class RegraftError(Exception):
    """Base of everything regraft raises on its own account."""


class OptionError(RegraftError, ValueError):
    """An option that does not exist, or a value it cannot take."""


class UnsupportedModelError(RegraftError, ValueError):
    """A model that cannot be optimized as it is; the message says what to do first."""


class InputError(RegraftError, ValueError):
    """Inputs of a call, or example inputs, that the model cannot take."""


class CompileError(RegraftError):
    """A pass or a rule failed where it should have refused; its own error is the cause."""


class StrictError(RegraftError):
    """Under `strict=True`: something was left as it was that should have been optimized."""


class ParityError(RegraftError):
    """The rewritten model differs from the original and no rewrite could be found whose removal repairs it."""


class RegraftWarning(UserWarning):
    """Something worth knowing about an optimized model, such as a call its original served; each is said once."""


def closest(name: str, known: Iterable[str]) -> str:
    """`, did you mean 'rope'?` where one of `known` is near `name`, else a full stop."""
    match = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f", did you mean {match[0]!r}?" if match else "."
