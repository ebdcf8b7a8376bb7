"""A model that cannot be captured whole runs by the graphs of its parts, where that means the same."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
import transformers
from runtime_models import Identity, optimized, tiny_llama, tokens
from torch import nn

from regraft.runtime import dispatch
from regraft.runtime.dispatch import Dispatch
from regraft.runtime.errors import RegraftWarning
from regraft.runtime.optimize import restore


class Wrapped(nn.Module):
    """Decides by values of its input, which no graph can, around something that can be captured."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        if int(input_ids.sum()) % 2 == 0:
            return self.inner(input_ids, use_cache=False).logits
        return -self.inner(input_ids, use_cache=False).logits


class Stack(nn.Module):
    """Blocks without a model around them, and again a decision by values."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.GELU()) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x) if float(x.detach().sum()) > 0 else block(-x)
        return x


def make(inner: Any = None) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RegraftWarning)
        return optimized(Wrapped(inner or tiny_llama()).eval(), example_inputs={"input_ids": tokens()})


def part_calls(model: nn.Module) -> dict[str, int]:
    return model.forward.parts[0].record.calls


def test_parts_that_take_long_are_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first block says how long the others would take."""
    monkeypatch.setattr(dispatch, "PARTS_PATIENCE", 0.0)
    torch.manual_seed(0)
    plain = Stack().eval()
    x = torch.randn(4, 8)
    model = optimized(copy.deepcopy(plain), example_inputs={"x": x})
    with pytest.warns(RegraftWarning, match="could not be captured"):
        for _ in range(2):
            torch.testing.assert_close(model(x), plain(x).detach())
    assert [len(part.graphs) for part in model.forward.parts] == [1, 0, 0]
    assert sum("capturing its parts would take over" in note.message for note in model.report.notes) == 1


def test_blocks_that_write_to_a_cache_are_not_captured() -> None:
    """Their graphs could not fill it, and a scan would take its time to be captured."""
    torch.manual_seed(0)
    config = transformers.FalconH1Config(
        vocab_size=131,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        mamba_d_ssm=32,
        mamba_n_heads=4,
        mamba_d_head=8,
        mamba_d_state=8,
        mamba_chunk_size=8,
    )
    plain = transformers.FalconH1ForCausalLM(config).eval()
    model = optimized(copy.deepcopy(plain), example_inputs={"input_ids": tokens()})
    with pytest.warns(RegraftWarning, match="holds more than keys and values"):
        torch.testing.assert_close(model(tokens()).logits, plain(tokens()).logits.detach())
    blocks = model.forward.parts[0].parts
    assert len(blocks) == 2 and not any(block.record.signatures for block in blocks)


def test_an_inner_model_is_captured_alone() -> None:
    model, original = make(), Wrapped(tiny_llama()).eval()
    assert [p.module for p in model.forward.parts] == [model.inner]
    with pytest.warns(RegraftWarning, match="could not be captured"):
        model(tokens())
    for seed in range(4):  # both sides of the decision
        ids = tokens(3, 5, seed)
        torch.testing.assert_close(model(ids), original(ids).detach(), rtol=1e-5, atol=1e-6)
    assert part_calls(model) == {"graph": 5, "original": 0}
    assert model.forward.record.calls == {"graph": 0, "original": 5}
    assert any("captured in parts" in n.message and "inner" in n.message for n in model.forward.record.notes)


def test_parts_stay_away_where_the_original_is_meant() -> None:
    model = make()
    assert model.inner(tokens()).logits.requires_grad  # called alone, it is the caller's own
    model.train()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RegraftWarning)
        model(tokens()).sum().backward()
    assert all(p.grad is not None for p in model.inner.parameters())
    assert part_calls(model) == {"graph": 0, "original": 0}


def test_blocks_of_a_stack() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RegraftWarning)
        model = optimized(Stack().eval(), Identity(), example_inputs={"x": torch.randn(4, 8)})
        reference = copy.deepcopy(model)
        restore(reference)
        assert not any(isinstance(m.__dict__.get("forward"), Dispatch) for m in reference.modules())
        x = torch.randn(2, 8)
        torch.testing.assert_close(model(x), reference(x).detach())
    assert [p.record.calls["graph"] for p in model.forward.parts] == [1, 1, 1]


def test_restore_and_state_dict() -> None:
    inner: transformers.PreTrainedModel = tiny_llama()
    keys = Wrapped(inner).state_dict().keys()
    model = make(inner)
    assert model.state_dict().keys() == keys
    restore(model)
    assert "forward" not in inner.__dict__ and "forward" not in model.__dict__
