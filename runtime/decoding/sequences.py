"""One prompt on its way: its tokens, the pages that hold their K and V, and how far it has come."""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING

from .pool import digest, first_digest
from .requests import Request

if TYPE_CHECKING:
    from .encoder_pages import Encoded


class State(enum.Enum):
    """Where a sequence stands."""

    WAITING = "waiting"
    RUNNING = "running"
    PREEMPTED = "preempted"
    """Waits again: its pages were given to others, what they held is computed anew."""
    FINISHED = "finished"


class Sequence:
    """Prompt and output of one request.

    `tokens` is what is known on the host. `computed` counts the tokens whose K and V are written or about to be by
    steps that were launched; in decoding it runs ahead of `tokens` by what was not read back yet.
    """

    def __init__(self, request: Request, groups: int, number: int = 0, block_size: int = 16) -> None:
        self.request, self.number = request, number
        self.tokens = list(request.tokens)
        self.prompt_length = len(self.tokens)
        self.state = State.WAITING
        self.computed = 0
        self.tables: list[list[int]] = [[] for _ in range(groups)]
        """Of each group: the block of tokens `i * block_size` and up; -1: behind the window, given back."""
        self.written_anew = 0
        """Another number whenever entries of the tables were replaced: otherwise they only grow, and are dropped."""
        self.dropped = [0] * groups
        """Of each group: leading blocks that lie behind the window."""
        self.row: int | None = None
        """Its row in the batch that is decoded."""
        self.registered = 0
        """Full blocks that others can find."""
        self.encoded: Encoded | None = None
        """Of a decoder beside an encoder: what is kept of the states that it goes on from."""
        self._block_size = block_size
        self._digests: list[bytes] = []

    @property
    def produced(self) -> list[int]:
        """What came after the prompt."""
        return self.tokens[self.prompt_length :]

    @property
    def limit(self) -> int:
        """The length it can reach, prompt included."""
        return self.prompt_length + self.request.max_new_tokens

    def append(self, token: int) -> bool:
        """Take the next token; returns whether it was the last."""
        self.tokens.append(token)
        request, new = self.request, len(self.tokens) - self.prompt_length
        if new >= request.max_new_tokens:
            return True
        if new < request.min_new_tokens:
            return False
        return token in request.stop_tokens or (request.stop is not None and request.stop(self.tokens))

    def digests(self, count: int) -> list[bytes]:
        """Of its first `count` blocks, which are full."""
        size = self._block_size
        while len(self._digests) < count:
            index = len(self._digests)
            before = self._digests[-1] if index else first_digest(self.request.salt)
            self._digests.append(digest(before, self.tokens[index * size : (index + 1) * size]))
        return self._digests[:count]
