"""An engine without pages: every step computes every sequence anew with the original model. What `generate` asks for,
in the simplest way that can be right, and it counts what is open."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from regraft.runtime.decoding.requests import Request
from regraft.runtime.decoding.sampling import Sampler
from regraft.runtime.decoding.sequences import Sequence


class StatelessEngine:
    rows = 12
    longest = None
    remembered = None
    counts_padding = False
    uncounted = None
    encoder = None

    def __init__(self, model: Any) -> None:
        self.forward, self.dtype = model.forward.original, model.dtype
        self.sampler = Sampler(model.config.get_text_config().vocab_size, "cpu")
        self.open: list[StatelessSession] = []
        self.ran = 0

    def logits(self, tokens: list[int]) -> Tensor:
        with torch.no_grad():
            return self.forward(torch.tensor([tokens]), use_cache=False).logits[0, -1]

    def run(
        self,
        requests: list[Request],
        on_token: Callable[[int, int], None] | None = None,
        states: None = None,
    ) -> list[list[int]]:
        self.ran += 1
        sequences = [Sequence(r, 1) for r in requests]
        for row, sequence in enumerate(sequences):
            self.sampler.assign(row, sequence)
        active = [True] * len(requests)
        while any(active):
            logits = torch.stack([self.logits(s.tokens) for s in sequences])
            chosen = self.sampler(logits, torch.tensor(active)).tolist()
            for i, (sequence, token) in enumerate(zip(sequences, chosen, strict=True)):
                if not active[i]:
                    continue
                sequence.tokens.append(token)
                if on_token is not None:
                    on_token(i, token)
                request = requests[i]
                active[i] = len(sequence.produced) < request.max_new_tokens and token not in request.stop_tokens
        return [s.produced for s in sequences]

    def session(self, batch_ids: list[list[int]], max_new_tokens: int, states: None = None) -> StatelessSession:
        assert len(batch_ids) <= self.rows
        return StatelessSession(self, batch_ids, max_new_tokens)


def make(model: Any, before: Any) -> StatelessEngine:
    """The one before, unless the weights took another form."""
    return before if before is not None and before.dtype == model.dtype else StatelessEngine(model)


class StatelessSession:
    def __init__(self, engine: StatelessEngine, batch: list[list[int]], new: int) -> None:
        self.longest = max(map(len, batch)) + new
        self.engine, self.batch = engine, [list(row) for row in batch]
        engine.open.append(self)

    def prefill(self) -> Tensor:
        assert all(len(row) <= self.longest for row in self.batch)
        return torch.stack([self.engine.logits(row) for row in self.batch])

    def step(self, tokens: Tensor) -> Tensor:
        for row, token in zip(self.batch, tokens.tolist(), strict=True):
            row.append(token)
        return self.prefill()

    def reorder(self, index: Tensor) -> None:
        self.batch = [list(self.batch[i]) for i in index.tolist()]

    def close(self) -> None:
        self.engine.open.remove(self)
