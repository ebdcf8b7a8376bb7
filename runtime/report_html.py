"""A report as one HTML page that needs nothing else: no script, no font, no network."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import TYPE_CHECKING, Any, Final

from ..compiler.cost import over_layers
from .record import SignatureRecord
from .report_cost import CostReport
from .report_graph import by_place, diff_lines, places, source_lines
from .report_text import nbytes, quantity, worth

if TYPE_CHECKING:
    from .report import Report

MAX_DIFF_LINES: Final = 600
"""Lines shown of one pass's diff; further layers repeat the same."""

STYLE: Final = """
:root { color-scheme: light dark; --ink: #1c2330; --soft: #5b6678; --line: #dfe4ec; --back: #fff; --card: #f5f7fa;
  --good: #18794e; --bad: #c62a2f; --before: #b4bccb; --after: #3b6fe0; --add: #e6f6ec; --del: #fdecec; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8ef; --soft: #98a3b5; --line: #333b4a; --back: #14181f;
  --card: #1c222c; --good: #4cc38a; --bad: #ff7b80; --before: #5b6678; --after: #6d98f5; --add: #12301f;
  --del: #3a1a1c; } }
* { box-sizing: border-box } body { margin: 0 auto; max-width: 1180px; padding: 28px; background: var(--back);
  color: var(--ink); font: 15px/1.5 system-ui, sans-serif }
h1 { font-size: 25px; margin: 0 } h2 { font-size: 18px; margin: 34px 0 10px; border-bottom: 1px solid var(--line) }
.soft { color: var(--soft) } .good { color: var(--good) } .bad { color: var(--bad) } .num { text-align: right;
  white-space: nowrap }
.cards { display: flex; flex-wrap: wrap; gap: 12px; margin: 20px 0 }
.card { background: var(--card); padding: 10px 16px;
  border-radius: 8px; min-width: 150px } .card b { display: block; font-size: 19px } .card span { color: var(--soft) }
table { border-collapse: collapse; width: 100%; font-size: 14px } th { text-align: left; color: var(--soft);
  font-weight: 500 } td, th { padding: 4px 12px 4px 0; border-bottom: 1px solid var(--line); vertical-align: top }
code, pre { font: 12.5px/1.45 ui-monospace, Consolas, monospace } pre { overflow-x: auto; background: var(--card);
  padding: 10px; border-radius: 6px; margin: 6px 0 } pre i { font-style: normal; display: block }
.add { background: var(--add) } .del { background: var(--del) } .hunk { color: var(--soft) }
details { margin: 3px 0 } summary { cursor: pointer } summary:hover { color: var(--after) }
.bar { height: 9px; border-radius: 3px; margin: 2px 0; min-width: 1px } .bar.before { background: var(--before) }
.bar.after { background: var(--after) } .bars { width: 30% }
"""


def to_html(report: Report) -> str:
    """The page. Sections that have nothing to say are left out."""
    main, cost = report.main, report.cost()
    body = [_head(report), _cards(report, main, cost)]
    if main is None:
        body.append(_section("Not served by a graph", _signatures(report)))
    body.append(_section("Rewrites", _rewrites(report)))
    if main is not None and main.expected:
        body.append(_section("Expected and found", _expected(main)))
    body.append(_section("What each fusion contributes", _worth(report)))
    body.append(_section("Certificate", _certificate(main)))
    body.append(_section("Near-misses", _near_misses(report)))
    body.append(_section("Reverted", _reverted(report)))
    body.append(_section("Notes", _notes(report)))
    if cost is not None:
        body.append(_section("Bytes, FLOPs and roofline time by op", _costs(cost, cost.before.by_op, cost.after.by_op)))
        modules = _costs(cost, cost.before.by_module, cost.after.by_module)
        body.append(_section("By module", f"<details><summary>all modules</summary>{modules}</details>"))
    if main is not None:
        body.append(_section("Passes", _passes(main)))
        body.append(_section("Lines of the model's source", _sources(main)))
        body.append(_section("Graph before", _graph(main.captured)))
        body.append(_section("Graph after", _graph(main.program)))
        body.append(_section("Signatures", _signatures(report)))
    title = escape(f"regraft: {report.model}")
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>'
    return (
        f"<!doctype html>\n<html lang=en><head>{head}<style>{STYLE}</style></head><body>{''.join(body)}</body></html>\n"
    )


