"""The report says what happened: counts, costs, certificate, what was reverted; as text, JSON and one HTML page."""

from __future__ import annotations

import copy
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import pytest
import torch
from runtime_models import tiny_llama, tokens

import regraft
from regraft.compiler.device import H200
from regraft.compiler.program import Limits, Note
from regraft.compiler.records import NearMiss, PassResult, Reverted, Rewrite
from regraft.compiler.shapes import dim_names
from regraft.runtime.record import Record, SignatureRecord
from regraft.runtime.report import Report, group_misses, group_rewrites
from regraft.runtime.report_cost import cost_report
from regraft.runtime.report_graph import diff_lines
from regraft.runtime.report_text import LINES, WIDTH, nbytes, quantity

LAYERS = 2


class Wrong(regraft.Rule):
    """silu(x) -> relu(x)"""

    stage = regraft.Stage.RAISE

    def pattern(self, p: Any, x: Any) -> Any:
        return p.silu(x)

    def emit(self, m: Any, g: Any) -> Any:
        return g.relu(m.x)


def asked(batch: int = 2, length: int = 9) -> dict[str, torch.Tensor]:
    """Arguments of the signature that `optimize` captures of its own accord."""
    ids = tokens(batch, length)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@pytest.fixture(scope="module")
def model() -> Any:
    made = regraft.optimize(tiny_llama(LAYERS), verbose=False)
    made(**asked())
    made(**asked(3, 5))
    return made


def test_counts_are_functions_of_the_layers(model: Any) -> None:
    plain = json.loads(model.report.to_json())
    counts = {e["what"]: (e["expected"], e["found"]) for e in plain["expected"]}
    assert counts == {
        "attention": (LAYERS, LAYERS),
        "norm": (2 * LAYERS + 1, 2 * LAYERS + 1),
        "rope": (2 * LAYERS, 2 * LAYERS),
        "qkv": (LAYERS, LAYERS),
        "gate_up": (LAYERS, LAYERS),
    }
    by_rule = {g["rule"]: g["count"] for g in plain["rewrites"] if g["stage"] == "FUSE"}
    assert by_rule["qkv"] == LAYERS and by_rule["gate_up"] == LAYERS
    assert by_rule["add_rms_norm"] == 2 * LAYERS


def test_json_has_the_keys_of_its_schema(model: Any) -> None:
    plain = json.loads(model.report.to_json())
    keys = {"version", "calls", "fallbacks", "rewrites", "near_misses", "reverted", "certificate", "notes", "passes"}
    assert keys | {"expected", "signatures", "memory", "cost", "model", "dtype", "device", "options"} <= plain.keys()
    assert plain["version"] == 1 and plain["model"] == "LlamaForCausalLM" and plain["dtype"] == "float32"
    assert plain["calls"] == {"graph": 2, "original": 0}
    assert plain["certificate"]["passed"] is True and plain["certificate"]["measured"]
    assert plain["memory"]["weights"] == sum(p.numel() * 4 for p in model.parameters())
    assert all(p["time_s"] >= 0 and p["nodes_before"] > 0 for p in plain["passes"])


def test_calls_are_counted_live(model: Any) -> None:
    before = model.report.calls
    model(**asked())
    assert model.report.calls == {"graph": before["graph"] + 1, "original": before["original"]}
    with pytest.warns(regraft.RegraftWarning, match="labels"):
        model(**asked(), labels=tokens())
    plain = model.report.to_dict()
    assert plain["calls"]["original"] == 1
    assert [n for reason, n in plain["fallbacks"].items() if "labels" in reason] == [1]
    assert "labels" in str(model.report).splitlines()[-1]


def test_text_fits_on_one_screen(model: Any) -> None:
    lines = str(model.report).splitlines()
    assert len(lines) <= LINES and max(map(len, lines)) <= WIDTH
    text = str(model.report)
    for said in (f"(x{LAYERS})", f"attention {LAYERS}/{LAYERS}", "Certificate passed", "Roofline", "Calls"):
        assert said in text, said


def test_costs_fall_and_agree_with_the_weights(model: Any) -> None:
    plain = model.report.to_dict()["cost"]
    assert plain["after"]["us"] < plain["before"]["us"]
    assert plain["after"]["kernels"] < plain["before"]["kernels"]
    by_op = {s["name"]: s for s in plain["after"]["by_op"]}
    assert by_op["regraft.attention"]["count"] == LAYERS, "lowered kernels are still known by their op"
    for side in ("before", "after"):
        assert sum(s["bytes"] for s in plain[side]["by_op"]) == plain[side]["bytes"]
        assert plain[side]["bytes"] > sum(p.numel() * 4 for p in model.model.layers.parameters())
    # q, k, v, o; gate, up, down; lm_head: 2 FLOPs a weight and token
    length = next(v for k, v in plain["sizes"].items() if k == "input_ids[1]")
    assert length == 512
    weights = sum(p.numel() for n, p in model.named_parameters() if p.dim() == 2 and "embed" not in n)
    assert sum(s["flops"] for s in plain["before"]["by_op"] if s["name"] == "aten.linear") == 2 * weights * length


