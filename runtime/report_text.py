"""A report on one screen: at most 24 lines of 100 columns."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Final

from ..compiler.cost import over_layers
from .record import SignatureRecord

if TYPE_CHECKING:
    from .report import Report, RewriteGroup

WIDTH: Final = 100
LINES: Final = 24
_INDENT: Final = " " * 13


def to_text(report: Report) -> str:
    """What matters most first; long sections say how much they leave out."""
    record, main = report.record, report.main
    lines = [_clip(f"regraft {report.model}: {_about(report)}")]
    if main is None:
        lines += [_line("not served", f"{s.arguments}: {s.reason}") for s in record.signatures]
    else:
        lines += _graph(report, main)
        lines += _rewrites(report)
    lines += _section("Reverted", [f"{r.rule} in {r.module or 'the model'}: {r.reason}" for r in report.reverted], 2)
    near = [
        f"{m.rule} in {m.module or 'the model'} (x{m.count}): wanted {m.wanted}, found {m.found}"
        for m in report.near_misses
        if m.rule != "lower"
    ]
    lines += _section("Nearly", near, 2)
    if main is not None:
        lines += _expected(main)
        lines += _certificate(main)
        lines += _cost(report)
    lines += _section("Worth", worth(report), 4)
    lines += _memory(report)
    if main is not None and main.launches is not None and record.device.startswith("cuda"):
        lines.append(_line("Launches", main.launches()))
    lines += _generate(report)
    others = [s for s in record.signatures if s is not main]
    lines += _section("Also", [f"{s.arguments}: {_served(s, record.device)}" for s in others], 1)
    lines += _section("Note", _notes(report), 2)
    calls = report.calls
    fallbacks = "; ".join(f"{n} with {reason}" for reason, n in record.fallbacks.items())
    counted = f"{calls['graph']} by the graph, {calls['original']} by the original"
    if record.generated:
        lines.append(_line("Generated", ", ".join(f"{n} by {way}" for way, n in record.generated.items())))
    lines.append(_line("Calls", counted + (f" ({fallbacks})" if fallbacks else "")))
    return "\n".join(
        lines if len(lines) <= LINES else [*lines[: LINES - 2], f"{_INDENT}... all in to_html()", lines[-1]]
    )


def _served(entry: SignatureRecord, device: str) -> str:
    if not entry.served:
        return entry.reason
    return f"graph; {entry.launches()}" if entry.launches is not None and device.startswith("cuda") else "graph"


def _about(report: Report) -> str:
    record = report.record
    parts = [record.dtype, f"on {record.device}" if record.device else ""]
    if record.parameters:
        parts.append(f"{quantity(record.parameters)} parameters, {nbytes(record.memory.get('weights', 0))}")
    if record.options.get("dry_run"):
        parts.append("dry run")
    return " ".join(parts[:2]).strip() + ", " + ", ".join(parts[2:])


def _graph(report: Report, main: SignatureRecord) -> list[str]:
    from .report import nodes_of

    nodes = nodes_of(main)
    times = ", ".join(f"{what} {s:.1f} s" for what, s in main.seconds.items() if s >= 0.05)
    return [
        _line("Graph", main.arguments),
        _line("", f"{nodes['before']} -> {nodes['after']} nodes" + (f"; {times}" if times else "")),
    ]


def _rewrites(report: Report) -> list[str]:
    groups = report.rewrites
    raised = Counter[str]()
    for g in groups:
        if g.stage == "RAISE":
            raised[g.label] += g.count
    lines = [_line("Raised", ", ".join(f"{label} x{n}" for label, n in raised.most_common()))] if raised else []
    lines += _section("Fused", [_with_saving(g) for g in groups if g.stage == "FUSE"], 6)
    kernels = Counter[str]()
    for g in groups:
        if g.rule == "lower" and " -> " in g.label:
            kernels[g.label.rsplit(" -> ", 1)[1]] += g.count
    if kernels and not report.record.options.get("dry_run"):
        text = ", ".join(f"{n} calls by {provider}" for provider, n in kernels.most_common())
        refused = [m for m in report.near_misses if m.rule == "lower"]
        lines.append(_line("Kernels", text + (f" ({refused[0].wanted}: {refused[0].found})" if refused else "")))
    return lines


def _with_saving(group: RewriteGroup) -> str:
    before = sum(r.cost_before_us for r in group.rewrites)
    after = sum(r.cost_after_us for r in group.rewrites)
    return group.text + (f", saves {before - after:.0f} of {before:.0f} us" if before > after else "")


def _expected(main: SignatureRecord) -> list[str]:
    if not main.expected:
        return []
    counts = ", ".join(f"{e.what} {e.found}/{e.expected}" for e in main.expected)
    lines = [_line("Expected", counts)]
    for e in main.expected:
        if not e.met:
            more = f" (and {len(e.missing) - 1} more)" if len(e.missing) > 1 else ""
            lines.append(
                _line("", f"{e.what} short by {max(e.expected - e.found, 1)}: {over_layers(e.missing[0])}{more}")
            )
    return lines[:4]


def _certificate(main: SignatureRecord) -> list[str]:
    certificate = main.certificate
    if certificate is None:
        return [_line("Certificate", "none: nothing was run")]
    if not certificate.passed:
        return [_line("Certificate", f"FAILED: {certificate.reason}")]
    if not certificate.measured:
        return [_line("Certificate", "passed; no case could be measured")]
    worst = max(certificate.measured, key=lambda m: m.error / m.bound if m.bound else 0.0)
    cases = ", ".join(m.case for m in certificate.measured)
    kl = [m.kl for m in certificate.measured if m.kl is not None]
    greedy = [m.greedy for m in certificate.measured if m.greedy is not None]
    text = f"passed: error {worst.error:.1e} (original {worst.error_original:.1e}, allowed {worst.bound:.1e})"
    if kl:
        text += f", KL {max(kl):.0e}"
    if greedy:
        text += f", greedy {100 * min(greedy):.4g} %"
    lines = [_line("Certificate", text), _line("", f"on {cases}; against {certificate.oracle}")]
    return lines + _section("Doubtful", list(certificate.doubts), 2)


def _cost(report: Report) -> list[str]:
    cost = report.cost()
    if cost is None:
        return []
    at = ", ".join(f"{name}={size}" for name, size in cost.sizes.items())
    before, after = cost.before, cost.after
    kernels = [sum(s.count for s in side.by_op) for side in (before, after)]
    moved = [nbytes(cost.number(side.total.bytes)) for side in (before, after)]
    flops = quantity(cost.number(after.total.flops))
    text = f"{before.us:.0f} -> {after.us:.0f} us, {kernels[0]} -> {kernels[1]} kernels, {moved[0]} -> {moved[1]}"
    lines = [_line("Roofline", f"{text}, {flops}FLOP, {cost.device.name}")]
    return [*lines, _line("", f"at {at}")] if at else lines


def worth(report: Report) -> list[str]:
    """What each fusion contributes, as `bench ablate` measured it: the largest first."""
    ablation = report.record.ablation
    if ablation is None:
        return []
    rows = []
    for p in sorted(ablation["passes"], key=lambda p: -(p["saves_ms"] or 0.0)):
        if p["saves_ms"] is not None:
            share = 100 * abs(p["saves_ms"]) / ablation["ms"]
            what = "saves" if p["saves_ms"] >= 0 else "costs"
            rows.append(f"{p['name']} (x{p['rewrites']}) {what} {abs(p['saves_ms']):.3f} ms, {share:.1f} %")
    return [f"{ablation['row']}, {ablation['ms']:.3f} ms: {row}" if i == 0 else row for i, row in enumerate(rows)]


def _memory(report: Report) -> list[str]:
    memory = report.record.memory
    if "packed_views" not in memory:
        return []
    shared, extra = memory["packed_views"], memory.get("packed_copies", 0)
    return [_line("Memory", f"{nbytes(shared)} of weights packed in place, {nbytes(extra)} added")]


def _generate(report: Report) -> list[str]:
    """How tokens are generated, once that is known."""
    found = report.record.generate
    if found is None:
        return []
    if not found["paged"]:
        return [_line("Generate", f"not paged: {found['reason']}")]
    windows = ", ".join("all keys" if w < 0 else f"window {w + 1}" for w in found["windows"])
    text = f"paged: {found['layers']} layers, {len(found['windows'])} groups ({windows})"
    lines = [_line("Generate", f"{text}; error {found['error']:.1e}, allowed {found['bound']:.1e}")]
    if found["captured_again"] is not None:
        lines.append(_line("", f"captured twice: {found['captured_again']}"))
    return lines


def _notes(report: Report) -> list[str]:
    groups = Counter((over_layers(n.module), n.message) for n in report.notes)
    counted = (
        (f"{module}{f' (x{n})' if n > 1 else ''}: " if module else "", text) for (module, text), n in groups.items()
    )
    return [where + text for where, text in counted]


def _section(title: str, entries: list[str], limit: int) -> list[str]:
    lines = [_line(title if i == 0 else "", entry) for i, entry in enumerate(entries[:limit])]
    if len(entries) > limit:
        lines[-1] = _clip(lines[-1], WIDTH - 16).ljust(1) + f" (and {len(entries) - limit} more)"
    return lines


def _line(title: str, text: str) -> str:
    return _clip(f"  {title:<10} {' '.join(text.split())}")


def _clip(text: str, width: int = WIDTH) -> str:
    return text if len(text) <= width else text[: width - 3] + "..."


def quantity(number: float) -> str:
    """`1.24 G`: three digits and an SI prefix."""
    for prefix in ("", "k", "M", "G", "T"):
        if abs(number) < 1000:
            return f"{number:.3g} {prefix}"
        number /= 1000
    return f"{number:.3g} P"


def nbytes(number: float) -> str:
    """`15.0 GiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(number) < 1024:
            return f"{number:.3g} {unit}"
        number /= 1024
    return f"{number:.3g} TiB"
