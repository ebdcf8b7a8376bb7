"""Tuning: every kernel that could compute a call is compared and timed, and the fastest one kept for its sizes."""

from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from regraft.kernels import choice, table, tuning, tuning_cache
from regraft.kernels.choice import Choice
from regraft.kernels.config import Config
from regraft.kernels.linear_act import linear_act
from regraft.kernels.op import Kernel
from regraft.kernels.thresholds import thresholds
from regraft.runtime import tune as module
from regraft.runtime.tune_providers import Calls, Fastest, tune_calls

CPU = torch.device("cpu")
DEVICE = "some_gpu"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("REGRAFT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(tuning, "device_limits", lambda device: (DEVICE, 50_000))
    tuning.forget()
    yield tmp_path / "cache"
    tuning.forget()


ran: list[str] = []


def kernel(name: str, change: Callable[[Tensor], Tensor] = lambda y: y) -> Kernel:
    def run(x: Tensor, weight: Tensor, bias: Tensor | None, kind: str) -> Tensor:
        ran.append(name)
        return change(linear_act.reference(x, weight, bias, kind))

    return Kernel(linear_act, name, run, lambda signature: None)


def failing(y: Tensor) -> Tensor:
    raise RuntimeError("out of resource: shared memory")


KERNELS = (kernel("table"), kernel("fast"), kernel("wrong", lambda y: y + 1), kernel("failing", failing))


def clock(**ms: float) -> Callable[[Mapping[str, Sequence[Callable[[], Any]]], bool], dict[str, float]]:
    return lambda calls, small: {name: ms[name] for name in calls}


def call(run: Callable[..., Tensor], m: int, n: int = 24, k: int = 40) -> str:
    """Which kernel computed it."""
    ran.clear()
    run(torch.randn(m, k), torch.randn(n, k), None, "relu")
    return ran[-1]


def recorded(run: Callable[..., Tensor], *rows: int) -> Calls:
    calls = Calls(tuning_cache.providers(DEVICE))
    with choice.recorded(calls):
        for m in rows:
            call(run, m)
    return calls


def test_the_fastest_is_kept_for_the_weight_and_numbers_of_rows_near_by(cache: Path) -> None:
    run = choice.bind(linear_act, KERNELS)
    assert call(run, 100) == "table"
    said: list[str] = []
    measure = clock(table=2.0, fast=1.0, wrong=0.5, failing=0.1)
    (found,) = tune_calls(recorded(run, 100, 101), CPU, say=said.append, measure=measure)
    assert (found.before, found.provider, found.before_us, found.us, found.tried) == ("table", "fast", 2000, 1000, 4)
    assert "table 2000.0 -> fast 1000.0 us" in said[1] and said[-1].startswith("[####################] 1/1 1 kept in")
    assert call(run, 100) == "fast" and call(run, 127) == "fast"
    assert call(run, 70) == "table", "another bucket of rows"
    assert call(choice.bind(linear_act, KERNELS[1::-1]), 100) == "fast"
    assert call(choice.bind(linear_act, (KERNELS[2], *KERNELS[:2])), 100) == "wrong", "not what it was compared with"
    assert call(run, 100, n=32) == "table" and call(run, 100, k=48) == "table", "another weight"
    assert call(choice.bind(linear_act, [KERNELS[0], KERNELS[2]]), 100) == "table", "it does not support the call"
    assert not recorded(run, 100), "known already"
    (file,) = cache.glob("*.json")
    assert json.loads(file.read_text())["providers"]["linear_act"][0]["provider"] == "fast"


def test_a_little_faster_is_not_worth_a_change() -> None:
    run = choice.bind(linear_act, KERNELS[:2])
    (found,) = tune_calls(recorded(run, 7), CPU, measure=clock(table=1.0, fast=0.96))
    assert (found.provider, found.us) == ("table", 1000)
    assert call(run, 7) == "table" and not recorded(run, 7), "known"


def test_what_does_not_run_is_left_and_said() -> None:
    features = (("M", 3), ("N", 8), ("K", 8))
    x, weight = torch.randn(3, 8), torch.randn(8, 8)
    said: list[str] = []
    calls = [Choice(linear_act, features, (KERNELS[3], KERNELS[1]), (x, weight, None, "relu"))]
    assert not tune_calls(calls, CPU, say=said.append, measure=clock(fast=1.0))
    assert "linear_act: failing does not run; left as it is" in said
    assert not tuning_cache.providers(DEVICE)


def test_calls_are_kept_once_without_tensors_and_only_where_repeating_them_changes_nothing() -> None:
    calls = Calls({})
    alive = []
    for m in (100, 100, 120, 300):
        x = torch.randn(m, 40)
        alive.append(weakref.ref(x))
        calls.append(
            Choice(linear_act, (("M", m), ("N", 24), ("K", 40)), KERNELS, (x, torch.randn(24, 40), None, "relu"))
        )
    del x
    gc.collect()
    assert [dict(c.features)["M"] for c in calls] == [100, 300]
    assert not [r for r in alive if r() is not None]
    mutable = table.OPS["paged_attention"]
    assert mutable.overload._schema.is_mutable
    calls.append(Choice(mutable, (("T", 1),), KERNELS, ()))
    calls.append(Choice(table.OPS["moe_experts"], (("T", 1),), KERNELS, (torch.ones(1, 8), torch.zeros(1, 2).long())))
    assert len(calls) == 2


def test_no_memory_for_one_call_leaves_the_others() -> None:
    def measure(calls: Mapping[str, Any], small: bool) -> dict[str, float]:
        if len(ran) < 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return dict.fromkeys(calls, 1.0)

    run = choice.bind(linear_act, KERNELS[:2])
    calls, said = recorded(run, 7, 300), list[str]()
    ran.clear()
    (found,) = tune_calls(calls, CPU, say=said.append, measure=measure)
    assert found.features["M"] == 300 and any("no memory" in line for line in said)


def test_compile_only_passes_are_not_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice.replay, "compiling", lambda: True)
    monkeypatch.setattr(choice.replay, "once", lambda key, function: function())
    assert not recorded(choice.bind(linear_act, KERNELS[:2]), 7)


