"""Apply rules to a graph: collect every candidate, choose among overlapping ones by cost, verify, replace.

Nothing is traced. A candidate's replacement is built beside the original, so that it can be costed and compared on real
values while both stand in the graph; then either the original's users move over, or the replacement is erased.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Collection, Hashable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_map

from .match import Failure, GraphIndex, Matcher
from .opset import Role, is_free, role_of
from .program import Program
from .provenance import common_module, module_of, source_of, stamp
from .records import Check, NearMiss, PassResult, Reverted, Rewrite
from .rule import Emitter, GroupRule, Reject, Rule, Stage
from .verify import Evaluator, compare

NEAR = 0.55
"""Share of a pattern that must have matched for its failure to be worth telling."""

GRAIN = 1.01
"""Differences below this factor mean nothing in a roofline: a bias of zeros added for a sibling that has none, say."""

Misses = list[tuple[Rule | GroupRule, Failure, int]]

Costing = Callable[[Sequence[fx.Node]], tuple[float, ...]]
"""Roofline time in microseconds of nodes executed one after the other, at each of the sizes a decision should hold for."""


@dataclass(frozen=True)
class Site:
    """A place where a rule holds."""

    rule: Rule | GroupRule
    nodes: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]
    emit: Callable[[Emitter], fx.Node | tuple[fx.Node, ...]]
    label: str


@dataclass(eq=False)
class Candidate:
    """A replacement that stands in the graph beside what it would replace."""

    rule: Rule | GroupRule
    old: tuple[fx.Node, ...]
    old_outputs: tuple[fx.Node, ...]
    new: tuple[fx.Node, ...]
    new_outputs: tuple[fx.Node, ...]
    label: str
    cost_before: tuple[float, ...]
    cost_after: tuple[float, ...]

    @property
    def anchor(self) -> fx.Node:
        return self.old_outputs[0]

    @property
    def saves(self) -> bool:
        """Faster at one size and slower at none (by more than the model's grain)."""
        pairs = list(zip(self.cost_after, self.cost_before))
        return any(after < before for after, before in pairs) and all(after <= GRAIN * before for after, before in pairs)

    @property
    def gain(self) -> float:
        """Microseconds saved, over all sizes."""
        return sum(self.cost_before) - sum(self.cost_after)

    @property
    def claims(self) -> set[fx.Node]:
        """Nodes no other candidate may replace too."""
        return _claims(self.old, self.old_outputs)


def _claims(nodes: Sequence[fx.Node], outputs: Sequence[fx.Node]) -> set[fx.Node]:
    """Everything that costs something, and the outputs; views and casts may serve several."""
    return {n for n in nodes if not is_free(n)} | set(outputs)


@dataclass(frozen=True)
class Policy:
    """How candidates are judged."""

    cost: Costing | None = None
    """None: every candidate that applies is taken (RAISE, where a replacement is the same work under another name)."""
    evaluator: Evaluator | None = None
    """None: nothing is verified here."""
    every_site: bool = False
    """Verify each site; otherwise one for each rule and signature."""
    deny: Collection[tuple[str, str]] = ()
    """(rule, anchor node name) pairs that must stay as they are; (rule, "*") is the whole rule."""


def rewrite(program: Program, name: str, stage: Stage, rules: Sequence[Rule | GroupRule], policy: Policy = Policy()) -> PassResult:
    """Run one set of rules over the program's graph, in place, until no more candidate is taken; says what happened."""
    started = time.perf_counter()
    graph = program.graph
    result = PassResult(name, stage.name, nodes_before=len(graph.nodes))
    refused: set[tuple[str, Hashable]] = set()
    misses: Misses = []
    for _ in range(8):
        index = GraphIndex(graph)
        misses = []
        sites = [site for rule in rules for site in _collect(rule, index, policy, misses)]
        candidates = [_build(site, graph, index, policy) for site in sites]  # only now: emitted nodes would disturb checks
        declined = [c for c in candidates if policy.cost and not c.saves]
        taken = _choose([c for c in candidates if c not in declined])
        applied = 0
        for candidate in taken:
            outcome = _judge(candidate, policy, refused)
            if outcome is not None and not outcome.passed:
                result.reverted.append(_reverted(candidate, outcome))
                declined.append(candidate)
                continue
            result.rewrites.append(_apply(graph, candidate, outcome))
            applied += 1
        kept = {id(c) for c in taken} - {id(c) for c in declined}
        for candidate in candidates:
            if id(candidate) not in kept:
                _erase(graph, candidate.new)
        if applied:
            graph.eliminate_dead_code()
        settled = {(c.rule.name, c.anchor.name) for c in declined}
        policy = replace(policy, deny={*policy.deny, *settled})
        if not applied:
            break
    result.misses = _group([_near_miss(rule, failure, size) for rule, failure, size in misses])
    graph.lint()
    program.gm.recompile()
    result.nodes_after = len(graph.nodes)
    result.time_s = time.perf_counter() - started
    return result


# -- collecting --------------------------------------------------------------------------------------------------------


def _collect(rule: Rule | GroupRule, index: GraphIndex, policy: Policy, misses: Misses) -> list[Site]:
    if (rule.name, "*") in policy.deny:
        return []
    if isinstance(rule, GroupRule):
        return _collect_groups(rule, index, policy, misses)
    matcher = Matcher(index, rule.traced)
    sites: list[Site] = []
    claimed: set[fx.Node] = set()
    for anchor in index.anchors(rule.traced.roots):
        if anchor in claimed or (rule.name, anchor.name) in policy.deny:
            continue
        failure: Failure | None = None
        for match in matcher.matches(anchor):
            reject = rule.check(match) or _crossing(match.nodes, match.outputs, match.inputs, index)
            if reject is not None:
                failure = _refusal(reject, rule.traced.size, match.anchor)
                continue
            sites.append(Site(rule, match.nodes, match.outputs, partial(rule.emit, match), rule.describe(match)))
            claimed |= _claims(match.nodes, match.outputs)
            failure = None
            break
        else:
            failure = failure or matcher.failure
            if failure.depth >= NEAR * rule.traced.size:
                misses.append((rule, failure, rule.traced.size))
    covered = {n for site in sites for n in site.nodes}
    misses[:] = [m for m in misses if m[0] is not rule or m[1].node not in covered]
    return sites[::-1]


def _collect_groups(rule: GroupRule, index: GraphIndex, policy: Policy, misses: Misses) -> list[Site]:
    groups: dict[Hashable, list[fx.Node]] = defaultdict(list)
    for node in index.order:
        if node.op == "call_function" and (not rule.targets or node.target in rule.targets):
            key = rule.key(node)
            if key is not None:
                groups[key].append(node)
    sites: list[Site] = []
    for members in groups.values():
        if len(members) < 2 or any((rule.name, n.name) in policy.deny for n in members):
            continue
        inside = set(members)
        inputs = tuple(dict.fromkeys(i for n in members for i in n.all_input_nodes if i not in inside))
        reject = rule.check(members) or _crossing(members, members, inputs, index)
        if reject is not None:
            if not reject.quiet:
                misses.append((rule, _refusal(reject, len(members), members[0]), len(members)))
            continue
        outputs = tuple(members)
        sites.append(Site(rule, outputs, outputs, partial(rule.emit, outputs), rule.describe(members)))
    return sites


def _refusal(reject: Reject, size: int, anchor: fx.Node) -> Failure:
    if reject.quiet:
        return Failure()
    node = reject.value if isinstance(reject.value, fx.Node) and reject.value.op == "call_function" else anchor
    found = reject.reason if not isinstance(reject.value, bool | int | float | str) else f"{reject.reason}: {reject.value}"
    return Failure(size, "the side condition of the rule", found, node)


def _crossing(nodes: Sequence[fx.Node], outputs: Sequence[fx.Node], inputs: Sequence[fx.Node], index: GraphIndex) -> Reject | None:
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


def _build(site: Site, graph: fx.Graph, index: GraphIndex, policy: Policy) -> Candidate:
    rule, old, old_outputs = site.rule, site.nodes, site.outputs
    inside = set(old)
    inputs = [i for n in old for i in n.all_input_nodes if i not in inside]
    place = _place(graph, inputs, old[0], index)
    emitter = Emitter(graph)
    with graph.inserting_before(place):
        emitted = site.emit(emitter)
    outputs = emitted if isinstance(emitted, tuple) else (emitted,)
    if len(outputs) != len(old_outputs):
        _erase(graph, emitter.nodes)
        raise ValueError(f"rule {rule.name}: emit returned {len(outputs)} nodes for {len(old_outputs)} outputs")
    for node, replaced in zip(outputs, old_outputs):
        if node in emitter.nodes and "val" in replaced.meta:
            node.meta.setdefault("val", replaced.meta["val"])
    propagate(emitter.nodes)
    stamp(emitter.nodes, list(old), rule.name, old_outputs[0])
    before = policy.cost(old) if policy.cost else ()
    after = policy.cost(emitter.nodes) if policy.cost else ()
    return Candidate(rule, old, old_outputs, tuple(emitter.nodes), outputs, site.label, before, after)


def _place(graph: fx.Graph, inputs: Sequence[fx.Node], first: fx.Node, index: GraphIndex) -> fx.Node:
    """Just before the first replaced node, or behind the last input where that comes later."""
    last = max(inputs, key=lambda i: index.order.get(i, -1), default=None)
    if last is None or index.order.get(last, -1) < index.order[first]:
        return first
    place = last.next
    while place.op == "placeholder":
        place = place.next
    return place


def propagate(nodes: Sequence[fx.Node]) -> None:
    """Give new nodes their fake values by running each on the fake values of its operands."""
    for node in nodes:
        if "val" in node.meta:
            continue
        args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), lambda n: n.meta["val"])
        mode = next((v.fake_mode for v in _leaves((args, kwargs)) if isinstance(v, FakeTensor)), None)
        if mode is None:
            node.meta["val"] = node.target(*args, **kwargs)  # type: ignore[operator]
        else:
            with mode, torch.no_grad():
                node.meta["val"] = node.target(*args, **kwargs)  # type: ignore[operator]


