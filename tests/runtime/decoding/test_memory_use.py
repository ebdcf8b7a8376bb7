"""How much of the KV cache sequences of very different lengths hold, beside a cache that gives each the longest's."""

from __future__ import annotations

from regraft.runtime.decoding.pool import BlockPool
from regraft.runtime.decoding.requests import Request
from regraft.runtime.decoding.sequences import Sequence
from regraft.runtime.decoding.tables import PageTables

ROWS, SHORTEST, LONGEST = 32, 128, 4096


def test_a_batch_of_mixed_lengths_holds_a_third_of_a_contiguous_cache() -> None:
    """Lengths at the quantiles of a log-uniform distribution, all reached at the same time: the most they can hold."""
    lengths = [round(SHORTEST * (LONGEST / SHORTEST) ** ((i + 0.5) / ROWS)) for i in range(ROWS)]
    tables = PageTables([BlockPool(ROWS * LONGEST // 16, 16)], (-1,))
    sequences = []
    for row, length in enumerate(lengths):
        sequence = Sequence(Request([row + 3] * length), 1, row, 16)
        assert tables.cover(sequence, length)
        sequence.computed = length
        sequences.append(sequence)
    used = tables.use(sequences)
    assert tables.pools[0].used * 16 <= 0.35 * ROWS * LONGEST
    assert 0 < used.waste <= 0.04
