"""A mixed step as one vector on the host, so that it is sent to the device by one copy."""

from __future__ import annotations

from collections.abc import Sequence as Items

import numpy as np
import torch
from torch import Tensor

from .flat import Step
from .scheduler import Chunk


def packed(chunks: Items[Chunk], rows: int, padded: int, groups: int, block_size: int) -> Tensor:
    """Everything that a mixed step needs, int64.

    Of `padded` tokens: ids, positions, slots of each group. Of `rows` rows: the last token, where the row starts (one
    more), its length, whether it samples. A row without a chunk has no tokens and length 0.
    """
    whole = np.zeros(padded * (2 + groups) + 4 * rows + 1, dtype=np.int64)
    ids, positions = whole[:padded], whole[padded : 2 * padded]
    slots = whole[2 * padded : (2 + groups) * padded].reshape(groups, padded)
    slots.fill(-1)
    last, starts, lengths, sampled = np.split(whole[(2 + groups) * padded :], [rows, 2 * rows + 1, 3 * rows + 1])
    begin = 0
    for chunk in chunks:
        row, end = chunk.sequence.row or 0, begin + chunk.count
        position = np.arange(chunk.start, chunk.start + chunk.count)
        ids[begin:end] = chunk.sequence.tokens[chunk.start : chunk.start + chunk.count]
        positions[begin:end] = position
        for group, table in enumerate(chunk.sequence.tables):
            slots[group, begin:end] = np.asarray(table)[position // block_size] * block_size + position % block_size
        last[row], starts[row + 1], lengths[row] = end - 1, chunk.count, chunk.start + chunk.count
        sampled[row] = chunk.samples
        begin = end
    np.cumsum(starts, out=starts)
    return torch.from_numpy(whole)


def unpacked(
    words: Tensor, tables: tuple[Tensor, ...], rows: int, padded: int, max_q: int, fresh: bool
) -> tuple[Step, Tensor]:
    """The step that `packed` laid out, and which rows sample, bool [rows]; tables are those of all rows or more."""
    groups = len(tables)
    sizes = [padded, padded, groups * padded, rows, rows + 1, rows, rows]
    ids, positions, slots, last, starts, lengths, sampled = words.split(sizes)
    step = Step(
        input_ids=ids[None],
        position_ids=positions[None],
        rows=last,
        cu_seqlens_q=starts.int(),
        lengths=lengths.int(),
        slots=tuple(slots.view(groups, padded).unbind(0)),
        tables=tuple(t[:rows] for t in tables),
        max_q=max_q,
        fresh=fresh,
    )
    return step, sampled.bool()
