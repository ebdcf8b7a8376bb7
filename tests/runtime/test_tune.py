"""Tuning: what is asked for is tried, compared, timed and kept on disk, and read before the shipped tables."""

from __future__ import annotations

import gc
import json
import logging
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from regraft.kernels import tuning, tuning_cache
from regraft.kernels.config import Config
from regraft.kernels.tuning import Asked, RowMemory, calling, choose, forced, recorded
from regraft.runtime import tune as module
from regraft.runtime.cli import main
from regraft.runtime.tune import Questions, neighbours, tune_asked, work
from regraft.runtime.tune_calls import Likeness, copied, same

CPU = torch.device("cpu")
DEVICE = "some_gpu"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("REGRAFT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(tuning, "device_limits", lambda device: (DEVICE, 50_000))
    tuning.forget()
    yield tmp_path / "cache"
    tuning.forget()


def launcher(x: torch.Tensor) -> torch.Tensor:
    """A launcher whose result depends on its configuration only where that is wrong."""
    n = x.shape[-1]
    config = choose("activation", {"N": n, "R": 1, "bytes": 4, "gated": 0}, RowMemory(0), x.device)
    if config["BLOCK_N"] == 4096:
        raise RuntimeError("out of resource: registers")
    return x * 2 + float(config["BLOCK_N"] == 512)


def ask(n: int) -> Asked:
    x = torch.randn(3, n)
    with recorded() as seen, calling(launcher, (x,)):
        launcher(x)
    (question,) = seen
    return question


def times(best: Config) -> Callable[[Mapping[str, Sequence[Callable[[], Any]]], bool], dict[str, float]]:
    """Milliseconds that fall towards one configuration, found out by running the calls."""

    def distance(config: Config) -> float:
        blocks = abs(config["BLOCK_N"].bit_length() - best["BLOCK_N"].bit_length())
        return 1.0 + blocks + abs(config.num_warps.bit_length() - best.num_warps.bit_length())

    def measure(calls: Mapping[str, Sequence[Callable[[], Any]]], small: bool) -> dict[str, float]:
        found = {}
        for name, each in calls.items():
            with recorded() as seen:
                each[0]()
            found[name] = distance(seen[0].config)
        return found

    return measure


def test_the_best_is_found_kept_and_used(cache: Path) -> None:
    best = Config((("BLOCK_N", 2048),), 8, 1)
    question = ask(5000)
    assert question.call is not None and question.config["BLOCK_N"] == 1024
    said: list[str] = []
    (found,) = tune_asked([question, question], CPU, say=said.append, measure=times(best))
    assert found.config.launch == {"BLOCK_N": 2048, "num_warps": 8, "num_stages": found.config.num_stages}
    assert found.us < found.before_us and found.tried > 5
    (file,) = cache.glob("*.json")
    assert file.name.startswith(f"{DEVICE}-triton") and json.loads(file.read_text())["kernels"]["activation"]
    assert ask(5000).config == found.config and ask(4500).config == found.config, "the same bucket"
    assert any(line.startswith("[####################] 1/1") for line in said)
    assert not tune_asked([ask(5000)], CPU, measure=times(best)), "known already"


def test_wrong_and_failing_candidates_are_left_out() -> None:
    wrong = Config((("BLOCK_N", 512),), 4, 1)
    (found,) = tune_asked([ask(5000)], CPU, measure=times(wrong))
    assert found.config["BLOCK_N"] != 512
    failing = Config((("BLOCK_N", 4096),), 4, 1)
    (found,) = tune_asked([ask(90000)], CPU, measure=times(failing))
    assert found.config["BLOCK_N"] == 2048


def test_a_little_faster_is_not_worth_a_change() -> None:
    present = ask(5000).config

    def measure(calls: Mapping[str, Any], small: bool) -> dict[str, float]:
        return {name: 1.0 if name == "0" else 0.99 for name in calls}

    (found,) = tune_asked([ask(5000)], CPU, measure=measure)
    assert found.config == present


def test_the_nearest_is_used_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="regraft"):
        default = ask(70_000).config
        ask(80_000)
    assert len([r for r in caplog.records if "activation was not measured on some_gpu" in r.message]) == 1
    assert "activation" in tuning.untuned
    mine = Config((("BLOCK_N", 256),), 2, 1)
    tuning_cache.store(DEVICE, "activation", {"N": 60_000, "R": 1, "bytes": 4, "gated": 0}, mine, 3.0)
    tuning_cache.store(DEVICE, "activation", {"N": 600, "R": 1, "bytes": 4, "gated": 0}, default, 3.0)
    tuning.forget()
    assert ask(130_000).config == mine, "nearer than 600"
    assert ask(700).config == default
    features = {"N": 60_000, "R": 1, "bytes": 2, "gated": 0}
    assert tuning_cache.nearest(tuning_cache.entries(DEVICE)["activation"], features) is None, "another dtype"


