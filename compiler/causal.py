"""What the attention of one sequence sees, for keys that are kept: all before the query, or a window; biases.

    reach = Causal(program, model).of(node)         # node: a call of regraft::attention
    #   key j is visible from position p where p - reach.left <= j <= p (left -1: where j <= p),
    #   and reach.slopes[h] * j, or what reach.relative has for its distance, is added to its scores

The masks of an attention are a part of the graph that reads positions and sizes. That part is run for one sequence at
several lengths, beyond every window that its own numbers could mean; a window longer than `LARGEST` is found by putting
smaller numbers in its place. A bias is ALiBi where what it adds to key j differs from slope * j only by a constant of
the row, which a softmax does not see; one that is looked up by distance is a table (`relative`). Anything else is
refused with a reason: bidirectional, prefixes, chunks, padding, masks that read tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from .masks import config_sizes, name_of_plane, reads_activations
from .opset import arguments
from .program import InputKind, Program
from .provenance import module_of
from .relative import Relative, relative_bias
from .slices import Slice, SliceError

LARGEST = 4096
"""Longest sampled window."""
_LARGEST_BIAS = 512
_SMALL = (1, 2, 5, 8, 13, 64)
_NAMED = 80
"""Masks of so many tokens get a name."""
_TRIALS = (23, 41)
"""Numbers put in place of those beyond `LARGEST`."""
_SOURCES = ("mask", "bias", "key_mask")


class CacheError(ValueError):
    """Why keys and values of a program cannot be kept in pages."""


@dataclass(frozen=True)
class Reach:
    """How far back a query sees, and the slopes of ALiBi (float32 `[H]`), if any."""

    left: int
    slopes: Tensor | None = None
    relative: Relative | None = None
    """A bias by distance, if any."""
    longest: int | None = None
    """The longest sequence for which the model has a mask or bias, if they come from a table."""


class _TooLong(ValueError):
    """A table of masks or biases ends before the sampled length."""

    def __init__(self, longest: int) -> None:
        self.longest = longest
        super().__init__(f"a table ends at {longest} tokens")


class Causal:
    """Finds the reach of each attention of one program; layers that share a mask share the answer."""

    def __init__(self, program: Program, model: nn.Module) -> None:
        self.program, self.model = program, model
        self._known: dict[tuple[Any, ...], Reach] = {}

    def of(self, node: fx.Node) -> Reach:
        """The reach of a `regraft::attention` node; raises `CacheError`."""
        given = arguments(node)
        q, k = (given[x].meta["val"].shape for x in ("q", "k"))
        if str(q[2]) != str(k[2]) or str(q[0]) != str(k[0]):
            raise CacheError(f"{_place(node)} attends to something else than its own tokens")
        sources = tuple(given[x] for x in _SOURCES)
        key = (*sources, given["left"], given["right"], q[1])
        if key not in self._known:
            try:
                self._known[key] = self._find(node, given, int(q[1]))
            except SliceError as error:
                raise CacheError(f"the mask of {_place(node)} is not known: {error}") from error
        return self._known[key]

    def _find(self, node: fx.Node, given: Mapping[str, Any], heads: int) -> Reach:
        names = [x for x in _SOURCES if given[x] is not None]
        relative = None
        if "bias" in names:
            relative = relative_bias(self.program, self.model, given["bias"], partial(one_sequence, self.program))
            names = [x for x in names if x != "bias" or relative is None]
        nodes = [given[x] for x in names]
        if any(map(reads_activations, nodes)):
            raise CacheError(f"the mask or bias of {_place(node)} is computed from activations")
        piece = Slice.of(self.program, nodes, self.model)
        lowest = [torch.finfo(n.meta["val"].dtype).min / 2 if n.meta["val"].is_floating_point() else 0 for n in nodes]
        look = _Look(self.program, names, lowest, int(given["left"]), int(given["right"]), heads, _place(node))
        numbers = sorted(n for n in piece.numbers() | set(config_sizes(self.model)) if n > 2)
        largest = _LARGEST_BIAS if "bias" in names else LARGEST
        windows = [n for n in numbers if n <= largest and n in piece.numbers()]
        own = [given["left"]] if 0 < given["left"] <= largest else []
        lengths = sorted({*_SMALL, *(w + d for w in (*windows, *own) if w <= 64 for d in (0, 1, 2))})
        lengths.append(max([*windows, *own, *lengths]) + 2)
        try:
            reach = look.fit(piece, lengths)
        except _TooLong as end:
            reach = replace(
                look.fit(piece, [*(n for n in lengths if n < end.longest), end.longest]), longest=end.longest
            )
        for number in sorted(n for n in piece.numbers() if n > largest):
            trials = [look.fit(piece.with_number(number, n), [*_SMALL[:-1], n + 2]).left for n in _TRIALS]
            if trials[1] - trials[0] == _TRIALS[1] - _TRIALS[0]:
                left = number + trials[0] - _TRIALS[0]
                reach = replace(reach, left=left if reach.left < 0 else min(left, reach.left))
            elif trials[0] != trials[1] or trials[0] != reach.left:
                raise CacheError(f"the mask of {look.place} depends on {number} in another way than as a window")
        if given["left"] > largest:
            reach = replace(reach, left=given["left"] if reach.left < 0 else min(reach.left, given["left"]))
        if reach.slopes is not None and _reads_parameters(piece):
            raise CacheError(f"the bias of {look.place} is computed from weights")
        return replace(reach, relative=relative)


@dataclass(frozen=True)
class _Look:
    """Evaluates one attention's masks, and says what they are."""

    program: Program
    names: list[str]
    lowest: list[float]
    left: int
    right: int
    heads: int
    place: str

    def fit(self, piece: Slice, lengths: list[int]) -> Reach:
        """The reach at the longest length, checked at all of them."""
        samples = [self._at(piece, n, seed) for n in lengths for seed in ((0, 1) if n <= 64 else (0,))]
        visible, bias = samples[-1]
        length = visible.shape[-1]
        first = int(visible[-1].to(torch.uint8).argmax())
        left = length - 1 - first if first else -1
        for seen, _ in samples:
            wanted = _window(seen.shape[-1], left, 0)
            if not torch.equal(seen, wanted):
                kind = _kind(max((v for v, _ in samples if len(v) <= _NAMED), key=len))
                raise CacheError(f"the mask of {self.place} is no causal window ({kind})")
        if bias is None:
            return Reach(left)
        slopes = bias[:, -1, -1] - bias[:, -1, -2]
        for seen, added in samples:
            assert added is not None
            apart = torch.arange(seen.shape[-1], dtype=added.dtype)
            rest = added - slopes[:, None, None] * apart
            off = (rest - rest.diagonal(dim1=1, dim2=2).unsqueeze(-1)).masked_fill(~seen, 0.0).abs().max()
            if float(off) > 1e-6 * (1 + float(slopes.abs().max()) * len(seen)):
                raise CacheError(f"the bias of {self.place} is not a slope of the distance (ALiBi)")
        if not bool((slopes != 0).any()):
            return Reach(left)
        _, plain = self._at(piece, 2, 0, None)  # as the model rounds them
        assert plain is not None
        rounded = (plain[:, 1, 1] - plain[:, 1, 0]).double()
        if float((rounded - slopes).abs().max()) > 0.01 * float(slopes.abs().max()):
            raise CacheError(f"the bias of {self.place} is rounded too much to be a slope")
        return Reach(left, rounded.float())

    def _at(
        self, piece: Slice, length: int, seed: int, target: torch.dtype | None = torch.float64
    ) -> tuple[Tensor, Tensor | None]:
        """Visible `[n, n]` and, where there is a bias, what it adds `[H, n, n]`, for one sequence of n tokens."""
        visible = _window(length, self.left, self.right)
        found = piece(one_sequence(self.program, length, seed), target) if self.names else ()
        bias: Tensor | None = None
        for name, lowest, value in zip(self.names, self.lowest, found, strict=True):
            value = value.cpu()
            if name == "key_mask":
                value = value[:, None, None, :]
            value = value.reshape((1,) * (4 - value.dim()) + tuple(value.shape))
            if 1 < value.shape[3] < length:
                raise _TooLong(value.shape[3])
            if value.shape[0] != 1 or any(s not in (1, length) for s in value.shape[2:]):
                raise CacheError(f"the {name} of {self.place} is {list(value.shape)} for {length} tokens")
            shown = value if value.dtype == torch.bool else value > lowest
            if name == "bias":
                bias = torch.where(shown, value, 0.0)[0].expand(self.heads, length, length)
            if bool((shown != shown[:, :1]).any()):
                raise CacheError(f"the {name} of {self.place} hides other keys from each head")
            visible = visible & shown[0, 0]
        return visible, bias


