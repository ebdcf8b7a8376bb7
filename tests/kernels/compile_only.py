"""Compiles calls without launching them, for a Hopper GPU that is not there; prints what was compiled, as JSON.

Run in a process of its own: it puts another driver and another device limit in place of the real ones.
"""

from __future__ import annotations

import contextlib
import json
import sys
import threading
import time
from collections.abc import Callable
from functools import partial

import torch
import triton
from compile_for import NoDevice
from torch.nn.functional import linear
from triton.runtime import driver
from triton.runtime._async_compile import active_mode

from regraft.kernels import choice, compiling, overlap, replay, tuning
from regraft.kernels.compiling import compile_behind, compile_only, settle
from regraft.kernels.rms_norm_triton import KERNELS, rms_norm


class Loads(NoDevice):
    """One that takes kernels in."""

    def __init__(self) -> None:
        super().__init__(90)
        self.loaded = 0
        self.utils = self

    def launcher_cls(self, source: object, metadata: object) -> Callable[..., None]:
        return lambda *launched: None

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 232448}

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[int, int, int, int, int]:
        self.loaded += 1
        return 1, 1, 32, 0, 1024


def bound_norm() -> Callable[[int], None]:
    """Calls of a bound kernel with rows of a width: one kernel for all numbers of rows."""
    bound = choice.bind(KERNELS[0].op, KERNELS[:1])

    def calls(width: int) -> None:
        for rows in (1, 16, 48, 1024):
            x = torch.ones(rows, width, dtype=torch.bfloat16)
            y = bound(x, x[0], 1e-6)
            assert y.shape == x.shape
            if replay.compiling():
                assert replay.observed() and not y.any()
                assert linear(y, x, x[:, 0]).shape == (rows, rows)
                assert not replay.empty((3,), torch.int32, x.device).any()
                assert bound(x, x[0], 1e-6).stride() == y.stride()  # as it was the first time

    return calls


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
    calls = bound_norm()
    widths = (256, 2048) if seconds else [1 << i for i in range(3, 14)]
    compile_only([partial(calls, width) for width in widths], time.monotonic() + seconds)
    first, loaded = len(compiled), device.loaded
    assert not replay.compiling() and not replay.observed() and active_mode.get() is None

    def again() -> None:
        calls(256)
        rms_norm(torch.ones(3, 64, dtype=torch.bfloat16), None, 1e-6)
        raise KeyboardInterrupt

    with contextlib.suppress(KeyboardInterrupt):
        compile_only([again], time.monotonic() + 60)
    assert not replay.compiling() and active_mode.get() is None
    if seconds and not broken:
        before = len(compiled), device.loaded
        calls(256)  # is launched
        assert (len(compiled), device.loaded) == before
    if not seconds:
        calls(widths[-1])  # not begun in time: compiled by who launches it
        assert len(compiled) > first
    return {"first": first, "loaded": loaded}


def behind() -> dict[str, object]:
    """One thread compiles, held up in the first kernel: who launches that one waits, who launches others does not."""
    driver.set_active(Loads())
    tuning.device_limits = lambda device: ("default", 232448)
    overlap.compute_capability = lambda device: (9, 0)
    compiling.BEHIND = 1
    here: list[str] = []
    there: list[str] = []
    go_on = threading.Event()

    def note(**given: object) -> None:
        if threading.current_thread() is threading.main_thread():
            here.append(given["src"].name)
        else:
            there.append(given["src"].name)
            go_on.wait(60)

    triton.knobs.compilation.listener = note
    calls = bound_norm()
    compile_behind([partial(calls, width) for width in (256, 2048, 4096, 8192)], time.monotonic() + 60)
    calls(4096)  # waits in the queue
    assert len(here) == 1 and replay.behind() is not None
    threading.Timer(0.5, go_on.set).start()
    calls(256)
    assert len(here) == 1 and go_on.is_set()
    settle()
    calls(2048)
    assert len(here) == 1 and replay.behind() is None
    compile_behind([partial(calls, 64)], 0.0)
    settle()
    calls(64)  # was not begun in time
    assert active_mode.get() is None
    return {"here": len(here), "there": len(there)}


if __name__ == "__main__":
    print(json.dumps(behind() if sys.argv[2] == "behind" else main(float(sys.argv[1]), sys.argv[2] == "broken")))
