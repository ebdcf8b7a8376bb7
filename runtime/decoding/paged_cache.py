"""HuggingFace's own loops over pages: a cache that holds no tensors, only an open session of the engine.

`_sample`, `_beam_search` and whatever a model overrides run as they are. They call the model with a `PagedCache`; its
forward hands such a call to `PagedCache.serve`, which lets the session compute the logits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

from ..errors import InputError, RegraftError
from .beside import Keeps, decoder_arguments, states_of

KNOWN = frozenset(
    {
        "input_ids",
        "attention_mask",
        "position_ids",
        "cache_position",
        "past_key_values",
        "use_cache",
        "return_dict",
        "logits_to_keep",
        "tokenizer",
    }
)
"""Arguments of a step: those that say what the session knows already, and those that change no logits. HuggingFace's
loop hands the tokenizer of `stop_strings` on to the model."""


class Session(Protocol):
    """A batch whose sequences go on in step (`Engine.session`)."""

    def prefill(self) -> Tensor:
        """Logits [B, V] behind the prompts."""

    def step(self, tokens: Tensor) -> Tensor:
        """Append a token to each sequence, int64 [B]; logits [B, V] behind it."""

    def reorder(self, index: Tensor) -> None:
        """Sequence i goes on from what sequence index[i] has, int64 [B]."""

    def close(self) -> None:
        """Give the pages back."""


class PagedCache(Cache):
    """Keys and values of a batch in the engine's pages; good for one `generate` call.

    Args:
        open_session: makes the session from the prompts without padding, the length that they have with it, and the
            encoder's states that each row sees, where there is an encoder.
        keeps: what keeps these.
    """

    def __init__(
        self, open_session: Callable[[list[list[int]], int, list[Tensor] | None], Session], keeps: Keeps | None = None
    ) -> None:
        super().__init__(layer_class_to_replicate=DynamicLayer)
        self._open, self._keeps = open_session, keeps
        self._session: Session | None = None
        self._rows, self._length = 0, 0
        self._closed = False

    def serve(self, arguments: Mapping[str, Any]) -> CausalLMOutputWithPast:
        """The model's forward: prefill in the first call, then a token for each sequence; logits [B, 1, V].

        Raises:
            InputError: an argument that the engine does not know, or more than one token at once.
            RegraftError: the call of `generate` that the cache belongs to is over.
        """
        if self._closed:
            raise RegraftError("past_key_values: these pages were given back when generate ended; start without them")
        given, arguments = arguments, decoder_arguments(arguments)
        unknown = [n for n, v in arguments.items() if n not in KNOWN and not _says_nothing(v)]
        ids = arguments.get("input_ids")
        if unknown or ids is None:
            name = unknown[0] if unknown else "a call without input_ids"
            raise InputError(f"{name} is not served over a paged cache; use_cache=False or regraft.restore(model) is")
        if self._session is None:
            states = states_of(given, self._keeps) if self._keeps is not None else None
            self._session = self._open(prompts(ids, arguments.get("attention_mask")), ids.shape[1], states)
            logits: Any = self._session.prefill()
        elif ids.shape[1] != 1:
            raise InputError(f"input_ids of {ids.shape[1]} tokens: over a paged cache each step takes one")
        else:
            logits = self._session.step(ids[:, 0])
        self._rows, self._length = ids.shape[0], self._length + ids.shape[1]
        return CausalLMOutputWithPast(logits=logits[:, None], past_key_values=self)

    def close(self) -> None:
        """Give the pages back; nothing can be computed with the cache any more."""
        self._closed = True
        session, self._session = self._session, None
        if session is not None:
            session.close()

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens so far, padding included."""
        return self._length

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Each beam goes on from another one's pages, which are shared until one of them writes."""
        if self._session is None:
            raise RegraftError("a paged cache was reordered before its prompt was computed")
        self._session.reorder(beam_idx)

    @property
    def self_attention_cache(self) -> Nothing:
        """For who takes the cache of an encoder-decoder apart by rows: outside of the pages there is nothing of it."""
        return Nothing(self._rows)

    cross_attention_cache = self_attention_cache

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> NoReturn:
        raise RegraftError("a paged cache is written by the engine alone, and the model was called around its forward")

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"{self._length} tokens"
        return f"PagedCache({state})"


class Nothing:
    """A cache of any number of layers, without a key in any of its rows."""

    def __init__(self, rows: int) -> None:
        self.keys = self.values = torch.empty(rows, 0, 0, 0)
        self.layers = self

    def __getitem__(self, layer: int) -> Nothing:
        return self


def prompts(input_ids: Tensor, attention_mask: Tensor | None) -> list[list[int]]:
    """The tokens of each row without its padding, `attention_mask` [B, L] or [1, L] being 0 on the left, then 1.

    Raises:
        InputError: tokens of another dtype than int64 or int32, or a mask of another shape.
    """
    if input_ids.dtype not in (torch.int64, torch.int32):
        raise InputError(f"input_ids of {input_ids.dtype}: expected torch.int64 or torch.int32")
    rows: list[list[int]] = input_ids.tolist()
    if attention_mask is None:
        return rows
    shape = list(input_ids.shape)
    if list(attention_mask.shape) not in (shape, [1, *shape[1:]]):
        raise InputError(f"attention_mask of shape {list(attention_mask.shape)}: expected {shape}, as input_ids")
    attention_mask = attention_mask.expand_as(input_ids)
    sizes: list[int] = attention_mask.long().sum(-1).tolist()
    return [row[len(row) - size :] for row, size in zip(rows, sizes, strict=True)]


def is_left_padding(attention_mask: Tensor) -> bool:
    """Whether the mask is 2D, 0 on the left, 1 from some place on, and keeps a token of each row."""
    if attention_mask.dim() != 2 or attention_mask.numel() == 0:
        return False
    mask = attention_mask.long()
    rises = (mask[:, 1:] >= mask[:, :-1]).all() & (mask[:, -1] == 1).all() & (mask.min() >= 0)
    return bool(rises & (mask == attention_mask).all())


def are_plain_positions(position_ids: Tensor, attention_mask: Tensor | None) -> bool:
    """Whether positions count the tokens of each row, from 0 at the first that is not padding."""
    if position_ids.dim() != 2:
        return False
    if attention_mask is None:
        return torch.equal(position_ids, torch.arange(position_ids.shape[1]).to(position_ids).expand_as(position_ids))
    if position_ids.shape != attention_mask.shape and position_ids.shape[0] != 1:
        return False
    real = attention_mask.bool()
    counted = attention_mask.long().cumsum(-1) - 1
    return torch.equal(position_ids.expand_as(counted)[real], counted[real])


def _says_nothing(value: Any) -> bool:
    return value is None or value is False


def close_all(given: Sequence[PagedCache | Session]) -> None:
    """Close each, whatever happens to the others."""
    for index, one in enumerate(given):
        try:
            one.close()
        except BaseException:
            close_all(given[index + 1 :])
            raise
