"""A model that no graph holds whole is captured in its largest parts, and the report says what was left and why."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import zoo
from capture_checks import assert_same, run
from torch import Tensor, nn

from regraft.compiler.errors import CaptureError
from regraft.compiler.parts import capture_parts


class _Outside(nn.Module):
    """A branch on a value, outside a language model."""

    def __init__(self) -> None:
        super().__init__()
        self.language, _ = zoo.build("llama")

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden = self.language.model(input_ids, use_cache=False).last_hidden_state
        if bool(hidden.sum() > 1e9):
            hidden = hidden * 2
        logits: Tensor = self.language.lm_head(hidden)
        return logits


class _Gate(nn.Module):
    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, hidden: Tensor, position_embeddings: tuple[Tensor, Tensor]) -> Tensor:
        if bool(hidden.sum() > 1e9):
            hidden = hidden * 2
        out: Tensor = self.inner(hidden, position_embeddings=position_embeddings, attention_mask=None)
        return out


class _Inside(nn.Module):
    """A branch on a value in each block, around a layer."""

    def __init__(self) -> None:
        super().__init__()
        language, _ = zoo.build("llama")
        self.embed, self.rotary = language.model.embed_tokens, language.model.rotary_emb
        self.blocks = nn.ModuleList([_Gate(layer) for layer in language.model.layers])

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden = self.embed(input_ids)
        tables = self.rotary(hidden, torch.arange(input_ids.shape[1])[None])
        for block in self.blocks:
            hidden = block(hidden, tables)
        result: Tensor = hidden
        return result


IDS = {"input_ids": torch.ones(2, 5, dtype=torch.long)}


def test_the_base_model_is_one_part() -> None:
    model = _Outside().eval()
    found = capture_parts(model, IDS)
    assert [part.module for part in found.parts] == ["language.model"]
    ids = torch.randint(3, zoo.VOCAB, (3, 8))
    with torch.no_grad():
        own = model.language.model(ids, use_cache=False).last_hidden_state
    assert_same(run(found.parts[0].program, model.language.model, {"input_ids": ids}).last_hidden_state, own)


def test_blocks_where_nothing_larger_can_be_captured() -> None:
    model = _Inside().eval()
    found = capture_parts(model, IDS)
    assert [part.module for part in found.parts] == ["blocks.0.inner", "blocks.1.inner"]
    assert [note.module for note in found.notes] == ["blocks.0", "blocks.1"]
    assert all("if bool(hidden.sum() > 1e9)" in note.source for note in found.notes)
    hidden = torch.randn(3, 7, 64)
    with torch.no_grad():
        cos, sin = model.rotary(hidden, torch.arange(7)[None])
        own = model.blocks[0].inner(hidden, position_embeddings=(cos, sin), attention_mask=None)
    given = {"hidden_states": hidden, "position_embeddings__0": cos, "position_embeddings__1": sin}
    assert_same(run(found.parts[0].program, model.blocks[0].inner, given), own)
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_training_mode_is_refused() -> None:
    with pytest.raises(CaptureError, match="training mode"):
        capture_parts(_Outside().train(), IDS)
