"""A barrier for all threads of a Gluon program, which Triton 3.6 calls `thread_barrier` and Triton 3.7 `barrier`."""

from __future__ import annotations

from typing import Any, Final

from triton.experimental.gluon import language as gl

thread_barrier: Final[Any] = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