def _leaves(tree: object) -> list[object]:
    found: list[object] = []
    tree_map(found.append, tree)
    return found


# -- choosing and applying ---------------------------------------------------------------------------------------------


def _choose(candidates: Sequence[Candidate]) -> list[Candidate]:
    """The best set that does not overlap, greedily by time saved, then by how much it replaces."""
    claimed: set[fx.Node] = set()
    taken = []
    for candidate in sorted(candidates, key=lambda c: (-c.gain, -len(c.old))):
        if not candidate.claims & claimed:
            claimed |= candidate.claims
            taken.append(candidate)
    return taken


def _judge(candidate: Candidate, policy: Policy, refused: set[tuple[str, Hashable]]) -> Check | None:
    if policy.evaluator is None:
        return None
    key = (candidate.rule.name, _signature(candidate))
    if not policy.every_site and key in refused:
        return Check(0.0, float("inf"), 0.0, False)
    seen = policy.evaluator.verified
    if not policy.every_site and key in seen:
        return None
    check = compare(policy.evaluator, candidate.old, candidate.old_outputs, candidate.new, candidate.new_outputs)
    if check.passed:
        seen.add(key)
    else:
        refused.add(key)
    policy.evaluator.forget(candidate.old if check.passed else candidate.new)
    return check


def _signature(candidate: Candidate) -> Hashable:
    """Sites that compute the same thing on tensors of the same shapes and dtypes look alike here."""

    def plain(value: object) -> object:
        if isinstance(value, fx.Node):
            tensor = value.meta.get("val")
            return (str(tensor.dtype), str(tuple(tensor.shape))) if isinstance(tensor, torch.Tensor) else str(type(tensor))
        return repr(value)

    def described(nodes: Sequence[fx.Node]) -> tuple[object, ...]:
        return tuple((str(n.target), str(tree_map(plain, (n.args, dict(n.kwargs))))) for n in nodes)

    return described(candidate.old), described(candidate.new)


