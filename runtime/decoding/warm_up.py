"""Compiling the kernels of prompts of all lengths when the first one comes, within a bound of time.

Which kernels compute a step depends on how many tokens it has: tables say where another one, or another configuration,
takes over. Of each class of lengths between two such places the smallest member is run, without launching anything.
"""

from __future__ import annotations

import bisect
import functools
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from .buckets import token_bucket

log = logging.getLogger("regraft")

SHORT: Final = 256
"""Tokens of a mixed step that is rounded up to a bucket and, when it comes again, run by a CUDA graph."""
STEP: Final = 64
"""Longer ones are rounded up to a multiple of this."""


def padded(tokens: int) -> int:
    """Tokens of a mixed step, padding included."""
    return token_bucket(tokens) if tokens <= SHORT else -(-tokens // STEP) * STEP


@dataclass(frozen=True)
class Shape:
    """A mixed step as far as kernels depend on it."""

    tokens: int
    max_q: int
    fresh: bool = False


def shapes(rows: int, most: int, thresholds: Sequence[int], near: int) -> list[Shape]:
    """A step of each class that steps of `rows` rows and at most `most` tokens fall into, those like `near` first."""
    sizes = sorted({padded(tokens) for tokens in (*range(1, min(most, SHORT) + 1), *range(SHORT + 1, most + 1))})
    found = [Shape(token_bucket(rows), 1)]  # prompts that are known but for their last token
    for size in _first(sizes, token_bucket):
        found += [Shape(size, q) for q in _longest(rows, size)]
    for size in _first(sizes, lambda tokens: bisect.bisect_right(thresholds, tokens)):
        found += [Shape(size, q, fresh=size > SHORT) for q in _longest(rows, size)]
    return sorted(dict.fromkeys(found), key=lambda shape: max(shape.tokens, near) / min(shape.tokens, near))


def _first(sizes: Iterable[int], kind: Callable[[int], int]) -> list[int]:
    """The smallest size of each kind."""
    found: dict[int, int] = {}
    for size in sizes:
        found.setdefault(kind(size), size)
    return list(found.values())


def _longest(rows: int, size: int) -> list[int]:
    """The most tokens of a row: all, or as many as the others have."""
    return list(dict.fromkeys((size, min(size, token_bucket(-(-size // rows))))))


def announced(wanted: Sequence[Shape], rows: int, seconds: int, each: int) -> str:
    """What is about to be done, how long it may take, and what it holds meanwhile, at `each` bytes a token."""
    most = max(shape.tokens for shape in wanted)
    size = max(1, most * each >> 20)
    return (
        f"regraft: compiling kernels for prompts of up to {most} tokens, batch {rows} ({len(wanted)} kinds of steps): "
        f"this prompt's at once, the others while it runs; at most {seconds} s each, less where they were compiled "
        f"before, and about {size} MiB meanwhile"
    )


def run(
    wanted: Sequence[Shape],
    compute: Callable[[Shape], object],
    compile_them: Callable[[Iterable[Callable[[], object]], float], None],
    seconds: float,
) -> int:
    """Run `compute` for each shape where nothing is launched, until `seconds` have gone by; returns for how many.

    Whatever goes wrong costs time later, and is said: no prompt depends on it.
    """
    started = time.monotonic()
    done = 0

    def calls() -> Iterator[Callable[[], object]]:
        nonlocal done
        for shape in wanted:
            if time.monotonic() - started > seconds:
                break
            yield functools.partial(compute, shape)
            done += 1

    try:
        compile_them(calls(), started + seconds)
    except Exception as error:  # noqa: BLE001 - memory that is not there, or a kernel's launcher in any way
        text = "kernels for steps of %d tokens and more are compiled when they come (%s: %s)"
        log.warning(text, wanted[min(done, len(wanted) - 1)].tokens, type(error).__name__, str(error)[:200])
    taken = time.monotonic() - started
    log.info("kernels of %d of %d kinds of steps were asked for in %.1f s", done, len(wanted), taken)
    return done
