"""Noise that depends on a row's seed, its step and the token alone: Gumbel noise from Philox-4x32-10 counters.

`argmax(scores + gumbel)` draws from `softmax(scores)` (Gumbel-max). The generator is that of Salmon et al., "Parallel
random numbers: as easy as 1, 2, 3" (2011), which Triton's `tl.philox` computes too: CPU and GPU draw the same integers.
"""

from __future__ import annotations

import torch
from torch import Tensor

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10
LOW = 0xFFFFFFFF
SERIES_BELOW = 2.0**-8
"""Under it, -log(1 - u) is summed as a series: 1 - u would round away what tells small u apart."""


def philox(seed: Tensor, step: Tensor, count: int) -> Tensor:
    """The first word of the counters (0 .. count-1, step, 0, 0) under `seed`, as unsigned 32-bit values.

    Args:
        seed, step: int64 [S], step below 2**32.

    Returns:
        int64 [S, count].
    """
    c0 = torch.arange(count, device=seed.device)[None, :].expand(seed.shape[0], count)
    c1 = (step & LOW)[:, None].expand_as(c0)
    c2 = c3 = torch.zeros_like(c0)
    k0, k1 = (seed & LOW)[:, None], ((seed >> 32) & LOW)[:, None]
    for _ in range(ROUNDS):
        a, b = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]  # 64 bits, of which int64 keeps all, sign or not
        c0, c1, c2, c3 = ((b >> 32) & LOW) ^ c1 ^ k0, b & LOW, ((a >> 32) & LOW) ^ c3 ^ k1, a & LOW
        k0, k1 = (k0 + WEYL[0]) & LOW, (k1 + WEYL[1]) & LOW
    return c0


def gumbel(words: Tensor) -> Tensor:
    """Gumbel noise, float32, from 32-bit words: -log(e) with e exponential, fine-grained where e is small."""
    u = ((words.to(torch.float32) + 0.5) * 2.0**-32).clamp(max=1 - 2.0**-24)
    series = u * (1 + u * (0.5 + u * (1 / 3)))
    return -torch.log(torch.where(u < SERIES_BELOW, series, -torch.log(1 - u)))


def add_gumbel(scores: Tensor, seed: Tensor, step: Tensor, drawn: Tensor) -> Tensor:
    """`scores` plus noise on the rows that are drawn; the others as they are.

    Args:
        scores: float32 [S, V], contiguous in V.
        seed, step: int64 [S]. drawn: bool [S].
    """
    if not scores.is_cuda:
        noise = gumbel(philox(seed, step, scores.shape[1]))
        return torch.where(drawn[:, None], scores + noise, scores)
    from ...kernels.gumbel_triton import launch  # Triton is not there on every platform

    return launch(scores, seed, step, drawn)
