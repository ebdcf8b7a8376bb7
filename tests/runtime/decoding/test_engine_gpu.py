"""Decoding by CUDA graphs: the tokens of the same kernels launched one by one, and nothing allocated on the way."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as tf
import zoo

import regraft
from regraft.runtime.decoding.engine import Engine
from regraft.runtime.decoding.flat import FlatProgram, flat_program
from regraft.runtime.decoding.memory import Limits
from regraft.runtime.decoding.params import SamplingParams
from regraft.runtime.decoding.requests import Request
from regraft.runtime.decoding.sampling import Sampler

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module", params=["llama", "gemma2"])
def flat(request: pytest.FixtureRequest) -> FlatProgram:
    model, inputs = zoo.build(request.param)
    model = model.cuda()
    inputs = {name: t.cuda() for name, t in inputs.items()}
    found = flat_program(regraft.optimize(model, example_inputs=inputs, verbose=False))
    assert isinstance(found, FlatProgram)
    found.model = model  # type: ignore[attr-defined]  # kept alive
    return found


def build(flat: FlatProgram, graphs: bool = True, **limits: Any) -> Engine:
    limits = {"max_batch_size": 8, "max_seq_len": 256, "token_budget": 64} | limits
    engine = Engine(flat, "cuda", Limits(**limits))
    if not graphs:
        engine.executor.graphs = None
    return engine


def prompts(flat: FlatProgram, count: int) -> list[list[int]]:
    made = torch.Generator().manual_seed(2)
    lengths = torch.randint(1, 60, (count,), generator=made).tolist()
    return [torch.randint(3, flat.vocab, (n,), generator=made).tolist() for n in lengths]


@pytest.mark.parametrize("sampled", [False, True])
def test_graphs_give_the_tokens_of_single_launches(flat: FlatProgram, sampled: bool) -> None:
    drawn = [SamplingParams(do_sample=True, temperature=0.9, top_p=0.9, seed=i) for i in range(13)]
    params = drawn if sampled else [None] * 13
    requests = [Request(p, q, max_new_tokens=20 + i) for i, (p, q) in enumerate(zip(prompts(flat, 13), params))]
    expected = build(flat, graphs=False).run(requests, Sampler(flat.vocab, "cuda"))
    engine = build(flat)
    sampler = Sampler(flat.vocab, "cuda")
    assert engine.run(requests, sampler) == expected
    assert engine.stats.graphs >= 4
    for _ in range(2):  # short prefills by graph, prefixes found
        assert engine.run(requests, sampler) == expected
    for pool in engine.executor.tables.pools:
        pool.check([])
    made = engine.stats.graphs
    engine.run([Request(p[::-1], q, max_new_tokens=9) for p, q in zip(prompts(flat, 13), params)], sampler)
    assert engine.stats.graphs - made <= 4  # prefills of sizes that came for the third time; no decoding graph


def test_longer_prompts_by_graph() -> None:
    config = zoo.config("llama")
    config.max_position_embeddings = 2048
    torch.manual_seed(0)
    model = tf.LlamaForCausalLM(config).eval().cuda()
    flat = flat_program(regraft.optimize(model, verbose=False))
    assert isinstance(flat, FlatProgram)
    limits = {"max_seq_len": 1200, "token_budget": 1100, "prefix_sharing": False, "warm_up_seconds": 0}
    made = torch.Generator().manual_seed(4)
    given = [torch.randint(3, flat.vocab, (n,), generator=made).tolist() for n in (290, 520, 1000)]
    requests = [Request(prompt, max_new_tokens=6) for prompt in given]
    expected = [build(flat, graphs=False, **limits).run([r], Sampler(flat.vocab, "cuda")) for r in requests]
    engine, sampler = build(flat, **limits), Sampler(flat.vocab, "cuda")
    graphs = engine.executor.graphs
    assert graphs is not None
    for _ in range(4):  # by graph from the third time on
        assert [engine.run([r], sampler) for r in requests] == expected
    assert len([key for key in graphs._graphs if key[0] == "prefill"]) == 3  # type: ignore[index]
    assert engine.run(requests, sampler) == [tokens for (tokens,) in expected]


def test_nothing_is_allocated_while_decoding(flat: FlatProgram) -> None:
    engine = build(flat)
    sampler = Sampler(flat.vocab, "cuda")
    counts: list[int] = []

    def on_token(index: int, token: int) -> None:
        counts.append(torch.cuda.memory_stats()["allocation.all.allocated"])

    engine.run([Request([5, 6, 7], max_new_tokens=240)], sampler, on_token)
    assert len(counts) == 240 and len(set(counts[40:])) == 1


def test_sessions_give_the_logits_of_lone_prefills(flat: FlatProgram) -> None:
    engine = build(flat, prefix_sharing=False)
    known = prompts(flat, 5)
    session = engine.session(known, 40)
    logits = session.prefill()
    made = torch.Generator().manual_seed(0)
    allocated = set()
    for step in range(40):
        tokens = torch.randint(3, flat.vocab, (5,), generator=made)
        known = [[*row, token] for row, token in zip(known, tokens.tolist())]
        on_device = tokens.cuda()
        before = torch.cuda.memory_stats()["allocation.all.allocated"]
        logits = session.step(on_device)
        allocated.add(torch.cuda.memory_stats()["allocation.all.allocated"] - before if step else 0)
        if step % 13 == 5:
            index = torch.randint(0, 5, (5,), generator=made)
            session.reorder(index)
            known = [known[i] for i in index.tolist()]
            kept = logits.clone()[index.cuda()]
            for row, expected in zip(known, kept):
                alone = engine.session([row], 1)
                torch.testing.assert_close(alone.prefill()[0], expected, rtol=1e-3, atol=1e-4)
                alone.close()
    assert min(allocated) == 0
    session.close()
    for pool in engine.executor.tables.pools:
        pool.check([])


def test_streams_follow_one_another(flat: FlatProgram) -> None:
    engine = build(flat)
    requests = [Request(p, max_new_tokens=15) for p in prompts(flat, 6)]
    expected = engine.run(requests, Sampler(flat.vocab, "cuda"))
    for _ in range(3):
        with torch.cuda.stream(torch.cuda.Stream()):
            assert engine.run(requests, Sampler(flat.vocab, "cuda")) == expected
