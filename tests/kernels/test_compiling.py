"""Kernels are compiled and loaded without being launched, once for all sizes of a class; what is left then is left."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from regraft.kernels import thresholds, tuning

SCRIPT = Path(__file__).parent / "compile_only.py"
ROOT = Path(thresholds.__file__).parents[2]

pytest.importorskip("triton")


def compile_only(seconds: float, cache: Path, hook: str = "none") -> dict[str, int]:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= {"TRITON_CACHE_DIR": str(cache), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(seconds), hook], env=env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, int] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("hook", ["none", "broken"])
def test_each_class_is_compiled_once(tmp_path: Path, hook: str) -> None:
    assert compile_only(60, tmp_path, hook) == {"first": 2, "loaded": 2}


def test_what_is_compiled_while_others_run_is_waited_for_by_who_launches_it(tmp_path: Path) -> None:
    assert compile_only(60, tmp_path, "behind") == {"here": 2, "there": 3}


def test_nothing_is_begun_when_the_time_is_over(tmp_path: Path) -> None:
    """Of eleven; what is under way by then is finished."""
    assert compile_only(0, tmp_path)["first"] < 11


def test_thresholds_are_those_of_the_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    table = '{"kernels": {"linear": [{"where": {"M": [0, 16], "N": [0, 99]}, "config": %s}]}}'
    config = '{"num_warps": 4, "num_stages": 1}'
    monkeypatch.setattr(tuning, "load", lambda name: tuning.parse(table % config) if name == tuning.DEFAULT else {})
    provided = {"attention": (tuning.Provided((("Q", 65, 1 << 30), ("D", 33, 64)), "cudnn"),)}
    monkeypatch.setattr(tuning, "providers", lambda name: provided)
    assert thresholds.thresholds(torch.device("cpu")) == [17, 65]
