"""What is asked of the engine, and what samples its tokens: the interface between the engine and `generate`."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from ..errors import InputError
from .params import SamplingParams

if TYPE_CHECKING:
    from .sequences import Sequence as Running


@dataclass(frozen=True, eq=False)
class Request:
    """One prompt, without padding, and how far it is continued.

    Raises:
        InputError: an empty prompt, or less than one new token.
    """

    tokens: Sequence[int]
    params: Any = None
    """Handed to the epilogue as it is: `SamplingParams`."""
    max_new_tokens: int = 20
    min_new_tokens: int = 0
    """Fewer tokens than this are never the end, whatever they are."""
    stop_tokens: frozenset[int] = frozenset()
    """The first of these that is produced is the last token of the output."""
    stop: Callable[[list[int]], bool] | None = None
    """Asked after every token with prompt and output so far (stop strings): True: this was the last one."""
    salt: Hashable = ()
    """What K and V depend on besides tokens and weights; pages are shared between equal ones only."""

    def __post_init__(self) -> None:
        if not self.tokens:
            raise InputError("a prompt has no tokens: at least one is needed")
        if self.max_new_tokens < 1:
            raise InputError(f"max_new_tokens={self.max_new_tokens}: at least 1 is needed")


def of_rows(
    params: SamplingParams, rows: list[list[int]], padded: list[list[int]], new: int, stop_tokens: frozenset[int]
) -> list[Request]:
    """A request for each row, which is that of `padded` without its padding; each draws a seed if it is sampled."""
    count = len(rows)
    seeds = torch.randint(2**63 - 1, (count,)).tolist() if params.do_sample else [0] * count
    return [
        Request(
            row,
            replace(params, seed=seed, padding=tuple(whole[: len(whole) - len(row)])),
            max_new_tokens=new,
            stop_tokens=stop_tokens,
        )
        for row, whole, seed in zip(rows, padded, seeds, strict=True)
    ]


class Epilogue(Protocol):
    """Makes the next tokens of a batch from its logits, on the device and captured in the CUDA graph of the step."""

    @property
    def graph_key(self) -> Hashable:
        """Equal keys of one epilogue: the same kernels on the same tensors, so that a captured graph serves again."""

    def assign(self, row: int, sequence: Running | None) -> None:
        """Row `row` of the batch is this sequence's from the next step on, or nobody's.

        Everything is given anew: `sequence.request.params`, its prompt and what it produced before
        (`sequence.tokens`, `sequence.produced`), so that a sequence which was preempted or moved goes on as if it had
        not been. What the row needs is uploaded in the order of the current stream, without waiting.
        """

    def __call__(self, logits: Tensor, active: Tensor) -> Tensor:
        """The next tokens, int64 [S], of rows 0 to S-1.

        Args:
            logits: [S, V], not to be written to.
            active: bool [S], rows that take their token in this step; the state of others must not change, and what
                is returned for them is dropped.
        """
