"""Pages of the KV cache as numbers: which are free, how many hold each, and which hold tokens that may come again."""

from __future__ import annotations

from array import array
from collections import OrderedDict, deque
from collections.abc import Hashable, Iterable, Sequence
from hashlib import blake2b
from typing import Final

from ..errors import RegraftError

DIGEST_BYTES: Final = 16


class OutOfBlocks(RegraftError):
    """The pool has no block left; the caller preempts somebody, or refuses."""


def digest(before: bytes, tokens: Sequence[int]) -> bytes:
    """Of a full block: names its tokens and, through the digest of the block before it, everything ahead of them."""
    return blake2b(array("q", tokens).tobytes(), digest_size=DIGEST_BYTES, key=before).digest()


def first_digest(salt: Hashable) -> bytes:
    """What the digest of a sequence's first block begins with: whatever K and V depend on besides the tokens."""
    return blake2b(repr(salt).encode(), digest_size=DIGEST_BYTES).digest()


class BlockPool:
    """Blocks 0 to `num_blocks - 1`, of `block_size` tokens each.

    A block is held by as many as share it. One that nobody holds is free; if it has a digest, its tokens are still
    there, `find` finds it, and it is given away after all that have none, the one not used for longest first.
    """

    def __init__(self, num_blocks: int, block_size: int = 16) -> None:
        self.num_blocks, self.block_size = num_blocks, block_size
        self._free = deque(range(num_blocks))
        self._cached: OrderedDict[int, None] = OrderedDict()
        """Free blocks with a digest, the one not used for longest first."""
        self._holders = [0] * num_blocks
        self._digests: list[bytes | None] = [None] * num_blocks
        self._by_digest: dict[bytes, int] = {}

    @property
    def available(self) -> int:
        """Blocks that can be allocated."""
        return len(self._free) + len(self._cached)

    @property
    def used(self) -> int:
        """Blocks that somebody holds."""
        return self.num_blocks - self.available

    def holders(self, block: int) -> int:
        """How many hold a block."""
        return self._holders[block]

    def allocate(self) -> int:
        """A block that nobody else holds.

        Raises:
            OutOfBlocks: all are held.
        """
        if self._free:
            block = self._free.popleft()
        elif self._cached:
            block, _ = self._cached.popitem(last=False)
            self._forget(block)
        else:
            raise OutOfBlocks(f"all {self.num_blocks} blocks of {self.block_size} tokens are held")
        self._holders[block] = 1
        return block

    def share(self, block: int) -> int:
        """Hold a block that somebody holds or `find` found; returns it."""
        if self._holders[block] == 0:
            del self._cached[block]
        self._holders[block] += 1
        return block

    def release(self, blocks: Iterable[int]) -> None:
        """Hold these no longer."""
        for block in blocks:
            holders = self._holders[block] = self._holders[block] - 1
            if holders < 0:
                raise AssertionError(f"block {block} was released more often than it was held")
            if holders == 0:
                if self._digests[block] is None:
                    self._free.append(block)
                else:
                    self._cached[block] = None

    def register(self, block: int, name: bytes) -> None:
        """A block that is held is full, with the tokens that `name` stands for; the first of equal ones is found."""
        if name not in self._by_digest and self._digests[block] is None:
            self._digests[block] = name
            self._by_digest[name] = block

    def find(self, name: bytes) -> int | None:
        """The block with this digest, to be shared before anything is allocated."""
        return self._by_digest.get(name)

    def own(self, block: int) -> tuple[int, bool]:
        """A block to write to in place of one that is held, and whether the old one's content must be copied there.

        The old one itself, no longer to be found, where nobody else holds it; otherwise a new one, and the old one is
        held by one less.

        Raises:
            OutOfBlocks: a new one is needed and all are held.
        """
        if self._holders[block] == 1:
            self._forget(block)
            return block, False
        fresh = self.allocate()
        self._holders[block] -= 1
        return fresh, True

    def forget_all(self) -> None:
        """Nothing that was written so far can be found any more: the weights changed."""
        self._by_digest.clear()
        self._digests = [None] * self.num_blocks
        self._free.extend(self._cached)
        self._cached.clear()

    def rebuild(self, tables: Iterable[Iterable[int]]) -> None:
        """Count anew who holds what, by everybody's tables; nothing that was written is found any more."""
        self._cached.clear()
        self._by_digest.clear()
        self._digests = [None] * self.num_blocks
        self._holders = [0] * self.num_blocks
        for table in tables:
            for block in table:
                self._holders[block] += 1
        self._free = deque(b for b, holders in enumerate(self._holders) if not holders)

    def check(self, tables: Iterable[Iterable[int]]) -> None:
        """Compare with everybody's tables.

        Raises:
            AssertionError: a block is held more or less often than the tables say, is free and held, or is lost.
        """
        counts = [0] * self.num_blocks
        for table in tables:
            for block in table:
                counts[block] += 1
        wrong = {b: (h, c) for b, (h, c) in enumerate(zip(self._holders, counts)) if h != c}
        if wrong:
            raise AssertionError(f"blocks held (as the pool counts, as the tables say): {wrong}")
        free = [*self._free, *self._cached]
        if sorted(free) != [b for b, h in enumerate(self._holders) if h == 0]:
            raise AssertionError("free blocks are not exactly those that nobody holds")
        named = {name: b for b, name in enumerate(self._digests) if name is not None}
        if named != self._by_digest or any((self._digests[b] is None) == (b in self._cached) for b in free):
            raise AssertionError("digests and blocks do not belong to each other")

    def _forget(self, block: int) -> None:
        name = self._digests[block]
        if name is not None:
            del self._by_digest[name]
            self._digests[block] = None