def one_sequence(program: Program, length: int, seed: int = 0) -> dict[str, Tensor]:
    """Inputs by keyword for one sequence: positions from 0, any tokens."""
    generator = torch.Generator().manual_seed(seed)
    device = next((t.device for t in program.example.values()), torch.device("cpu"))
    out = {}
    for name, guard in program.limits.tensors.items():
        if len(guard.shape) == 1:
            out[name] = torch.zeros(1, dtype=guard.dtype, device=device)
        elif name == "position_ids":
            out[name] = torch.arange(length, device=device)[None]
        else:
            out[name] = torch.randint(0, 3, (1, length), generator=generator).to(device)
    return out


def _window(length: int, left: int, right: int) -> Tensor:
    visible = torch.ones(length, length, dtype=torch.bool)
    visible = visible.triu_(-left) if left >= 0 else visible
    return visible.tril_(right) if right >= 0 else visible


def _kind(visible: Tensor) -> str:
    """A name for `[n, n]`, for people."""
    if bool(visible.all()):
        return "bidirectional"
    return name_of_plane(visible, list(range(2, len(visible)))).split()[0]


def _reads_parameters(piece: Slice) -> bool:
    return any(made.kind is InputKind.PARAMETER for made in piece.inputs)


def _place(node: fx.Node) -> str:
    return module_of(node) or node.name
