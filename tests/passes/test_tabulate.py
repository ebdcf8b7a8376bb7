"""Rotary embeddings from a table: the same bits as computed, for as many positions as a sequence may have."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import zoo
from flat_models import flat_of, tiny

import regraft
from regraft.passes import tabulate
from regraft.runtime.decoding.book import Book
from regraft.runtime.decoding.engine import Engine
from regraft.runtime.decoding.flat import flat_program
from regraft.runtime.decoding.memory import Limits
from regraft.runtime.decoding.program import FlatProgram

CPU = torch.device("cpu")
WITHOUT = {"passes": {"tabulate": False}}


def logits(flat: FlatProgram) -> torch.Tensor:
    """Of two ragged steps, prefill and decode mixed."""
    lengths = (9, 70, 3)
    made = torch.Generator().manual_seed(0)
    sequences = [torch.randint(3, zoo.VOCAB, (n,), generator=made) for n in lengths]
    book = Book.of(flat, lengths, CPU)
    book.bind(flat)
    return torch.cat([flat(book.step(take, sequences)) for take in ({0: 8, 1: 60}, {0: 1, 1: 10, 2: 3})])


def computes(flat: FlatProgram) -> bool:
    return any(n.target in (torch.ops.aten.cos.default, torch.ops.aten.sin.default) for n in flat.program.graph.nodes)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("llama31", {}),
        ("glm", {}),
        ("gpt_oss", {}),
        ("deepseekv3", {}),
        ("gemma3", {"layer_types": ["sliding_attention", "full_attention"]}),
    ],
)
def test_rows_are_what_the_graph_computes(name: str, changes: dict[str, Any]) -> None:
    model = tiny(name, 2 if changes else 1, **changes)
    flat, plain = flat_of(model), flat_of(model, **WITHOUT)
    assert flat.tabulated == 256 and not computes(flat)
    assert plain.tabulated is None and computes(plain)
    assert torch.equal(logits(flat), logits(plain))
    lookups = [n for n in flat.program.graph.nodes if n.target is torch.ops.aten.embedding.default]
    assert len(lookups) == 2, "of tokens, and of positions"


@pytest.mark.parametrize("name", ["opt", "bloom"])
def test_learned_positions_and_slopes_have_no_table(name: str) -> None:
    assert flat_of(tiny(name, 1)).tabulated is None


def test_a_table_ends_where_rotations_begin_to_depend_on_others() -> None:
    changes = {"max_position_embeddings": 200, "rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}
    flat = flat_of(tiny("llama_dynamic", 1, **changes))
    assert flat.program.longest is not None and flat.tabulated == flat.program.longest[0]
    assert torch.equal(logits(flat), logits(flat_of(tiny("llama_dynamic", 1, **changes), **WITHOUT)))


def test_other_bits_in_other_company_stay_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = tabulate._rows

    def other(piece: Any, program: Any, positions: Any) -> Any:
        found = rows(piece, program, positions)
        return [torch.nextafter(t, t + 1) if len(positions) == 1 else t for t in found]

    monkeypatch.setattr(tabulate, "_rows", other)
    flat = flat_of(tiny("llama", 1))
    assert flat.tabulated is None and computes(flat)


def test_tables_are_as_long_as_asked_for_and_no_larger_than_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama", 1)
    flat = flat_of(model, decoding={"max_seq_len": 2000})
    assert flat.tabulated == 2000
    assert Engine(flat, CPU, Limits(max_seq_len=4000, max_batch_size=2)).executor.max_seq_len == 2000
    assert flat_of(model, decoding={"max_seq_len": 20}).tabulated == tabulate.LEAST
    monkeypatch.setattr(tabulate, "LARGEST_TABLE", 2000 * 16 * 4 - 1)
    assert flat_of(model, decoding={"max_seq_len": 2000}).tabulated is None


def test_tables_follow_their_buffers() -> None:
    """A buffer that is written to, and a model that is another dtype: as if both had been so from the start."""
    model = regraft.optimize(tiny("llama", 1), verbose=False)
    before = flat_program(model)
    assert isinstance(before, FlatProgram)
    first = logits(before)
    with torch.no_grad():
        model.model.rotary_emb.inv_freq.mul_(0.7)
    flat = flat_program(model)
    assert isinstance(flat, FlatProgram)
    fresh = tiny("llama", 1)
    with torch.no_grad():
        fresh.model.rotary_emb.inv_freq.mul_(0.7)
    found = logits(flat)
    assert not torch.equal(found, first) and torch.equal(found, logits(flat_of(fresh, **WITHOUT)))
    model.to(torch.bfloat16)
    flat = flat_program(model)
    assert isinstance(flat, FlatProgram) and flat.tabulated == 256
    assert torch.equal(logits(flat), logits(flat_of(fresh.to(torch.bfloat16), **WITHOUT)))