def test_where_a_tuned_provider_begins_and_ends_is_compiled_ahead() -> None:
    before = thresholds(CPU)
    features = {"M": 700, "N": 24, "K": 40}
    tuning_cache.store_provider(DEVICE, "linear_act", features, tuning_cache.Faster("fast", "fast"), 1.0)
    assert thresholds(CPU) == before
    tuning_cache.store_provider(DEVICE, "linear_act", features, tuning_cache.Faster("fast", "table"), 1.0)
    assert set(thresholds(CPU)) - set(before) <= {513, 769} and {513, 769} <= set(thresholds(CPU))
    for size in (1, 16, 17, 24, 25, 32, 700, 769, 1024, 1025):
        low, high = tuning_cache.span(dict(tuning_cache.bucket({"M": size}))["M"])
        assert low <= size <= high
        assert tuning_cache.bucket({"M": low}) == tuning_cache.bucket({"M": high})
        assert tuning_cache.bucket({"M": low - 1}) != tuning_cache.bucket({"M": low})


def test_configurations_and_providers_share_a_file() -> None:
    fast, slow = tuning_cache.Faster("fast", "table"), tuning_cache.Faster("slow", "table")
    tuning_cache.store_provider(DEVICE, "linear_act", {"M": 100, "N": 24, "K": 40}, fast, 1.0)
    tuning_cache.store(DEVICE, "activation", {"N": 600}, Config((("BLOCK_N", 64),), 1, 1), 1.0)
    tuning_cache.store_provider(DEVICE, "linear_act", {"M": 101, "N": 24, "K": 40}, slow, 1.0)
    assert list(tuning_cache.entries(DEVICE)) == ["activation"]
    (mine,) = tuning_cache.providers(DEVICE)["linear_act"].items()
    assert mine == (tuning_cache.call_bucket({"M": 110, "N": 24, "K": 40}), slow)


def test_what_another_torch_brought_is_measured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    fast = tuning_cache.Faster("fast", "table")
    tuning_cache.store_provider(DEVICE, "linear_act", {"M": 100, "N": 24, "K": 40}, fast, 1.0)
    assert tuning_cache.providers(DEVICE)
    monkeypatch.setattr(torch, "__version__", "9.0")
    tuning.forget()
    assert not tuning_cache.providers(DEVICE)


def test_a_file_of_before_has_no_providers(cache: Path) -> None:
    tuning_cache.store(DEVICE, "activation", {"N": 600}, Config((("BLOCK_N", 64),), 1, 1), 1.0)
    file = tuning_cache.path(DEVICE)
    sections = json.loads(file.read_text())
    sections.pop("providers", None)
    file.write_text(json.dumps(sections))
    tuning.forget()
    assert list(tuning_cache.entries(DEVICE)) == ["activation"] and not tuning_cache.providers(DEVICE)
    file.write_text("{")
    tuning.forget()
    assert not tuning_cache.providers(DEVICE)


def test_the_model_is_run_and_its_choices_collected(monkeypatch: pytest.MonkeyPatch) -> None:
    run = choice.bind(linear_act, KERNELS)

    class Model(torch.nn.Linear):
        def forward(self, input_ids: Tensor) -> Tensor:
            return run(torch.ones(len(input_ids), 40), torch.ones(24, 40), None, "relu")

    monkeypatch.setattr(module, "optimize", lambda model, **options: model)
    monkeypatch.setattr(module, "inputs_for", lambda model, batch, length: {"input_ids": torch.ones(batch, length)})
    monkeypatch.setattr("regraft.runtime.tune_providers.measure_on", lambda device: clock(table=2.0, fast=1.0))
    found = module.tune(Model(1, 1), [(1, 4), (2, 4)])
    assert [type(f) for f in found] == [Fastest, Fastest]
    assert "linear_act, M 1" in str(found[0])
