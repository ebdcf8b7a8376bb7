"""Kernels of prompts of all lengths are compiled when the first one comes: all classes of steps, within a time."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import transformers as tf
import zoo

import regraft
from regraft.kernels import compiling
from regraft.runtime.decoding import warm_up
from regraft.runtime.decoding.buckets import token_bucket
from regraft.runtime.decoding.engine import Engine
from regraft.runtime.decoding.flat import FlatProgram, flat_program
from regraft.runtime.decoding.memory import Limits
from regraft.runtime.decoding.requests import Request
from regraft.runtime.decoding.sampling import Sampler
from regraft.runtime.decoding.warm_up import SHORT, Shape, padded, shapes

Calls = Iterable[Callable[[], object]]
THRESHOLDS = [2, 17, 65, 264, 500, 512, 2000, 6144]


@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("most", [1, 40, 1000, 8192])
def test_every_step_has_a_member_of_its_class(rows: int, most: int) -> None:
    found = shapes(rows, most, THRESHOLDS, near=most)
    assert len(found) == len(set(found)) <= (36 if rows == 1 else 80)
    assert max(s.tokens for s in found) <= max(padded(most), 16)
    fresh = {(bisect.bisect_right(THRESHOLDS, s.tokens), s.fresh) for s in found}
    asked = {(token_bucket(s.tokens), token_bucket(s.max_q)) for s in found if not s.fresh}
    for total in range(1, most + 1):
        size = padded(total)
        assert (bisect.bisect_right(THRESHOLDS, size), size > SHORT) in fresh
        for longest in (total, -(-total // rows)):
            assert (token_bucket(size), token_bucket(longest)) in asked


def test_those_like_the_prompt_come_first() -> None:
    tokens = [s.tokens for s in shapes(1, 8192, THRESHOLDS, near=1000)]
    assert 500 < tokens[0] < 1500
    assert {tokens[-1], tokens[-2]} & {16, 24}
    assert tokens.index(832) < tokens.index(128) < tokens.index(24)


def test_nothing_is_begun_when_the_time_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(warm_up.time, "monotonic", lambda: now[0])
    until: list[float] = []
    done: list[Shape] = []

    def fake(calls: Calls, end: float) -> None:
        until.append(end)
        for call in calls:
            call()

    def compute(shape: Shape) -> None:
        done.append(shape)
        now[0] += 4

    wanted = shapes(1, 100, [], near=100)
    assert warm_up.run(wanted, compute, fake, 10) == 3
    assert done == wanted[:3] and until == [110.0]

    def too_large(shape: Shape) -> None:
        raise torch.OutOfMemoryError

    assert warm_up.run(wanted, too_large, fake, 10) == 0


@pytest.fixture(scope="module")
def flat() -> FlatProgram:
    model, inputs = zoo.build("llama")
    found = flat_program(regraft.optimize(model, example_inputs=inputs, verbose=False))
    assert isinstance(found, FlatProgram)
    found.model = model  # type: ignore[attr-defined]  # kept alive
    return found


def test_once_for_one_prompt_and_once_for_several_and_without_effect(
    flat: FlatProgram, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    entered = []

    def fake(calls: Calls, end: float) -> None:
        entered.append(capsys.readouterr().out)  # said before it begins
        before = [t.clone() for pair in engine.executor.pages.layers for t in pair]
        for call in calls:
            call()
        assert all(map(torch.equal, before, (t for pair in engine.executor.pages.layers for t in pair)))

    monkeypatch.setattr(compiling, "compile_only", fake)
    monkeypatch.setattr(compiling, "compile_behind", fake)
    limits = Limits(max_batch_size=4, max_seq_len=64, token_budget=48, prefix_sharing=False)
    batches = [[Request([3, 4, 5], max_new_tokens=4)], [Request([7 + i] * 30, max_new_tokens=4) for i in range(3)]]
    sampler = Sampler(flat.vocab, "cpu")
    engine = Engine(flat, "cpu", limits)
    expected = [engine.run(batch, sampler) for batch in (*batches, *batches)]
    assert not entered  # nothing is compiled for the CPU
    engine = Engine(flat, "cpu", limits)
    engine.executor._cold = True
    assert [engine.run(batch, sampler) for batch in (*batches, *batches)] == expected
    assert len(entered) == 4 and all("compiling kernels for prompts of up to 48 tokens" in t for t in entered[::2])
    assert entered[1::2] == ["", ""] and "about 1 MiB" in entered[0]
    assert flat.token_bytes == 2 * 2 * 56 * 4  # gate and up of a tiny Llama
    engine.run(batches[1] * 2, sampler)
    assert len(entered) == 4
    entered.clear()
    quiet = Engine(flat, "cpu", limits, verbose=False)
    quiet.executor._cold = True
    engine = quiet
    assert quiet.run(batches[0], sampler) == expected[0]
    assert entered == ["", ""]


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [(16, 8, 128), (32, 8, 64)])
def test_new_prompts_compile_nothing(heads: tuple[int, int, int]) -> None:
    """Neither other lengths nor other chunks, after the first prompt and the first batch."""
    import triton

    query_heads, key_heads, width = heads
    config = tf.LlamaConfig(
        hidden_size=1024 if width == 128 else 2048,
        intermediate_size=3072 if width == 128 else 8192,
        num_attention_heads=query_heads,
        num_key_value_heads=key_heads,
        head_dim=width,
        num_hidden_layers=2,
        vocab_size=32000,
        max_position_embeddings=32768,
        eos_token_id=None,
        bos_token_id=None,
        pad_token_id=0,
    )
    with torch.device("cuda"):
        model = tf.LlamaForCausalLM(config).to(torch.bfloat16).eval()
    model = regraft.optimize(model, verbose=False, decoding={"max_seq_len": 20000, "max_batch_size": 8})
    compiled: list[str] = []

    def note(**given: Any) -> None:
        compiled.append(given["src"].name)

    def load(module: object, function: object, name: str, *rest: object) -> None:
        compiled.append(f"{name} is loaded")  # behind it the launcher is there, which a C compiler builds

    def generate(*lengths: int) -> None:
        ids = [torch.randint(3, 32000, (n,)).tolist() for n in lengths]
        model.generate_batch(ids, tf.GenerationConfig(max_new_tokens=3), progress_bar=False)

    listener = triton.knobs.compilation.listener
    triton.knobs.compilation.listener = note
    triton.knobs.runtime.kernel_load_start_hook.add(load)
    try:
        generate(40)
        assert compiled
        compiling.settle()
        compiled.clear()
        for n in (1, 17, 24, 33, 100, 200, 256, 257, 400, 511, 512, 600, 800, 1100, 1500, 2047, 2048, 3000, 6100, 8192):
            generate(n)
            assert not compiled, (n, compiled)
        generate(19000)  # by chunks
        ids = torch.randint(3, 32000, (1, 50), device="cuda")
        for _ in range(2):  # known but for its last token the second time
            model.generate(ids, max_new_tokens=3)
        assert not compiled, compiled
        generate(*[40] * 8)
        compiling.settle()
        compiled.clear()
        generate(*range(1, 9))
        generate(*range(20, 100, 10))
        generate(*range(300, 1100, 100))
        generate(5000, *range(10, 17))
        generate(3000, 10, *[17] * 6)
        assert not compiled, compiled
    finally:
        triton.knobs.compilation.listener = listener
        triton.knobs.runtime.kernel_load_start_hook.remove(load)
