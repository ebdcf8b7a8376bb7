"""The few lines that `optimize` prints: what was fused, what nearly was, whether it is right, memory and time."""

from __future__ import annotations

from .record import SignatureRecord
from .report import Report

SHOWN = 3
"""Near-misses, reverted rewrites and notes that are told; the report has all."""


def announcement(report: Report) -> str:
    """A handful of lines about the first signature."""
    entry = report.signatures[0] if report.signatures else None
    if entry is None:
        return "\n".join([f"regraft: {report.model}", *(f"  note: {n.message}" for n in report.notes[:SHOWN])])
    lines = [f"regraft: {report.model}, {entry.arguments}"]
    if not entry.served:
        return "\n".join([*lines, f"  not captured, the original forward serves it: {entry.reason}"])
    lines += [f"  Fused {group.text}" for group in report.rewrites if group.stage == "FUSE"]
    lines += [f"  Reverted {r.rule} at {r.module or 'the model'}: {r.reason}" for r in report.reverted[:SHOWN]]
    lines += [
        f"  Nearly {m.rule} at {m.module} (x{m.count}): wanted {m.wanted}, found {m.found}   {m.source}"
        for m in report.near_misses[:SHOWN]
        if m.count > 0
    ]
    lines += [
        f"  Expected {e.expected} {e.what}, found {e.found}: {'; '.join(e.missing[:SHOWN])}"
        for e in entry.expected
        if not e.met
    ]
    lines += [f"  Note {n.module or report.model}: {n.message}" for n in report.notes[:SHOWN]]
    lines.append("  " + "; ".join(_figures(report, entry)))
    return "\n".join(lines)


def _figures(report: Report, entry: SignatureRecord) -> list[str]:
    parts = []
    certificate = entry.certificate
    if certificate is not None and certificate.measured:
        worst = max(certificate.measured, key=lambda m: m.error / m.bound if m.bound else 0.0)
        parts.append(
            f"parity on {len(certificate.measured)} batches: error {worst.error:.1e}, the original's "
            f"{worst.error_original:.1e}"
        )
        parts += [f"passing shows little of {doubt}" for doubt in certificate.doubts[:1]]
    memory = report.record.memory
    extra = memory.get("packed_copies", 0)
    parts.append(f"weights {memory.get('weights', 0) / 2**20:.0f} MiB, {extra / 2**20:.1f} MiB more for packed copies")
    parts.append(f"{sum(entry.seconds.values()):.1f} s")
    return parts
