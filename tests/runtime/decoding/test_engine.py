"""Requests of any length through the engine give what each gives alone; whoever ends, however, leaves nothing."""

from __future__ import annotations

import gc
import logging
import os
import random
import sys
import threading
from typing import Any

import pytest
import torch
from paged_flat import VOCAB, Greedy, TinyFlat, prompts

from regraft.runtime.decoding.calls import Call
from regraft.runtime.decoding.engine import Engine
from regraft.runtime.decoding.memory import Limits, count_blocks
from regraft.runtime.decoding.requests import Request
from regraft.runtime.decoding.scheduler import Scheduler
from regraft.runtime.errors import InputError, OptionError, RegraftError


def build(flat: TinyFlat | None = None, batch: int = 4, **limits: Any) -> tuple[Engine, TinyFlat]:
    flat = flat if flat is not None else TinyFlat()
    limits = {"max_seq_len": 128, "token_budget": 40} | limits
    return Engine(flat, "cpu", Limits(max_batch_size=batch, **limits)), flat  # type: ignore[arg-type]


def clean(engine: Engine) -> None:
    engine.executor.tables.check([])
    assert all(p.used == 0 for p in engine.executor.tables.pools)


@pytest.fixture
def checked(caplog: pytest.LogCaptureFixture) -> None:
    """Every table is checked at every step."""
    caplog.set_level(logging.INFO, "regraft.pages")


def test_tables_are_checked_only_when_their_topic_was_asked_for(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)  # of every logger, as programs do that show their own messages
    engine, _ = build(block_size=16)
    checks: list[int] = []
    monkeypatch.setattr(engine.executor.tables, "check", lambda sequences: checks.append(len(sequences)))
    engine.run([Request(p, max_new_tokens=3) for p in prompts(2)], Greedy())
    assert not checks
    caplog.set_level(logging.INFO, "regraft.pages")
    engine.run([Request(p, max_new_tokens=3) for p in prompts(2)], Greedy())
    assert checks


@pytest.mark.parametrize("burst", [1, 8])
@pytest.mark.parametrize("block_size", [16, 32])
def test_run_equals_lone_runs(burst: int, block_size: int, checked: None) -> None:
    engine, flat = build(block_size=block_size)
    given = prompts(11)
    stops = frozenset({3, 17, 40})
    arrived: dict[int, list[int]] = {}
    found = engine.run(
        [Request(p, max_new_tokens=5 + i, stop_tokens=stops) for i, p in enumerate(given)],
        Greedy(),
        on_token=lambda i, token: arrived.setdefault(i, []).append(token),
        burst=burst,
    )
    expected = [flat.greedy(p, 5 + i, stops) for i, p in enumerate(given)]
    assert found == expected == [arrived[i] for i in range(11)]
    clean(engine)


@pytest.mark.parametrize("sharing", [True, False])
def test_too_small_a_cache_preempts_and_goes_on(sharing: bool, checked: None, monkeypatch: pytest.MonkeyPatch) -> None:
    flat = TinyFlat()
    block = 16 * 2 * 2 * 8 * 4 * 2  # tokens, K and V, heads, dim, bytes, layers
    monkeypatch.setattr("regraft.runtime.decoding.memory.free_bytes", lambda device: 9 * block)
    limits = Limits(max_batch_size=6, memory_fraction=1.0, token_budget=64, prefix_sharing=sharing)
    engine = Engine(flat, "cpu", limits, model_length=128)
    assert [p.num_blocks for p in engine.executor.tables.pools] == [9, 9]
    given = [p[:30] for p in prompts(8)]
    assert engine.run([Request(p, max_new_tokens=40) for p in given], Greedy()) == [flat.greedy(p, 40) for p in given]
    assert engine.stats.preemptions > 0 and 0 < engine.stats.waste < 0.5
    with pytest.raises(InputError, match="at most 128"):
        engine.run([Request([1] * 120, max_new_tokens=30)], Greedy())
    clean(engine)


def test_a_second_call_finds_what_the_first_wrote_and_new_weights_do_not() -> None:
    engine, flat = build()
    prompt = prompts(1)[0] + list(range(50))
    first = engine.run([Request(prompt, max_new_tokens=30)], Greedy())
    longer = prompt + first[0]
    matched = []
    tables = engine.executor.tables
    original = tables.adopt
    tables.adopt = lambda s, n: matched.append(n) or original(s, n)  # type: ignore[func-returns-value,method-assign]
    assert engine.run([Request(longer, max_new_tokens=9)], Greedy()) == [flat.greedy(longer, 9)]
    assert matched == [(len(longer) - 1) // 16]
    flat.head, flat.version = -flat.head, 1
    flat.embedding.mul_(0.5)
    assert engine.run([Request(longer, max_new_tokens=9)], Greedy()) == [flat.greedy(longer, 9)]
    assert matched[1:] == [0]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["model", "callback"])