def test_a_corrupt_file_is_ignored_with_a_warning(cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache.mkdir()
    for text in ("{", "[]", '{"kernels": {"activation": [{"features": {"N": 1}, "config": {"BLOCK_N": 48}}]}}'):
        tuning_cache.path(DEVICE).write_text(text)
        tuning.forget()
        caplog.clear()
        assert ask(5000).config["BLOCK_N"] == 1024
        assert "is ignored" in caplog.text
        tuning_cache.store(DEVICE, "activation", {"N": 9}, Config((("BLOCK_N", 64),), 1, 1), 1.0)
        assert len(tuning_cache.entries(DEVICE)["activation"]) == 1, "replaced"


def test_buckets() -> None:
    rounded = {n: tuning_cache._round(n) for n in (0, 1, 7, 16, 17, 24, 25, 2048, 2049, 3072, 14336, 28672)}
    assert rounded == {
        0: 0, 1: 1, 7: 7, 16: 16, 17: 24, 24: 24, 25: 32, 2048: 2048, 2049: 3072, 3072: 3072, 14336: 16384, 28672: 32768
    }  # fmt: skip


def test_a_chosen_folder_comes_first(tmp_path: Path, cache: Path) -> None:
    tuning_cache.use(tmp_path / "mine")
    try:
        assert tuning_cache.directory() == tmp_path / "mine"
    finally:
        tuning_cache.use(None)
    assert tuning_cache.directory() == cache


def test_candidates_are_ranked_by_tiles() -> None:
    sizes = {"M": 2048, "N": 4096, "K": 4096}

    def config(m: int, n: int) -> Config:
        return Config((("BLOCK_M", m), ("BLOCK_N", n)), 8, 3)

    assert work(sizes, config(128, 128), 132) < work(sizes, config(16, 16), 132)
    assert work({**sizes, "M": 1}, config(16, 64), 132) < work({**sizes, "M": 1}, config(128, 64), 132)
    assert work({"D": 64, "R": 5}, config(1, 1), 132) == 0.0
    around = neighbours(Config((("BLOCK_N", 1),), 1, 1))
    assert Config((("BLOCK_N", 2),), 1, 1) in around and Config((("BLOCK_N", 1),), 1, 2) in around
    assert all(c.num_stages >= 1 and c.num_warps >= 1 for c in around)


def test_copies_keep_strides_and_numbers() -> None:
    base = torch.randn(4, 6, 10)
    for t in (base, base.transpose(0, 2), base[:, 1:4, ::2], base[:1].expand(5, -1, -1), torch.tensor(3.0)):
        made = copied(t)
        assert torch.equal(made, t) and made.stride() == t.stride()
        assert made.untyped_storage().data_ptr() != t.untyped_storage().data_ptr()
    assert copied("gelu") == "gelu" and copied(base[:0]).shape == (0, 6, 10)


def test_same_allows_for_roundings_only() -> None:
    x = torch.randn(1000)
    assert same(x * (1 + 1e-7), x) and not same(x * 1.001, x) and not same(x.double(), x) and not same(x[:5], x)
    assert same(torch.arange(3), torch.arange(3)) and not same(torch.arange(3), torch.arange(3) + 1)


def test_forcing_is_for_the_block_alone() -> None:
    other = Config((("BLOCK_N", 128),), 2, 1)
    with forced("activation", other):
        assert ask(5000).config == other
    assert ask(5000).config != other


def test_the_model_is_run_and_its_questions_collected(monkeypatch: pytest.MonkeyPatch) -> None:
    class Model(torch.nn.Linear):
        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            x = torch.ones(1, 5000)
            with calling(launcher, (x,)):
                return launcher(x)

    monkeypatch.setattr(module, "optimize", lambda model, **options: model)
    monkeypatch.setattr(module, "inputs_for", lambda model, batch, length: {"input_ids": torch.ones(batch, length)})
    best = Config((("BLOCK_N", 2048),), 8, 1)
    monkeypatch.setattr(module, "measure_on", lambda device: times(best))
    (found,) = module.tune(Model(1, 1), [(1, 4), (2, 4)])
    assert found.config["BLOCK_N"] == 2048 and "activation, N 5000" in str(found)


def test_the_command_needs_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", "bert_base", "--device", "cpu"]) == 2
    assert "CUDA" in capsys.readouterr().err


def test_sizes_in_the_tables_of_the_device_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "device_limits", lambda device: ("nvidia_h200", 200_000))
    tuning.forget()
    choose("rms_norm", {"D": 4096, "R": 2048, "bytes": 2}, RowMemory(4096), CPU)
    choose("rope", {"D": 64, "R": 2048, "bytes": 2}, RowMemory(64), CPU)  # in the default file, which was made there
    assert not tuning.untuned
    choose("rms_norm", {"D": 65536, "R": 1, "bytes": 2}, RowMemory(65536), CPU)
    assert list(tuning.untuned) == ["rms_norm"]


