"""What a decoding step reads and moves on by itself, as tensors that stay where they are.

The host changes it only where rows change hands or pages are added: all such changes of a moment are one copy of pinned
memory and one scatter, in the order of the stream. Everything else is computed on the device from lengths and tables.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from typing import Final

import torch
from torch import Tensor

from .program import EncoderStep, Step

RING: Final = 64
"""Steps whose tokens are kept; the host reads them before they are overwritten."""
STAGED: Final = 1 << 14
"""Changes that are sent at once."""


class DecodeState:
    """Rows 0 to `rows - 1` of a batch.

    Args:
        groups: block tables of each row.
        width: columns of a table.
        encoder_width: columns of the table of an encoder's states; 0: there is no encoder.
    """

    def __init__(
        self, rows: int, groups: int, width: int, block_size: int, device: torch.device, encoder_width: int = 0
    ) -> None:
        self.rows, self.width, self.block_size, self.device = rows, width, block_size, device
        parts = [2 * rows, rows, rows, groups * rows * width, rows, rows * encoder_width]
        self._words = torch.zeros(sum(parts), dtype=torch.int32, device=device)
        ids, self.computed, self.limits, tables, self._encoder_lengths, encoder_table = self._words.split(parts)
        self._encoder_table = encoder_table.view(rows, encoder_width)
        self._encoder_at = sum(parts[:4])
        self._unwritten = torch.full((rows,), -1, dtype=torch.int64, device=device)
        self._computed_at, self._limits_at, self._tables_at = 2 * rows, 3 * rows, 4 * rows
        self.ids = ids.view(torch.int64)
        """int64 [rows]: the token that is computed next."""
        # computed, limits: int32 [rows], tokens in the pages, and how many there may be; limit 0: an unused row
        self._tables = tables.view(groups, rows, width)
        self.tables = self._tables.unbind(0)
        """int32 [rows, width] of each group."""
        self.positions = torch.zeros(rows, dtype=torch.int64, device=device)
        self.lengths = torch.zeros(rows, dtype=torch.int32, device=device)
        self._slots = torch.full((groups, rows), -1, dtype=torch.int64, device=device)
        self.active = torch.zeros(rows, dtype=torch.bool, device=device)
        """bool [rows]: who takes part in the step under way."""
        self.numbers = torch.arange(rows, device=device)
        self.starts = torch.arange(rows + 1, dtype=torch.int32, device=device)
        self.ring = torch.zeros(RING, rows, dtype=torch.int64, device=device)
        self.tick = torch.zeros(1, dtype=torch.int64, device=device)
        """The line of `ring` that the next step writes."""
        self._staged = torch.zeros(3 * STAGED, dtype=torch.int32, device=device)
        self._changes: dict[int, int] = {}

    # -- changes by the host ----------------------------------------------------------------------------------------

    def set_token(self, row: int, token: int) -> None:
        """The row computes this token next."""
        self._changes[2 * row] = token

    def set_length(self, row: int, computed: int, limit: int) -> None:
        """The row has so many tokens in its pages, and goes on up to `limit`."""
        self._changes[self._computed_at + row] = computed
        self._changes[self._limits_at + row] = limit

    def set_pages(self, row: int, group: int, first: int, blocks: Items[int]) -> None:
        """Columns `first` and up of the row's table."""
        start = self._tables_at + (group * self.rows + row) * self.width + first
        self._changes.update(zip(range(start, start + len(blocks)), blocks))

    def set_encoder(self, row: int, blocks: Items[int], length: int) -> None:
        """The row goes on from these states of an encoder."""
        self._changes[self._encoder_at + row] = length
        start = self._encoder_at + self.rows + row * self._encoder_table.shape[1]
        self._changes.update(zip(range(start, start + len(blocks)), blocks))

    def send(self) -> None:
        """Let the device have all changes, before whatever is launched next."""
        items = list(self._changes.items())
        self._changes.clear()
        for begin in range(0, len(items), STAGED):
            where, what = zip(*items[begin : begin + STAGED])
            count = len(where)
            host = torch.empty(3 * count, dtype=torch.int32, pin_memory=self.device.type == "cuda")
            host[: 2 * count].view(torch.int64).copy_(torch.tensor(where))
            host[2 * count :].copy_(torch.tensor(what))
            staged = self._staged[: 3 * count]
            staged.copy_(host, non_blocking=True)
            self._words.scatter_(0, staged[: 2 * count].view(torch.int64), staged[2 * count :])

    def reset(self) -> None:
        """No row is in use, no change is waiting."""
        self._changes.clear()
        self.limits.zero_()
        self.tick.zero_()

    # -- a step, on the device --------------------------------------------------------------------------------------

    def advance(self, rows: int) -> Step:
        """Make room for the next token of rows 0 to `rows - 1`; returns the step that computes it."""
        if self.device.type == "cuda":
            from ...kernels import decode_triton  # Triton is not there on every platform

            own = (self.computed, self.limits, self._tables, self.positions, self.lengths)
            decode_triton.advance(*own, self.active.view(torch.uint8), self._slots, rows, self.block_size)
        else:
            self._advance(rows)
        return Step(
            input_ids=self.ids[None, :rows],
            position_ids=self.positions[None, :rows],
            rows=self.numbers[:rows],
            cu_seqlens_q=self.starts[: rows + 1],
            lengths=self.lengths[:rows],
            slots=self._slots[:, :rows].unbind(0),
            tables=tuple(t[:rows] for t in self.tables),
            max_q=1,
            every=True,
            encoder=self._encoder_of_rows(rows),
        )

    def _encoder_of_rows(self, rows: int) -> EncoderStep | None:
        if not self._encoder_table.shape[1]:
            return None
        lengths, table = self._encoder_lengths[:rows], self._encoder_table[:rows]
        return EncoderStep(self._unwritten[:rows], self.starts[: rows + 1], lengths, table)

    def encoder_of_tokens(self, starts: Tensor, tokens: int) -> EncoderStep | None:
        """What `tokens` tokens read; row r has those from starts[r] to starts[r + 1], padding reads nothing."""
        if not self._encoder_table.shape[1]:
            return None
        numbers = torch.arange(tokens + 1, dtype=torch.int32, device=self.device)
        row = torch.searchsorted(starts[1:], numbers[:-1], right=True)
        known = row < len(starts) - 1
        row = torch.where(known, row, 0)
        return EncoderStep(
            slots=torch.full((tokens,), -1, dtype=torch.int64, device=self.device),
            starts=numbers,
            lengths=torch.where(known, self._encoder_lengths[row], 0),
            table=self._encoder_table[row],
        )

    def _advance(self, rows: int) -> None:
        computed, size = self.computed[:rows], self.block_size
        active = torch.lt(computed, self.limits[:rows], out=self.active[:rows])
        position = torch.where(active, computed, 0).long()
        page = self._tables[:, :rows].gather(2, (position // size).expand(len(self.tables), -1)[..., None])[..., 0]
        self._slots[:, :rows] = torch.where(active, page * size + position % size, -1)
        self.positions[:rows] = position
        self.lengths[:rows] = torch.where(active, computed + 1, 0)
        computed += active

    def take(self, tokens: Tensor) -> None:
        """These tokens, int64 [S], are what active rows compute next; they are kept for the host."""
        rows = tokens.shape[0]
        if self.device.type == "cuda":
            from ...kernels import decode_triton

            decode_triton.take(tokens, self.active.view(torch.uint8), self.ids, self.ring, self.tick)
            return
        self.ids[:rows] = torch.where(self.active[:rows], tokens, self.ids[:rows])
        self.ring[:, :rows].index_copy_(0, self.tick, tokens[None])
        self.tick.add_(1).remainder_(RING)
