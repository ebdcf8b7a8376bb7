"""Which sequences take part in the next step, and with how many tokens: decodes first, then prefill by chunks."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from ..errors import InputError
from .buckets import batch_bucket
from .requests import Request
from .sequences import Sequence, State
from .tables import PageTables


@dataclass(frozen=True)
class Chunk:
    """Tokens `start` to `start + count` of a sequence, computed in this step."""

    sequence: Sequence
    start: int
    count: int

    @property
    def samples(self) -> bool:
        """Whether the step gives the sequence its next token."""
        return self.start + self.count == len(self.sequence.tokens)


class Scheduler:
    """Sequences that wait and that run.

    There are two kinds of steps. `schedule` makes up a mixed one: it needs to know all tokens produced so far, may
    admit, chunk and preempt. `steady` grants a burst of pure decoding steps for the rows as they stand, by lengths
    alone, so that it can be asked before the tokens of the last burst are read back.

    Args:
        tables: the pages.
        max_batch_size: rows, that is, sequences that run at once.
        max_seq_len: tokens of the longest sequence, its output included.
        token_budget: tokens of a mixed step.
        sharing: whether blocks of equal tokens are shared, also with sequences that are gone.
    """

    def __init__(
        self, tables: PageTables, max_batch_size: int, max_seq_len: int, token_budget: int = 2048, sharing: bool = True
    ) -> None:
        self.tables, self.max_seq_len = tables, max_seq_len
        self.token_budget = max(token_budget, max_batch_size)
        self.sharing = sharing
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.preemptions = 0
        """How often a sequence had to give its pages back."""
        self._rows = list(range(max_batch_size - 1, -1, -1))
        self._next = 0

    # -- coming and going -------------------------------------------------------------------------------------------

    def check(self, request: Request) -> None:
        """Whether it could run alone.

        Raises:
            InputError: it is longer than a sequence may be, or its pages are more than there are.
        """
        tables, prompt, new = self.tables, len(request.tokens), request.max_new_tokens
        if prompt + new > self.max_seq_len:
            raise InputError(
                f"a prompt of {prompt} tokens with max_new_tokens={new} needs {prompt + new} positions; "
                f"a sequence has at most {self.max_seq_len} (max_seq_len)"
            )
        for group, pool in enumerate(tables.pools):
            needed = tables.peak(group, prompt + new - 1, 1)
            if needed > pool.num_blocks:
                raise InputError(
                    f"a prompt of {prompt} tokens with max_new_tokens={new} needs {needed} pages of "
                    f"{tables.block_size} tokens; the KV cache has {pool.num_blocks}. "
                    "More memory for it: max_seq_len, memory_fraction, or fp8 or int8 pages"
                )

    def add(self, request: Request) -> Sequence:
        """Let a request wait for its turn; raises InputError as `check` does."""
        self.check(request)
        sequence = Sequence(request, len(self.tables.pools), self._next, self.tables.block_size)
        self._next += 1
        self.waiting.append(sequence)
        return sequence

    def accept(self, sequence: Sequence, tokens: list[int]) -> int:
        """Append what it produced, up to its end; returns how many tokens were taken. What is left over is dropped."""
        for taken, token in enumerate(tokens, 1):
            if sequence.append(token):
                self.finish(sequence)
                return taken
        if self.sharing:
            self.tables.register(sequence)
        return len(tokens)

    def finish(self, sequence: Sequence) -> None:
        """It is done, or cancelled: its pages and its row are free."""
        if sequence.state is State.FINISHED:
            return
        if sequence.state is State.RUNNING:
            self._leave(sequence)
        else:
            self.waiting.remove(sequence)
        sequence.state = State.FINISHED

    def _leave(self, sequence: Sequence) -> None:
        if self.sharing:
            self.tables.register(sequence)
        self.tables.release(sequence)
        self.running.remove(sequence)
        assert sequence.row is not None
        self._rows.append(sequence.row)
        self._rows.sort(reverse=True)
        sequence.row = None

    def _preempt(self) -> None:
        """The newest gives its pages back and will compute them anew."""
        newest = max(self.running, key=lambda s: s.number)
        self._leave(newest)
        newest.state = State.PREEMPTED
        older = sum(s.number < newest.number for s in self.waiting)
        self.waiting.insert(older, newest)
        self.preemptions += 1

    def _compact(self) -> bool:
        """Whether its rows could be renumbered to fall into a smaller bucket."""
        rows = [s.row for s in self.running if s.row is not None]
        return bool(rows) and batch_bucket(len(rows)) < batch_bucket(max(rows) + 1)

    def _renumber(self) -> None:
        """Move the last rows to the first free ones."""
        while self._compact():
            last = max(self.running, key=lambda s: s.row or 0)
            assert last.row is not None
            self._rows.append(last.row)
            last.row = min(self._rows)
            self._rows.remove(last.row)
            self._rows.sort(reverse=True)

    # -- a burst of decoding ----------------------------------------------------------------------------------------

    def steady(self, most: int) -> list[Chunk]:
        """Up to `most` decoding steps of all rows, as one chunk a row; empty: `schedule` must decide."""
        if any(s.computed < len(s.tokens) - 1 for s in self.running) or self._compact() or self._admissible():
            return []
        left = {s: s.limit - 1 - s.computed for s in self.running}
        steps = min(most, max(left.values(), default=0))
        for sequence in self.running:
            self.tables.drop(sequence)
        while steps and not self._cover({s: min(steps, n) for s, n in left.items()}):
            steps //= 2
        chunks = [Chunk(s, s.computed, min(steps, n)) for s, n in left.items() if min(steps, n) > 0]
        for chunk in chunks:
            chunk.sequence.computed += chunk.count
        return chunks

    def _cover(self, counts: dict[Sequence, int]) -> bool:
        wanted = [0] * len(self.tables.pools)
        for sequence, count in counts.items():
            for group, blocks in enumerate(self.tables.missing(sequence, sequence.computed + count)):
                wanted[group] += blocks
        if not self.tables.fits(wanted):
            return False
        return all(self.tables.cover(s, s.computed + n) for s, n in counts.items())

    # -- a mixed step -----------------------------------------------------------------------------------------------

    def schedule(self) -> list[Chunk]:
        """The next step, decodes before prefill; empty: nothing is left to do.

        Every token produced is known (`accept`), and those that reached their end are gone.
        """
        if not self._admissible():
            self._renumber()
        while True:
            chunks = self._decodes()
            chunks += self._prefills(self.token_budget - len(chunks))
            if chunks or not self.running:
                break
            self._preempt()
        for chunk in chunks:
            chunk.sequence.computed += chunk.count
            if self.sharing:
                self.tables.register(chunk.sequence)
        return chunks

    def _decodes(self) -> list[Chunk]:
        chunks = []
        for sequence in sorted(self.running, key=lambda s: s.number):
            if sequence.computed != len(sequence.tokens) - 1:
                continue
            self.tables.drop(sequence)
            while sequence.state is State.RUNNING and not self.tables.cover(sequence, sequence.computed + 1):
                self._preempt()
            if sequence.state is State.RUNNING:
                chunks.append(Chunk(sequence, sequence.computed, 1))
        return [c for c in chunks if c.sequence.state is State.RUNNING]

    def _prefills(self, budget: int) -> list[Chunk]:
        chunks: list[Chunk] = []
        for sequence in sorted(self.running, key=lambda s: s.number):
            if sequence.computed < len(sequence.tokens) - 1:
                budget -= self._prefill(sequence, budget, chunks)
        while budget > 0 and self._admissible():
            sequence = self.waiting.popleft()
            if self.sharing:
                self.tables.adopt(sequence, self.tables.match(sequence))
            sequence.state, sequence.row = State.RUNNING, self._rows.pop()
            self.running.append(sequence)
            taken = self._prefill(sequence, budget, chunks)
            budget -= taken
            if not taken:
                break
        return chunks

    def _prefill(self, sequence: Sequence, budget: int, chunks: list[Chunk]) -> int:
        """A chunk of its tokens, as long as budget and pages allow."""
        self.tables.drop(sequence)
        count = self.tables.most(sequence, min(budget, len(sequence.tokens) - sequence.computed))
        if count > 0 and self.tables.cover(sequence, sequence.computed + count):
            chunks.append(Chunk(sequence, sequence.computed, count))
            return count
        return 0

    def _admissible(self) -> bool:
        """Whether the first that waits can begin: a row, pages for all it has and one more for each that runs.

        It waits for another whose prompt is being computed where that one leaves it at most half of its own to do.
        """
        if not self.waiting or not self._rows:
            return False
        if not self.running:
            return True
        sequence, tables = self.waiting[0], self.tables
        matched = tables.match(sequence) if self.sharing else 0
        held = tables.free_matched(sequence, matched)
        for group, pool in enumerate(tables.pools):
            peak = tables.peak(group, len(sequence.tokens) + 1, self.token_budget)
            first = tables.peak(group, matched * tables.block_size, 0) if matched else 0
            owed = (
                sum(tables.missing(s, len(s.tokens))[group] for s in self.running) if tables.windows[group] < 0 else 0
            )
            if max(peak - first, 1) + held[group] + owed + len(self.running) > pool.available:
                return False
        return not (self.sharing and self._worth_waiting(sequence, matched))

    def _worth_waiting(self, sequence: Sequence, matched: int) -> bool:
        names = sequence.digests((len(sequence.tokens) - 1) // self.tables.block_size)
        for other in self.running:
            todo = len(other.tokens) // self.tables.block_size
            if other.computed < len(other.tokens) and todo > matched:
                theirs = other.digests(todo)
                common = next((i for i, (a, b) in enumerate(zip(names, theirs)) if a != b), min(len(names), todo))
                if 2 * (common - matched) >= len(names) - matched > 0:
                    return True
        return False
