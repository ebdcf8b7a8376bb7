"""Whatever shares the pages, every output is that of a lone run, and at the end nobody holds a page."""

from __future__ import annotations

import os
import random

import pytest
from paged_model import VOCAB, NoEpilogue, PagedModel, lone_run

from regraft.runtime.decoding.buckets import batch_bucket, batch_buckets, token_bucket
from regraft.runtime.decoding.calls import Call
from regraft.runtime.decoding.pool import BlockPool
from regraft.runtime.decoding.requests import Request
from regraft.runtime.decoding.scheduler import Scheduler
from regraft.runtime.decoding.sequences import Sequence
from regraft.runtime.decoding.tables import PageTables
from regraft.runtime.errors import InputError

SIZE = 4


def build(
    blocks: tuple[int, ...],
    windows: tuple[int, ...] = (-1,),
    batch: int = 8,
    budget: int = 24,
    sharing: bool = True,
    burst: int = 4,
) -> tuple[Call, PagedModel]:
    tables = PageTables([BlockPool(n, SIZE) for n in blocks], windows)
    model = PagedModel(windows, SIZE)
    return Call(Scheduler(tables, batch, 10_000, budget, sharing), model, NoEpilogue(), burst), model


def finish(call: Call) -> None:
    while not call.done:
        call.step()
        call.scheduler.tables.check(call.scheduler.running)


@pytest.mark.parametrize("windows", [(-1,), (5,), (-1, 9), (3, -1)])
@pytest.mark.parametrize("sharing", [True, False])
@pytest.mark.parametrize("burst", [1, 7])
def test_random_requests_equal_lone_runs(windows: tuple[int, ...], sharing: bool, burst: int) -> None:
    """A pool so small that sequences are preempted all the time, common prefixes, stops, cancellations."""
    rng = random.Random(f"{windows} {sharing} {burst}")
    call, model = build((22,) * len(windows), windows, batch=6, sharing=sharing, burst=burst)
    stems = [[rng.randrange(VOCAB) for _ in range(24)] for _ in range(3)]
    requests: dict[Sequence, Request] = {}
    cancelled: set[Sequence] = set()
    total = int(os.environ.get("REGRAFT_STRESS", "500")) // 16 + 1
    while len(requests) < total or not call.done:
        for _ in range(rng.randrange(3) if len(requests) < total else 0):
            prompt = rng.choice(stems)[: rng.randrange(25)] + [rng.randrange(3) for _ in range(rng.randrange(1, 20))]
            request = Request(
                prompt,
                max_new_tokens=rng.randrange(1, 40),
                min_new_tokens=rng.randrange(4),
                stop_tokens=frozenset(rng.sample(range(VOCAB), rng.randrange(3))),
                stop=(lambda tokens: sum(tokens[-2:]) % 31 == 0) if rng.random() < 0.3 else None,
                salt=rng.randrange(2),
            )
            requests[call.add(request)] = request
        call.step()
        if rng.random() < 0.1 and call.scheduler.running:
            victim = rng.choice([*call.scheduler.running, *call.scheduler.waiting])
            call.cancel(victim)
            cancelled.add(victim)
        call.scheduler.tables.check(call.scheduler.running)
    for sequence, request in requests.items():
        expected = lone_run(windows, request)
        if sequence in cancelled:
            expected = expected[: len(sequence.produced)]
        assert sequence.produced == expected
    call.scheduler.tables.check([])
    assert all(pool.available == pool.num_blocks for pool in call.scheduler.tables.pools)
    assert model.largest <= call.scheduler.token_budget
    assert cancelled
    if -1 in windows:
        assert call.scheduler.preemptions > 0


def test_prefixes_are_computed_once() -> None:
    """Twins wait for the first; a later call finds what an earlier one wrote."""
    call, model = build((100,))
    prompt = list(range(41))
    for _ in range(4):
        call.add(Request(prompt, max_new_tokens=1))
    finish(call)
    assert model.tokens_computed == 41 + 3 * 1  # ten full blocks shared, the last token computed by each
    call.add(Request([*prompt, *range(7)], max_new_tokens=1))
    finish(call)
    assert model.tokens_computed == 44 + 8
    call.add(Request(prompt, max_new_tokens=1, salt="adapter"))
    finish(call)
    assert model.tokens_computed == 52 + 41


def test_windows_hold_only_what_they_see() -> None:
    call, _ = build((30, 5), (-1, 7), budget=4, batch=1)
    call.add(Request(list(range(60)), max_new_tokens=40))
    most = 0
    while not call.done:
        call.step()
        most = max(most, call.scheduler.tables.pools[1].used)
    assert most <= 5


def test_what_can_never_fit_is_refused_before_anything_runs() -> None:
    call, model = build((5,))
    call.add(Request(list(range(11)), max_new_tokens=10))  # the last token is never stored: exactly 20
    with pytest.raises(InputError, match=r"11 tokens with max_new_tokens=11 needs 6 pages of 4 tokens.* has 5"):
        call.add(Request(list(range(11)), max_new_tokens=11))
    with pytest.raises(InputError, match="10001 positions; a sequence has at most 10000"):
        call.add(Request([1], max_new_tokens=10_000))
    assert model.tokens_computed == 0
    finish(call)


def test_decodes_come_before_prefill() -> None:
    call, model = build((100,), budget=8, sharing=False)
    first = call.add(Request([1, 2], max_new_tokens=30))
    call.step()
    call.add(Request(list(range(50)), max_new_tokens=2))
    before = len(first.produced)
    for _ in range(8):  # 50 tokens, 7 a step
        call.step()
    assert len(first.produced) - before >= 7 and model.largest == 8


def test_the_oldest_is_never_preempted() -> None:
    call, _ = build((8,), batch=4, sharing=False)
    sequences = [call.add(Request([i] * 4, max_new_tokens=24)) for i in range(4)]
    ends = []
    while not call.done:
        call.step()
        ends += [s.number for s in sequences if len(s.produced) == 24 and s.number not in ends]
    assert call.scheduler.preemptions > 0 and ends == sorted(ends)


def test_rows_move_together_when_the_batch_shrinks() -> None:
    call, _ = build((200,), batch=8, sharing=False)
    requests = [Request([i], max_new_tokens=60 if i == 7 else 5) for i in range(8)]
    sequences = [call.add(r) for r in requests]
    finish_rows = set()
    while not call.done:
        call.step()
        if len(call.scheduler.running) == 1:
            finish_rows.add(call.scheduler.running[0].row)
    assert 0 in finish_rows
    assert [s.produced for s in sequences] == [lone_run((-1,), r) for r in requests]


def test_waste_counts_slots_without_a_token() -> None:
    call, _ = build((50,), sharing=False)
    call.add(Request([1] * 5, max_new_tokens=1))
    call.scheduler.schedule()
    use = call.scheduler.tables.use(call.scheduler.running)
    assert (use.allocated, use.written) == (8, 5) and use.waste == 3 / 8


def test_buckets() -> None:
    assert batch_buckets(70) == [1, 2, 4, 8, 16, 24, 32, 48, 64, 80]
    assert all(batch_bucket(n) >= n for n in range(1, 300))
    assert [token_bucket(n) for n in (1, 16, 17, 24, 25, 33, 49, 512, 513)] == [16, 16, 24, 24, 32, 48, 64, 512, 768]
