"""A certificate that fails: verify every site; if that does not help, find the rewrites to blame, and revert them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TypeVar

from ..compiler.records import PassResult, Reverted, Rewrite
from .certificate import Certificate

log = logging.getLogger("regraft")

Site = tuple[str, str]
T = TypeVar("T")

MAX_TRIALS = 40
MAX_TRIALS_A_RULE = 10
"""Compilations spent on the search, over rules and then within a wrong one; what is undecided then is reverted."""


def repair(
    compile_with: Callable[[str, frozenset[Site]], T],
    measure: Callable[[T], Certificate],
    candidate: T,
    certificate: Certificate,
    passes: Callable[[], Iterable[PassResult]],
) -> tuple[T, Certificate, list[Reverted]]:
    """The candidate with as many rewrites as pass the certificate, its certificate, and what was reverted.

    `compile_with(verify, deny)` compiles, `measure` certifies, `passes()` are the results of the last compilation.
    """
    reason = certificate.reason
    candidate = compile_with("full", frozenset())
    certificate = measure(candidate)
    if certificate.passed:
        caught = [r for p in passes() for r in p.reverted]
        log.warning("verifying every site reverted %d rewrites", len(caught))
        return candidate, certificate, []
    rewrites = [r for p in passes() for r in p.rewrites]
    sites = [sites_of(r) for r in rewrites]

    def works(kept: Sequence[int]) -> bool:
        nonlocal candidate, certificate
        chosen = set(kept)
        denied = frozenset(s for i, group in enumerate(sites) if i not in chosen for s in group)
        candidate = compile_with("full", denied)
        certificate = measure(candidate)
        return certificate.passed

    def also(sure: Sequence[int], more: Sequence[int]) -> bool:
        return works([*sure, *more])

    by_rule: dict[str, list[int]] = {}
    for index, rewrite in enumerate(rewrites):
        by_rule.setdefault(rewrite.rule, []).append(index)
    rules = list(by_rule.values())
    whole = largest_working(range(len(rules)), lambda chosen: works([i for r in chosen for i in rules[r]]))
    kept = [i for r in whole for i in rules[r]]
    for r in sorted(set(range(len(rules))) - set(whole)):  # a rule that is wrong somewhere may be right elsewhere
        sure = tuple(kept)
        kept += largest_working(rules[r], partial(also, sure), limit=MAX_TRIALS_A_RULE)
    works(kept)
    blamed = [r for i, r in enumerate(rewrites) if i not in set(kept)]
    return candidate, certificate, [_reverted(r, reason) for r in blamed]


def largest_working(items: Sequence[int], works: Callable[[Sequence[int]], bool], limit: int = MAX_TRIALS) -> list[int]:
    """As many of `items` as can be kept while `works(kept)`, by halving; at most `limit` trials."""
    good: list[int] = []
    queue = [list(items)]
    trials = 0
    while queue and trials < limit:
        part = queue.pop(0)
        trials += 1
        if works([*good, *part]):
            good += part
        elif len(part) > 1:
            half = len(part) // 2
            queue[:0] = [part[:half], part[half:]]
    return sorted(good)


def sites_of(rewrite: Rewrite) -> frozenset[Site]:
    """What to deny so that this rewrite does not happen again."""
    return frozenset((rewrite.rule, name) for name in rewrite.replaced)


def _reverted(rewrite: Rewrite, reason: str) -> Reverted:
    return Reverted(rewrite.rule, rewrite.module, rewrite.source, f"the whole model differed: {reason}", rewrite.check)
