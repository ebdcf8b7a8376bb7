"""Sizes to which batches and prompts are rounded up, so that few CUDA graphs serve all of them."""

from __future__ import annotations

import itertools


def batch_bucket(rows: int) -> int:
    """The smallest of 1, 2, 4, 8, then multiples of 8 up to 32, of 16 up to 128, of 32 beyond, with room for `rows`."""
    if rows <= 8:
        return 1 << max(rows - 1, 0).bit_length()
    step = 8 if rows <= 32 else 16 if rows <= 128 else 32
    return -(-rows // step) * step


def batch_buckets(most: int) -> list[int]:
    """All buckets that batches of up to `most` rows fall into, smallest first."""
    return [b for b, _ in itertools.groupby(map(batch_bucket, range(1, most + 1)))]


def token_bucket(tokens: int) -> int:
    """Tokens of a short prefill, rounded up to a power of two, or to three quarters of one, of at least 16."""
    whole = max(16, 1 << max(tokens - 1, 0).bit_length())
    return whole * 3 // 4 if whole > 16 and tokens <= whole * 3 // 4 else whole
