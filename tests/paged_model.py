"""A model without tensors: the next token is a hash of the tokens that it finds in its pages.

It writes and reads pages by block tables as attention does, so a page given to two sequences, freed too early or
filled with another's tokens changes the output.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass
from typing import Any

from regraft.runtime.decoding.requests import Request
from regraft.runtime.decoding.scheduler import Chunk
from regraft.runtime.decoding.sequences import Sequence

VOCAB = 97


def next_token(windows: Items[int], tokens: Items[int], salt: Any = ()) -> int:
    """What follows these tokens, by what each window lets the last of them see."""
    seen = tuple(tuple(tokens[max(0, len(tokens) - 1 - w) if w >= 0 else 0 :]) for w in windows)
    return hash((seen, salt)) % VOCAB


def lone_run(windows: Items[int], request: Request) -> list[int]:
    """The output of a request that runs alone and without pages."""
    tokens = list(request.tokens)
    for produced in range(1, request.max_new_tokens + 1):
        tokens.append(next_token(windows, tokens, request.salt))
        stopped = tokens[-1] in request.stop_tokens or (request.stop is not None and request.stop(tokens))
        if stopped and produced >= request.min_new_tokens:
            break
    return tokens[len(request.tokens) :]


@dataclass
class Known:
    """Tokens that are there."""

    tokens: list[list[int]]

    def read(self) -> list[list[int]]:
        return self.tokens


class NoEpilogue:
    """Tokens are made by the model itself."""

    graph_key = ()

    def assign(self, row: int, sequence: Sequence | None) -> None:
        pass

    def __call__(self, logits: Any, active: Any) -> Any:
        raise AssertionError("not used")


class PagedModel:
    """Runs chunks as an executor does."""

    def __init__(self, windows: Items[int], block_size: int) -> None:
        self.windows, self.block_size = windows, block_size
        self.pages: dict[tuple[int, int, int], tuple[int, Any]] = {}
        self.tokens_computed = 0
        self.largest = 0

    def _step(self, sequence: Sequence, position: int, token: int) -> int:
        salt, size = sequence.request.salt, self.block_size
        seen = []
        for group, window in enumerate(self.windows):
            table = sequence.tables[group]
            assert table[position // size] >= 0
            self.pages[group, table[position // size], position % size] = (token, salt)
            begin = max(0, position - window) if window >= 0 else 0
            found = [self.pages[group, table[p // size], p % size] for p in range(begin, position + 1)]
            assert all(s == salt for _, s in found)
            seen.append(tuple(t for t, _ in found))
        self.tokens_computed += 1
        return hash((tuple(seen), salt)) % VOCAB

    def mixed(self, chunks: list[Chunk], epilogue: Any) -> Known:
        self.largest = max(self.largest, sum(c.count for c in chunks))
        assert len({c.sequence.row for c in chunks}) == len(chunks)
        out = []
        for chunk in chunks:
            token = -1
            for position in range(chunk.start, chunk.start + chunk.count):
                token = self._step(chunk.sequence, position, chunk.sequence.tokens[position])
            out.append([token] if chunk.samples else [])
        return Known(out)

    def burst(self, chunks: list[Chunk], epilogue: Any) -> Known:
        out = []
        for chunk in chunks:
            sequence = chunk.sequence
            ahead = getattr(sequence, "ahead", (0, 0))
            start = chunk.start
            token = ahead[1] if ahead[0] == start and start >= len(sequence.tokens) else sequence.tokens[start]
            produced = []
            for position in range(start, start + chunk.count):
                token = self._step(sequence, position, token)
                produced.append(token)
            sequence.ahead = (start + chunk.count, token)  # type: ignore[attr-defined]
            out.append(produced)
        return Known(out)
