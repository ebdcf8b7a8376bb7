"""Compiles calls without launching them, for a Hopper GPU that is not there; prints what was compiled, as JSON.

Run in a process of its own: it puts another driver and another device limit in place of the real ones.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable

import torch
import triton
from compile_for import NoDevice
from torch.nn.functional import linear
from triton.runtime import driver
from triton.runtime._async_compile import active_mode

from regraft.kernels import choice, overlap, replay, tuning
from regraft.kernels.compiling import compile_only
from regraft.kernels.rms_norm_triton import KERNELS, rms_norm


class Loads(NoDevice):
    """One that takes kernels in."""

    def __init__(self) -> None:
        super().__init__(90)
        self.loaded = 0
        self.utils = self

    def launcher_cls(self, source: object, metadata: object) -> object:
        return object()

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 232448}

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[int, int, int, int, int]:
        self.loaded += 1
        return 1, 1, 32, 0, 1024


def main(seconds: float, broken: bool) -> dict[str, object]:
    device = Loads()
    driver.set_active(device)
    tuning.device_limits = lambda device: ("default", 232448)
    overlap.compute_capability = lambda device: (9, 0)
    compiled: list[str] = []

    def note(**given: object) -> None:
        compiled.append(given["src"].name)

    triton.knobs.compilation.listener = note
    if broken:  # a hook of somebody else's
        triton.knobs.runtime.jit_post_compile_hook = lambda **given: 1 / 0
    bound = choice.bind(KERNELS[0].op, KERNELS[:1])

    def calls(width: int) -> None:
        for rows in (1, 16, 48, 1024):
            x = torch.ones(rows, width, dtype=torch.bfloat16)
            y = bound(x, x[0], 1e-6)
            assert replay.observed() and y.shape == x.shape
            assert linear(y, x, x[:, 0]).shape == (rows, rows)
            assert not replay.empty((3,), torch.int32, x.device).any()
            assert bound(x, x[0], 1e-6).stride() == y.stride()  # as it was the first time

    widths = (256, 2048) if seconds else [1 << i for i in range(3, 14)]

    def both(ready: Callable[[], int]) -> None:
        for width in widths:
            calls(width)

    compile_only(both, time.monotonic() + seconds)
    first = len(compiled)
    assert not replay.compiling() and not replay.observed() and active_mode.get() is None
    taken = 0

    def again(ready: Callable[[], int]) -> None:
        nonlocal taken
        calls(256)
        assert len(compiled) == first or not seconds
        rms_norm(torch.ones(3, 64, dtype=torch.bfloat16), None, 1e-6)
        while not ready():
            time.sleep(0.01)
        taken = len(compiled) - first
        raise KeyboardInterrupt

    with contextlib.suppress(KeyboardInterrupt):
        compile_only(again, time.monotonic() + 60)
    assert not replay.compiling() and active_mode.get() is None
    return {"first": first, "taken": taken, "loaded": device.loaded}


if __name__ == "__main__":
    print(json.dumps(main(float(sys.argv[1]), sys.argv[2] == "broken")))
