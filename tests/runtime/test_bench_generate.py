"""`bench generate`: wrong tokens are caught, near ties are not wrong, and a slower run fails against its baseline."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from runtime_models import tiny_llama

from regraft.runtime import bench_generate as module
from regraft.runtime.bench_generate import GenerateResult, GenerateRow, bench_generate, differences, slower
from regraft.runtime.cli import main
from regraft.runtime.decoding.tables import PageTables
from regraft.runtime.generators import kv_bytes

ROW = GenerateRow(2, 5, 48)


def test_all_numbers_of_a_row() -> None:
    model = tiny_llama()
    said: list[str] = []
    bench = bench_generate(model, [ROW], ["eager", "regraft"], rounds=1, say=said.append)
    eager, ours = bench.results
    assert (eager.candidate, ours.candidate) == ("eager", "regraft") and not eager.problem and not ours.problem
    for r in bench.results:
        assert r.ttft_ms > 0 and r.step_ms > 0 and r.tokens_per_s > 0 and r.first_s > 0
        assert set(r.itl_ms) == {"median", "p95", "p99"} and r.itl_ms["median"] <= r.itl_ms["p95"] <= r.itl_ms["p99"]
    config = model.config
    width = config.hidden_size // config.num_attention_heads
    each = 2 * config.num_hidden_layers * config.num_key_value_heads * width * 4
    assert kv_bytes(config, 2, 11, 4) == 22 * each
    assert "generate" not in vars(model) and "forward" not in vars(model), "the model that was given is left as it was"
    assert len(said) == 2 and json.dumps(bench.to_dict())


def test_every_call_has_prompts_never_seen_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same ones for each candidate; an engine that shares pages of equal beginnings finds none."""
    real = module.prepared
    seen: dict[str, list[torch.Tensor]] = {}
    known: list[int] = []
    match = PageTables.match

    def watched(tables: PageTables, sequence: Any) -> int:
        known.append(match(tables, sequence))
        return known[-1]

    monkeypatch.setattr(PageTables, "match", watched)

    @contextmanager
    def prepared(choice: str, model: Any, length: int) -> Iterator[Any]:
        with real(choice, model, length) as run:

            def generate(ids: torch.Tensor, new: int, *streamer: Any) -> torch.Tensor:
                seen.setdefault(choice, []).append(ids)
                return (run.streamed if streamer else run.generate)(ids, new, *streamer)

            yield replace(run, generate=generate, streamed=generate)

    monkeypatch.setattr(module, "prepared", prepared)
    row = GenerateRow(2, 40, 4)
    bench_generate(tiny_llama(), [row], ["eager", "regraft"], rounds=2)
    eager, ours = seen["eager"], seen["regraft"]
    assert len(ours) == len(eager) == 1 + module.WARM + 3 + 2 + 2 + 1
    assert all(torch.equal(a, b) for a, b in zip(eager, ours))
    lines = torch.cat(ours)
    assert len(lines[:, :16].unique(dim=0)) == len(lines), "not even a first page is known"
    assert len(known) >= len(ours) and not any(known)


def test_other_tokens_than_eagers_are_wrong_unless_they_are_near_ties() -> None:
    model = tiny_llama()
    ids = torch.randint(3, 20, (2, 5))
    expected = model.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False)[:, 5:]
    assert differences(model, ids, expected, expected.clone()) == (0, "")
    wrong = expected.clone()
    wrong[1, 2] = (wrong[1, 2] + 1) % 20
    count, problem = differences(model, ids, expected, wrong)
    assert count == 1 and problem.startswith("wrong: sequence 1, token 2")
    with torch.no_grad():  # two tokens with the same row of the output layer are tied
        head = model.get_output_embeddings().weight
        head[wrong[1, 2]] = head[expected[1, 2]]
    assert differences(model, ids, expected, wrong) == (1, "")
    assert differences(model, ids, expected, wrong[:, :3])[1].startswith("wrong: [2, 3] tokens")


def test_a_wrong_candidate_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama()
    real = module.prepared

    @contextmanager
    def prepared(choice: str, given: Any, length: int) -> Iterator[Any]:
        with real("eager", given, length) as run:
            if choice == "regraft":
                yield replace(run, generate=lambda ids, new: (run.generate(ids, new) + 1) % 7)
            elif choice == "vllm":
                raise ImportError("vllm is not installed here")
            else:
                yield run

    monkeypatch.setattr(module, "prepared", prepared)
    ours, vllm = bench_generate(model, [ROW], ["regraft", "vllm"], rounds=1).results
    assert ours.problem.startswith("wrong") and ours.step_ms == 0
    assert "not installed" in vllm.problem


@pytest.mark.parametrize(("short", "problem"), [(0, ""), (1, "wrong: [2, 47] tokens")])
def test_of_other_weights_only_the_number_of_tokens_is_compared(
    short: int, problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_llama()
    real = module.prepared

    @contextmanager
    def prepared(choice: str, given: Any, length: int) -> Iterator[Any]:
        with real("eager", given, length) as run:
            other = replace(run, generate=lambda ids, new: (run.generate(ids, new) + 1)[:, short * (new > 1) :] % 7)
            yield other if choice == "vllm" else run

    monkeypatch.setattr(module, "prepared", prepared)
    (found,) = bench_generate(model, [ROW], ["vllm"], rounds=1).results
    assert found.problem.startswith(problem) and bool(found.problem) is bool(problem)
    assert (found.step_ms > 0) is not bool(problem)


def test_without_eagers_tokens_nothing_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    real = module.prepared

    @contextmanager
    def prepared(choice: str, given: Any, length: int) -> Iterator[Any]:
        if choice == "eager":
            raise RuntimeError("no memory")
        with real("eager", given, length) as run:
            yield run

    monkeypatch.setattr(module, "prepared", prepared)
    (found,) = bench_generate(tiny_llama(), [ROW], ["regraft"], rounds=1).results
    assert found.problem == "eager gave no tokens to compare with"


def test_a_slower_run_fails_against_its_baseline(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = GenerateResult("r", "regraft", 1, 5, 6, ttft_ms=10.0, step_ms=2.0)
    before = {"results": [{"row": "r", "candidate": "regraft", "ttft_ms": 10.0, "step_ms": 1.9, "problem": ""}]}
    assert slower([result], before, 0.1) == []
    assert slower([result], before, 0.01) == ["r: step 1.900 -> 2.000 ms"]
    assert slower([replace(result, problem="wrong")], before, 0.1) == ["r: wrong"]
    config = tmp_path / "config.json"
    config.write_text(json.dumps({**tiny_llama().config.to_dict(), "architectures": ["LlamaForCausalLM"]}))
    file = tmp_path / "out.json"
    command = ["bench", "generate", "--model", str(config), "--prompt", "4", "--new", "64", "--rounds", "1"]
    command += ["--candidates", "regraft", "--device", "cpu"]
    assert main([*command, "--json", str(file)]) == 0
    plain = json.loads(file.read_text())
    plain["results"][0]["step_ms"] /= 100
    file.write_text(json.dumps(plain))
    assert main([*command, "--baseline", str(file)]) == 1
    assert "slower than" in capsys.readouterr().out
    assert main(["bench", "generate"]) == 2 and "needs a model" in capsys.readouterr().err
