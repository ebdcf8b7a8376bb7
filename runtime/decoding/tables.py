"""The block tables of sequences over the pools of all groups: growing, windows, prefixes that were seen before."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Items
from dataclasses import dataclass

from .pool import BlockPool, OutOfBlocks
from .sequences import Sequence


@dataclass(frozen=True)
class Use:
    """What is held at a moment, in slots (a slot keeps one token of one group)."""

    allocated: int
    written: int

    @property
    def waste(self) -> float:
        """The share of allocated slots that hold nothing."""
        return 1 - self.written / self.allocated if self.allocated else 0.0


class PageTables:
    """Block tables over one pool a group. Layers of a group share its numbering and its window.

    Args:
        pools: one a group, all with the same block size.
        windows: `left` of each group: a query at p sees keys from p - left on; -1: all.
    """

    def __init__(self, pools: Items[BlockPool], windows: Items[int]) -> None:
        self.pools, self.windows = tuple(pools), tuple(windows)
        self.block_size = self.pools[0].block_size

    def blocks_for(self, tokens: int) -> int:
        """Blocks that hold `tokens` tokens."""
        return -(-tokens // self.block_size)

    def peak(self, group: int, tokens: int, chunk: int) -> int:
        """Blocks of a group that a sequence of `tokens` tokens holds at most, if it grows by `chunk` at a time."""
        left, whole = self.windows[group], self.blocks_for(tokens)
        return whole if left < 0 else min(whole, self.blocks_for(left + chunk) + 1)

    def _first_seen(self, group: int, position: int) -> int:
        """The first block that a query at `position` reads."""
        left = self.windows[group]
        return 0 if left < 0 else max(0, position - left) // self.block_size

    def drop(self, sequence: Sequence) -> None:
        """Give back what lies behind the windows of its next token."""
        for group, (pool, table) in enumerate(zip(self.pools, sequence.tables)):
            end = min(self._first_seen(group, sequence.computed), len(table))
            begin = sequence.dropped[group]
            if end > begin:
                pool.release(b for b in table[begin:end] if b >= 0)
                table[begin:end] = [-1] * (end - begin)
                sequence.dropped[group] = end

    def missing(self, sequence: Sequence, tokens: int) -> list[int]:
        """Blocks of each group that it lacks to hold `tokens` tokens."""
        whole = self.blocks_for(tokens)
        return [max(0, whole - len(table)) for table in sequence.tables]

    def fits(self, wanted: Items[int]) -> bool:
        """Whether that many blocks of each group can be allocated now."""
        return all(w <= pool.available for w, pool in zip(wanted, self.pools))

    def cover(self, sequence: Sequence, tokens: int) -> bool:
        """Allocate what it lacks to hold `tokens` tokens; False, and nothing is changed, where there is not enough."""
        wanted = self.missing(sequence, tokens)
        if not self.fits(wanted):
            return False
        for pool, table, count in zip(self.pools, sequence.tables, wanted):
            table.extend(pool.allocate() for _ in range(count))
        return True

    def most(self, sequence: Sequence, tokens: int) -> int:
        """How many of `tokens` further tokens there is room for now."""
        room = tokens
        for pool, table in zip(self.pools, sequence.tables):
            room = min(room, (len(table) + pool.available) * self.block_size - sequence.computed)
        return max(0, room)

    def match(self, sequence: Sequence) -> int:
        """Leading blocks whose K and V are there already; at least the last token is left to be computed."""
        names = sequence.digests((len(sequence.tokens) - 1) // self.block_size)
        count = len(names)
        for group, pool in enumerate(self.pools):
            if self.windows[group] < 0:
                count = next((i for i in range(count) if pool.find(names[i]) is None), count)
        windowed = [g for g, left in enumerate(self.windows) if left >= 0]
        while count and not all(
            self.pools[g].find(name) is not None
            for g in windowed
            for name in names[self._first_seen(g, count * self.block_size) : count]
        ):
            count -= 1
        return count

    def free_matched(self, sequence: Sequence, count: int) -> list[int]:
        """Of each group, how many of `count` matched blocks nobody holds: sharing makes them unavailable."""
        names = sequence.digests(count)
        free = []
        for group, pool in enumerate(self.pools):
            seen = names[self._first_seen(group, count * self.block_size) :]
            free.append(sum(pool.holders(b) == 0 for name in seen if (b := pool.find(name)) is not None))
        return free

    def adopt(self, sequence: Sequence, count: int) -> None:
        """Begin with `count` matched blocks, shared."""
        names = sequence.digests(count)
        for group, pool in enumerate(self.pools):
            first = min(self._first_seen(group, count * self.block_size), count)
            shared = [pool.find(name) for name in names[first:]]
            sequence.tables[group] = [-1] * first + [pool.share(b) for b in shared if b is not None]
            sequence.dropped[group] = first
        sequence.computed = count * self.block_size
        sequence.registered = count

    def register(self, sequence: Sequence) -> None:
        """Let others find the blocks that are full and whose tokens are known."""
        full = min(sequence.computed, len(sequence.tokens)) // self.block_size
        if full <= sequence.registered:
            return
        names = sequence.digests(full)
        for pool, table in zip(self.pools, sequence.tables):
            for index in range(sequence.registered, full):
                if table[index] >= 0:
                    pool.register(table[index], names[index])
        sequence.registered = full

    def release(self, sequence: Sequence) -> None:
        """Give everything back; what is registered is given away last, and its end before its beginning."""
        for group, pool in enumerate(self.pools):
            pool.release(b for b in reversed(sequence.tables[group]) if b >= 0)
            sequence.tables[group] = []
            sequence.dropped[group] = 0
        sequence.computed = sequence.registered = 0
        sequence.written_anew += 1

    def own(self, sequence: Sequence, position: int) -> list[tuple[int, int, int]]:
        """Make the blocks of a position the sequence's alone; returns (group, from, to) of pages to be copied.

        Raises:
            OutOfBlocks: a copy needs a block and there is none; nothing is changed.
        """
        index = position // self.block_size
        here = [(g, t[index]) for g, t in enumerate(sequence.tables) if index < len(t) and t[index] >= 0]
        for group, block in here:
            if self.pools[group].holders(block) > 1 and not self.pools[group].available:
                raise OutOfBlocks(f"no block is left for a copy: {self.pools[group].num_blocks} are held")
        copies = []
        for group, block in here:
            fresh, copied = self.pools[group].own(block)
            sequence.tables[group][index] = fresh
            if copied:
                copies.append((group, block, fresh))
                sequence.written_anew += 1
        sequence.registered = min(sequence.registered, index)
        return copies

    def use(self, sequences: Iterable[Sequence]) -> Use:
        """Slots held, and slots that hold a token, shared ones counted once."""
        allocated, written = 0, 0
        for group in range(len(self.pools)):
            filled: dict[int, int] = {}
            for sequence in sequences:
                for index, block in enumerate(sequence.tables[group]):
                    if block >= 0:
                        here = min(max(sequence.computed - index * self.block_size, 0), self.block_size)
                        filled[block] = max(filled.get(block, 0), here)
            allocated += len(filled) * self.block_size
            written += sum(filled.values())
        return Use(allocated, written)

    def rebuild(self, sequences: Items[Sequence]) -> None:
        """Only these hold pages, as their tables say."""
        for group, pool in enumerate(self.pools):
            pool.rebuild([b for b in s.tables[group] if b >= 0] for s in sequences)

    def check(self, sequences: Items[Sequence]) -> None:
        """Raise AssertionError where pools and tables do not agree, or a block that is not full is shared."""
        for group, pool in enumerate(self.pools):
            pool.check([b for b in s.tables[group] if b >= 0] for s in sequences)
            for sequence in sequences:
                begin = sequence.computed // self.block_size
                for block in sequence.tables[group][begin:]:
                    if block >= 0 and pool.holders(block) > 1:
                        raise AssertionError(f"block {block} is written to by a sequence and held by others")