def test_the_report_says_what_was_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    from regraft.runtime.record import Record
    from regraft.runtime.report import Report

    monkeypatch.setattr(tuning, "untuned", {"rope": "...", "linear": "..."})
    (note,) = Report(Record("Model", device="cuda:0")).notes
    assert "linear, rope" in note.message and "regraft tune" in note.message
    assert not Report(Record("Model", device="cpu")).notes


def test_compilers_are_not_heard(capfd: pytest.CaptureFixture[str]) -> None:
    with module.quiet():
        os.write(2, b"a page of intermediate code\n")
    os.write(2, b"an error\n")
    assert capfd.readouterr().err == "an error\n"


def test_tuners_at_the_same_time_keep_each_others_entries(monkeypatch: pytest.MonkeyPatch) -> None:
    read = tuning_cache._read

    def slow(file: Path) -> Any:
        found = read(file)
        time.sleep(0.01)  # so that all would have read before one has written
        return found

    monkeypatch.setattr(tuning_cache, "_read", slow)
    config = Config((("BLOCK_N", 64),), 1, 1)
    sizes = [1 << i for i in range(12)]
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(lambda n: tuning_cache.store(DEVICE, "activation", {"N": n}, config, 1.0), sizes))
    assert set(tuning_cache.entries(DEVICE)["activation"]) == {(("N", n),) for n in sizes}


def test_questions_keep_one_a_bucket_and_no_tensor_alive() -> None:
    known = {"activation": {tuning_cache.bucket({"N": 600, "R": 1, "bytes": 4, "gated": 0}): Config((), 1, 1)}}
    asked = Questions(known)
    alive = []
    for n in (5000, 4500, 600, 9000, 5000):
        x = torch.randn(3, n) * 3 + 1
        alive.append(weakref.ref(x))
        with recorded(asked), calling(launcher, (x,)):
            launcher(x)
    del x
    gc.collect()
    assert not [r for r in alive if r() is not None]
    assert [dict(q.features)["N"] for q in asked] == [5000, 9000]
    assert asked[0].call is not None
    (like,) = asked[0].call[1]
    made = like.make()
    assert made.shape == (3, 5000) and abs(made.std() - 3) < 0.2 and abs(made.mean() - 1) < 0.2
    (found, _) = tune_asked(asked, CPU, measure=times(Config((("BLOCK_N", 2048),), 8, 1)))
    assert found.config["BLOCK_N"] == 2048


def test_a_likeness_has_strides_and_spread_but_indices_and_infinities_are_kept() -> None:
    base = torch.randn(4, 60, 10) * 5
    for t in (base.transpose(0, 2), base[:1].expand(5, -1, -1), base[:, 3:50, ::2]):
        like = Likeness.of(t)
        made = copied(like)
        assert (made.shape, made.stride(), like.nbytes) == (t.shape, t.stride(), t.numel() * 4)
        assert abs(made.std() / t.std() - 1) < 0.2
    mask = torch.full((3, 3), -torch.inf)
    for value in (torch.arange(5), mask, torch.tensor(2.0), "gelu", None):
        assert Likeness.of(value) is value


def test_nothing_is_compiled_while_it_is_timed() -> None:
    running, most = set[int](), []

    def slow(x: torch.Tensor) -> torch.Tensor:
        me = threading.get_ident()
        running.add(me)
        try:
            y = launcher(x)
            time.sleep(0.05)
        finally:
            running.discard(me)
        return y

    def measure(calls: Mapping[str, Any], small: bool) -> dict[str, float]:
        most.append(len(running))
        return dict.fromkeys(calls, 1.0)

    x = torch.randn(3, 5000)
    with recorded() as seen, calling(slow, (x,)):
        launcher(x)
    (found,) = tune_asked(seen, CPU, measure=measure, limit_s=0.06)
    assert most and max(most) == 0
    assert found.tried < 17, "none was begun after the limit"


def test_recordings_inside_each_other_end_in_their_order() -> None:
    with recorded() as outer:
        with recorded():
            pass
        ask_again = ask(5000)
    assert ask_again in outer
