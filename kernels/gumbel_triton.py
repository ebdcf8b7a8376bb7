# mypy: disallow-untyped-defs=False
"""Gumbel noise added to scores in one pass, from the counters of `runtime/decoding/noise.py`: the same integers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import replay

BLOCK = 1024


@triton.jit
def add_gumbel_kernel(
    scores_ptr,
    seed_ptr,
    step_ptr,
    drawn_ptr,
    out_ptr,
    count,
    stride_scores,
    stride_seed,
    stride_step,
    stride_drawn,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    token = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    scores = tl.load(scores_ptr + row * stride_scores + token, mask=token < count, other=float("-inf"))
    if tl.load(drawn_ptr + row * stride_drawn) != 0:
        step = tl.load(step_ptr + row * stride_step).to(tl.int32)
        zero = token * 0
        word, _, _, _ = tl.philox(tl.load(seed_ptr + row * stride_seed), token, zero + step, zero, zero)
        u = tl.minimum((word.to(tl.float32) + 0.5) * 2.3283064365386963e-10, 0.9999999403953552)  # 2^-32, 1 - 2^-24
        series = u * (1 + u * (0.5 + u * 0.3333333432674408))  # -log(1 - u), where 1 - u would round u away
        scores -= tl.log(tl.where(u < 0.00390625, series, -tl.log(1 - u)))
    tl.store(out_ptr + row * count + token, scores, mask=token < count)


def launch(scores: Tensor, seed: Tensor, step: Tensor, drawn: Tensor) -> Tensor:
    """`scores` [S, V] float32 plus noise on the rows where `drawn` [S] bool; seed and step int64 [S].

    Scores are contiguous in V; the others may have strides.
    """
    rows, count = scores.shape
    out = replay.empty((rows, count), torch.float32, scores.device)
    grid = (rows, triton.cdiv(count, BLOCK))
    strides = (scores.stride(0), seed.stride(0), step.stride(0), drawn.stride(0))
    if rows and count:
        given = (scores, seed, step, drawn.view(torch.uint8), out, count, *strides)
        replay.launch(add_gumbel_kernel, grid, *given, BLOCK=BLOCK, num_warps=4)
    return out
