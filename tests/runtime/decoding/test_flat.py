"""A flat program says what the model says of each sequence alone, in whatever steps, pages and company it is run."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
import zoo
from flat_models import builder_of, flat_of, tiny
from torch import Tensor

import regraft
from regraft.compiler.verify import bound_for, distance
from regraft.runtime.build import Unserved
from regraft.runtime.decoding import flat_check
from regraft.runtime.decoding.book import Book
from regraft.runtime.decoding.flat import flat_program, make
from regraft.runtime.decoding.program import FlatProgram
from regraft.runtime.oracle import run_oracle, run_reference

CPU = torch.device("cpu")


def alone(model: Any, tokens: Tensor) -> tuple[Tensor, ...]:
    """Logits `[n, V]` of the original forward, and of its code in float64."""
    forward = type(model).forward.__get__(model)
    inputs = {"input_ids": tokens[None]}
    return tuple(
        run.logits[0]
        for run in (run_reference(model, forward, inputs), run_oracle(model, forward, inputs, torch.float64))
    )


def assert_as_alone(model: Any, found: list[Tensor], sequences: list[Tensor]) -> None:
    """At most twice the original's error, and a few ulp: the rule of the certificate."""
    truths = [alone(model, tokens[: len(logits)]) for tokens, logits in zip(sequences, found, strict=True)]
    original, oracle = [t[0] for t in truths], [t[1] for t in truths]
    allowed = bound_for(distance(original, oracle), oracle, torch.float32)
    assert distance(found, oracle) <= allowed


def run_randomly(flat: FlatProgram, book: Book, sequences: list[Tensor], seed: int) -> list[Tensor]:
    """Logits of every token; steps take random parts of random sequences, decode and prefill mixed."""
    choose = random.Random(seed)
    rows: list[list[Tensor]] = [[] for _ in sequences]
    while left := [s for s, tokens in enumerate(sequences) if book.done[s] < len(tokens)]:
        chosen = choose.sample(left, choose.randint(1, len(left)))
        most = choose.choice((1, 3, 9))
        take = {s: choose.randint(1, min(most, len(sequences[s]) - book.done[s])) for s in chosen}
        step = book.step(take, sequences, padding=choose.choice((0, 0, 3)), absent=choose.choice((0, 0, 2)))
        for s, part in zip(take, flat(step).split(list(take.values())), strict=True):
            rows[s].append(part)
    return [torch.cat(parts) for parts in rows]


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "bloom", "deepseekv3", "gpt_oss"])
def test_random_steps_are_as_lone_runs(name: str) -> None:
    model = tiny(name)
    flat = flat_of(model)
    for seed, lengths in enumerate([(13, 1, 22, 7), (2, 17), (5,)]):
        sequences = [torch.randint(3, zoo.VOCAB, (n,)) for n in lengths]
        book = Book.of(flat, lengths, CPU, page=(4, 3, 16)[seed])
        book.bind(flat)
        assert_as_alone(model, run_randomly(flat, book, sequences, seed), sequences)


def test_what_rounding_explains_in_float32_is_looked_at_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(flat_check.SAME, torch.float32, 0.0)  # as if there were many more layers
    flat_of(tiny("llama", dtype=torch.bfloat16))
    monkeypatch.setitem(flat_check.SAME, torch.float64, 0.0)
    refused = make(builder_of(tiny("llama", dtype=torch.bfloat16)))
    assert isinstance(refused, Unserved) and "mix in another way" in refused.reason


def test_pages_behind_a_window_are_not_read() -> None:
    """What no query sees any more may be taken away: the table says -1, the page holds what would show."""
    model = tiny("mistral")
    flat = flat_of(model)
    (window,) = flat.groups
    sequences = [torch.randint(3, zoo.VOCAB, (20,))]
    book = Book.of(flat, [20], CPU, page=2)
    book.bind(flat)
    rows = [flat(book.step({0: 14}, sequences))]
    while book.done[0] < 20:
        first = max(0, book.done[0] - window) // 2
        for index in range(first):
            page = book.tables[0][0][index]
            if page >= 0:
                for k, v in book.pages:
                    k[page], v[page] = float("nan"), float("nan")
                book.tables[0][0][index] = -1
        rows.append(flat(book.step({0: 1}, sequences)))
    assert book.tables[0][0][:3] == [-1, -1, -1]
    assert_as_alone(model, [torch.cat(rows)], sequences)


def test_only_the_rows_asked_for() -> None:
    flat = flat_of(tiny("llama"))
    sequences = [torch.randint(3, zoo.VOCAB, (n,)) for n in (6, 4)]
    logits = []
    for rows in (torch.arange(10), torch.tensor([5, 9])):
        book = Book.of(flat, [6, 4], CPU)
        book.bind(flat)
        step = book.step({0: 6, 1: 4}, sequences)
        step.rows = rows
        logits.append(flat(step))
    assert logits[1].shape == (2, zoo.VOCAB)
    torch.testing.assert_close(logits[1], logits[0][[5, 9]], rtol=1e-6, atol=1e-6)


