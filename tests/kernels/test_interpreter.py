"""Every kernel test on the CPU, in Triton's interpreter, which must be switched on before the kernels are defined."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from regraft.kernels.launch import INTERPRETED

HERE = Path(__file__).parent


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter's process")
def test_kernels_in_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "--import-mode=importlib", f"--confcutdir={HERE.parent}", "-q", "-x"]
    command += ["-p", "no:cacheprovider", "-W", "ignore", "-k", "test_triton", str(HERE)]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("PYTEST_XDIST_WORKER", None)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=HERE.parent.parent, timeout=600)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout
