"""Flat programs made of a forward that was captured for batches: the same graph as captured for flat tokens."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
import zoo
from flat_models import flat_of, tiny

import regraft
from regraft.compiler.causal import CacheError
from regraft.compiler.cost import op_name
from regraft.compiler.flatten import flattened
from regraft.runtime.decoding import flat as module
from regraft.runtime.decoding.book import Book
from regraft.runtime.decoding.flat import Unserved, flat_program
from regraft.runtime.decoding.program import FlatProgram

CPU = torch.device("cpu")


def logits(flat: FlatProgram) -> torch.Tensor:
    lengths = (9, 30)
    made = torch.Generator().manual_seed(0)
    sequences = [torch.randint(3, zoo.VOCAB, (n,), generator=made) for n in lengths]
    book = Book.of(flat, lengths, CPU)
    book.bind(flat)
    return torch.cat([flat(book.step(take, sequences)) for take in ({0: 8, 1: 20}, {0: 1, 1: 10})])


def ops(flat: FlatProgram) -> Counter[str]:
    found = Counter(op_name(n) for n in flat.program.graph.nodes if n.op == "call_function")
    found["aten.index"] += found.pop("aten.index_select", 0)  # of rows
    return found


def captures(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    made: list[Any] = []
    capture = module.capture

    def counted(*args: Any, **kwargs: Any) -> Any:
        made.append(args)
        return capture(*args, **kwargs)

    monkeypatch.setattr(module, "capture", counted)
    return made


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_oss"])
def test_a_forward_is_not_captured_again(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = regraft.optimize(tiny(name), verbose=False)
    made = captures(monkeypatch)
    flat = flat_program(model)
    assert isinstance(flat, FlatProgram) and not made
    plain = flat_of(tiny(name))
    assert len(made) == 1
    assert ops(flat) == ops(plain) and torch.equal(logits(flat), logits(plain))
    assert flat.max_positions == plain.max_positions and flat.groups == plain.groups


def test_where_the_mask_counts_positions_it_is_captured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """OPT's positions are the sums of its mask: a ragged batch shows that they are wrong for flat tokens."""
    model = regraft.optimize(tiny("opt"), verbose=False)
    made = captures(monkeypatch)
    flat = flat_program(model)
    assert isinstance(flat, FlatProgram) and len(made) == 1
    assert torch.equal(logits(flat), logits(flat_of(tiny("opt"))))
    again = model.report.record.generate["captured_again"]
    assert again.startswith("CacheError: ") and again[:40] in " ".join(str(model.report).split())


def test_what_fails_on_the_short_way_leaves_the_long_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever fails, and wherever; no packed weight of a try that failed stays."""
    model = regraft.optimize(tiny("llama", 1), example_inputs={"input_ids": torch.arange(3, 12)[None]}, verbose=False)
    before = set(model.forward.bound.weights.packs)
    made = captures(monkeypatch)
    failures = [TypeError("the short way"), CacheError("the long one")]

    def fails(*args: Any) -> Any:
        raise failures.pop(0)

    with monkeypatch.context() as patch:
        patch.setattr(module, "check", fails)
        found = flat_program(model)
    assert isinstance(found, Unserved) and found.reason == "the long one" and len(made) == 1
    assert set(model.forward.bound.weights.packs) == before


def test_a_forward_that_keeps_some_logits_is_not_taken() -> None:
    tokens = torch.arange(3, 12)[None]
    example = {"input_ids": tokens, "position_ids": torch.arange(9)[None]}
    for arguments, taken in (({}, True), ({"logits_to_keep": 1}, False), ({"position_ids": tokens}, False)):
        model = regraft.optimize(tiny("llama", 1), example_inputs={"input_ids": tokens, **arguments}, verbose=False)
        (served,) = model.forward.graphs
        assert (flattened(served.captured, example) is not None) == taken
