# mypy: disallow-untyped-defs=False
"""Elements of many tensors as bytes in one launch, by where the tensors lie."""

from __future__ import annotations

from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import empty, launch

BYTES: Final = 8
"""Of each element; what an element has more is not read."""


@triton.jit
def samples_kernel(places_ptr, out_ptr, SAMPLES: tl.constexpr, BYTES: tl.constexpr):
    tensor = tl.program_id(0)
    start = tl.load(places_ptr + 3 * tensor).to(tl.pointer_type(tl.uint8))
    count = tl.load(places_ptr + 3 * tensor + 1)
    width = tl.load(places_ptr + 3 * tensor + 2)
    sample = tl.arange(0, SAMPLES)
    element = sample.to(tl.int64) * (count - 1) // (SAMPLES - 1)  # [SAMPLES], the first and the last among them
    byte = tl.arange(0, BYTES)
    there = (byte < width)[None, :] & (count > 0)
    read = tl.load(start + element[:, None] * width + byte[None, :], mask=there, other=0)
    out = tensor.to(tl.int64) * SAMPLES + sample
    tl.store(out_ptr + out[:, None] * BYTES + byte[None, :], read)


def samples(places: Tensor, count: int) -> Tensor:
    """`count` elements of each tensor, evenly spaced: uint8 `[N, count, 8]`, zeros where an element has fewer bytes.

    Args:
        places: int64 `[N, 3]` contiguous: of each tensor on the same device its address, how many elements lie in a row
            from there, and the bytes of one.
        count: a power of two from 2 on.
    """
    out = empty((len(places), count, BYTES), torch.uint8, places.device)
    if len(places):
        launch(samples_kernel, (len(places),), places, out, SAMPLES=count, BYTES=BYTES, num_warps=4)
    return out
