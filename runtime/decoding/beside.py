"""A call beside an encoder: what of its arguments is the decoder's, and which states each row sees."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from torch import Tensor

from .encoder import RENAMED

OUTPUTS = "encoder_outputs"
_UNREAD = ("last_hidden_state", "hidden_states", "attentions", "pooler_output")
"""What encoders return: of these only the first is read by a decoder, whose program was made beside nothing else."""


class Keeps(Protocol):
    """What is asked of who keeps an encoder's states."""

    @property
    def masked(self) -> bool:
        """Whether `attention_mask` says which states are seen."""

    def refusal(self, lengths: Iterable[int]) -> str | None:
        """Why states of these lengths cannot be kept now, or None."""


def decoder_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of the model by the names that a decoder alone has for them; beside no encoder, as they are."""
    if arguments.get(OUTPUTS) is None:
        return dict(arguments)
    own = {renamed: name for name, renamed in (*RENAMED.items(), ("attention_mask", "decoder_attention_mask"))}
    theirs = (OUTPUTS, *own.values())
    return {own.get(name, name): value for name, value in arguments.items() if name not in theirs}


def refused_states(arguments: Mapping[str, Any], keeps: Keeps) -> str | None:
    """Why what the encoder made cannot be read from pages, or None."""
    outputs = arguments.get(OUTPUTS)
    if outputs is None:
        return f"a call without {OUTPUTS}"
    names = outputs.keys() if isinstance(outputs, Mapping) else _UNREAD[: len(outputs)]
    other = [name for name in names if name not in _UNREAD and not _hides_nothing(name, outputs)]
    if other:
        return f"{OUTPUTS} with {other[0]}"
    mask = arguments.get("attention_mask")
    if keeps.masked and mask is not None and tuple(mask.shape) != tuple(outputs[0].shape[:2]):
        return f"an attention_mask {list(mask.shape)} of states {list(outputs[0].shape[:2])}"
    return keeps.refusal(_lengths(outputs[0], mask if keeps.masked else None))


def states_of(arguments: Mapping[str, Any], keeps: Keeps) -> list[Tensor]:
    """The states `[N, E]` that each row sees; rows of one prompt share a tensor's values."""
    states, mask = arguments[OUTPUTS][0], arguments.get("attention_mask") if keeps.masked else None
    if mask is None or bool((mask != 0).all()):
        return list(states)
    return [row[seen] for row, seen in zip(states, mask != 0, strict=True)]


def _hides_nothing(name: str, outputs: Any) -> bool:
    return name == "attention_mask" and bool((outputs[name] != 0).all())


def _lengths(states: Tensor, mask: Tensor | None) -> list[int]:
    if mask is None:
        return [states.shape[1]] * states.shape[0]
    lengths: list[int] = (mask != 0).sum(-1).tolist()
    return lengths
