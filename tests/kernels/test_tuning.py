"""Configurations are data: which one a launch gets, and that none exceeds the device's shared memory."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch

from regraft.kernels import (
    attention_triton,
    linear_act_triton,
    paged_attention_triton,
    paged_decode_triton,
    skinny_triton,
    tuning,
)
from regraft.kernels.tuning import Config, Entry, RowMemory, choose, device_file, parse, select_config

H200, RTX_3090 = 232_448, 101_376
"""Bytes of shared memory that one program may have on compute capability 9.0 and 8.6."""

FILES = [path.stem for path in tuning.DIRECTORY.glob("*.json")]


def attention_plan(
    width: int, itemsize: int, queries: int, aligned: bool = True
) -> tuple[dict[str, int], tuning.SharedMemory]:
    return attention_triton._plan(width, width, itemsize, queries, None, None, aligned)


def test_a_smaller_device_gets_a_smaller_configuration() -> None:
    plan = attention_plan(128, 2, 4096)
    large = select_config("attention", *plan, file="default", limit=H200)
    small = select_config("attention", *plan, file="default", limit=RTX_3090)
    assert large is not None
    assert small is not None
    assert plan[1](small) <= RTX_3090 < plan[1](large) <= H200


def test_nothing_fits_a_device_without_shared_memory() -> None:
    assert select_config("attention", *attention_plan(128, 2, 4096), file="default", limit=2048) is None


@pytest.mark.parametrize("limit", [H200, RTX_3090])
def test_every_shape_has_a_configuration(limit: int) -> None:
    for file in FILES:
        for itemsize in (2, 4):
            for width in (8, 16, 64, 80, 128, 192, 256):
                for queries, aligned in product((1, 16, 17, 5000), (True, False)):
                    plan = attention_plan(width, itemsize, queries, aligned)
                    assert select_config("attention", *plan, file=file, limit=limit) is not None
            sizes = product((1, 16, 17, 64, 65, 5000), (16, 80, 128, 256), (1, itemsize), (True, False))
            for rows, width, page_bytes, aligned in sizes:
                plan = paged_attention_triton._plan(width, width, itemsize, page_bytes, rows, aligned)
                assert select_config("paged_attention", *plan, file=file, limit=limit) is not None
                decode = paged_decode_triton.plan(width, width, itemsize, page_bytes, min(rows, 32), 8)
                assert select_config("paged_decode", *decode, file=file, limit=limit) is not None
            for rows in (1, 16, 17, 64, 65, 5000):
                for weights, width in product((1, 2), (64, 4096, 28672)):
                    few = {"M": min(rows, 64), "N": width, "K": width, "bytes": itemsize, "weights": weights}
                    one = skinny_triton.GemvMemory(itemsize, weights)
                    assert select_config("gemv", few, one, file=file, limit=limit) is not None
                    assert select_config("norm_gemv", few, one, file=file, limit=limit) is not None
                    some = skinny_triton.SkinnyMemory(2, weights, skinny_triton.block_of_rows(rows))
                    assert select_config("skinny", few, some, file=file, limit=limit) is not None
                for weights, aligned in product((1, 2), (True, False)):
                    plan = linear_act_triton._plan(rows, 4096, 4096, itemsize, weights, aligned)
                    assert select_config("linear", *plan, file=file, limit=limit) is not None
        for kernel in ("rms_norm", "layer_norm", "softmax", "rope"):
            for width in (1, 2, 64, 256, 512, 2048, 32768):
                for rows in (1, 5000):
                    features = {"D": width, "R": rows, "bytes": 2}
                    assert select_config(kernel, features, RowMemory(width), file=file, limit=limit) is not None
        for n in (1, 300, 10**9):
            features = {"N": n, "R": 1, "bytes": 2, "gated": 0}
            assert select_config("activation", features, RowMemory(0), file=file, limit=limit) is not None


@pytest.mark.parametrize("file", FILES)
def test_files_are_complete_and_their_features_exist(file: str) -> None:
    features = {
        "rms_norm": {"D": 64, "R": 1, "bytes": 2},
        "layer_norm": {"D": 64, "R": 1, "bytes": 2},
        "softmax": {"D": 64, "R": 1, "bytes": 2},
        "rope": {"D": 64, "R": 1, "bytes": 2},
        "activation": {"N": 64, "R": 1, "bytes": 2, "gated": 0},
        "linear": linear_act_triton._plan(1, 1, 1, 2, 1, True)[0],
        "attention": attention_plan(64, 2, 1)[0],
        "paged_attention": paged_attention_triton._plan(64, 64, 2, 2, 1, True)[0],
        "paged_decode": paged_decode_triton.plan(64, 64, 2, 2, 1, 8)[0],
        "linear_wgmma": dict.fromkeys(("M", "N", "K", "gated", "rope"), 1),
        "moe_wgmma": dict.fromkeys(("M", "N", "K", "gated", "R"), 1),
        "heads": {"rows": 1, "D": 64},
        "moe_gemv": dict.fromkeys(("P", "R", "E", "N", "K", "gated", "along_k"), 1),
        "moe_grouped": dict.fromkeys(("P", "R", "E", "N", "K", "gated", "along_k"), 1),
        "moe_grouped_down": dict.fromkeys(("P", "R", "E", "N", "K", "gated", "along_k", "BLOCK_T"), 1),
        "gemv": dict.fromkeys(("M", "N", "K", "bytes", "weights"), 1),
        "norm_gemv": dict.fromkeys(("N", "K", "bytes", "weights"), 1),
        "skinny": dict.fromkeys(("M", "N", "K", "bytes", "weights"), 1),
    }
    entries = parse((tuning.DIRECTORY / f"{file}.json").read_text())
    assert set(entries) == set(features) if file == "default" else set(entries) <= set(features)
    for kernel, of_kernel in entries.items():
        for entry in of_kernel:
            entry.matches(features[kernel])  # KeyError for a name that is no feature


def test_device_entries_come_first(monkeypatch: pytest.MonkeyPatch) -> None:
    own = Entry((("N", 1, 100),), Config((("BLOCK_N", 64),), 1, 1))
    files = {"mine": {"activation": (own,)}, "default": tuning.load("default")}
    monkeypatch.setattr(tuning, "load", files.__getitem__)
    assert select_config("activation", {"N": 100}, RowMemory(0), file="mine", limit=None) is own.config
    other = select_config("activation", {"N": 101}, RowMemory(0), file="mine", limit=None)
    assert other is not None
    assert other["BLOCK_N"] > 64


def test_an_unknown_device_has_no_entries_of_its_own() -> None:
    assert tuning.load(device_file("NVIDIA GeForce RTX-4090")) == {}
    assert device_file("NVIDIA H200") == "nvidia_h200"


def test_choose_says_what_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "device_limits", lambda device: ("default", 100))
    tuning._choose.cache_clear()
    with pytest.raises(LookupError, match="activation"):
        choose("activation", {"N": 5}, RowMemory(0), torch.device("cpu"))
    assert "100 bytes" in str(tuning.refuse_memory("activation", {"N": 5}, RowMemory(0), torch.device("cpu")))
    tuning._choose.cache_clear()


def test_malformed_configurations_are_errors() -> None:
    with pytest.raises(ValueError, match="power of two"):
        Config((("BLOCK_N", 48),), 4, 1)
    with pytest.raises(ValueError, match="num_stages"):
        Config((("BLOCK_N", 64),), 4, 0)
    with pytest.raises(KeyError):
        parse('{"kernels": {"rope": [{"config": {"BLOCK_R": 1}}]}}')


@pytest.mark.parametrize(("capability", "limit"), [(90, H200), (86, RTX_3090)])
def test_the_estimate_bounds_what_the_compiler_uses(capability: int, limit: int) -> None:
    """Compiles kernels for a GPU that need not be there, and reads their shared memory."""
    script = Path(__file__).parent / "compile_for.py"
    done = subprocess.run(
        [sys.executable, str(script), str(capability), str(limit)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads(done.stdout)
    assert len(rows) >= 8
    for row in rows:
        assert row["shared"] <= row["estimate"] <= limit, row
    wgmma = {row["case"] for row in rows if row["wgmma"]}
    assert not {case for case in wgmma if "40/17" in case or " 77 " in case}  # see `rows_aligned`
    assert bool(wgmma) == (capability == 90)
    paged = {f"paged_attention {case} torch.bfloat16" for case in ("24 300", "128 300", "128 300 biased")}
    assert {"stream linear_act", "stream gate_up"} <= wgmma or capability != 90
    assert {case for case in wgmma if case.startswith("paged")} == (paged if capability == 90 else set())
    assert all(row["copies"] for row in rows if row["case"] in wgmma & paged)
