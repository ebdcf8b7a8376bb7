"""The encoder's side of a decoder: how its states are handed over, and what every attention to them keeps.

    encoder = EncoderProgram(program, weights)
    encoder(states)                     # [(k, v)] of each attention, [N, Hkv, D] and [N, Hkv, Dv]

States are those of one sequence without padding or of several, one behind the other, `[1, N, E]`. What is kept of them
does not change any more.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

from ...compiler.causal import CacheError
from ...compiler.cross import STATES
from ...compiler.program import LayerSpec, Program, Recipe
from ...compiler.verify import higher
from ..certificate import named_outputs
from ..executable import Executable
from ..oracle import run_oracle, run_reference
from ..weights import Weights

MASK = "decoder_attention_mask"
RENAMED = {"input_ids": "decoder_input_ids", "position_ids": "decoder_position_ids"}


class _States(BaseModelOutput):
    """An encoder's states, and None for whatever else some encoder returns."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


def as_decoder(forward: Callable[..., Any]) -> Callable[..., Any]:
    """An encoder-decoder's forward as that of its decoder: input_ids, position_ids, encoder_states `[B, N, E]`."""
    taken = inspect.signature(forward).parameters

    def decoder(*args: Any, encoder_states: Any, **kwargs: Any) -> Any:
        given = {RENAMED.get(name, name): value for name, value in kwargs.items()}
        if MASK in taken:  # without one some ask which tokens are padding, but only where they are given no cache
            given.setdefault(MASK, torch.ones_like(given["decoder_input_ids"]))
        return forward(*args, encoder_outputs=_States(last_hidden_state=encoder_states), **given)

    decoder.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]
    return decoder


def is_encoder_decoder(module: nn.Module) -> bool:
    """Whether tokens are decoded beside an encoder's states."""
    return bool(getattr(getattr(module, "config", None), "is_encoder_decoder", False))


def width_of(module: nn.Module) -> int:
    """Numbers of a state; raises CacheError where the config does not say."""
    config: Any = getattr(module, "config", None)
    find: Any = getattr(module, "get_encoder", None)
    own = getattr(find(), "config", None) if callable(find) else None
    for part in (config, getattr(config, "encoder", None), own):
        if isinstance(width := getattr(part, "hidden_size", None), int):
            return width
    raise CacheError("its config does not say how wide the encoder's states are")


class EncoderProgram:
    """Computes what the attentions to an encoder's states keep. `layers` are theirs."""

    def __init__(self, program: Program, weights: Weights, masked: bool) -> None:
        self.program = program
        self.layers: tuple[LayerSpec, ...] = program.layers
        self.masked = masked
        """Whether the model's `attention_mask` says which states the decoder sees; otherwise it sees all."""
        self.executable = Executable(program, weights)
        self.recipes: list[Recipe] = self.executable.recipes

    def __call__(self, states: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Keys `[N, Hkv, D]` and values `[N, Hkv, Dv]` of each attention, for states `[1, N, E]`."""
        sides = self.executable.flat({STATES: states}, directly=True)
        return list(zip(sides[::2], sides[1::2], strict=True))


@torch.no_grad()
def sees_masked(module: nn.Module, forward: Callable[..., Any], states: Tensor, tokens: Tensor) -> bool:
    """Whether `attention_mask` takes states away, as if they were not there; False: it says nothing of them.

    `forward` as of `as_decoder`; it runs one precision up, where rounding hides no difference. Raises CacheError where
    the mask does something else.
    """
    if "attention_mask" not in inspect.signature(forward).parameters:
        return False
    mask = torch.ones(states.shape[:2], dtype=torch.int64, device=states.device)
    mask[:, 1::2] = 0
    found = []
    for some, seen in ((states, torch.ones_like(mask)), (states, mask), (states[:, ::2], mask[:, ::2])):
        inputs = {"input_ids": tokens, STATES: some, "attention_mask": seen}
        try:
            output = run_oracle(module, forward, inputs, higher(states.dtype))
        except Exception:  # noqa: BLE001 - a model's code may refuse another dtype in any way it likes
            output = run_reference(module, forward, inputs)
        found.append(named_outputs(output)["logits"])
    whole, masked, fewer = found
    near = 0.05 * float((whole - fewer).abs().max())
    if float((masked - whole).abs().max()) <= near:
        return False
    if float((masked - fewer).abs().max()) <= near:
        return True
    raise CacheError("its attention_mask does something else than to hide states of the encoder")