class Tags(HTMLParser):
    """Checks that tags close, and collects text and links."""

    VOID = frozenset(["meta", "br"])

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [str(v) for k, v in attrs if k in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_html_is_whole_and_needs_nothing_else(model: Any) -> None:
    page = model.report.to_html()
    tags = Tags()
    tags.feed(page)
    assert not tags.open and not tags.links and "<script" not in page and "http" not in page
    text = "".join(tags.text)
    for title in ("Rewrites", "Expected and found", "Certificate", "Passes", "Graph before", "Graph after"):
        assert title in text, title
    assert "modeling_llama.py" in text and "regraft.add_rms_norm(" in text
    diffs = re.findall(r"diff of ([\w, ]+) \+(\d+) -(\d+)", text)
    fused = next((int(a), int(r)) for names, a, r in diffs if "qkv" in names)
    assert fused[0] > 0 and fused[1] > 0
    assert text.count("model.layers.1") >= 2, "each layer of both graphs"


def test_a_copy_reports_without_its_graphs(model: Any) -> None:
    other = copy.deepcopy(model)
    assert other.report.record is not model.report.record
    assert other.report.cost() is None
    plain = json.loads(other.report.to_json())
    assert plain["cost"] is None and plain["rewrites"]
    assert "Graph after" not in other.report.to_html()
    other(**asked())
    assert other.report.calls["graph"] == model.report.calls["graph"] + 1


def test_dry_run_on_meta_reports_and_changes_nothing() -> None:
    with torch.device("meta"):
        meta = tiny_llama(LAYERS)
    report = regraft.optimize(meta, dry_run=True, verbose=False)
    assert isinstance(report, Report) and "forward" not in vars(meta)
    plain = json.loads(report.to_json())
    assert plain["certificate"] is None and plain["device"] == "meta"
    assert {e["what"]: e["found"] for e in plain["expected"]}["qkv"] == LAYERS
    assert "nothing was run" in str(report)


def test_a_wrong_rule_is_named_as_reverted() -> None:
    model = tiny_llama(LAYERS)
    with torch.no_grad():
        right = model(**asked()).logits
        found = regraft.optimize(model, rules=[Wrong()], passes={"gate_up": False}, verbose=False)(**asked()).logits
    torch.testing.assert_close(found, right)
    plain = json.loads(model.report.to_json())
    assert {r["rule"] for r in plain["reverted"]} == {"wrong"}
    assert "wrong in model.layers" in str(model.report) and "Reverted" in str(model.report)
    assert plain["options"]["passes"] == {"gate_up": False}
    assert "gate_up" not in {e["what"] for e in plain["expected"]}, "what was switched off is not expected"


def test_equal_rewrites_and_misses_are_grouped_over_layers() -> None:
    rewrites = [
        Rewrite("qkv", f"model.layers.{i}.self_attn", "f.py:1 x", "q + k -> qk", ("a",), ("b",), 2.0, 1.5)
        for i in range(4)
    ]
    (group,) = group_rewrites([PassResult("qkv", "FUSE", rewrites)])
    assert group.text == "q + k -> qk (x4)"
    assert group.to_dict()["modules"] == ["model.layers.*.self_attn"]
    assert group.to_dict()["cost_before_us"] == 8.0 and group.to_dict()["cost_after_us"] == 6.0

    misses = [NearMiss("rms_norm", f"layers.{i}.norm", "f.py:3 y", "rsqrt", "sqrt", 4, 6) for i in range(5)]
    misses.append(NearMiss("rope", "layers.0.attn", "f.py:9 z", "cat", "stack", 9, 10, count=2))
    grouped = group_misses(misses)
    assert [(m.rule, m.module, m.count) for m in grouped] == [
        ("rope", "layers.0.attn", 2),
        ("rms_norm", "layers.*.norm", 5),
    ]


def test_a_report_without_a_graph_says_why_and_long_lists_are_cut() -> None:
    record = Record("Strange", dtype="float32", device="cpu")
    record.signatures.append(SignatureRecord("x float32[2]", served=False, reason="data-dependent control flow"))
    record.notes += [Note(f"layers.{i}", f"note {i} " + "long " * 40) for i in range(9)]
    passes = [PassResult("r", "FUSE", reverted=[Reverted(f"rule{i}", "m", "s", "wrong") for i in range(7)])]
    record.signatures[0].passes = passes
    text = str(Report(record))
    assert "data-dependent control flow" in text and "(and 5 more)" in text and "(and 7 more)" in text
    assert max(map(len, text.splitlines())) <= WIDTH and len(text.splitlines()) <= LINES
    assert "data-dependent control flow" in Report(record).to_html()
    assert Report(record).cost() is None


def test_json_has_no_infinities() -> None:
    record = Record("Model", options={"a": float("inf"), "b": [float("nan")]})
    assert json.loads(Report(record).to_json())["options"] == {"a": "inf", "b": ["nan"]}


def test_cost_report_is_at_one_sequence(model: Any) -> None:
    main = model.report.main
    made = cost_report(main.captured, main.program, H200)
    assert made.sizes["input_ids[0]"] == 1 and made.sizes["input_ids[1]"] == 512
    assert made.number(made.after.total.bytes) < made.number(made.before.total.bytes)
    (symbol,) = (s for s, name in dim_names(main.captured).items() if name == "input_ids[1]")
    limited = replace(main.captured, limits=Limits(ranges={symbol.name: (1, 77)}))
    assert cost_report(limited, main.program, H200).sizes["input_ids[1]"] == 77, "or as long as the model allows"


def test_diff_leaves_out_what_only_releases_memory() -> None:
    before = "class G:\n    def forward(self):\n        # x\n        a: f32 = op(b);  b = c = None\n        d = op(a)"
    after = "class G:\n    def forward(self):\n        a: f32 = op(b)\n        d = other(a);  a = None"
    assert [line for line in diff_lines(before, after) if line[0] in "+-"] == ["-d = op(a)", "+d = other(a)"]


def test_numbers_for_people() -> None:
    assert quantity(8_030_000_000) == "8.03 G" and quantity(12) == "12 " and quantity(4.2e15) == "4.2 P"
    assert nbytes(0) == "0 B" and nbytes(16 << 30) == "16 GiB" and nbytes(1536) == "1.5 KiB"
