"""Blocks are held by exactly those who hold them, and found again as long as nothing was written over them."""

from __future__ import annotations

import random

import pytest

from regraft.runtime.decoding.pool import BlockPool, OutOfBlocks, digest, first_digest


def test_all_blocks_are_given_once() -> None:
    pool = BlockPool(3)
    blocks = [pool.allocate() for _ in range(3)]
    assert sorted(blocks) == [0, 1, 2] and pool.available == 0
    with pytest.raises(OutOfBlocks, match="all 3 blocks"):
        pool.allocate()
    pool.release(blocks)
    pool.check([])
    with pytest.raises(AssertionError, match="released more often"):
        pool.release([0])


def test_digests_name_everything_ahead() -> None:
    one = digest(first_digest("a"), [1, 2])
    names = {one, digest(one, [1, 2]), digest(first_digest("b"), [1, 2]), digest(first_digest("a"), [2, 1])}
    assert len(names) == 4
    assert one == digest(first_digest("a"), [1, 2])


def test_released_blocks_are_found_until_they_are_needed() -> None:
    pool = BlockPool(3)
    a, b, c = (pool.allocate() for _ in range(3))
    pool.register(a, b"a")
    pool.register(b, b"b")
    pool.release([b, a, c])
    assert pool.allocate() == c  # the one nobody could find
    assert pool.find(b"b") == b
    pool.share(b)
    pool.check([[b], [c]])
    assert pool.allocate() == a and pool.find(b"a") is None
    with pytest.raises(OutOfBlocks):
        pool.allocate()
    pool.check([[a], [b], [c]])


def test_the_first_of_equal_blocks_is_found() -> None:
    pool = BlockPool(2)
    a, b = pool.allocate(), pool.allocate()
    pool.register(a, b"x")
    pool.register(b, b"x")
    assert pool.find(b"x") == a
    pool.release([a, b])
    pool.check([])
    assert pool.allocate() == b and pool.find(b"x") == a


def test_writing_to_a_shared_block_takes_another() -> None:
    pool = BlockPool(3)
    a = pool.allocate()
    pool.register(a, b"x")
    pool.share(a)
    fresh, copied = pool.own(a)
    assert fresh != a and copied and pool.holders(a) == 1 and pool.find(b"x") == a
    assert pool.own(a) == (a, False) and pool.find(b"x") is None  # what is written to is no longer what it was
    pool.check([[a], [fresh]])


def test_nothing_is_found_after_the_weights_changed() -> None:
    pool = BlockPool(2)
    a, b = pool.allocate(), pool.allocate()
    pool.register(a, b"a")
    pool.register(b, b"b")
    pool.release([a])
    pool.forget_all()
    assert pool.find(b"a") is None and pool.find(b"b") is None
    pool.check([[b]])


def test_counted_anew_only_tables_hold_blocks() -> None:
    pool = BlockPool(4)
    blocks = [pool.allocate() for _ in range(4)]
    pool.register(blocks[0], b"a")
    pool.rebuild([[1, 2], [2]])
    pool.check([[1, 2], [2]])
    assert pool.available == 2 and pool.find(b"a") is None


def test_random_use_leaks_nothing() -> None:
    pool, rng, tables = BlockPool(13), random.Random(0), [[] for _ in range(5)]
    names = [bytes([i]) for i in range(20)]
    for _ in range(5000):
        table = rng.choice(tables)
        match rng.randrange(5):
            case 0 | 1 if pool.available:
                table.append(pool.allocate())
            case 2 if (found := pool.find(rng.choice(names))) is not None:
                table.append(pool.share(found))
            case 3 if table:
                pool.register(table[-1], rng.choice(names))
            case 4 if table:
                pool.release(table)
                table.clear()
        pool.check(tables)
    assert pool.available < 13
