"""Measurements: correctness before time, rounds in turn, medians; wrong and failing candidates are told, not timed."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from runtime_models import tiny_llama

from regraft.kernels import tuning
from regraft.kernels.case import Case, plain, some_rows
from regraft.kernels.op import Kernel
from regraft.kernels.rms_norm import rms_norm
from regraft.runtime import bench_forward as forward_module
from regraft.runtime import bench_kernels as kernels_module
from regraft.runtime.bench import table
from regraft.runtime.bench_forward import bench_forward
from regraft.runtime.bench_kernels import bench_kernels
from regraft.runtime.cli import main
from regraft.runtime.doctor import examine, examples
from regraft.runtime.loading import inputs_for
from regraft.runtime.timing import Timing, measure

CPU = torch.device("cpu")


def test_measure_takes_turns_and_medians() -> None:
    order: list[str] = []

    def sleeping(name: str, seconds: float) -> Any:
        def call() -> None:
            order.append(name)
            time.sleep(seconds)

        return call

    found = measure({"a": sleeping("a", 0.004), "b": sleeping("b", 0.001)}, CPU, rounds=3, calls=2, warmup=1)
    assert order == ["a", "b", *"aabb", *"bbaa", *"aabb"], "warm-up, then rounds in alternating order"
    assert found["a"].median_ms > 3.5 > found["b"].median_ms > 0.9
    assert found["a"].fastest_ms <= found["a"].median_ms <= found["a"].slowest_ms
    assert found["a"].warmup_s >= 0.004 and found["a"].rounds == 3
    with pytest.raises(ValueError, match="rounds=0"):
        measure({}, CPU, rounds=0)


def test_inputs_have_the_size_that_was_asked_for() -> None:
    model = tiny_llama()
    made = inputs_for(model, 5, 33)
    assert made["input_ids"].shape == (5, 33) and made["attention_mask"].shape == (5, 33)
    assert made["input_ids"].max() < model.config.vocab_size and made["attention_mask"].all()
    assert not torch.equal(made["input_ids"][0], made["input_ids"][2]), "rows differ"


def test_forward_compares_before_it_times(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama()
    candidate = forward_module.candidate

    @contextmanager
    def candidates(name: str, given: Any, inputs: Any) -> Iterator[Any]:
        if name == "compile":
            yield lambda **inputs: given(**{**inputs, "input_ids": inputs["input_ids"].flip(1)})
        elif name == "compile-graphs":
            raise RuntimeError("no such backend")
        elif name == "compile-max":
            time.sleep(60)
        else:
            with candidate(name, given, inputs) as run:
                yield run

    monkeypatch.setattr(forward_module, "candidate", candidates)
    chosen = ["regraft", "compile", "compile-graphs", "compile-max"]
    bench = bench_forward(model, [(2, 9)], chosen, rounds=1, calls=1, limit_s=12.0)
    results = {r.candidate: r for r in bench.results}
    assert results["eager"].timing and results["regraft"].timing and not results["regraft"].problem
    assert results["regraft"].error <= results["regraft"].bound
    assert results["compile"].timing is None and results["compile"].problem.startswith("wrong: logits")
    assert results["compile"].error > results["compile"].bound
    assert results["compile-graphs"].timing is None and "no such backend" in results["compile-graphs"].problem
    assert results["compile-max"].problem == "gave up after 12 s"
    plain = json.loads(json.dumps(bench.to_dict()))
    assert {"date", "versions", "device", "dtype", "command", "model", "results", "rates"} <= plain.keys()
    assert {"torch", "triton", "transformers", "regraft"} <= plain["versions"].keys()
    assert plain["results"][0]["timing"]["median_ms"] > 0
    (row,) = plain["summary"]
    assert row["best_peer"] == "eager" and row["ratio"] == plain["geometric_mean"] == row["peer_ms"] / row["regraft_ms"]
    lines = table(bench.results)
    assert any("eager" in line and "1.00x" in line for line in lines) and any("wrong" in line for line in lines)
    assert "forward" not in vars(model), "the model that was given is left as it was"


def test_arguments_of_a_row_reach_the_forward_and_its_name() -> None:
    model = tiny_llama()
    bench = bench_forward(model, [(2, 9)], ["regraft"], rounds=1, calls=1, arguments={"logits_to_keep": 1})
    assert {r.row for r in bench.results} == {"LlamaForCausalLM 2x9 logits_to_keep=1"}
    assert all(r.timing is not None and not r.problem for r in bench.results)
    truth = forward_module.truth_of(
        model, {"input_ids": torch.ones(2, 9, dtype=torch.long), "logits_to_keep": 1}, torch.float32
    )
    assert truth.oracle["logits"].shape[:2] == (2, 1)


def small_case() -> Case:
    def arguments(device: torch.device) -> dict[str, Any]:
        x = torch.randn(1, 5, 96, dtype=torch.bfloat16, device=device)
        return {"x": x, "weight": torch.randn(96, dtype=torch.bfloat16, device=device), "eps": 1e-6}

    def peer(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        return torch.nn.functional.rms_norm(x, x.shape[-1:], weight, eps)

    def failing(**arguments: Any) -> torch.Tensor:
        raise RuntimeError("no kernel found")

    peers = {"broken": plain(failing), "F.rms_norm": plain(peer)}
    return Case(rms_norm, "5 rows of 96", torch.bfloat16, arguments, peers, some_rows("x"))


def fake_times(monkeypatch: pytest.MonkeyPatch, ms: dict[str, float]) -> None:
    def measured(ready: dict[str, Any], device: torch.device, **settings: Any) -> dict[str, Timing]:
        return {name: Timing(ms[name], ms[name], ms[name], 1, 0.0, "graph") for name in ready}

    monkeypatch.setattr(kernels_module, "measure_kernels", measured)


def test_kernels_wrong_and_refusing_providers_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*args: Any) -> torch.Tensor:
        return rms_norm.reference(*args) * 1.1

    def tuned(*args: Any) -> torch.Tensor:
        tuning.choose("activation", {"N": 5}, tuning.RowMemory(0), CPU)
        return rms_norm.reference(*args)

    providers = (
        Kernel(rms_norm, "good", tuned, lambda signature: None),
        Kernel(rms_norm, "bad", wrong, lambda signature: None),
        Kernel(rms_norm, "picky", wrong, lambda signature: "x is too small"),
    )
    monkeypatch.setattr(kernels_module, "PROVIDERS", {"rms_norm": providers})
    monkeypatch.setattr(kernels_module, "cases", lambda dtype: {"rms_norm": (small_case(),)})
    fake_times(monkeypatch, {"good": 0.004, "F.rms_norm": 0.002})
    said: list[str] = []
    bench = bench_kernels(CPU, rounds=1, calls=1, shape="rows*96", say=said.append)
    results = {r.provider: r for r in bench.results}
    assert results["good"].chosen and results["good"].us == 4.0 and results["F.rms_norm"].peer
    assert results["good"].ratio == 0.5 and results["F.rms_norm"].ratio == 1.0
    assert results["good"].config.startswith("activation BLOCK_N=")
    moved = 2 * (5 * 96 + 96) + 4 * 5 * 96  # without out_dtype the result is float32
    assert results["good"].gb_s == pytest.approx(moved / 4e-6 / 1e9)
    assert results["good"].share > 0
    assert results["bad"].timing is None and results["bad"].problem.startswith("wrong")
    assert results["bad"].error > results["bad"].bound
    assert results["picky"].problem == "x is too small"
    assert results["broken"].problem == "RuntimeError: no kernel found"
    assert "rms_norm, 5 rows of 96" in said and any("TFLOP/s" in line for line in said)
    assert kernels_module.slower(bench.results) == ["rms_norm, 5 rows of 96: good 4.0 us, 2.00 times F.rms_norm 2.0 us"]
    with pytest.raises(ValueError, match="'rope'"):
        bench_kernels(CPU, ops=["rope"])
    with pytest.raises(ValueError, match="'7 rows'"):
        bench_kernels(CPU, shape="7 rows")

    before = json.loads(json.dumps(bench.to_dict()))
    fake_times(monkeypatch, {"good": 0.0046, "F.rms_norm": 0.002})
    later = bench_kernels(CPU, rounds=1, calls=1)
    (line,) = kernels_module.regressions(later.results, before, 0.1)
    assert "good: 4.0 -> 4.6 us, 1.15 times" in line
    assert not kernels_module.regressions(later.results, before, 0.2)
    fake_times(monkeypatch, {"good": 0.0046, "F.rms_norm": 0.0023})
    assert not kernels_module.regressions(bench_kernels(CPU).results, before, 0.1), "the peer is slower too"


def test_kernels_are_timed_on_the_cpu_too(monkeypatch: pytest.MonkeyPatch) -> None:
    providers = (Kernel(rms_norm, "good", rms_norm.reference, lambda signature: None),)
    monkeypatch.setattr(kernels_module, "PROVIDERS", {"rms_norm": providers})
    monkeypatch.setattr(kernels_module, "cases", lambda dtype: {"rms_norm": (small_case(),)})
    results = bench_kernels(CPU, rounds=1, calls=1).results
    assert {r.provider for r in results if r.timing is not None and r.us > 0} == {"good", "F.rms_norm"}


def test_every_op_with_a_kernel_is_examined_and_the_examples_fit_their_ops() -> None:
    from regraft.kernels.table import OPS, PROVIDERS

    for dtype in (torch.float32, torch.bfloat16):
        made = examples(CPU, dtype)
        assert set(PROVIDERS) <= set(made)
        for name, arguments in made.items():
            found = OPS[name](**arguments)
            assert all(t.isfinite().all() for t in (found if isinstance(found, tuple) else (found,))), name


def test_every_kernel_agrees_with_itself_as_its_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    from regraft.kernels.table import OPS
    from regraft.runtime import doctor as doctor_module

    providers = {op.name: (Kernel(op, "itself", op.reference, lambda signature: None),) for op in OPS.values()}
    monkeypatch.setattr(doctor_module, "PROVIDERS", providers)
    found = [f for f in examine(CPU, torch.bfloat16) if "itself" in f.what]
    assert len(found) == len(examples(CPU, torch.bfloat16)) and all(f.ok for f in found), found


def test_the_doctor_finds_a_wrong_and_a_failing_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    from regraft.runtime import doctor as doctor_module

    def failing(*args: Any) -> Any:
        raise RuntimeError("illegal memory access")

    def run(*args: Any) -> torch.Tensor:
        return rms_norm.reference(*args) + 0.1

    good = Kernel(rms_norm, "good", rms_norm.reference, lambda signature: None)
    kernels = (
        good,
        dataclasses.replace(good, provider="off", run=run),
        dataclasses.replace(good, provider="bad", run=failing),
    )
    monkeypatch.setattr(doctor_module, "PROVIDERS", {"rms_norm": kernels})
    found = {f.what: f for f in examine(CPU, torch.float32)}
    assert found["rms_norm (good)"].ok
    assert not found["rms_norm (off)"].ok and "allowed" in found["rms_norm (off)"].detail
    assert not found["rms_norm (bad)"].ok and "illegal memory access" in found["rms_norm (bad)"].detail
    assert found["torch"].detail == torch.__version__


@pytest.mark.gpu
def test_device_time_hides_the_launch() -> None:
    x = torch.randn(64, device="cuda")

    def slow_to_launch() -> None:
        time.sleep(0.05)
        x.add_(1)

    device = torch.device("cuda")
    hidden = measure({"x": lambda: x.add_(1)}, device, rounds=1, calls=5, device_time=True)
    seen = measure({"x": slow_to_launch}, device, rounds=1, calls=5)
    assert seen["x"].median_ms > 45  # others may use the GPU as well
    assert hidden["x"].median_ms < seen["x"].median_ms / 2


def test_a_regression_against_a_baseline_fails_the_command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    providers = (Kernel(rms_norm, "good", rms_norm.reference, lambda signature: None),)
    monkeypatch.setattr(kernels_module, "PROVIDERS", {"rms_norm": providers})
    monkeypatch.setattr(kernels_module, "cases", lambda dtype: {"rms_norm": (small_case(),)})
    fake_times(monkeypatch, {"good": 0.004, "F.rms_norm": 0.002})
    file = tmp_path / "before.json"
    words = ["bench", "kernels", "--device", "cpu", "--dtype", "bfloat16"]
    assert main([*words, "--json", str(file)]) == 0
    assert main([*words, "--baseline", str(file)]) == 0
    fake_times(monkeypatch, {"good": 0.0044, "F.rms_norm": 0.002})
    capsys.readouterr()
    assert main([*words, "--baseline", str(file)]) == 1
    assert "slower than" in capsys.readouterr().out
    assert main([*words, "--baseline", str(file), "--threshold", "0.2"]) == 0
    file.write_text('{"results": [{"op": 1}]}')
    assert main([*words, "--baseline", str(file)]) == 2