def _section(title: str, content: str) -> str:
    return f"<h2>{escape(title)}</h2>{content}" if content else ""


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Cells are HTML already; a heading that starts with `#` is a column of numbers."""
    numeric = [h.startswith("#") for h in head]

    def cells(tag: str, values: Sequence[str]) -> str:
        return "".join(f"<{tag}{' class=num' if n else ''}>{v}</{tag}>" for v, n in zip(values, numeric, strict=True))

    lines = [f"<tr>{cells('td', row)}</tr>" for row in rows]
    return (
        f"<table><tr>{cells('th', [h.removeprefix('#') for h in head])}</tr>{''.join(lines)}</table>" if lines else ""
    )


def _code(text: str) -> str:
    return f"<code>{escape(text)}</code>" if text else ""


def _head(report: Report) -> str:
    from .report import versions

    record = report.record
    made = ", ".join(f"{n} {v}" for n, v in versions().items())
    options = ", ".join(f"{n}={v!r}" for n, v in record.options.items())
    about = f"{record.dtype} on {record.device}, {quantity(record.parameters)} parameters"
    below = "; ".join(filter(None, [about, options, made]))
    return f"<h1>{escape(report.model)}</h1><div class=soft>{escape(below)}</div>"


def _cards(report: Report, main: SignatureRecord | None, cost: CostReport | None) -> str:
    from .report import nodes_of

    cards: list[tuple[str, str]] = []
    if main is not None:
        nodes = nodes_of(main)
        cards.append((f"{nodes['before']} &rarr; {nodes['after']}", "nodes"))
    if cost is not None:
        sizes = escape(", ".join(f"{n}={s}" for n, s in cost.sizes.items()))
        cards.append((f"{cost.before.us:.0f} &rarr; {cost.after.us:.0f} us", f"roofline, {escape(cost.device.name)}"))
        kernels = [sum(s.count for s in side.by_op) for side in (cost.before, cost.after)]
        cards.append((f"{kernels[0]} &rarr; {kernels[1]}", f"kernels at {sizes}" if sizes else "kernels"))
    if main is not None and main.certificate is not None:
        passed = main.certificate.passed
        cards.append(
            (f"<span class={'good' if passed else 'bad'}>{'passed' if passed else 'FAILED'}</span>", "certificate")
        )
    calls = report.calls
    cards.append((f"{calls['graph']} / {calls['original']}", "calls by graph / original"))
    extra = report.record.memory.get("packed_copies")
    if extra is not None:
        cards.append((nbytes(extra), f"added to {nbytes(report.record.memory.get('weights', 0))} of weights"))
    return (
        "<div class=cards>" + "".join(f"<div class=card><b>{b}</b><span>{s}</span></div>" for b, s in cards) + "</div>"
    )


def _rewrites(report: Report) -> str:
    rows = []
    for group in report.rewrites:
        plain = group.to_dict()
        saved = plain["cost_before_us"] - plain["cost_after_us"]
        worst = plain["worst_check"]
        check = f"{worst['error_after']:.1e} of {worst['bound']:.1e}" if worst else ""
        if worst and worst["error_after"] == 0:
            check = "exact"
        modules = ", ".join(plain["modules"][:3]) + (" ..." if len(plain["modules"]) > 3 else "")
        rows.append(
            [
                escape(group.stage.lower()),
                escape(group.label),
                str(group.count),
                _code(modules),
                _code(plain["source"]),
                f"{saved:.0f} us" if saved > 0 else "",
                check,
            ]
        )
    return _table(["stage", "rewrite", "#count", "where", "source", "#saves", "#error of allowed"], rows)


def _worth(report: Report) -> str:
    return "".join(f"<div>{escape(line)}</div>" for line in worth(report))


def _expected(main: SignatureRecord) -> str:
    rows = []
    for e in main.expected:
        sign = "<span class=good>all</span>" if e.met else "<span class=bad>short</span>"
        places_ = "<br>".join(_code(m) for m in e.missing[:12])
        rows.append([escape(e.what), str(e.expected), str(e.found), sign, places_])
    return _table(["what", "#expected", "#found", "", "missing"], rows)


def _certificate(main: SignatureRecord | None) -> str:
    certificate = main.certificate if main is not None else None
    if certificate is None:
        return "<p class=soft>Nothing was run.</p>"
    rows = []
    for m in certificate.measured:
        rows.append(
            [
                escape(m.case),
                _code(m.output),
                f"{m.error_original:.2e}",
                f"{m.error:.2e}",
                f"{m.bound:.2e}",
                "" if m.kl is None else f"{m.kl:.1e}",
                "" if m.greedy is None else f"{100 * m.greedy:.4g} %",
                "<span class=good>passed</span>" if m.passed else "<span class=bad>failed</span>",
            ]
        )
    head = ["batch", "worst output", "#original's error", "#error", "#allowed", "#KL", "#greedy agreement", ""]
    said = [f"Errors are against {certificate.oracle}." if certificate.oracle else "", certificate.reason]
    said += [f"Skipped: {s}." for s in certificate.skipped]
    said += [f"Passing shows little of {d}." for d in certificate.doubts]
    return _table(head, rows) + f"<p class=soft>{escape(' '.join(filter(None, said)))}</p>"


def _near_misses(report: Report) -> str:
    rows = [
        [
            escape(m.rule),
            _code(over_layers(m.module)),
            str(m.count),
            _code(m.source),
            _code(m.wanted),
            _code(m.found),
            f"{m.depth} of {m.size}",
        ]
        for m in report.near_misses
    ]
    return _table(["rule", "where", "#count", "source", "wanted", "found", "#matched"], rows)


def _reverted(report: Report) -> str:
    rows = [[escape(r.rule), _code(r.module), _code(r.source), escape(r.reason)] for r in report.reverted]
    return _table(["rule", "where", "source", "why"], rows)


def _notes(report: Report) -> str:
    rows = [[_code(n.module), escape(n.message), _code(n.source)] for n in report.notes]
    return _table(["module", "note", "source"], rows)


def _signatures(report: Report) -> str:
    rows = []
    for s in report.record.signatures:
        times = ", ".join(f"{what} {t:.2f} s" for what, t in s.seconds.items())
        rows.append([_code(s.arguments), "graph" if s.served else escape(s.reason), times])
    return _table(["arguments", "served by", "time"], rows)


def _costs(cost: CostReport, before: Sequence[Any], after: Sequence[Any]) -> str:
    sides = ({s.name: s for s in before}, {s.name: s for s in after})
    names = sorted(sides[0].keys() | sides[1].keys(), key=lambda n: -max(_us(side.get(n)) for side in sides))
    longest = max((_us(side.get(n)) for side in sides for n in names), default=1.0) or 1.0
    rows = []
    for name in names:
        pair = [side.get(name) for side in sides]
        bars = "".join(
            f'<div class="bar {what}" style="width:{100 * _us(s) / longest:.1f}%"></div>'
            for what, s in zip(("before", "after"), pair, strict=True)
        )
        moved = [nbytes(cost.number(s.cost.bytes)) if s else "-" for s in pair]
        flops = [quantity(cost.number(s.cost.flops)) if s else "-" for s in pair]
        count = [str(s.count) if s else "-" for s in pair]
        us = [f"{s.us:.0f}" if s else "-" for s in pair]
        both = [" &rarr; ".join(v) for v in (count, moved, flops, us)]
        rows.append([_code(name), *both, f"<div class=bars style='width:220px'>{bars}</div>"])
    return _table(["", "#nodes", "#bytes", "#FLOPs", "#us", "before and after"], rows)


def _us(share: Any) -> float:
    return share.us if share is not None else 0.0


def _passes(main: SignatureRecord) -> str:
    traced = main.retrace() if main.retrace is not None else main.passes
    rows = []
    for p in main.passes:
        removed = ", ".join(f"{n} {what}" for what, n in p.removed.items())
        did = f"{len(p.rewrites)} rewrites" if p.rewrites else removed
        nodes = f"{p.nodes_before} &rarr; {p.nodes_after}"
        rows.append([escape(p.name), escape(p.stage.lower()), did, nodes, f"{1e3 * p.time_s:.0f} ms"])
    table = _table(["pass", "stage", "what it did", "#nodes", "#time"], rows)
    groups: dict[tuple[str, str], list[str]] = {}
    for p in traced:
        if p.before != p.after:
            groups.setdefault((p.before, p.after), []).append(p.name)
    return table + "".join(_diff(", ".join(names), *texts) for texts, names in groups.items())


def _diff(names: str, before: str, after: str) -> str:
    lines = diff_lines(before, after)
    shown = "".join(f"<i class={_kind(line)}>{escape(line) or ' '}</i>" for line in lines[:MAX_DIFF_LINES])
    more = f"<i class=hunk>... {len(lines) - MAX_DIFF_LINES} more lines</i>" if len(lines) > MAX_DIFF_LINES else ""
    added, removed = (sum(line.startswith(sign) for line in lines) for sign in "+-")
    summary = f"diff of {escape(names)} <span class=soft>+{added} -{removed}</span>"
    return f"<details><summary>{summary}</summary><pre>{shown}{more}</pre></details>"


def _kind(line: str) -> str:
    return {"+": "add", "-": "del", "@": "hunk"}.get(line[:1], "same")


def _sources(main: SignatureRecord) -> str:
    if main.captured is None:
        return ""
    rows = [
        [_code(line.source), str(line.nodes), _code(", ".join(line.ops)), escape(", ".join(line.rules))]
        for line in source_lines(main.captured, main.passes)
    ]
    table = _table(["line", "#nodes", "captured as", "rewritten by"], rows)
    return f"<details><summary>{len(rows)} lines</summary>{table}</details>" if rows else ""


def _graph(program: Any) -> str:
    if program is None:
        return ""
    parts = []
    for place, nodes in by_place(program):
        lines = "".join(
            f"<i>{escape(text)}  <span class=soft>{escape(source)}</span></i>" for text, source in places(nodes)
        )
        name = escape(place or "outside any layer")
        parts.append(
            f"<details><summary>{name} <span class=soft>{len(nodes)} nodes</span></summary><pre>{lines}</pre></details>"
        )
    return "".join(parts)
