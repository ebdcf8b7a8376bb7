"""Suites of forwards: rows in processes of their own, and peers taken over from an earlier run."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from runtime_models import tiny_llama

from regraft.runtime.bench import Bench, Result, geometric_mean, summaries, summary_table
from regraft.runtime.cli import main
from regraft.runtime.errors import InputError
from regraft.runtime.loading import CONFIGS, ArgumentError, inputs_for, load_config, load_model
from regraft.runtime.reuse import Earlier
from regraft.runtime.suite import Row, Settings, read_suite, run_suite
from regraft.runtime.timing import Timing

SETTINGS = Settings(torch.device("cpu"), torch.float32, limit_s=1.0)


def timed(row: str, candidate: str, ms: float, **more: Any) -> Result:
    return Result(row, candidate, 1, 8, Timing(ms, ms, ms, 1, 0.0), **more)


def test_the_summary_compares_with_the_fastest_peer_that_was_right() -> None:
    results = [
        timed("a", "eager", 4.0, peak_gb=2.0),
        timed("a", "compile", 1.0, problem="wrong: logits"),
        timed("a", "compile-max", 2.0, first_s=60.0),
        timed("a", "regraft", 1.0, peak_gb=1.0, first_s=15.0),
        timed("b", "eager", 3.0),
        timed("b", "regraft", 6.0),
        timed("c", "eager", 3.0),
        Result("c", "regraft", 1, 8, problem="crashed"),
    ]
    rows = summaries(results)
    assert [(s.row, s.best_peer, s.ratio) for s in rows] == [("a", "compile-max", 2.0), ("b", "eager", 0.5)]
    assert rows[0].memory_ratio == 0.5 and rows[0].first_ratio == 0.25 and rows[1].memory_ratio is None
    assert geometric_mean(rows) == pytest.approx(1.0) and geometric_mean([]) is None
    lines = summary_table(results)
    assert lines[-1].endswith("over 2 rows, 1 below 1, 1 rows without a ratio")
    assert lines[-2].startswith("c ") and lines[-2].endswith("no ratio: crashed")
    assert summary_table(results[:-2])[-1].endswith("over 2 rows, 1 below 1")


def test_a_row_that_crashes_or_hangs_costs_only_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("regraft.runtime.suite.SLACK_S", 1.0)

    def run(row: Row, settings: Settings, say: Callable[[str], None]) -> Bench:
        if row.name == "crash":
            os._exit(7)
        if row.name == "hang":
            time.sleep(60)
        if row.name == "raise":
            raise RuntimeError("out of memory")
        bench = Bench(row.name, "float32", "some device")
        bench.results = [timed(row.label, "eager", 2.0), timed(row.label, "regraft", 1.0)]
        return bench

    seen: list[int] = []
    settings = replace(SETTINGS, limit_s=0.1)
    rows = [Row("", 1, 8, name=n) for n in ("crash", "good", "hang", "raise")]
    bench = run_suite(rows, settings, done=lambda b: seen.append(len(b.results)), run=run)
    problems = {r.row: r.problem for r in bench.results if r.candidate == "regraft"}
    assert problems == {
        "crash 1x8": "its process ended with 7",
        "good 1x8": "",
        "hang 1x8": "gave up after 1 s",
        "raise 1x8": "RuntimeError: out of memory",
    }
    assert seen == [1, 3, 4, 5] and bench.device == "some device"


def test_a_suite_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_llama().save_pretrained(tmp_path / "m")
    (tmp_path / "small.json").write_text((tmp_path / "m" / "config.json").read_text())
    lines = [{"model": "small", "batch": 2, "length": 7, "peers": []}, {"model": "small", "batch": 1, "length": 5}]
    (tmp_path / "s.json").write_text(json.dumps({"rows": lines}))
    out = tmp_path / "out.json"
    words = ["bench", "forward", "--suite", str(tmp_path / "s.json"), "--device", "cpu", "--dtype", "float32"]
    assert main([*words, "--only", "2x7", "--rounds", "1", "--calls", "1", "--json", str(out)]) == 0
    found = json.loads(out.read_text())
    assert [(r["row"], r["candidate"]) for r in found["results"]] == [("small 2x7", "eager"), ("small 2x7", "regraft")]
    assert found["geometric_mean"] > 0 and "geometric mean" in capsys.readouterr().out
    assert main([*words, "--only", "9x9"]) == 2 and "'9x9'" in capsys.readouterr().err
    assert main(["bench", "forward"]) == 2


def test_a_wrong_suite_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "s.json"
    for text, said in (
        ("{}", "rows"),
        ("[1]", "rows"),
        ('{"rows": [{"model": "m", "batch": 1, "length": 2, "peers": ["tvm"]}]}', "'tvm'"),
        ('{"rows": [{"model": "m", "batch": 1, "size": 2}]}', "size"),
    ):
        file.write_text(text)
        with pytest.raises(ArgumentError, match=said):
            read_suite(str(file))


def test_the_suite_of_the_repository_names_models_that_load() -> None:
    rows = read_suite(str(CONFIGS / "forward.json"))
    assert {r.label for r in rows} >= {"llama_8b 1x512", "bert_base 32x128", "vit_base 64x1"}
    for name in {r.model for r in rows}:
        assert load_config(name).architectures, name
    encoder = load_model("whisper_small_encoder", dtype=torch.float32, device=torch.device("meta"), layers=1)
    assert inputs_for(encoder, 3, 1)["input_features"].shape == (3, 80, 3000)
    assert "attention_mask" not in inputs_for(tiny_llama(), 1, 4, mask=False)


def test_peers_are_reused_where_an_anchor_agrees(tmp_path: Path) -> None:
    before = Bench("m", "bfloat16", "chip", rates={"copy_tb_s": 4.0, "matmul_tflop_s": 700.0})
    before.results = [timed("m 1x8", n, ms) for n, ms in (("eager", 10.0), ("compile", 5.0), ("compile-graphs", 4.0))]
    file = tmp_path / "b.json"
    file.write_text(json.dumps(before.to_dict()))
    earlier = Earlier(str(file))
    now = Bench("m", "bfloat16", "chip", rates={"copy_tb_s": 4.1, "matmul_tflop_s": 690.0})
    blank = Result("m 1x8", "", 1, 8)
    same, slower = timed("m 1x8", "eager", 10.4), timed("m 1x8", "eager", 12.0)

    taken = earlier.result("compile", now, blank, same)
    assert isinstance(taken, Result) and taken.timing and taken.timing.median_ms == 5.0 and taken.reused == before.date
    assert isinstance(earlier.result("compile", now, blank, slower), str), "the host is slower today"
    graphs = earlier.result("compile-graphs", now, blank, slower)
    assert isinstance(graphs, Result) and graphs.candidate == "compile-graphs", "the device is not"
    busy, busier = (replace(slower, host_ms=ms) for ms in (10.0, 20.0))
    before.results = [replace(same, host_ms=10.0), replace(timed("m 1x8", "compile-graphs", 4.0), host_ms=0.3)]
    file.write_text(json.dumps(before.to_dict()))
    assert isinstance(Earlier(str(file)).result("compile-graphs", now, blank, busy), Result)
    assert isinstance(Earlier(str(file)).result("compile-graphs", now, blank, busier), str), "0.3 of 4 ms more"
    now.rates["copy_tb_s"] = 3.0
    assert isinstance(earlier.result("compile-graphs", now, blank, slower), str)
    assert earlier.result("compile-max", now, blank, same) is None
    assert earlier.result("eager", now, blank, same) is None
    assert "device" in str(earlier.result("compile", replace(now, device="other"), blank, same))
    assert "torch" in str(earlier.result("compile", replace(now, versions={"torch": "0"}), blank, same))
    file.write_text("[]")
    with pytest.raises(InputError, match="--reuse"):
        Earlier(str(file))