def test_an_error_leaves_the_pool_clean(error: type[BaseException], where: str) -> None:
    engine, flat = build()
    given = prompts(6)

    def on_token(index: int, token: int) -> None:
        if where == "callback" and index == 2:
            raise error("stop")

    if where == "model":
        error = ValueError
        flat.fail_at = 9
    with pytest.raises(error):
        engine.run([Request(p, max_new_tokens=30) for p in given], Greedy(), on_token)
    clean(engine)
    flat.fail_at = -1
    assert engine.run([Request(p) for p in given], Greedy()) == [flat.greedy(p, 20) for p in given]


def test_an_interrupt_at_any_line_leaves_the_pool_clean() -> None:
    """Ctrl-C comes between any two lines; a session that is open meanwhile goes on afterwards."""
    engine, flat = build(prefix_sharing=False)
    given = [Request(p, max_new_tokens=12) for p in prompts(5)]
    expected = [flat.greedy(r.tokens, 12) for r in given]
    session = engine.session([[7, 8, 9]], 100)
    logits = session.prefill()
    known = [7, 8, 9]
    lines = 0
    stop = -1

    def trace(frame: Any, event: str, argument: Any) -> Any:
        nonlocal lines
        if "decoding" not in frame.f_code.co_filename or "tests" in frame.f_code.co_filename:
            return None
        if event == "line" and engine._running is not None:
            lines += 1
            if lines == stop:
                raise KeyboardInterrupt
        return trace

    def run() -> list[list[int]]:
        nonlocal lines
        lines, before = 0, sys.gettrace()
        sys.settrace(trace)
        try:
            return engine.run(given, Greedy())
        finally:
            sys.settrace(before)

    assert run() == expected == run()
    for place in range(1, lines * 9 // 10, max(1, lines // 60)):
        stop = place
        with pytest.raises(KeyboardInterrupt):
            run()
        engine.executor.tables.check(session.sequences)
        known.append(int(logits.argmax()))
        logits = session.step(logits.argmax(-1))
    stop = -1
    assert run() == expected
    assert known[3:] == flat.greedy([7, 8, 9], len(known) - 3)
    session.close()
    clean(engine)


def test_one_request_that_cannot_fit_stops_all_before_anything_runs() -> None:
    engine, flat = build()
    with pytest.raises(InputError, match=r"100 tokens with max_new_tokens=40 needs 140 positions.* at most 128"):
        engine.run([Request([1, 2]), Request([1] * 100, max_new_tokens=40)], Greedy())
    assert flat.calls == 0
    clean(engine)


def test_threads_do_not_mix() -> None:
    engine, flat = build()
    given = prompts(12)
    found: dict[int, list[list[int]]] = {}

    def work(i: int) -> None:
        if i % 2:
            found[i] = engine.run([Request(p, max_new_tokens=8) for p in given[i::4]], Greedy())
        else:
            found[i] = in_step(engine, given[i::4], 8)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {i: [flat.greedy(p, 8) for p in given[i::4]] for i in range(4)}
    clean(engine)


def test_a_call_within_a_call_is_refused() -> None:
    engine, flat = build()
    request = Request([1, 2, 3])
    caught = []

    def on_token(index: int, token: int) -> None:
        with pytest.raises(RegraftError, match="from within on_token") as error:
            engine.run([request], Greedy())
        caught.append(error)

    assert engine.run([request], Greedy(), on_token) == [flat.greedy([1, 2, 3], 20)] and len(caught) == 20
    clean(engine)


@pytest.mark.parametrize("sharing", [True, False])
def test_random_requests_with_cancellations(sharing: bool, checked: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors in a small cache; REGRAFT_STRESS=10000 runs more of them."""
    flat, rng = TinyFlat(), random.Random(5)
    block = 16 * 2 * 2 * 8 * 4 * 2  # tokens, K and V, heads, dim, bytes, layers
    monkeypatch.setattr("regraft.runtime.decoding.memory.free_bytes", lambda device: 9 * block)
    engine = Engine(flat, "cpu", Limits(max_batch_size=5, memory_fraction=1.0, token_budget=32), model_length=128)
    total = int(os.environ.get("REGRAFT_STRESS", "500")) // 20
    scheduler = Scheduler(engine.executor.tables, 5, engine.executor.max_seq_len, 32, sharing)
    call = Call(scheduler, engine.executor, Greedy(), burst=4)
    given = prompts(total, longest=50)
    sequences: dict[Any, bool] = {}
    while len(sequences) < total or not call.done:
        if len(sequences) < total and rng.random() < 0.5:
            request = Request(given[len(sequences)][:70], max_new_tokens=rng.randrange(1, 40))
            sequences[call.add(request)] = False
        call.step()
        engine.look(call)
        if scheduler.running and rng.random() < 0.05:
            victim = rng.choice(scheduler.running)
            call.cancel(victim)
            sequences[victim] = True
    assert scheduler.preemptions > 0 and any(sequences.values())
    for sequence, cancelled in sequences.items():
        known = list(sequence.request.tokens)
        for token in sequence.produced:
            logits = flat.lone(known)
            assert logits[token] > logits.max() - 1e-4  # float32 against float64
            known.append(token)
        assert cancelled or len(sequence.produced) == sequence.request.max_new_tokens
    clean(engine)


def test_a_row_that_changed_hands_and_is_free_again_writes_nothing() -> None:
    """The device still thought it in use by the sequence before, whose pages are others' by now."""
    engine, flat = build(prefix_sharing=False)
    call = Call(Scheduler(engine.executor.tables, 4, 128, 40, sharing=False), engine.executor, Greedy(), burst=2)
    longs = [Request([i, 7, 9], max_new_tokens=100) for i in range(4)]
    sequences = [call.add(request) for request in longs]
    for _ in range(6):
        call.step()
    call.cancel(sequences[1])
    short = call.add(Request([5], max_new_tokens=1))
    while not call.done:
        call.step()
        if short.produced and call._flying:
            state = engine.executor.state
            assert not bool(state.computed[1] < state.limits[1])
    assert short.produced == flat.greedy([5], 1)
    for index in (0, 2, 3):
        assert sequences[index].produced == flat.greedy(longs[index].tokens, 100)


def test_a_sequence_that_comes_back_to_its_row_has_other_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """The newest is preempted and resumed in the row that it had, where the device still had its old table."""
    flat, block = TinyFlat(), 16 * 2 * 2 * 8 * 4 * 2
    monkeypatch.setattr("regraft.runtime.decoding.memory.free_bytes", lambda device: 17 * block)
    limits = Limits(max_batch_size=4, memory_fraction=1.0, prefix_sharing=False)
    engine = Engine(flat, "cpu", limits, model_length=128)
    lengths = [(30, 90), (30, 90), (1, 4), (30, 50), (10, 60)]
    given = [Request([i] * prompt, max_new_tokens=new) for i, (prompt, new) in enumerate(lengths)]
    sampler = Greedy()
    found = engine.run(given, sampler)
    rows = [row for row, sequence in sampler.log if sequence is not None and sequence.number == 4]
    assert len(rows) > 1 and rows[0] == rows[1] and engine.stats.preemptions >= 1
    assert found == [flat.greedy(r.tokens, r.max_new_tokens) for r in given]
    clean(engine)


# -- sessions -----------------------------------------------------------------------------------------------------


def in_step(engine: Engine, batch: list[list[int]], new: int) -> list[list[int]]:
    """Greedy decoding by a session."""
    session = engine.session(batch, new)
    logits = session.prefill()
    out = []
    for _ in range(new):
        tokens = logits.argmax(-1)
        out.append(tokens.tolist())
        if len(out) < new:
            logits = session.step(tokens)
    session.close()
    return [list(row) for row in zip(*out)]


def test_session_equals_lone_runs(checked: None) -> None:
    engine, flat = build()
    batch = prompts(4)
    assert in_step(engine, batch, 50) == [flat.greedy(p, 50) for p in batch]
    clean(engine)


def test_equal_prompts_are_computed_once(checked: None) -> None:
    engine, flat = build()
    prompt = prompts(1)[0] + [1, 2, 3]
    session = engine.session([prompt] * 4, 20)
    logits = session.prefill()
    assert flat.calls == -(-len(prompt) // 40)
    assert logits.shape == (4, VOCAB) and bool((logits == logits[0]).all())
    known = [list(prompt) for _ in range(4)]
    for step in range(20):
        tokens = logits.topk(4).indices.diagonal() if step == 0 else logits.argmax(-1)
        for row, token in zip(known, tokens.tolist()):
            row.append(token)
        logits = session.step(tokens)
        torch.testing.assert_close(logits.double(), torch.stack([flat.lone(r) for r in known]), rtol=0, atol=2e-5)
    assert len({tuple(row) for row in known}) == 4
    session.close()
    clean(engine)


def test_beams_share_and_copy(checked: None) -> None:
    """Random reorderings: pages are shared until somebody writes."""
    engine, flat = build(batch=6)
    made = torch.Generator().manual_seed(0)
    known = [list(p) for p in prompts(6, longest=30)]
    session = engine.session(known, 60)
    logits = session.prefill()
    for _ in range(60):
        tokens = torch.randint(0, VOCAB, (6,), generator=made)
        for row, token in zip(known, tokens.tolist()):
            row.append(token)
        logits = session.step(tokens)
        torch.testing.assert_close(logits.double(), torch.stack([flat.lone(r) for r in known]), rtol=0, atol=2e-5)
        index = torch.randint(0, 6, (6,), generator=made)
        session.reorder(index)
        known = [list(known[i]) for i in index.tolist()]
    held = engine.executor.tables.use(session.sequences)
    assert held.allocated < sum(-(-len(k) // 16) * 16 for k in known) * 2
    session.close()
    session.close()
    clean(engine)
    with pytest.raises(RegraftError, match="closed"):
        session.step(tokens)


def test_sessions_and_calls_take_turns(checked: None) -> None:
    engine, flat = build(batch=8)
    batch, other = prompts(8)[:2], prompts(8)[4:8]
    one, two = engine.session(batch, 30), engine.session(other, 30)
    known = [list(p) for p in batch], [list(p) for p in other]
    behind = [one.prefill(), two.prefill()]
    for step in range(30):
        for i, session in enumerate((one, two)):
            tokens = behind[i].argmax(-1)
            for row, token in zip(known[i], tokens.tolist()):
                row.append(token)
            behind[i] = session.step(tokens).clone()
        if step == 5:
            request = Request([5, 6, 7], max_new_tokens=12)
            assert engine.run([request], Greedy()) == [flat.greedy([5, 6, 7], 12)]
    assert [k[len(p) :] for k, p in zip(known[0], batch)] == [flat.greedy(p, 30) for p in batch]
    assert [k[len(p) :] for k, p in zip(known[1], other)] == [flat.greedy(p, 30) for p in other]
    one.close()
    two.close()
    clean(engine)


def test_sessions_that_nobody_closes_give_their_pages_back() -> None:
    engine, _ = build()
    engine.session(prompts(4), 20).prefill()
    gc.collect()
    in_step(engine, prompts(4), 3)
    clean(engine)


def test_sessions_that_do_not_fit_are_refused() -> None:
    engine, flat = build(batch=2)
    with pytest.raises(InputError, match="a batch of 3: expected 1 to 2"):
        engine.session([[1]] * 3)
    with pytest.raises(InputError, match=r"needs? 129 positions"):
        engine.session([[1] * 100], 30)
    first = engine.session([[1] * 100] * 2, 28)
    with pytest.raises(InputError, match="2 sequences of up to 100 tokens with 28 new ones need 16 pages"):
        engine.session([[1] * 100] * 2, 28)
    first.close()
    engine.session([[1] * 100] * 2, 28).close()
    assert flat.calls == 0


# -- limits -------------------------------------------------------------------------------------------------------


def test_pages_are_counted_from_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    flat, cpu = TinyFlat(), torch.device("cpu")
    block = 16 * 2 * 2 * 8 * 4
    monkeypatch.setattr("regraft.runtime.decoding.memory.free_bytes", lambda device: 100 * block)

    def count(length: int, **limits: Any) -> list[int]:
        return count_blocks(flat.layers, flat.groups, Limits(**limits), length, cpu)

    assert count(64, max_batch_size=4, max_seq_len=64) == [16, 16]
    assert count(160, max_batch_size=4, max_seq_len=160, token_budget=12) == [40, 12]
    assert count(10_000, memory_fraction=0.5) == [25, 25]
    assert count(10_000, memory_fraction=1.0, max_batch_size=1, token_budget=12) == [97, 3]
    with pytest.raises(InputError, match=r"max_seq_len=1000 tokens needs \d+ MiB"):
        count(1000, max_batch_size=4, max_seq_len=1000)
    with pytest.raises(InputError, match="hold no page"):
        count(1000, memory_fraction=0.001)


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_batch_size": 0},
        {"max_batch_size": None},
        {"max_seq_len": 1},
        {"max_seq_len": "long"},
        {"memory_fraction": 1.5},
        {"memory_fraction": "half"},
        {"block_size": 8},
        {"token_budget": 0},
        {"token_budget": 8.5},
        {"prefix_sharing": "no"},
    ],
)
def test_wrong_limits_are_named(wrong: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=next(iter(wrong))):
        Limits(**wrong)