def _apply(graph: fx.Graph, candidate: Candidate, check: Check | None) -> Rewrite:
    record = Rewrite(
        rule=candidate.rule.name,
        module=common_module(candidate.old) or module_of(candidate.anchor),
        source=source_of(candidate.anchor),
        label=candidate.label,
        replaced=tuple(n.name for n in candidate.old),
        produced=tuple(n.name for n in candidate.new),
        cost_before_us=sum(candidate.cost_before[-1:]),
        cost_after_us=sum(candidate.cost_after[-1:]),
        check=check,
    )
    for old, new in zip(candidate.old_outputs, candidate.new_outputs, strict=True):
        old.replace_all_uses_with(new)
    for node in reversed(candidate.old):
        if not node.users:
            graph.erase_node(node)
    return record


def _reverted(candidate: Candidate, check: Check) -> Reverted:
    return Reverted(
        candidate.rule.name,
        common_module(candidate.old) or module_of(candidate.anchor),
        source_of(candidate.anchor),
        f"error {check.error_after:.3g} where the original has {check.error_before:.3g} and {check.bound:.3g} is allowed, or another meaning",
        check,
    )


def _erase(graph: fx.Graph, nodes: Sequence[fx.Node]) -> None:
    for node in reversed(nodes):
        if not node._erased:
            node.users.clear()
            graph.erase_node(node)


# -- near-misses -------------------------------------------------------------------------------------------------------


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


def _group(misses: Sequence[NearMiss]) -> list[NearMiss]:
    """Identical misses over layers become one with a count; numbers in names do not make them different."""
    import re

    grouped: dict[tuple[str, ...], NearMiss] = {}
    for miss in misses:
        key = (miss.rule, re.sub(r"\d+", "*", miss.module), miss.source, miss.wanted, re.sub(r"_?\d+", "*", miss.found))
        first = grouped.get(key)
        grouped[key] = miss if first is None else replace(first, module=key[1], count=first.count + 1)
    return list(grouped.values())
