"""A batch that goes on in step, for loops that choose tokens themselves: HuggingFace's own, beams among them."""

from __future__ import annotations

from collections.abc import Hashable
from collections.abc import Sequence as Items
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import InputError, RegraftError
from .encoder_pages import Encoded
from .requests import Request
from .scheduler import Chunk
from .sequences import Sequence, State

if TYPE_CHECKING:
    from .engine import Engine


class Session:
    """Sequences 0 to B-1 in rows 0 to B-1; made by `Engine.session`.

    Equal prompts are computed once and share their pages; who writes to a shared page gets a copy. Other calls may run
    between two of a session's.
    """

    def __init__(
        self, engine: Engine, number: int, batch_ids: Items[Items[int]], encoded: Items[Encoded] | None = None
    ) -> None:
        self._engine, self._executor, self.number = engine, engine.executor, number
        self._tables = self._executor.tables
        self.sequences: list[Sequence] = []
        """Empty once the session is closed."""
        self.encoded = list(encoded or ())
        """What is kept of encoders' states, for as long as the session is open."""
        for row, tokens in enumerate(batch_ids):
            beside = encoded[row] if encoded is not None else None
            request = Request(tokens, salt=beside.number if beside is not None else ())
            sequence = Sequence(request, len(self._tables.pools), row, self._tables.block_size)
            sequence.encoded = beside
            sequence.row, sequence.state = row, State.RUNNING
            self.sequences.append(sequence)

    @torch.no_grad()
    def prefill(self) -> Tensor:
        """Logits [B, V] behind the prompts."""
        with self._engine.turn():
            self._check_open()
            first: dict[Hashable, Sequence] = {}
            for sequence in self.sequences:
                first.setdefault(_identity(sequence), sequence)
            originals = list(first.values())
            if self._engine.limits.prefix_sharing:
                for sequence in originals:
                    self._tables.adopt(sequence, self._tables.match(sequence))
            behind = self._compute(originals)
            for sequence in self.sequences:
                original = first[_identity(sequence)]
                if sequence is not original:
                    self._follow(sequence, original)
            rows = [originals.index(first[_identity(s)]) for s in self.sequences]
            if rows == list(range(len(behind))):
                return behind
            return behind.index_select(0, torch.tensor(rows).to(behind.device, non_blocking=True))

    def step(self, tokens: Tensor) -> Tensor:
        """Append a token to each sequence, int64 [B]; returns the logits [B, V] behind it, gone with the next step.

        Raises:
            InputError: a sequence has the greatest length already.
        """
        with self._engine.turn():
            self._check_open()
            copies = []
            for sequence in self.sequences:
                self._room(sequence)
                if sequence.computed % self._tables.block_size:
                    copies += self._tables.own(sequence, sequence.computed)
                else:
                    self._tables.drop(sequence)
                    self._cover(sequence, sequence.computed + 1)
            self._executor.pages.copy(copies)
            logits = self._executor.step(self.sequences, tokens)
            for sequence in self.sequences:
                sequence.computed += 1
            self._engine.look()
            return logits[: len(self.sequences)]

    def reorder(self, index: Tensor) -> None:
        """Sequence i goes on from what sequence index[i] has, int64 [B]: pages are shared, nothing is copied yet."""
        with self._engine.turn():
            self._check_open()
            before = list(self.sequences)
            wanted = index.tolist()
            for row, source in enumerate(wanted):
                if source != row:
                    fresh = Sequence(before[source].request, len(self._tables.pools), row, self._tables.block_size)
                    fresh.row, fresh.state = row, State.RUNNING
                    self._follow(fresh, before[source])
                    self.sequences[row] = fresh
            for row, source in enumerate(wanted):
                if source != row:
                    self._tables.release(before[row])

    def close(self) -> None:
        """Give the pages back; again does nothing."""
        if self.sequences:
            with self._engine.turn():
                self._engine.closed(self)
                gone, self.sequences = list(self.sequences), []
                self._executor.release(gone)
                for sequence in gone:
                    self._tables.release(sequence)
                if self._executor.encoder is not None:
                    self._executor.encoder.give_back(self.encoded)
                self.encoded.clear()

    def _check_open(self) -> None:
        if not self.sequences:
            raise RegraftError("this session is closed")

    def _room(self, sequence: Sequence) -> None:
        if sequence.computed >= self._executor.max_seq_len:
            raise InputError(
                f"a sequence has {sequence.computed} tokens; it can have {self._executor.max_seq_len} (max_seq_len)"
            )

    def _cover(self, sequence: Sequence, tokens: int) -> None:
        if not self._tables.cover(sequence, tokens):
            raise RegraftError(
                "the KV cache has no page left: open the session with the max_new_tokens that it needs, "
                "or give the cache more memory"
            )

    def _compute(self, sequences: Items[Sequence]) -> Tensor:
        """Logits [len(sequences), V] behind the tokens of these, by chunks within the budget of a step."""
        behind: Tensor | None = None
        numbers = {s: i for i, s in enumerate(sequences)}
        todo = list(sequences)
        while todo:
            budget, chunks = self._engine.limits.budget(self._tables.windows), []
            for sequence in todo:
                count = min(budget, len(sequence.tokens) - sequence.computed)
                if count:
                    self._tables.drop(sequence)
                    self._cover(sequence, sequence.computed + count)
                    chunks.append(Chunk(sequence, sequence.computed, count))
                    budget -= count
            done = [c.sequence for c in chunks if c.samples]
            logits = self._executor.forward(chunks)
            if behind is None:
                behind = logits.new_empty(len(sequences), logits.shape[1])
            if done:
                pairs = torch.tensor([[numbers[s], s.row] for s in done]).to(logits.device, non_blocking=True)
                behind.index_copy_(0, pairs[:, 0], logits.index_select(0, pairs[:, 1]))
            for chunk in chunks:
                chunk.sequence.computed += chunk.count
                if self._engine.limits.prefix_sharing:
                    self._tables.register(chunk.sequence)
            todo = [s for s in todo if s not in done]
            self._engine.look()
        assert behind is not None
        return behind

    def _follow(self, sequence: Sequence, source: Sequence) -> None:
        """Share everything that another has."""
        for group, pool in enumerate(self._tables.pools):
            sequence.tables[group] = [pool.share(b) if b >= 0 else b for b in source.tables[group]]
        sequence.tokens = source.tokens
        sequence.dropped = list(source.dropped)
        sequence.encoded = source.encoded
        sequence.computed, sequence.registered = source.computed, source.registered


def _identity(sequence: Sequence) -> Hashable:
    """Equal where everything is that logits depend on."""
    return tuple(sequence.tokens), sequence.request.salt