def test_weights_are_shared_and_followed() -> None:
    """No weight is packed a second time; changes in place are seen, another form makes another program."""
    model = regraft.optimize(tiny("llama"), verbose=False)
    dispatch = model.forward
    before = {key: pack.value.data_ptr() for key, pack in dispatch.bound.weights.packs.items()}
    assert before
    flat = flat_program(model)
    assert isinstance(flat, FlatProgram)
    after = {key: pack.value.data_ptr() for key, pack in dispatch.bound.weights.packs.items()}
    assert after.items() >= before.items() and len(after) == len(before) + 1, "a table of positions is all that is new"
    assert flat_program(model) is flat

    sequences = [torch.randint(3, zoo.VOCAB, (9,))]
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight.mul_(1.5)
    assert flat_program(model) is flat
    book = Book.of(flat, [9], CPU)
    book.bind(flat)
    assert_as_alone(model, [flat(book.step({0: 9}, sequences))], sequences)

    version = flat.version
    model.model.layers[0].mlp.up_proj.weight = torch.nn.Parameter(torch.randn(112, 64) * 0.1)
    assert flat_program(model) is flat
    assert flat.version != version
    book = Book.of(flat, [9], CPU)
    book.bind(flat)
    assert_as_alone(model, [flat(book.step({0: 9}, sequences))], sequences)

    model.double()
    other = flat_program(model)
    assert isinstance(other, FlatProgram) and other is not flat
    assert {layer.dtype for layer in other.layers} == {torch.float64}
    regraft.restore(model)
    with pytest.raises(ValueError, match="not optimized"):
        flat_program(model)


def test_report_says_how_tokens_are_generated() -> None:
    model = regraft.optimize(tiny("gemma2"), verbose=False)
    assert model.report.to_dict()["generate"] is None
    flat_program(model)
    assert "Generate   paged: 2 layers, 2 groups (window 6, all keys)" in str(model.report)
    assert model.report.to_dict()["generate"]["windows"] == [5, -1]
    model = regraft.optimize(tiny("llama4_text"), verbose=False)
    assert isinstance(flat_program(model), Unserved)
    assert "Generate   not paged: the mask of model.layers.0.self_attn is no causal window" in str(model.report)


def test_a_model_in_training_mode_is_not_served() -> None:
    model = regraft.optimize(tiny("llama"), verbose=False)
    assert isinstance(flat_program(model), FlatProgram)
    model.train()
    found = flat_program(model)
    assert isinstance(found, Unserved) and "training" in found.reason
    model.eval()
    assert isinstance(flat_program(model), FlatProgram)


def test_pages_must_fit_and_be_bound() -> None:
    flat = flat_of(tiny("llama"))
    book = Book.of(flat, [4], CPU)
    with pytest.raises(RuntimeError, match="bind"):
        flat(book.step({0: 4}, [torch.arange(3, 7)]))
    for wrong, match in ((torch.zeros(3, 16, 1, 8), "wanted"), (torch.zeros(3, 16, 2, 8).half(), "float16")):
        pages = [(wrong, v) for _, v in book.pages]
        with pytest.raises(ValueError, match=match):
            flat.bind(pages)


@pytest.mark.parametrize(("dtype", "most"), [(torch.float8_e4m3fn, 0.05), (torch.int8, 0.02)])
def test_pages_of_few_bits(dtype: torch.dtype, most: float) -> None:
    """Rounding to 4 and 8 bits of a row's largest number; the weights stay packed once."""
    model = regraft.optimize(tiny("llama"), verbose=False)
    exact = flat_program(model)
    packs = dict(model.forward.bound.weights.packs)
    flat = flat_program(model, dtype)
    assert isinstance(exact, FlatProgram) and isinstance(flat, FlatProgram)
    assert {layer.dtype for layer in flat.layers} == {dtype}
    assert model.forward.bound.weights.packs.keys() == packs.keys()
    sequences = [torch.randint(3, zoo.VOCAB, (n,)) for n in (30, 12)]
    logits = []
    for program in (exact, flat):
        book = Book.of(program, [30, 12], CPU)
        book.bind(program)
        logits.append(torch.cat(run_randomly(program, book, sequences, 0)))
    share = (logits[1] - logits[0]).norm() / logits[0].norm()
    assert 0 < share < most
    assert model.report.to_dict()["generate"]["losses"][str(dtype).removeprefix("torch.")] < most
    with pytest.raises(ValueError, match="scales"):
        flat.bind(book.pages)
    with pytest.raises(ValueError, match="float16"):
        flat_program(model, torch.float16)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "bloom"])
def test_where_every_token_is_wanted_none_are_picked(name: str) -> None:
    """A step of decoding is the graph without the gather before the head, bit for bit."""
    flat = flat_of(tiny(name))
    picks = (torch.ops.aten.index.Tensor, torch.ops.aten.index_select.default)
    lengths = (5, 9, 4)
    sequences = [torch.randint(3, zoo.VOCAB, (n,)) for n in lengths]
    found = []
    for every in (True, False):
        book = Book.of(flat, lengths, CPU, page=4)
        book.bind(flat)
        flat(book.step({s: n - 1 for s, n in enumerate(lengths)}, sequences))
        step = book.step(dict.fromkeys(range(3), 1), sequences)
        assert step.every
        step.every = every
        count = sum(n.target in picks for n in flat.program_of(step).graph.nodes)
        found.append((flat(step), count))
    assert torch.equal(found[0][0], found[1][0]) and found[0][1] == found[1][1] - 1
