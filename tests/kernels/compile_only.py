"""Compiles calls without launching them, for a Hopper GPU that is not there; prints what was compiled, as JSON.

Run in a process of its own: it puts another driver and another device limit in place of the real ones.
"""

from __future__ import annotations

import json
import sys
import time

import torch
import triton
from compile_for import NoDevice
from torch.nn.functional import linear
from triton.runtime import driver

from regraft.kernels import choice, overlap, replay, tuning
from regraft.kernels.compiling import compiling
from regraft.kernels.rms_norm_triton import KERNELS, rms_norm


def main(seconds: float) -> dict[str, object]:
    driver.set_active(NoDevice(90))
    tuning.device_limits = lambda device: ("default", 232448)
    overlap.compute_capability = lambda device: (9, 0)
    compiled: list[str] = []
    triton.knobs.runtime.jit_post_compile_hook = lambda **given: compiled.append(given["fn"].name)
    bound = choice.bind(KERNELS[0].op, KERNELS[:1])

    def calls(width: int) -> None:
        for rows in (1, 16, 48, 1024):
            x = torch.ones(rows, width, dtype=torch.bfloat16)
            y = bound(x, x[0], 1e-6)
            assert replay.observed() and y.shape == x.shape
            assert linear(y, x, x[:, 0]).shape == (rows, rows)
            assert not replay.empty((3,), torch.int32, x.device).any()

    with compiling(time.monotonic() + seconds) as ready:
        calls(256)
        calls(2048)
    first = len(compiled)
    assert not replay.compiling() and not replay.observed()
    with compiling(time.monotonic() + 60) as ready:
        calls(256)
        again = len(compiled) - first
        rms_norm(torch.ones(3, 64, dtype=torch.bfloat16), None, 1e-6)
        while not ready():
            time.sleep(0.01)
        taken = len(compiled) - first - again
    return {"first": first, "again": again, "taken": taken}


if __name__ == "__main__":
    print(json.dumps(main(float(sys.argv[1]))))
