"""Pages of what attentions keep of encoders' states: written once, read by every step of a sequence."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from collections.abc import Sequence as Items
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from ..errors import InputError
from .encoder import EncoderProgram
from .memory import CPU_BYTES, FRACTION, RESERVE, Limits, block_bytes, free_bytes
from .pages import Pages
from .pool import BlockPool

LONGEST: Final = 2048
"""States of a sequence, where `max_seq_len` does not say more."""
AT_ONCE: Final = 8192
"""States whose keys and values are computed in one call."""


@dataclass(frozen=True, eq=False)
class Encoded:
    """What is kept of the states of one sequence; sequences that go on from the same states share it."""

    number: int
    """Never given twice."""
    blocks: list[int]
    length: int


class EncoderPages:
    """Memory for the states of as many sequences as are decoded at once, or as fit into a quarter of what is free.

    Raises:
        InputError: there is no memory for a single page.
    """

    def __init__(self, encoder: EncoderProgram, limits: Limits, device: torch.device) -> None:
        self._encoder, size = encoder, limits.block_size
        self.masked = encoder.masked
        self.longest = max(LONGEST, limits.max_seq_len or 0)
        self.width = -(-self.longest // size)
        """Pages of the longest sequence."""
        free = free_bytes(device)
        budget = FRACTION / 2 * (free - RESERVE) if device.type == "cuda" else min(CPU_BYTES, free) / 2
        bytes_of = block_bytes(encoder.layers, 0, size)
        count = min(limits.max_batch_size * self.width, int(budget) // bytes_of)
        if count < 1:
            raise InputError(f"{int(budget) >> 10} KiB hold no page of an encoder's states ({bytes_of >> 10} KiB)")
        self.pages = Pages(encoder.layers, [count], size, device)
        self._pool = BlockPool(count, size)
        self._numbers = itertools.count()

    @property
    def used(self) -> int:
        """Pages that are held."""
        return self._pool.used

    def refusal(self, lengths: Iterable[int]) -> str | None:
        """Why states of these lengths cannot be kept now, or None."""
        wanted = list(lengths)
        if min(wanted) < 1:
            return "a sequence that sees none of the encoder's states"
        if max(wanted) > self.longest:
            return f"{max(wanted)} states of the encoder, more than {self.longest}"
        needed = sum(map(self._blocks_for, wanted))
        if needed > self._pool.available:
            return (
                f"the encoder's states need {needed} pages of {self._pool.block_size}, {self._pool.available} are free"
            )
        return None

    def keep(self, states: Items[Tensor]) -> list[Encoded]:
        """Compute and keep what attentions need of the states `[N, E]` of each sequence.

        Neighbours with equal states share what is kept.

        Raises:
            InputError: there is no room for them; nothing is held then.
        """
        owners = list(itertools.accumulate((int(not _same(a, b)) for a, b in itertools.pairwise(states)), initial=0))
        distinct = [s for i, s in enumerate(states) if i == 0 or owners[i] != owners[i - 1]]
        reason = self.refusal(len(s) for s in distinct)
        if reason is not None:
            raise InputError(reason)
        made = [self._room(len(s)) for s in distinct]
        begin = 0
        while begin < len(made):
            end, total = begin + 1, len(distinct[begin])
            while end < len(made) and total + len(distinct[end]) <= AT_ONCE:
                total += len(distinct[end])
                end += 1
            self._write(made[begin:end], torch.cat(distinct[begin:end]))
            begin = end
        return [made[owner] for owner in owners]

    def give_back(self, encoded: Iterable[Encoded]) -> None:
        """Nobody reads these any more."""
        for one in {e.number: e for e in encoded}.values():
            self._pool.release(one.blocks)

    def rebuild(self, encoded: Iterable[Encoded]) -> None:
        """Only these are held."""
        self._pool.rebuild(one.blocks for one in {e.number: e for e in encoded}.values())

    def _blocks_for(self, length: int) -> int:
        return -(-length // self._pool.block_size)

    def _room(self, length: int) -> Encoded:
        return Encoded(next(self._numbers), [self._pool.allocate() for _ in range(self._blocks_for(length))], length)

    def _write(self, encoded: Items[Encoded], states: Tensor) -> None:
        size = self._pool.block_size
        places = [
            block * size + i
            for e in encoded
            for n, block in enumerate(e.blocks)
            for i in range(size)
            if n * size + i < e.length
        ]
        slots = torch.tensor(places).to(states.device, non_blocking=True)
        for pages, sides in zip(self.pages.layers, self._encoder(states[None]), strict=True):
            for page, rows in zip(pages, sides, strict=True):
                page.flatten(0, 1).index_copy_(0, slots, rows)


def _same(a: Tensor, b: Tensor) -> bool:
    return a is b or (a.shape == b.shape and torch.equal(a, b))
