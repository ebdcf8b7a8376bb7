"""Where rules hold: sites of patterns and of groups, refusals of `check`, and the near-misses that are told."""

from __future__ import annotations

import logging
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Hashable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from torch import fx

from .match import Failure, GraphIndex, Match, Matcher
from .opset import Role, is_free, role_of
from .provenance import module_of, source_of
from .records import NearMiss
from .rule import Emitter, GroupRule, Reject, Rule

log = logging.getLogger(__name__)

NEAR = 0.55
"""Share of a pattern that must have matched for its failure to be worth telling."""

SMALL = 6
"""Patterns of fewer parts fit half of many things: for them only refusals of `check` are told."""

Nodes = Sequence[fx.Node]

Misses = list[tuple[Rule | GroupRule, Failure, int]]
"""A rule, how far it got, and the size of its pattern."""

Deny = Collection[tuple[str, str]]
"""(rule, anchor node name) pairs that must stay as they are; (rule, "*") is the whole rule."""


@dataclass(frozen=True)
class Site:
    """A place where a rule holds."""

    rule: Rule | GroupRule
    nodes: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]
    emit: Callable[[Emitter], fx.Node | tuple[fx.Node, ...]]
    label: str


def claims_of(nodes: Sequence[fx.Node], outputs: Sequence[fx.Node]) -> set[fx.Node]:
    """Everything that costs something, and the outputs; views and casts may serve several."""
    return {n for n in nodes if not is_free(n)} | set(outputs)


def collect(rule: Rule | GroupRule, index: GraphIndex, deny: Deny, misses: Misses) -> list[Site]:
    if (rule.name, "*") in deny:
        return []
    if isinstance(rule, GroupRule):
        return _collect_groups(rule, index, deny, misses)
    matcher = Matcher(index, rule.traced)
    sites: list[Site] = []
    claimed: set[fx.Node] = set()
    for anchor in index.anchors(rule.traced.roots):
        if anchor in claimed or (rule.name, anchor.name) in deny:
            continue
        failure: Failure | None = None
        least = NEAR * rule.traced.size if rule.traced.size >= SMALL else float("inf")
        for match in matcher.matches(anchor):
            reject = _checked(rule, match) or _crossing(match.nodes, match.outputs, match.inputs, index)
            if reject is not None:
                failure = _refusal(reject, rule.traced.size, match.anchor)
                continue
            sites.append(Site(rule, match.nodes, match.outputs, partial(rule.emit, match), rule.describe(match)))
            claimed |= claims_of(match.nodes, match.outputs)
            failure = None
            break
        else:
            refused = failure is not None and failure.depth > 0
            failure = failure or matcher.failure
            if refused or failure.depth >= least:
                misses.append((rule, failure, rule.traced.size))
    covered = {n for site in sites for n in site.nodes}
    misses[:] = [m for m in misses if m[0] is not rule or m[1].node not in covered]
    return sites[::-1]


def _collect_groups(rule: GroupRule, index: GraphIndex, deny: Deny, misses: Misses) -> list[Site]:
    groups: dict[Hashable, list[fx.Node]] = defaultdict(list)
    for node in index.order:
        if node.op == "call_function" and (not rule.targets or node.target in rule.targets):
            key = rule.key(node)
            if key is not None:
                groups[key].append(node)
    sites: list[Site] = []
    for members in groups.values():
        if len(members) < 2 or any((rule.name, n.name) in deny for n in members):
            continue
        inside = set(members)
        inputs = tuple(dict.fromkeys(i for n in members for i in n.all_input_nodes if i not in inside))
        reject = _checked(rule, members) or _crossing(members, members, inputs, index)
        if reject is not None:
            if not reject.quiet:
                misses.append((rule, _refusal(reject, len(members), members[0]), len(members)))
            continue
        outputs = tuple(members)
        sites.append(Site(rule, outputs, outputs, partial(rule.emit, outputs), rule.describe(members)))
    return sites


def _checked(rule: Rule | GroupRule, found: Match | Sequence[fx.Node]) -> Reject | None:
    """`rule.check`; a check that raises refuses the place, and the report says what it raised."""
    try:
        return rule.check(found)  # type: ignore[arg-type]
    except Exception as error:  # noqa: BLE001 - a rule's code may raise anything, on graphs its author never saw
        log.warning("rule %s: check raised %s: %s", rule.name, type(error).__name__, error)
        return Reject(f"check raised {type(error).__name__}: {error}")


def _refusal(reject: Reject, size: int, anchor: fx.Node) -> Failure:
    if reject.quiet:
        return Failure()
    node = reject.value if isinstance(reject.value, fx.Node) and reject.value.op == "call_function" else anchor
    told = f": {reject.value}" if isinstance(reject.value, bool | int | float | str) else ""
    return Failure(size, "the side condition of the rule", reject.reason + told, node)


def _crossing(nodes: Nodes, outputs: Nodes, inputs: Nodes, index: GraphIndex) -> Reject | None:
    """Refuse where the replacement could not stand in one place: a user before an input, or a mutation in between."""
    inside = set(nodes)
    last_input = max((index.order.get(i, -1) for i in inputs), default=-1)
    for output in outputs:
        for user in output.users:
            if user not in inside and index.order.get(user, last_input + 1) <= last_input:
                return Reject(f"{user.name} needs {output.name} before all inputs of the match are there", output)
    first, last = index.order[nodes[0]], index.order[nodes[-1]]
    for target, found in index.by_target.items():
        if found and role_of(found[0]) is Role.MUTATE and any(first < index.order[n] < last for n in found):
            return Reject(f"{target} writes to memory in between", found[0])
    return None


def _near_miss(rule: Rule | GroupRule, failure: Failure, size: int) -> NearMiss:
    node = failure.node
    return NearMiss(
        rule.name,
        module_of(node) if node is not None else "",
        source_of(node) if node is not None else "",
        failure.wanted,
        failure.found,
        failure.depth,
        size,
    )


def grouped(misses: Misses) -> list[NearMiss]:
    """Identical misses over layers become one with a count; numbers in names do not make them different."""
    found: dict[tuple[str, ...], NearMiss] = {}
    for miss in (_near_miss(rule, failure, size) for rule, failure, size in misses):
        key = (miss.rule, re.sub(r"\d+", "*", miss.module), miss.source, miss.wanted, re.sub(r"_?\d+", "", miss.found))
        first = found.get(key)
        found[key] = miss if first is None else replace(first, module=key[1], count=first.count + 1)
    return list(found.values())
