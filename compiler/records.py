"""What happened, as data: rewrites, near-misses, passes, verification. Everything a report says is in these records."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Rewrite:
    """One accepted replacement."""

    rule: str
    module: str
    """Qualified name of the innermost module that every replaced node belongs to."""
    source: str
    """`modeling_llama.py:64 return self.weight * hidden_states` of the anchor."""
    label: str
    """What was fused, for people: `q_proj + k_proj + v_proj -> qkv`."""
    replaced: tuple[str, ...]
    """Names of the nodes that went away."""
    produced: tuple[str, ...]
    cost_before_us: float = 0.0
    """Roofline time on the target device in microseconds, at the larger of the sizes that the decision was made for."""
    cost_after_us: float = 0.0
    check: Check | None = None


@dataclass(frozen=True)
class Check:
    """A site compared with the original on real weights: errors against an oracle one precision up."""

    error_before: float
    """max |original - oracle|"""
    error_after: float
    """max |rewritten - oracle|"""
    bound: float
    passed: bool
    other_form: str = ""
    """`float64 [2, 9] instead of float32 [2, 9]` where the replacement gives another dtype or shape."""


@dataclass(frozen=True)
class NearMiss:
    """A place that looked like a rule's pattern and was not: over half of the pattern matched, or `check` refused."""

    rule: str
    module: str
    source: str
    wanted: str
    found: str
    depth: int
    size: int
    count: int = 1
    """How many identical ones, over layers."""


@dataclass(frozen=True)
class Reverted:
    """A rewrite that was taken back, and why."""

    rule: str
    module: str
    source: str
    reason: str
    check: Check | None = None


@dataclass
class PassResult:
    """What one pass did."""

    name: str
    stage: str
    rewrites: list[Rewrite] = field(default_factory=list)
    misses: list[NearMiss] = field(default_factory=list)
    reverted: list[Reverted] = field(default_factory=list)
    removed: dict[str, int] = field(default_factory=dict)
    """For clean-up passes: what was removed, by kind."""
    nodes_before: int = 0
    nodes_after: int = 0
    time_s: float = 0.0
    before: str = ""
    """The graph as readable text, kept when the report or a dump wants it."""
    after: str = ""
