"""The command line: what it prints and writes, and errors that name the argument, its value and what is allowed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from runtime_models import tiny_llama

from regraft.runtime.cli import main
from regraft.runtime.loading import load_config, load_model, with_layers


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    tiny_llama(2).to(torch.bfloat16).save_pretrained(path)
    return path


@pytest.fixture
def config(folder: Path, tmp_path: Path) -> Path:
    file = tmp_path / "config.json"
    file.write_text((folder / "config.json").read_text())
    return file


def test_dry_run_from_a_config_alone(config: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    page, plain = tmp_path / "r.html", tmp_path / "r.json"
    assert main(["optimize", str(config), "--dry-run", "--html", str(page), "--json", str(plain)]) == 0
    assert "dry run" in capsys.readouterr().out
    found = json.loads(plain.read_text())
    assert found["device"] == "meta" and {e["what"]: e["found"] for e in found["expected"]}["attention"] == 2
    assert page.read_text().startswith("<!doctype html>")
    assert main(["report", str(config), "--layers", "1", "--json", "-"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {e["what"]: e["found"] for e in found["expected"]}["attention"] == 1


def test_bench_forward_writes_its_conditions(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "b.json"
    words = [
        "bench",
        "forward",
        str(folder),
        "--device",
        "cpu",
        "--batch",
        "1,2",
        "--length",
        "9",
        "--dtype",
        "float32",
    ]
    words += ["--candidates", "eager,regraft", "--rounds", "1", "--calls", "1", "--layers", "1", "--json", str(file)]
    assert main(words) == 0
    found = json.loads(file.read_text())
    assert [(r["candidate"], r["batch"], r["length"]) for r in found["results"]] == [
        ("eager", 1, 9),
        ("regraft", 1, 9),
        ("eager", 2, 9),
        ("regraft", 2, 9),
    ]
    assert found["dtype"] == "float32" and all(r["timing"]["median_ms"] > 0 for r in found["results"])
    assert " 2x9" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["optimise", "x"], "optimise"),
        (["optimize"], "model"),
        (["optimize", "/does/not/exist"], "expected a folder with a config.json"),
        (["optimize", "CONFIG", "--dtype", "bfloat"], "Known: float32, bfloat16"),
        (["optimize", "CONFIG", "--device", "tpu"], "allowed are cpu, cuda"),
        (["optimize", "CONFIG", "--layers", "0"], "'0' is not a positive number"),
        (["optimize", "CONFIG", "--dry-run", "--passes=-rop"], "rope"),
        (["optimize", "CONFIG", "--dry-run", "--verify", "quick"], "fast"),
        (["bench", "forward", "CONFIG", "--batch", "1,x"], "'x' is not a positive number"),
        (["bench", "forward", "CONFIG", "--candidates", "eagre"], "eager"),
        (["bench", "kernels", "rmsnorm"], "rms_norm"),
        (["bench", "generate", "bert_base", "--layers", "1"], "BertModel does not"),
        (["profile", "CONFIG", "--trace", "/no/such/folder/x.json"], "--trace '/no/such/folder/x.json': there is no"),
        (["optimize", "CONFIG", "--html", "/"], "--html '/': expected a file"),
        (["optimize", "LIST"], "transformers cannot read its config"),
    ],
)
def test_errors_name_the_argument_and_what_is_allowed(
    words: list[str], said: str, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "list.json").write_text("[1]")
    paths = {"CONFIG": str(config), "LIST": str(tmp_path / "list.json")}
    words = [paths.get(w, w) for w in words]
    try:
        status = main(words)
    except SystemExit as left:
        status = left.code
    assert status == 2
    assert said in capsys.readouterr().err


def test_a_config_that_transformers_does_not_know(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "no_such_model"}')
    assert main(["optimize", str(tmp_path)]) == 2
    assert "no_such_model" in capsys.readouterr().err


def test_weights_are_loaded_where_there_are_some_and_else_are_the_same_each_time(folder: Path, config: Path) -> None:
    cpu = torch.device("cpu")
    loaded = load_model(str(folder), dtype=None, device=cpu)
    assert loaded.dtype == torch.bfloat16 and not loaded.training
    original = tiny_llama(2).to(torch.bfloat16)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), original.parameters(), strict=True))
    first, second = (load_model(str(config), dtype=torch.float32, device=cpu) for _ in range(2))
    assert first.dtype == torch.float32
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_layers_of_every_stack(config: Path) -> None:
    import transformers

    assert with_layers(load_config(str(config)), 1).num_hidden_layers == 1
    whisper = with_layers(transformers.WhisperConfig(encoder_layers=4, decoder_layers=6), 2)
    assert (whisper.encoder_layers, whisper.decoder_layers) == (2, 2)
    gemma = with_layers(transformers.Gemma3TextConfig(num_hidden_layers=6), 2)
    assert gemma.num_hidden_layers == 2 and len(gemma.layer_types) == 2


def test_help_and_the_module_form() -> None:
    ran = subprocess.run([sys.executable, "-m", "regraft", "--help"], capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    assert all(verb in ran.stdout for verb in ("optimize", "bench", "doctor", "report"))
