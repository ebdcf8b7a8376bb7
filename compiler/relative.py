"""Biases of scores that are looked up by how far a key lies behind its query: T5's, whose buckets end somewhere.

    bias[h, i, j] = weight[bucket(i - j), h]    ->    table[h, d] = weight[buckets[d], h],  d = min(i - j, W - 1)

The buckets are a part of the graph that reads positions and sizes. It is run for one sequence; that beyond W nothing
changes is certain where the last bucket is the last row of the weight, and buckets never fall.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, fx, nn

from .program import InputKind, Program
from .slices import Slice

aten = torch.ops.aten

LARGEST: Final = 2048
"""The longest sequence for which buckets are looked at."""
_SHORT: Final = 40
_MOVES: Final = frozenset(
    [
        aten.permute.default,
        aten.transpose.int,
        aten.unsqueeze.default,
        aten.squeeze.dim,
        aten.expand.default,
        aten.clone.default,
    ]
)


@dataclass(frozen=True)
class Relative:
    """A table by distance: `weight[buckets].T`; buckets int64 `[W]`, those of the last distance hold from there on."""

    weight: fx.Node
    buckets: Tensor


Inputs = Callable[[int], dict[str, Tensor]]
"""Inputs by keyword for one sequence of so many tokens."""


def relative_bias(program: Program, model: nn.Module, bias: fx.Node, inputs: Inputs) -> Relative | None:
    """What a bias `[1, H, T, T]` is by distance, for keys that are not ahead of the query; None: it is another kind.

    Raises `SliceError` where its parts cannot be run.
    """
    node: Any = bias
    while node.target in _MOVES:
        node = node.args[0]
    if node.target is not aten.embedding.default:
        return None
    weight, index = node.args[:2]
    made = program.placeholder_inputs().get(weight)
    if made is None or made.kind is not InputKind.PARAMETER or weight.meta["val"].dim() != 2:
        return None
    found = Slice.of(program, [index], model)(inputs(LARGEST))[0]
    if tuple(found.shape) != (LARGEST, LARGEST):
        return None
    buckets = found[-1].flip(0)
    last = int(weight.meta["val"].shape[0]) - 1
    if int(buckets[-1]) != last or bool((buckets.diff() < 0).any()):
        return None
    buckets = buckets[: int((buckets < last).sum()) + 1]
    return Relative(weight, buckets) if _is_table(program, model, bias, weight, buckets, inputs) else None


def _is_table(
    program: Program, model: nn.Module, bias: fx.Node, weight: fx.Node, buckets: Tensor, inputs: Inputs
) -> bool:
    """Whether the bias is what the table says, wherever a key is not ahead."""
    for length in (1, 2, _SHORT, 2 * _SHORT + 1):
        value, rows = Slice.of(program, [bias, weight], model)(inputs(length))
        places = torch.arange(length, device=value.device)
        apart = places[:, None] - places[None, :]
        wanted = rows[buckets[apart.clamp(0, len(buckets) - 1)]].permute(2, 0, 1)  # [H, T, T]
        if value.shape[-3:] != wanted.shape or value.numel() != wanted.numel():
            return False
        if not torch.equal(value.reshape(wanted.shape)[:, apart >= 0], wanted[:, apart >= 0]):
            return False
    return True
