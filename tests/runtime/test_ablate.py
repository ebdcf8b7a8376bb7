"""What each fusion contributes, and how the report shows it."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
from runtime_models import tiny_llama

from regraft.runtime import ablate as module
from regraft.runtime.ablate import Ablation, Contribution, ablate, read_ablation
from regraft.runtime.cli import main
from regraft.runtime.errors import InputError
from regraft.runtime.optimize import optimize


def test_each_fusion_is_taken_out_in_turn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_llama(2)
    folder, out = tmp_path / "tiny", tmp_path / "a.json"
    model.save_pretrained(folder)
    words = ["bench", "ablate", str(folder), "--device", "cpu", "--dtype", "float32", "--batch", "2", "--length", "9"]
    assert main([*words, "--passes", "qkv,linear_act", "--rounds", "1", "--calls", "1", "--json", str(out)]) == 0
    found = json.loads(out.read_text())
    (row,) = found["results"]
    assert row["row"] == "tiny 2x9" and [p["name"] for p in row["passes"]] == ["qkv", "linear_act"]
    qkv, absent = row["passes"]
    assert qkv["rewrites"] == 2 and qkv["ms"] > 0 and qkv["saves_ms"] == pytest.approx(qkv["ms"] - row["ms"])
    assert absent["rewrites"] == 0 and "all passes" in capsys.readouterr().out

    assert main(["report", str(folder), "--ablation", str(out), "--html", str(tmp_path / "r.html")]) == 0
    text = capsys.readouterr().out
    assert "Worth" in text and "tiny 2x9" in text and "qkv (x2)" in text
    assert "What each fusion contributes" in (tmp_path / "r.html").read_text()
    assert main(["report", str(folder), "--ablation", str(folder / "config.json")]) == 2


def test_without_names_it_is_every_fusion_that_rewrote_something(monkeypatch: pytest.MonkeyPatch) -> None:
    off: list[str] = []

    def watched(model: object, **options: object) -> object:
        off.extend(options["passes"] or ())  # type: ignore[arg-type, misc]
        return optimize(model, **options)  # type: ignore[arg-type, type-var]

    monkeypatch.setattr(module, "optimize", watched)
    model = tiny_llama(1)
    (result,) = ablate(model, (1, 5), rounds=1, calls=1).results
    assert off == [p.name for p in result.passes] and {"qkv", "gate_up"} <= set(off)
    assert "forward" not in vars(model)


def test_a_failing_pipeline_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(model: object, **options: object) -> object:
        raise RuntimeError("no")

    monkeypatch.setattr(module, "optimize", failing)
    with pytest.raises(ValueError, match="RuntimeError: no"):
        ablate(tiny_llama(1), (1, 5), rounds=1, calls=1)


def test_lines_and_files(tmp_path: Path) -> None:
    passes = [
        Contribution("a", 1, 9.0, -1.0),
        Contribution("b", 2, 12.5, 2.5),
        Contribution("c", 3, None, None, "crash"),
    ]
    lines = Ablation("m 1x2", 10.0, 0.1, passes).lines()
    assert lines[1:] == ["  b (x2): saves 2.500 ms, 25.0 %", "  c (x3): crash", "  a (x1): costs 1.000 ms, 10.0 %"]
    file = tmp_path / "x.json"
    for text in ("{", '{"results": []}', '{"results": [{"passes": [{"name": 1}], "ms": 1, "row": ""}]}'):
        file.write_text(text)
        with pytest.raises(InputError, match="bench ablate"):
            read_ablation(str(file), "m")
    both = [asdict(Ablation(f"{name} 1x2", ms, 0.1, passes)) for name, ms in (("m", 10.0), ("n", 20.0))]
    file.write_text(json.dumps({"results": both}))
    assert read_ablation(str(file), "n")["ms"] == 20.0
    with pytest.raises(InputError, match="no row of o, only m 1x2, n 1x2"):
        read_ablation(str(file), "o")
    file.write_text(json.dumps({"results": both[:1]}))
    assert read_ablation(str(file), "o")["ms"] == 10.0, "the only one"
