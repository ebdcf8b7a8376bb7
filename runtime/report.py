"""`model.report`: what was found, what was rewritten, what it is worth and whether it is right.

`print(model.report)` fits on one screen, `.to_json()` has all of it, `.to_html()` shows it with both graphs.
"""

from __future__ import annotations

import html
import importlib.metadata
import json
import sys
from collections.abc import Iterable
from dataclasses import asdict, replace
from typing import Any, Final

import torch

from ..compiler.cost import over_layers
from ..compiler.device import device_for
from ..compiler.program import Note
from ..compiler.records import NearMiss, PassResult, Reverted, Rewrite
from ..kernels import tuning
from .certificate import Certificate
from .record import Record, SignatureRecord
from .report_cost import CostReport, cost_report

SCHEMA: Final = 1
"""Raised when a key of `to_dict()` changes its meaning or goes away."""


class Report:
    """A view of the live record: counters and lists are as they stand when asked for."""

    def __init__(self, record: Record) -> None:
        self.record = record

    # -- what a report is made of -----------------------------------------------------------------------------------

    @property
    def model(self) -> str:
        """Name of the model's class."""
        return self.record.model

    @property
    def calls(self) -> dict[str, int]:
        """How many calls the graph served, and how many the original."""
        return dict(self.record.calls)

    @property
    def signatures(self) -> tuple[SignatureRecord, ...]:
        """Every signature that was asked for, in order."""
        return tuple(self.record.signatures)

    @property
    def main(self) -> SignatureRecord | None:
        """The first signature that a graph serves."""
        return next((s for s in self.record.signatures if s.served), None)

    @property
    def passes(self) -> tuple[PassResult, ...]:
        """What each pass did to the main signature."""
        return tuple(self.main.passes) if self.main is not None else ()

    @property
    def rewrites(self) -> tuple[RewriteGroup, ...]:
        """Accepted rewrites of the main signature, equal ones over layers together."""
        return group_rewrites(self.passes)

    @property
    def near_misses(self) -> tuple[NearMiss, ...]:
        """Places that looked like a pattern and were not, over all signatures, equal ones over layers together."""
        return group_misses(m for s in self.record.signatures for p in s.passes for m in p.misses)

    @property
    def reverted(self) -> tuple[Reverted, ...]:
        """Rewrites taken back, because of a site's check or of the certificate."""
        found = (r for s in self.record.signatures for r in (*(x for p in s.passes for x in p.reverted), *s.reverted))
        return tuple(dict.fromkeys(found))

    @property
    def notes(self) -> tuple[Note, ...]:
        """What could not be captured, and other things to know."""
        untuned = []
        if tuning.untuned and self.record.device.startswith("cuda"):
            names = ", ".join(sorted(tuning.untuned))
            untuned = [
                Note("", f"nearest configurations run for {names}; `python -m regraft tune MODEL` measures them")
            ]
        return tuple(
            dict.fromkeys((*self.record.notes, *(n for s in self.record.signatures for n in s.notes), *untuned))
        )

    @property
    def certificate(self) -> Certificate | None:
        """That of the main signature."""
        return self.main.certificate if self.main is not None else None

    def cost(self) -> CostReport | None:
        """Roofline of the main signature before and after; None without a graph, or after a copy."""
        main = self.main
        if main is None or main.captured is None or main.program is None:
            return None
        return cost_report(main.captured, main.program, device_for(self.record.device or "cpu"))

    # -- how it is told ---------------------------------------------------------------------------------------------

    def __str__(self) -> str:
        from .report_text import to_text

        return to_text(self)

    def __repr__(self) -> str:
        calls = self.calls
        counted = f"{calls['graph']} calls by the graph, {calls['original']} by the original"
        return f"<regraft report of {self.model}: {counted}>"

    def to_dict(self) -> dict[str, Any]:
        """Plain data, with the keys of schema version `SCHEMA`."""
        record, cost = self.record, self.cost()
        return {
            "version": SCHEMA,
            "model": record.model,
            "dtype": record.dtype,
            "device": record.device,
            "parameters": record.parameters,
            "options": dict(record.options),
            "versions": versions(),
            "calls": self.calls,
            "fallbacks": dict(record.fallbacks),
            "generated": dict(record.generated),
            "rewrites": [g.to_dict() for g in self.rewrites],
            "near_misses": [asdict(m) for m in self.near_misses],
            "reverted": [asdict(r) for r in self.reverted],
            "expected": [asdict(e) for e in (self.main.expected if self.main is not None else ())],
            "certificate": self.certificate.to_json() if self.certificate is not None else None,
            "notes": [asdict(n) for n in self.notes],
            "passes": [pass_dict(p) for p in self.passes],
            "signatures": [signature_dict(s) for s in record.signatures],
            "memory": dict(record.memory),
            "generate": record.generate,
            "ablation": record.ablation,
            "cost": cost.to_dict() if cost is not None else None,
        }

    def to_json(self, indent: int | None = 2) -> str:
        """`to_dict()` as JSON; infinities and NaN, which JSON does not have, as strings."""
        return json.dumps(_finite(self.to_dict()), indent=indent, default=str, allow_nan=False)

    def to_html(self) -> str:
        """One self-contained page: graphs, diff by pass, source lines, near-misses, certificate, costs."""
        from .report_html import to_html

        return to_html(self)

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(str(self))}</pre>"


