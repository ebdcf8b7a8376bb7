"""Weights that lie by columns are copied by rows for decoding, where there is room, and only there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers

import regraft
from regraft.compiler.program import InputKind
from regraft.passes import pack

GREEDY = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
MATRICES = [f"transformer.h.{i}.{n}.weight" for i in range(2) for n in ("attn.c_attn", "attn.c_proj", "mlp.c_fc")]
MATRICES += [f"transformer.h.{i}.mlp.c_proj.weight" for i in range(2)]
SIZE = 4 * 2 * 12 * 64 * 64
"""Bytes of all of them: 2 layers of 64 columns."""


def tiny_gpt2() -> Any:
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=160, bos_token_id=1, eos_token_id=2)
    return transformers.GPT2LMHeadModel(config).eval()


def prompts() -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 150, (2, 7), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@pytest.fixture
def room(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    def set_room(size: int) -> None:
        monkeypatch.setattr(pack, "_room", lambda context: size)

    return set_room


def copied(model: Any) -> list[str]:
    """Weights that the program over pages reads a copy of."""
    inputs = model.generate.decoding.engine().flat.program.inputs
    recipes = [i.recipe for i in inputs if i.kind is InputKind.PACKED and i.recipe is not None]
    return sorted(source for recipe in recipes for source in recipe.sources)


def counted(model: Any) -> None:
    with torch.no_grad():
        model.get_parameter(MATRICES[0]).mul_(-3)
        model.get_parameter(MATRICES[3]).data = model.get_parameter(MATRICES[3]).flip(0).clone()


def through_data(model: Any) -> None:
    """No count of PyTorch's says that anything was written."""
    model.get_parameter(MATRICES[0]).data.mul_(-3)
    model.get_parameter(MATRICES[3]).data.copy_(model.get_parameter(MATRICES[3]).data.flip(0))


def both(model: Any) -> None:
    model.get_parameter(MATRICES[0]).data.mul_(-3)
    with torch.no_grad():
        model.get_parameter(MATRICES[3]).mul_(2)


@pytest.mark.parametrize("change", [counted, through_data, both])
def test_tokens_are_the_same_and_follow_the_weights(room: Callable[[int], None], change: Callable[[Any], None]) -> None:
    room(SIZE)
    model, plain = regraft.optimize(tiny_gpt2(), verbose=False), tiny_gpt2()
    assert torch.equal(model.generate(**prompts(), **GREEDY), plain.generate(**prompts(), **GREEDY))
    assert copied(model) == sorted(MATRICES)
    assert model.report.record.memory["packed_copies"] == SIZE
    assert all(p.is_contiguous() for p in model.parameters())
    for changed in (model, plain):
        change(changed)
    expected = plain.generate(**prompts(), **GREEDY)
    assert not torch.equal(expected, tiny_gpt2().generate(**prompts(), **GREEDY))
    assert torch.equal(model.generate(**prompts(), **GREEDY), expected)


def test_the_forward_alone_copies_nothing(room: Callable[[int], None]) -> None:
    room(SIZE)
    model = regraft.optimize(tiny_gpt2(), verbose=False)
    model(**prompts())
    assert model.report.record.memory["packed_copies"] == 0


def test_no_more_than_there_is_room_for(room: Callable[[int], None]) -> None:
    room(SIZE // 3)
    model = regraft.optimize(tiny_gpt2(), verbose=False)
    assert torch.equal(model.generate(**prompts(), **GREEDY), tiny_gpt2().generate(**prompts(), **GREEDY))
    assert 0 < len(copied(model)) < len(MATRICES)
    assert 0 < model.report.record.memory["packed_copies"] <= SIZE // 3


def test_inference_tensors_whose_changes_nothing_tells_are_read_where_they_lie(room: Callable[[int], None]) -> None:
    room(SIZE)
    with torch.inference_mode():
        model, plain = tiny_gpt2().requires_grad_(False), tiny_gpt2().requires_grad_(False)
    model = regraft.optimize(model, verbose=False)
    assert torch.equal(model.generate(**prompts(), **GREEDY), plain.generate(**prompts(), **GREEDY))
    assert not set(copied(model)) & set(MATRICES)
    with torch.inference_mode():
        for changed in (model, plain):
            changed.get_parameter(MATRICES[0]).mul_(-3)
    assert torch.equal(model.generate(**prompts(), **GREEDY), plain.generate(**prompts(), **GREEDY))
