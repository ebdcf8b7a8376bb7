"""A certificate that fails: verify every site; if that does not help, find the rewrites to blame, and revert them.

In order: every site verified; no kernels, only their references; then the rules, and within a wrong rule its sites, by
halving. What is kept is as much as passes the certificate.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Generic, TypeVar

from ..compiler.records import PassResult, Reverted, Rewrite
from .certificate import Certificate

log = logging.getLogger("regraft")

Site = tuple[str, str]
"""A rule, and the name of a node it replaced, or `*` for the whole rule."""
T = TypeVar("T")

MAX_TRIALS = 40
MAX_TRIALS_A_RULE = 10
"""Compilations spent on the search, over rules and then within a wrong one; what is undecided then is reverted."""
AFTER_REWRITING = ("PACK", "LOWER")


@dataclass(frozen=True)
class Attempt(Generic[T]):
    """One compilation, certified."""

    candidate: T
    passes: list[PassResult]
    certificate: Certificate

    @property
    def rewrites(self) -> list[Rewrite]:
        """What rules replaced; packing and the choice of kernels are not rules."""
        return [r for p in self.passes if p.stage not in AFTER_REWRITING for r in p.rewrites]


Compile = Callable[[str, frozenset[Site], bool], Attempt[T]]
"""`(verify, deny, kernels)`: compile, pack and certify."""


def repair(attempt: Compile[T], reason: str) -> tuple[Attempt[T], list[Reverted]]:
    """The attempt with as many rewrites as pass the certificate, and what was reverted; `reason` is what failed."""
    full = attempt("full", frozenset(), True)
    if full.certificate.passed:
        log.warning("verifying every site reverted %d rewrites", sum(len(p.reverted) for p in full.passes))
        return full, []
    plain = attempt("full", frozenset(), False)
    if plain.certificate.passed:
        message = f"the whole model differed: {reason}; the references of all ops are used instead of kernels"
        return plain, [Reverted("lower", "", "", message)]
    rules = list(dict.fromkeys(r.rule for r in full.rewrites))

    def with_rules(kept: Sequence[str]) -> bool:
        deny = frozenset((r, "*") for r in rules if r not in kept)
        return attempt("full", deny, True).certificate.passed

    kept_rules = largest_working(rules, with_rules)
    wrong = [r for r in rules if r not in kept_rules]
    denied: set[Site] = {(r, "*") for r in wrong}
    reverted: list[Rewrite] = []
    for rule in wrong:  # wrong at one site, it may be right at others
        denied.discard((rule, "*"))
        own = [r for r in full.rewrites if r.rule == rule]

        def with_sites(kept: Sequence[int], own: list[Rewrite], others: frozenset[Site]) -> bool:
            deny = others | {s for i, r in enumerate(own) if i not in kept for s in sites_of(r)}
            return attempt("full", deny, True).certificate.passed

        test = partial(with_sites, own=own, others=frozenset(denied))
        kept_sites = largest_working(range(len(own)), test, MAX_TRIALS_A_RULE) if len(own) > 1 else []
        bad = [r for i, r in enumerate(own) if i not in kept_sites]
        denied |= {s for r in bad for s in sites_of(r)} if kept_sites else {(rule, "*")}
        reverted += bad
    final = attempt("full", frozenset(denied), True)
    return final, [_reverted(r, reason) for r in reverted]


K = TypeVar("K")


def largest_working(items: Sequence[K], works: Callable[[Sequence[K]], bool], limit: int = MAX_TRIALS) -> list[K]:
    """As many of `items` as can be kept while `works(kept)`, by halving; all together are known to fail."""
    good: list[K] = []
    half = (len(items) + 1) // 2
    queue = [list(items[:half]), list(items[half:])]
    trials = 0
    while queue and trials < limit:
        part = queue.pop(0)
        if not part:
            continue
        trials += 1
        if works([*good, *part]):
            good += part
        elif len(part) > 1:
            half = len(part) // 2
            queue[:0] = [part[:half], part[half:]]
    return [i for i in items if i in good]


def sites_of(rewrite: Rewrite) -> frozenset[Site]:
    """What to deny so that this rewrite does not happen again."""
    return frozenset((rewrite.rule, name) for name in rewrite.replaced)


def _reverted(rewrite: Rewrite, reason: str) -> Reverted:
    return Reverted(rewrite.rule, rewrite.module, rewrite.source, f"the whole model differed: {reason}", rewrite.check)
