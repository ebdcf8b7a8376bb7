"""Pages handed out by hand, to look at a flat program without an engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from ...compiler.program import LayerSpec
from ...kernels.paged_attention import PAGE_DTYPES
from .program import EncoderStep, FlatProgram, Step

PAGE: Final = 16


def _filled(layer: LayerSpec, count: int, page: int, device: torch.device) -> tuple[Tensor, Tensor]:
    shape = (count, page, layer.kv_heads)
    k, v = (torch.full((*shape, d), 7.0, device=device).to(layer.dtype) for d in (layer.key_dim, layer.value_dim))
    return k, v


@dataclass
class EncoderBook:
    """What is kept of the encoder's states of each sequence; nothing where there are none."""

    pages: list[tuple[Tensor, Tensor]]
    tables: Tensor
    """int32 [sequences, most]"""
    lengths: Tensor
    """int32 [sequences]"""

    @classmethod
    def of(cls, flat: FlatProgram, states: Sequence[Tensor], device: torch.device, page: int) -> EncoderBook:
        """Pages with what is kept of states `[1, N, E]` each."""
        counts = [s.shape[1] for s in states]
        wanted = [-(-n // page) for n in counts]
        most = max(wanted, default=0)
        order = torch.randperm(sum(wanted) + 1, generator=torch.Generator().manual_seed(2)).tolist()
        tables = [[order.pop() for _ in range(n)] + [-1] * (most - n) for n in wanted]
        layers = flat.encoder.layers if flat.encoder is not None and states else ()
        pages = [_filled(layer, sum(wanted) + 1, page, device) for layer in layers]
        if flat.encoder is not None and states:  # of all at once, as the engine does: states must not mix either
            slots = [table[i // page] * page + i % page for table, n in zip(tables, counts) for i in range(n)]
            for sides, kept in zip(pages, flat.encoder(torch.cat(list(states), dim=1)), strict=True):
                for side, rows in zip(sides, kept, strict=True):
                    side.flatten(0, 1)[torch.tensor(slots, device=device)] = rows
        shaped = torch.tensor(tables, dtype=torch.int32, device=device).reshape(len(counts), most)
        return cls(pages, shaped, torch.tensor(counts, dtype=torch.int32, device=device))

    def step(self, owners: Sequence[int], padding: int) -> EncoderStep | None:
        """For a token of each of these sequences, then tokens of padding."""
        if not self.pages:
            return None
        device, total = self.lengths.device, len(owners) + padding
        rows = torch.tensor([*owners, *[0] * padding], device=device)
        lengths = self.lengths[rows]
        lengths[len(owners) :] = 0
        return EncoderStep(
            slots=torch.full((total,), -1, device=device),
            starts=torch.arange(total + 1, dtype=torch.int32, device=device),
            lengths=lengths,
            table=self.tables[rows],
        )


@dataclass
class Book:
    """Which pages belong to whom, handed out at random: each group its own order."""

    pages: list[tuple[Tensor, Tensor]]
    tables: list[list[list[int]]]
    """For each group and sequence, its pages."""
    device: torch.device
    done: list[int]
    encoder: EncoderBook
    scales: list[tuple[Tensor, Tensor]] | None = None

    @classmethod
    def of(
        cls,
        flat: FlatProgram,
        lengths: Sequence[int],
        device: torch.device,
        page: int = PAGE,
        states: Sequence[Tensor] = (),
    ) -> Book:
        """Pages for sequences of these lengths, filled with what must not be read; those of `states` are written."""
        wanted = [-(-n // page) for n in lengths]
        count = sum(wanted) + 1
        generator = torch.Generator().manual_seed(1)
        tables = []
        for _ in flat.groups:
            order = torch.randperm(count, generator=generator).tolist()
            tables.append([[order.pop() for _ in range(n)] for n in wanted])
        pages, scales = [], []
        for layer in flat.layers:
            pages.append(_filled(layer, count, page, device))
            shape = (count, page, layer.kv_heads)
            scales.append((torch.ones(shape, device=device), torch.ones(shape, device=device)))
        encoder = EncoderBook.of(flat, states, device, page)
        scaled = flat.layers[0].dtype in PAGE_DTYPES
        return cls(pages, tables, device, [0] * len(lengths), encoder, scales if scaled else None)

    def bind(self, flat: FlatProgram) -> None:
        """Let a flat program use these pages."""
        flat.bind(self.pages, self.scales, self.encoder.pages)

    def step(self, take: Mapping[int, int], sequences: Sequence[Tensor], padding: int = 0, absent: int = 0) -> Step:
        """The next `take[s]` tokens of each sequence s named, and the rows of all of them.

        `padding` tokens and `absent` sequences, which are not there, follow.
        """
        page = self.pages[0][0].shape[1]
        begins = not any(self.done[s] for s in take)
        tokens: list[Tensor] = []
        positions: list[int] = []
        ends, lengths = [0], []
        places: list[list[int]] = [[] for _ in self.tables]
        for s, count in take.items():
            first, last = self.done[s], self.done[s] + count
            tokens.append(sequences[s][first:last])
            positions += range(first, last)
            for group, table in enumerate(self.tables):
                places[group] += [table[s][p // page] * page + p % page for p in range(first, last)]
            ends.append(ends[-1] + count)
            lengths.append(last)
            self.done[s] = last
        most = [max(len(table[s]) for s in take) for table in self.tables]
        rows = [[table[s] + [-1] * (m - len(table[s])) for s in take] for table, m in zip(self.tables, most)]
        padded = [0] * padding
        return Step(
            input_ids=torch.cat([*tokens, self._of(padded)])[None],
            position_ids=self._of(positions + padded)[None],
            rows=torch.arange(ends[-1], device=self.device),
            cu_seqlens_q=self._of(ends + [ends[-1]] * absent).int(),
            lengths=self._of(lengths + [0] * absent).int(),
            slots=tuple(self._of(p + [-1] * padding) for p in places),
            tables=tuple(self._of(r + [[-1] * m] * absent).int() for r, m in zip(rows, most)),
            max_q=max(take.values()),
            fresh=begins,
            every=padding == 0 and max(take.values()) == 1,
            encoder=self.encoder.step([s for s, count in take.items() for _ in range(count)], padding),
        )

    def _of(self, values: Any) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self.device)
