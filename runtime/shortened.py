"""Examples that are small enough to be computed in a higher precision, for graphs that serve every size."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import torch

from ..compiler.program import Limits
from .cases import by_tokens

TOKENS: Final = 1024
"""In a sequence."""
ROWS: Final = 8
"""In a batch of what has no tokens; sequences together have at most as many tokens as two of the longest."""


def shortened(example: Mapping[str, torch.Tensor], limits: Limits) -> dict[str, torch.Tensor]:
    """The first rows and tokens of an example, where the graph takes them; else all of it."""
    batches, lengths = set(), set()
    words_only = all(by_tokens(name) for name in example)  # pictures belong to tokens that might be cut
    for guard in limits.tensors.values():
        if guard.shape and isinstance(guard.shape[0], str):
            batches.add(guard.shape[0])
        if words_only and len(guard.shape) > 1 and isinstance(guard.shape[1], str):
            lengths.add(guard.shape[1])
    sizes = {
        symbol: size
        for name, guard in limits.tensors.items()
        for symbol, size in zip(guard.shape, example[name].shape, strict=True)
        if isinstance(symbol, str)
    }
    wanted = {symbol: min(sizes[symbol], TOKENS) for symbol in lengths}
    longest = max(wanted.values(), default=0)
    rows = max(2, 2 * TOKENS // longest) if longest else ROWS
    wanted |= {symbol: min(sizes[symbol], rows) for symbol in batches - lengths}
    made = {}
    for name, tensor in example.items():
        for dim, symbol in enumerate(limits.tensors[name].shape):
            if isinstance(symbol, str) and symbol in wanted:
                tensor = tensor.narrow(dim, 0, wanted[symbol])
        made[name] = tensor if tensor.shape == example[name].shape else tensor.contiguous()
    mask = made.get("attention_mask")
    known = mask is not None and mask.dim() == 2 and not mask.is_meta
    padded = known and mask is not None and not bool((mask != 0).any(1).all())
    return dict(example) if padded or limits.violation(made) is not None else made


def unpadded(example: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The example with every token a real one.

    What a model computes at padding differs from one spelling of its attention to the next, and would be held against a
    rewrite; the certificate makes padded batches of its own, and looks at their real rows.
    """
    made = dict(example)
    for name in ("attention_mask", "decoder_attention_mask"):
        mask = made.get(name)
        if mask is None or mask.dim() != 2 or mask.is_meta or mask.is_floating_point():
            continue
        if bool(((mask == 0) | (mask == 1)).all()):
            made[name] = torch.ones_like(mask)
    return made
