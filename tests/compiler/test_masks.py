"""Masks are recognised for what they are, at sizes beyond their windows and with any padding; what is no window with
padding keeps its mask; and the guard notices what sampling could not see."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import zoo
from torch import Tensor, fx, nn

from regraft.compiler.capture import capture
from regraft.compiler.masks import Description, Masks
from regraft.compiler.program import Program

ATTENTION = torch.ops.regraft.attention.default


def attentions(program: Program) -> list[fx.Node]:
    return [node for node in program.graph.nodes if node.target is ATTENTION]


def described(name: str, masked: bool, cache: bool = True, **more: Tensor) -> tuple[Program, Masks, list[Description]]:
    model, inputs = zoo.build(name)
    if masked:
        inputs = {**inputs, "attention_mask": torch.ones_like(inputs["input_ids"])}
    program = capture(model, {**inputs, **more}, {}, cache=cache)
    masks = Masks(program, model)
    return program, masks, [masks.classify(node) for node in attentions(program)]


WANTED: dict[str, list[tuple[int, int]]] = {
    "llama": [(-1, 0)] * 2,
    "mistral": [(5, 0)] * 2,
    "gemma2": [(5, 0), (-1, 0)],
    "modernbert": [(-1, -1), (3, 3)],
    "opt": [(-1, 0)] * 2,
    "bart": [(-1, -1)] * 2 + [(-1, 0), (-1, -1)] * 2,
    "t5": [(-1, -1)] * 2 + [(-1, 0), (-1, -1)] * 2,
}


@pytest.mark.parametrize("name", list(WANTED))
def test_window_and_padding(name: str) -> None:
    _, _, found = described(name, masked=True)
    assert [(d.left, d.right) for d in found] == WANTED[name]
    assert all(d.replaceable and d.argument == "mask" for d in found)
    pad_free = [d for d in found if d.key_mask is None]
    encoder_decoder = name in ("bart", "t5")  # no padding for the decoder's own tokens was given
    assert len(pad_free) == (2 if encoder_decoder else 0)
    for d in found:
        if d.key_mask is not None:
            assert d.key_mask.meta["val"].dim() == 2
    assert all(d.seen > 10 for d in found)


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2"])
def test_without_padding(name: str) -> None:
    _, _, found = described(name, masked=False)
    assert all(d.replaceable and d.key_mask is None and d.right == 0 for d in found)


def test_vision_and_speech_see_everything() -> None:
    for name in ("vit", "wav2vec2"):
        _, _, found = described(name, masked=False)
        assert found and all(d.kind in ("none", "bidirectional") for d in found)


def test_chunks_keep_their_mask() -> None:
    _, _, found = described("llama4_text", masked=True)
    assert all(not d.replaceable and d.kind == "chunked 6" and d.reason for d in found)


def test_positions_that_restart_keep_their_mask() -> None:
    """Given positions without a padding mask mean packed sequences: the mask follows their values."""
    _, _, found = described("llama", masked=False, cache=False, position_ids=torch.arange(9).expand(2, -1).clone())
    assert all(not d.replaceable and "position_ids" in d.reason for d in found)


def replace_masks(program: Program, found: list[Description]) -> Program:
    """What a pass does with a description."""
    for node, d in zip(attentions(program), found, strict=True):
        args = list(node.args) + [None] * (11 - len(node.args))
        args[3 if d.argument == "mask" else 4] = None
        args[5], args[8], args[9] = d.key_mask, d.left, d.right
        args[10] = args[10] or 0.0
        node.args = tuple(args)
    program.gm.recompile()
    return program


@pytest.mark.parametrize("name", ["gemma2", "modernbert", "bart"])
def test_replaced_masks_give_the_same_bits(name: str) -> None:
    from capture_checks import run, tensors_in

    model, inputs = zoo.build(name)
    inputs = {**inputs, "attention_mask": torch.ones_like(inputs["input_ids"])}
    program = capture(model, inputs, {}, cache=False)
    masks = Masks(program, model)
    found = [masks.classify(node) for node in attentions(program)]
    for side in ("left", "right", "holes"):
        these = {n: torch.randint(3, zoo.VOCAB, (3, 17)) for n in inputs}
        these["attention_mask"] = torch.ones(3, 17, dtype=torch.long)
        where = {"left": slice(0, 5), "right": slice(12, 17), "holes": [2, 3, 9]}[side]
        these["attention_mask"][1, where] = 0
        before = tensors_in(run(program, model, these))
        unchanged = [node.args for node in attentions(program)]
        after = tensors_in(run(replace_masks(program, found), model, these))
        for node, args in zip(attentions(program), unchanged, strict=True):
            node.args = args
        program.gm.recompile()
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True)), side


class _Masked(nn.Module):
    """Attention under a mask made by `make(queries, keys, padding)`."""

    def __init__(self, make: Callable[..., Tensor], additive: bool = False) -> None:
        super().__init__()
        self.make, self.additive = make, additive
        self.scale = nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        q = (x * self.scale).unsqueeze(1)
        mask = self.make(x.shape[1], padding)
        args: tuple[Any, ...] = (None, mask) if self.additive else (mask, None)
        return torch.ops.regraft.attention(q, q, q, *args, None, None, 0.35)


def classified(make: Callable[..., Tensor], additive: bool = False) -> tuple[Program, nn.Module, Masks, Description]:
    module = _Masked(make, additive).eval()
    inputs = {"x": torch.randn(2, 7, 8), "padding": torch.ones(2, 7, dtype=torch.long)}
    program = capture(module, inputs, {}, cache=False)
    masks = Masks(program, module)
    return program, module, masks, masks.classify(attentions(program)[0])


def causal(length: int, padding: Tensor) -> Tensor:
    k = torch.arange(length)
    return (k[None] <= k[:, None])[None, None] & padding.bool()[:, None, None, :]


def test_additive_masks_are_visibility_only_if_all_values_say_so() -> None:
    low = torch.finfo(torch.float32).min

    def hard(length: int, padding: Tensor) -> Tensor:
        return torch.where(causal(length, padding), 0.0, low)

    def soft(length: int, padding: Tensor) -> Tensor:
        k = torch.arange(length, dtype=torch.float32)
        return (k[None] - k[:, None])[None, None] * 0.5 + hard(length, padding)

    found = classified(hard, additive=True)[3]
    assert found.replaceable and found.argument == "bias" and (found.left, found.right) == (-1, 0)
    assert found.key_mask is not None
    assert not classified(soft, additive=True)[3].replaceable


def test_a_prefix_and_a_padding_of_queries_are_not_windows() -> None:
    def prefix(length: int, padding: Tensor) -> Tensor:
        k = torch.arange(length)
        return causal(length, padding) | (k < 3)[None, None, None]

    def queries(length: int, padding: Tensor) -> Tensor:
        return causal(length, padding) & padding.bool()[:, None, :, None]

    assert not classified(prefix)[3].replaceable
    assert not classified(queries)[3].replaceable


def test_the_guard_notices_a_window_that_sampling_did_not_reach() -> None:
    """No config names 200, and sampling stops before it: only the guard at run time can know."""

    def hidden(length: int, padding: Tensor) -> Tensor:
        k = torch.arange(length)
        return causal(length, padding) & (k[None] > k[:, None] - 200)[None, None]

    program, _, masks, found = classified(hidden)
    assert found.replaceable and found.left == -1 and found.seen < 200
    guard = masks.guard(attentions(program)[0], found)

    def inputs(length: int) -> dict[str, Tensor]:
        padding = torch.ones(2, length, dtype=torch.long)
        padding[0, :3] = 0
        return {"x": torch.randn(2, length, 8), "padding": padding}

    assert guard.holds(inputs(150)) and guard.holds(inputs(1))
    assert not guard.holds(inputs(201))


class _Books(nn.Module):
    """Two rows of tokens make one of the model's, as with several codebooks."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(32, 8)

    def forward(self, input_ids: Tensor) -> Tensor:
        rows = input_ids.reshape(-1, 2, input_ids.shape[-1])
        x = self.embedding(rows).sum(1)[:, None]
        mask = torch.ones(input_ids.shape[0] // 2, 1, x.shape[2], x.shape[2], dtype=torch.bool).tril()
        return torch.ops.regraft.attention(x, x, x, mask, None, None, None, 1.0, -1, -1, 0.0)


def test_a_mask_without_rows_says_nothing() -> None:
    """Masks are looked at on one row of the inputs, which is none of this model's: the mask stays."""
    model, ids = _Books().eval(), torch.randint(32, (4, 9))
    program = capture(model, {"input_ids": ids}, {}, cache=False)
    (node,) = attentions(program)
    found = Masks(program, model).classify(node)
    assert not found.replaceable
    assert found.reason == "it has no rows where the inputs have one"
