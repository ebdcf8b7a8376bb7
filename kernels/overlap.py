# mypy: disallow-untyped-defs=False
"""Kernels of a stream that overlap (programmatic dependent launch): one starts while the one before it still runs."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .launch import INTERPRETED, compute_capability


@triton.jit
def start_dependent(PDL: tl.constexpr):
    """Lets the next kernel of the stream start while this one runs, and waits for the one before (Hopper).

    A kernel that is launched with `launch_pdl` calls this before it reads or writes any memory of another kernel.
    """
    if PDL:
        gdc_launch_dependents()
        gdc_wait()


@triton.jit
def load_early(w_ptrs, other_ptrs, inside, BOTH: tl.constexpr, PDL: tl.constexpr):
    """Tiles of weights, asked for before the wait for the kernel in front; the second where there are BOTH.

    What wrote them must have ended when the last kernel launched without `launch_pdl` began, as in `stream_kernel`.
    """
    if PDL:
        gdc_launch_dependents()
    w = tl.load(w_ptrs, mask=inside, other=0.0, eviction_policy="evict_first")
    other = w
    if BOTH:
        other = tl.load(other_ptrs, mask=inside, other=0.0, eviction_policy="evict_first")
    if PDL:
        gdc_wait()
    return w, other


def overlaps(x: Tensor) -> dict[str, bool]:
    """Launch options of a kernel that calls `start_dependent`: overlapping launches from Hopper on."""
    hopper = not INTERPRETED and compute_capability(x.device) >= (9, 0)
    return {"PDL": True, "launch_pdl": True} if hopper else {"PDL": False}
