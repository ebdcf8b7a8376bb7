"""In-flight batching: sequences enter and leave while others are decoded.

Pure decoding runs in bursts of a few steps, and the next burst is launched before the tokens of the last one are read:
the device never waits for the host. Stop conditions are looked at when tokens are read; what was produced beyond a stop
is dropped. Whenever the batch changes, all bursts are read first, so that the host knows every token.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Final, Protocol

from ..errors import RegraftError
from .pool import OutOfBlocks
from .requests import Epilogue, Request
from .scheduler import Chunk, Scheduler
from .sequences import Sequence, State

DEPTH: Final = 2
"""Bursts under way at once."""


class Tokens(Protocol):
    """Tokens on their way to the host."""

    def read(self) -> list[list[int]]:
        """Wait for them: of each chunk, one token a step."""


class Runs(Protocol):
    """What a call needs of the executor."""

    def mixed(self, chunks: list[Chunk], epilogue: Epilogue) -> Tokens:
        """Compute the chunks in one step; a token of each that `samples`, none of the others."""

    def burst(self, chunks: list[Chunk], epilogue: Epilogue) -> Tokens:
        """Decode each chunk's row `count` steps on from what it has."""


@dataclass(frozen=True)
class Burst:
    """Chunks that were launched and their tokens."""

    chunks: list[Chunk]
    tokens: Tokens


class Call:
    """Requests that run together. Not for several threads at once.

    Args:
        burst: decoding steps between two looks at the tokens.
    """

    def __init__(self, scheduler: Scheduler, runs: Runs, epilogue: Epilogue, burst: int = 8) -> None:
        self.scheduler, self._runs, self._epilogue, self._burst = scheduler, runs, epilogue, burst
        self._flying: deque[Burst] = deque()
        self.steps = 0

    def add(self, request: Request) -> Sequence:
        """Let a request take part from the next step that has room.

        Raises:
            InputError: it could not even run alone.
        """
        return self.scheduler.add(request)

    def cancel(self, sequence: Sequence) -> None:
        """End it where it is; its pages are free, its tokens so far are kept."""
        self.scheduler.finish(sequence)

    @property
    def done(self) -> bool:
        """Whether nothing waits, runs, or is on its way."""
        return not (self.scheduler.waiting or self.scheduler.running or self._flying)

    def step(self) -> list[tuple[Sequence, list[int]]]:
        """Launch what can be launched; returns the tokens that arrived, by sequence, in order.

        Raises:
            OutOfBlocks: what waits cannot begin, because others than this call hold the pages.
        """
        chunks = self.scheduler.steady(self._burst)
        if chunks:
            self.steps += max(c.count for c in chunks)
            self._flying.append(Burst(chunks, self._runs.burst(chunks, self._epilogue)))
            return self._collect() if len(self._flying) >= DEPTH else []
        if self._flying:
            return self._collect()
        chunks = self.scheduler.schedule()
        if chunks:
            self.steps += 1
            self._flying.append(Burst(chunks, self._runs.mixed(chunks, self._epilogue)))
            return self._collect()
        if self.scheduler.waiting:
            raise OutOfBlocks("the pages that this call needs are held by sessions that are still open")
        return []

    def _collect(self) -> list[tuple[Sequence, list[int]]]:
        burst = self._flying.popleft()
        arrived = []
        for chunk, tokens in zip(burst.chunks, burst.tokens.read(), strict=True):
            sequence = chunk.sequence
            if sequence.state is State.FINISHED or not tokens:
                continue
            if sequence.state is not State.RUNNING:
                raise RegraftError("a sequence was preempted before its tokens were read")
            taken = self.scheduler.accept(sequence, tokens)
            arrived.append((sequence, tokens[:taken]))
        return arrived