class RewriteGroup:
    """The same rewrite at the same place of every layer."""

    def __init__(self, stage: str, rewrites: list[Rewrite]) -> None:
        self.stage, self.rewrites = stage, rewrites
        self.rule, self.label = rewrites[0].rule, rewrites[0].label

    @property
    def count(self) -> int:
        return len(self.rewrites)

    @property
    def text(self) -> str:
        """`q_proj + k_proj + v_proj -> qkv (x32)`."""
        return f"{self.label} (x{self.count})"

    def to_dict(self) -> dict[str, Any]:
        """Plain data; costs are sums over the group."""
        checks = [r.check for r in self.rewrites if r.check is not None]
        worst = max(checks, key=lambda c: c.error_after, default=None)
        return {
            "rule": self.rule,
            "stage": self.stage,
            "label": self.label,
            "count": self.count,
            "modules": sorted({over_layers(r.module) for r in self.rewrites}),
            "source": self.rewrites[0].source,
            "cost_before_us": round(sum(r.cost_before_us for r in self.rewrites), 3),
            "cost_after_us": round(sum(r.cost_after_us for r in self.rewrites), 3),
            "checked": len(checks),
            "worst_check": asdict(worst) if worst is not None else None,
        }


def group_rewrites(passes: Iterable[PassResult]) -> tuple[RewriteGroup, ...]:
    """By stage, rule and label, in the order they happened."""
    groups: dict[tuple[str, str, str], list[Rewrite]] = {}
    for result in passes:
        for rewrite in result.rewrites:
            groups.setdefault((result.stage, rewrite.rule, rewrite.label), []).append(rewrite)
    return tuple(RewriteGroup(stage, members) for (stage, _, _), members in groups.items())


def group_misses(misses: Iterable[NearMiss]) -> tuple[NearMiss, ...]:
    """Equal ones over layers as one, with their count; the ones that came furthest first."""
    groups: dict[tuple[str, ...], NearMiss] = {}
    for miss in misses:
        key = (miss.rule, over_layers(miss.module), miss.source, miss.wanted, miss.found)
        known = groups.get(key)
        module = over_layers(miss.module)
        if known is None:
            groups[key] = miss
        else:
            groups[key] = replace(known, module=module, count=known.count + miss.count)
    return tuple(sorted(groups.values(), key=lambda m: (-m.depth / max(m.size, 1), -m.count)))


def pass_dict(result: PassResult) -> dict[str, Any]:
    """A pass without its texts."""
    return {
        "name": result.name,
        "stage": result.stage,
        "rewrites": len(result.rewrites),
        "near_misses": sum(m.count for m in result.misses),
        "reverted": len(result.reverted),
        "removed": dict(result.removed),
        "nodes_before": result.nodes_before,
        "nodes_after": result.nodes_after,
        "time_s": round(result.time_s, 4),
    }


def signature_dict(entry: SignatureRecord) -> dict[str, Any]:
    """One signature without its graphs."""
    return {
        "arguments": entry.arguments,
        "served": entry.served,
        "reason": entry.reason,
        "nodes": nodes_of(entry),
        "launches": entry.launches() if entry.launches is not None else "",
        "seconds": {k: round(v, 4) for k, v in entry.seconds.items()},
        "certificate": entry.certificate.to_json() if entry.certificate is not None else None,
        "passes": [pass_dict(p) for p in entry.passes],
    }


def nodes_of(entry: SignatureRecord) -> dict[str, int]:
    """Nodes as captured and at the end."""
    if not entry.passes:
        return {"before": 0, "after": 0}
    return {"before": entry.passes[0].nodes_before, "after": entry.passes[-1].nodes_after}


def versions() -> dict[str, str]:
    """Of what decides a result."""
    package = sys.modules[__name__.removesuffix(".runtime.report")]  # also where it runs from a folder, not installed
    found = {"regraft": str(package.__version__), "torch": str(torch.__version__)}
    for name in ("triton", "transformers"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def _finite(value: Any) -> Any:
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return str(value)
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return value
