"""Apply rules to a graph: collect every candidate, choose among overlapping ones by cost, verify, replace.

Nothing is traced. A candidate's replacement is built beside the original, so that it can be costed and compared on real
values while both stand in the graph; then either the original's users move over, or the replacement is erased.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_map

from .match import GraphIndex
from .opset import Role, role_of
from .program import Program
from .provenance import common_module, module_of, source_of, stamp
from .records import Check, PassResult, Reverted, Rewrite
from .rule import Emitter, GroupRule, Rule, Stage
from .shapes import described
from .sites import Deny, Misses, Site, claims_of, collect, grouped
from .verify import Evaluator, compare

GRAIN = 1.01
"""Differences below this factor mean nothing in a roofline: a bias of zeros added for a sibling that has none, say."""

FakeValues = dict[Hashable, object]
"""Fake results by operator and description of its operands."""

ROUNDS = 8
"""How often one set of rules may go over a graph; each round sees what the last one made."""

Costing = Callable[[Sequence[fx.Node]], tuple[float, ...]]
"""Roofline time in microseconds of nodes run one after the other, at each of the sizes a decision should hold for."""


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
        pairs = list(zip(self.cost_after, self.cost_before, strict=True))
        never_slower = all(after <= GRAIN * before for after, before in pairs)
        return never_slower and any(after < before for after, before in pairs)

    @property
    def gain(self) -> float:
        """Microseconds saved, over all sizes."""
        return sum(self.cost_before) - sum(self.cost_after)

    @property
    def claims(self) -> set[fx.Node]:
        """Nodes no other candidate may replace too."""
        return claims_of(self.old, self.old_outputs)


@dataclass(frozen=True)
class Policy:
    """How candidates are judged."""

    cost: Costing | None = None
    """None: every candidate that applies is taken (RAISE, where a replacement is the same work under another name)."""
    evaluator: Evaluator | None = None
    """None: nothing is verified here."""
    every_site: bool = False
    """Verify each site; otherwise one for each rule and signature."""
    deny: Deny = ()


def rewrite(
    program: Program, name: str, stage: Stage, rules: Sequence[Rule | GroupRule], policy: Policy | None = None
) -> PassResult:
    """Run one set of rules over the program's graph, in place, until no more candidate is taken; says what happened.

    The caller recompiles `program.gm` before it is called.
    """
    started = time.perf_counter()
    policy = policy or Policy()
    graph = program.graph
    result = PassResult(name, stage.name, nodes_before=len(graph.nodes))
    refused: dict[tuple[str, Hashable], Reverted] = {}
    misses: Misses = []
    values: FakeValues = {}
    for _ in range(ROUNDS):
        index = GraphIndex(graph)
        misses = []
        sites = []
        for rule in rules:
            try:
                sites += collect(rule, index, policy.deny, misses)
            except Exception as error:  # noqa: BLE001 - a rule's code may raise anything, on graphs its author never saw
                result.reverted.append(Reverted(rule.name, "", "", f"the rule itself raised {_told(error)}"))
                policy = replace(policy, deny={*policy.deny, (rule.name, "*")})
        candidates, settled = [], set()
        for site in sites:  # only now: emitted nodes would disturb checks
            try:
                candidates.append(_build(site, graph, index, policy, values))
            except _EmitError as error:
                result.reverted.append(_failed(site, str(error)))
                settled.add((site.rule.name, site.outputs[0].name))
        declined = {c for c in candidates if policy.cost and not c.saves}
        kept: set[Candidate] = set()
        beside = {n for c in candidates for n in c.new}
        for candidate in _choose([c for c in candidates if c not in declined]):
            if _misplaced(candidate, beside):
                continue  # the next round sees the graph as it is then
            outcome = _judge(candidate, policy, refused)
            if isinstance(outcome, Reverted):
                result.reverted.append(outcome)
                declined.add(candidate)
                continue
            result.rewrites.append(_apply(graph, candidate, outcome))
            kept.add(candidate)
            beside.difference_update(candidate.new)
        for candidate in candidates:
            if candidate not in kept:
                _erase(graph, candidate.new)
        settled |= {(c.rule.name, c.anchor.name) for c in declined}
        policy = replace(policy, deny={*policy.deny, *settled})
        if not kept:
            break
        graph.eliminate_dead_code()
    result.misses = grouped(misses)
    if result.rewrites:
        graph.lint()
    result.nodes_after = len(graph.nodes)
    result.time_s = time.perf_counter() - started
    return result


class _EmitError(Exception):
    """`emit` raised, or built something that cannot be computed."""


def _build(site: Site, graph: fx.Graph, index: GraphIndex, policy: Policy, values: FakeValues) -> Candidate:
    rule, old, old_outputs = site.rule, site.nodes, site.outputs
    inside = set(old)
    inputs = [i for n in old for i in n.all_input_nodes if i not in inside]
    place = _place(graph, inputs, old[0], index)
    emitter = Emitter(graph)
    try:
        with graph.inserting_before(place):
            emitted = site.emit(emitter)
        outputs = emitted if isinstance(emitted, tuple) else (emitted,)
        if len(outputs) != len(old_outputs):
            raise ValueError(f"it returned {len(outputs)} nodes for {len(old_outputs)} outputs")
        for node, replaced in zip(outputs, old_outputs, strict=True):
            if not isinstance(node, fx.Node):
                raise TypeError(f"it returned {node!r}, which is not a node of the graph")
            if node in emitter.nodes and "val" in replaced.meta:
                node.meta.setdefault("val", replaced.meta["val"])
        for node in emitter.nodes:
            if role_of(node) is Role.MUTATE:
                raise ValueError(f"{node.target} writes to memory; a replacement must leave its operands as they are")
        propagate(emitter.nodes, values)
    except Exception as error:
        _erase(graph, emitter.nodes)
        raise _EmitError(f"emit raised {_told(error)}") from error
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


def _misplaced(candidate: Candidate, beside: set[fx.Node]) -> bool:
    """Whether its inputs, moved by candidates applied before it, stand behind it, or a user stands before it.

    Users that stand `beside` the graph belong to candidates that are not applied yet.
    """
    if any(given > node for node in candidate.new for given in node.all_input_nodes):
        return True
    for old, new in zip(candidate.old_outputs, candidate.new_outputs, strict=True):
        if any(user < new and user not in beside and user not in candidate.old for user in old.users):
            return True
    return False


def propagate(nodes: Sequence[fx.Node], known: FakeValues) -> None:
    """Give new nodes their fake values by running each on the fake values of its operands, once for equal operands."""
    for node in nodes:
        if "val" in node.meta:
            continue
        key = (node.target, described(node.args), described(node.kwargs))
        if key in known:
            node.meta["val"] = known[key]
            continue
        args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), lambda n: n.meta["val"])
        mode = next((v.fake_mode for v in _leaves((args, kwargs)) if isinstance(v, FakeTensor)), None)
        if mode is None:
            node.meta["val"] = node.target(*args, **kwargs)  # type: ignore[operator]
        else:
            with mode, enable_python_dispatcher(), torch.no_grad():  # C++ decompositions ask for concrete sizes
                node.meta["val"] = node.target(*args, **kwargs)  # type: ignore[operator]
        known[key] = node.meta["val"]


def is_constant(node: fx.Node) -> bool:
    """Computed from weights alone: folded before the first call."""
    inputs = node.all_input_nodes
    return node.op == "call_function" and bool(inputs) and all(n.meta.get("weight") or is_constant(n) for n in inputs)


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


def _judge(
    candidate: Candidate, policy: Policy, refused: dict[tuple[str, Hashable], Reverted]
) -> Check | Reverted | None:
    """The comparison of a candidate, None where it needs none, or why it may not stay."""
    if policy.evaluator is None:
        return None
    key = (candidate.rule.name, _signature(candidate))
    seen = policy.evaluator.verified
    if not policy.every_site and key in seen:
        return None
    if not policy.every_site and key in refused:
        anchor = candidate.anchor
        return replace(refused[key], module=common_module(candidate.old) or module_of(anchor), source=source_of(anchor))
    try:
        check = compare(policy.evaluator, candidate.old, candidate.old_outputs, candidate.new, candidate.new_outputs)
        refusal = None if check.passed else _reverted(candidate, check)
    except Exception as error:  # noqa: BLE001 - whatever the replacement's operators raise
        check, refusal = None, _failed(candidate, f"it raised {_told(error)}")
    finally:
        policy.evaluator.forget([n for n in candidate.new if is_constant(n)])  # as large as the weights themselves
    policy.evaluator.forget(candidate.old if refusal is None else candidate.new)
    if refusal is None:
        seen.add(key)
        return check
    refused[key] = refusal
    return refusal


def _signature(candidate: Candidate) -> Hashable:
    """Sites that compute the same thing on tensors of the same shapes and dtypes look alike here."""

    def plain(value: object) -> object:
        if isinstance(value, fx.Node):
            tensor = value.meta.get("val")
            if not isinstance(tensor, torch.Tensor):
                return str(type(tensor))
            return str(tensor.dtype), str(tuple(tensor.shape))
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
    before, after, bound = check.error_before, check.error_after, check.bound
    if check.other_form:
        reason = f"it gives {check.other_form}"
    elif after > bound:
        reason = f"error {after:.3g} where the original has {before:.3g} and {bound:.3g} is allowed"
    else:
        reason = f"error {after:.3g} where the original has {before:.3g}: too large on average, or another meaning"
    return replace(_failed(candidate, reason), check=check)


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _failed(site: Site | Candidate, reason: str) -> Reverted:
    nodes, anchor = (site.nodes, site.outputs[0]) if isinstance(site, Site) else (site.old, site.anchor)
    return Reverted(site.rule.name, common_module(nodes) or module_of(anchor), source_of(anchor), reason)


def _erase(graph: fx.Graph, nodes: Sequence[fx.Node]) -> None:
    for node in reversed(nodes):
        if not node._erased:
            node.users.clear()
            graph.erase_node(node)
