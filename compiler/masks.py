"""What the mask of an attention is, found by running the part of the graph that computes it.

    masks = Masks(program, model)
    found = masks.classify(node)            # node: a call of regraft::attention
    if found.replaceable:
        #   mask -> left=found.left, right=found.right, key_mask=found.key_mask (a node, [B, K]; cast it unless bool)
        guard = masks.guard(node, found)    # before the graph is changed
        ...
        guard.holds(tensors)                # at run time: once for each new sequence length

The mask (or the additive float mask, the op's `bias`) reads shapes, positions and padding, never activations; one in
which floating inputs show, as an additive mask of the caller's, stays. Its backward slice is run at several sizes, with
padding left, right, in holes and none, and with arbitrary values in every integer input, and compared with

    visible[b, h, q, k] = (left < 0 or k >= p - left) and (right < 0 or k <= p + right) and key_mask[b, k]
    where p = q + K - Q

Sizes go beyond every window that the config could name, up to `LARGEST`. What holds for the samples is still only
inferred: a window beyond `LARGEST` shows at run time, hence the guard. Anything else keeps its mask: chunked, packed
(positions that restart), prefix, a mask over heads, a real bias (ALiBi, relative positions), unknown.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from .program import InputKind, Limits, Program
from .slices import Slice, SliceError, sample, sizes_of

LARGEST = 4096
"""Longest sampled window; masks are `[Q, K]`, so that a sample costs some tens of megabytes at most."""
_SMALL = (1, 2, 5, 8, 13)
_MASK, _BIAS = 3, 4
"""Positions of `mask` and `bias` among the op's arguments."""


@dataclass(frozen=True)
class Description:
    """What the mask of one attention is.

    `kind` is for people. Where `replaceable`, (`left`, `right`, `key_mask`) say the same as the mask; `argument` is
    the op's argument that they replace, `mask` or `bias`. `reason` says why not, where not. `seen` is the largest
    number of keys that was sampled.
    """

    kind: str
    argument: str = "mask"
    replaceable: bool = False
    left: int = -1
    right: int = -1
    key_mask: fx.Node | None = None
    reason: str = ""
    seen: int = 0


class MaskGuard:
    """Recomputes a mask from real inputs and compares it with what replaced it."""

    def __init__(self, piece: Slice, found: Description, lengths: tuple[Any, Any], limits: Limits) -> None:
        self.slice, self.found = piece, found
        self._lengths, self._limits = lengths, limits

    def holds(self, tensors: dict[str, Tensor]) -> bool:
        """Whether the template equals the mask for these inputs by keyword (all inputs of the graph)."""
        sizes = self._limits.sizes(tensors)
        queries, keys = (_evaluate(length, sizes) for length in self._lengths)
        try:
            mask, *rest = self.slice(tensors)
        except SliceError:
            return False
        visible = visibility(mask)
        if visible is None or not visible.numel():
            return False
        return _equals(visible, rest[0] if rest else None, queries, keys, self.found)


class Masks:
    """Classifies the masks of one program; layers that share a mask share the answer."""

    def __init__(self, program: Program, model: nn.Module) -> None:
        self.program, self.model = program, model
        self._candidates = config_sizes(model)
        self._known: dict[tuple[Any, ...], Description] = {}

    def classify(self, node: fx.Node) -> Description:
        """The description of the mask of a `regraft::attention` node."""
        mask, bias = _argument(node, _MASK, "mask"), _argument(node, _BIAS, "bias")
        argument, source = ("bias", bias) if mask is None else ("mask", mask)
        if source is None:
            return Description("none", reason="there is no mask")
        lengths = self._lengths(node)
        key = (source, argument, *map(str, lengths))
        if key not in self._known:
            try:
                self._known[key] = self._classify(source, argument, lengths)
            except SliceError as error:
                self._known[key] = Description("unknown", argument, reason=str(error))
        return self._known[key]

    def guard(self, node: fx.Node, found: Description) -> MaskGuard:
        """What checks `found` on real inputs. Make it while the graph still has the mask."""
        position = _MASK if found.argument == "mask" else _BIAS
        source = _argument(node, position, found.argument)
        if source is None:
            raise ValueError(f"{node.name} has no {found.argument} any more")
        nodes = [source] if found.key_mask is None else [source, found.key_mask]
        return MaskGuard(Slice.of(self.program, nodes, self.model), found, self._lengths(node), self.program.limits)

    def _lengths(self, node: fx.Node) -> tuple[Any, Any]:
        """Q and K as sizes or sympy expressions."""
        q, k = node.args[0], node.args[1]
        assert isinstance(q, fx.Node) and isinstance(k, fx.Node)
        return _expression(q.meta["val"].shape[2]), _expression(k.meta["val"].shape[2])

    def _classify(self, source: fx.Node, argument: str, lengths: tuple[Any, Any]) -> Description:
        alone = Slice.of(self.program, [source], self.model)
        if reads_activations(source):
            return Description("bias", argument, reason="it is computed from activations")
        if self._holds_floats(alone, lengths):
            names = ", ".join(alone.users_by_value)
            return Description("values", argument, reason=f"it depends on numbers in {names}, of which any may come")
        fitted = self._fit(alone, argument, lengths)
        if not fitted.replaceable:
            return fitted
        if self._agrees(alone, fitted, lengths):
            return fitted
        for candidate in _key_masks(self.program, source, lengths[1]):
            pair = Slice.of(self.program, [source, candidate], self.model)
            padded = _with(fitted, key_mask=candidate, kind=f"{fitted.kind}, padding")
            if self._agrees(pair, padded, lengths):
                return padded
        names = ", ".join(alone.users_by_value) or "nothing"
        reason = f"it depends on the values of {names} in another way than by padding"
        return Description("values", argument, reason=reason)

    def _holds_floats(self, piece: Slice, lengths: tuple[Any, Any]) -> bool:
        """Whether floating inputs show in the mask: an additive mask of the caller's, all zeros in a sample."""
        sizes = list(self._sizes(lengths))[1]
        tensors = sample(self.program, sizes)
        floats = [n for n in piece.users_by_value if tensors[n].is_floating_point()]
        if not floats:
            return False
        generator = torch.Generator().manual_seed(0)
        others = dict(tensors)
        for name in floats:
            lowest = torch.rand(tensors[name].shape, generator=generator) < 0.5
            others[name] = tensors[name].masked_fill(
                lowest.to(tensors[name].device), torch.finfo(tensors[name].dtype).min
            )
        return not torch.equal(piece(tensors)[0], piece(others)[0])

    def _fit(self, piece: Slice, argument: str, lengths: tuple[Any, Any]) -> Description:
        """The window of the mask without padding at the largest sampled size, checked at that size."""
        sizes = list(self._sizes(lengths))[-1]
        queries, keys = (_evaluate(length, sizes) for length in lengths)
        last = Description("unknown", argument, reason="it is no window")
        for fill in (1, 3):  # a padding mask of ones, or tokens none of which is padding
            tensors = {n: t if t.is_floating_point() else t * fill for n, t in sample(self.program, sizes).items()}
            visible = visibility(piece(tensors)[0])
            if visible is None:
                return Description("bias", argument, reason="its values are not only 0 and the lowest")
            if not visible.numel():  # one row of the inputs is less than one of the model's, which says nothing
                last = Description("unknown", argument, reason="it has no rows where the inputs have one")
                continue
            if visible.dim() > 1 and (visible != visible[:1, :1]).any():
                last = Description("unknown", argument, reason="it differs between heads or batch rows")
                continue
            plane = visible[0, 0]
            if plane.shape[-1] not in (1, keys) or plane.shape[-2] not in (1, queries):
                last = Description("unknown", argument, reason=f"it is {tuple(visible.shape)}")
                continue
            plane = plane.expand(queries, keys)
            found = _window_of(plane, argument, queries, keys)
            if _equals(plane[None, None], None, queries, keys, found):
                return found
            kind = name_of_plane(plane, self._candidates)
            last = Description(kind, argument, reason="it is no window around the query")
        return last

    def _agrees(self, piece: Slice, found: Description, lengths: tuple[Any, Any]) -> bool:
        for sizes in self._sizes(lengths):
            queries, keys = (_evaluate(length, sizes) for length in lengths)
            for tensors in _patterns(sample(self.program, sizes), small=keys <= 64):
                visible, *rest = piece(tensors)
                seen = visibility(visible)
                if (
                    seen is None
                    or not seen.numel()
                    or not _equals(seen, rest[0] if rest else None, queries, keys, found)
                ):
                    return False
        return True

    def _sizes(self, lengths: tuple[Any, Any]) -> Iterator[dict[str, int]]:
        """Sizes of all symbols, small first, at last one beyond every window that the config could name."""
        symbols = sorted({str(s) for length in lengths for s in getattr(length, "free_symbols", ())})
        wanted = [*_SMALL, *sorted({c + d for c in self._candidates if c <= 64 for d in (0, 1, 2)} - set(_SMALL))[:12]]
        largest = max([c for c in self._candidates if c <= LARGEST], default=64) + 2
        for length in [*wanted, largest]:
            batch = 3 if length <= 64 else 1
            chosen = {}
            for offset, symbol in enumerate(symbols):
                low, high = self.program.limits.ranges.get(symbol, (1, None))
                size = max(low, length + 2 * offset)
                chosen[symbol] = size if high is None else min(size, high)
            yield sizes_of(self.program, chosen, batch=batch, default=length)


def _argument(node: fx.Node, position: int, name: str) -> fx.Node | None:
    value = node.args[position] if len(node.args) > position else node.kwargs.get(name)
    return value if isinstance(value, fx.Node) else None


def _expression(size: Any) -> Any:
    return size.node.expr if isinstance(size, torch.SymInt) else int(size)


def _evaluate(length: Any, sizes: Mapping[str, int]) -> int:
    if isinstance(length, int):
        return length
    return int(length.subs({s: sizes[str(s)] for s in length.free_symbols}))


def visibility(mask: Tensor) -> Tensor | None:
    """`[B, H, Q, K]` bool; an additive mask is one where all values are 0 or at most half the lowest number."""
    mask = mask.reshape((1,) * (4 - mask.dim()) + tuple(mask.shape)) if mask.dim() < 4 else mask
    if mask.dtype == torch.bool:
        return mask
    if not mask.is_floating_point():
        return None
    hidden = mask <= torch.finfo(mask.dtype).min / 2
    return ~hidden if bool((hidden | (mask == 0)).all()) else None


def _template(queries: int, keys: int, found: Description, device: torch.device) -> Tensor:
    visible = torch.ones(queries, keys, dtype=torch.bool, device=device)
    if found.left >= 0:
        visible = visible.triu_(keys - queries - found.left)
    if found.right >= 0:
        visible = visible.tril_(keys - queries + found.right)
    return visible


def _equals(visible: Tensor, key_mask: Tensor | None, queries: int, keys: int, found: Description) -> bool:
    if visible.shape[-1] not in (1, keys) or visible.shape[-2] not in (1, queries):
        return False
    wanted = _template(queries, keys, found, visible.device)[None, None]
    if key_mask is not None:
        if key_mask.dim() != 2 or key_mask.shape[1] != keys or key_mask.shape[0] not in (1, visible.shape[0]):
            return False
        wanted = wanted & (key_mask != 0)[:, None, None, :]
    return bool((visible == wanted).all())


def _window_of(plane: Tensor, argument: str, queries: int, keys: int) -> Description:
    """The narrowest window around the query that contains all that a `[Q, K]` plane shows."""
    rows = torch.arange(queries, device=plane.device)[plane.any(-1)]
    if rows.numel() == 0:
        return Description("empty", argument)
    shown = plane[rows].to(torch.uint8)
    first, last = shown.argmax(-1), keys - 1 - shown.flip(-1).argmax(-1)
    low, high = (int(d) for d in ((first - rows).min() - (keys - queries), (last - rows).max() - (keys - queries)))
    left = -1 if low <= -(keys - 1) else -low
    right = -1 if high >= queries - 1 else high
    if left < -1 or right < -1:
        return Description("unknown", argument)
    names = {(True, True): "bidirectional", (True, False): "causal" if right == 0 else f"{right} ahead"}
    kind = names.get((left < 0, right < 0)) or (
        f"causal, window {left + 1}" if right == 0 else f"window {left}|{right}"
    )
    return Description(kind, argument, True, left, right, None, "", keys)


def name_of_plane(plane: Tensor, candidates: list[int]) -> str:
    """A name for a plane that is no window, for the report."""
    queries, keys = plane.shape
    q, k = torch.arange(queries)[:, None], torch.arange(keys)[None]
    plane = plane.cpu()
    for size in candidates:
        if size < queries and bool((plane == ((q // size == k // size) & (k <= q))).all()):
            return f"chunked {size}"
    causal = k <= q
    if bool((plane & ~causal).any()) and bool((plane | ~causal).all()):
        return "prefix"
    if bool((plane == torch.eye(queries, keys, dtype=torch.bool)).all()):
        return "packed"
    return "unknown"


def _key_masks(program: Program, source: fx.Node, keys: Any) -> Iterator[fx.Node]:
    """Nodes that the mask is made from and that could say which keys are real: `[B, K]`, booleans first."""
    users = {n for n, made in program.placeholder_inputs().items() if made.kind is InputKind.USER}
    found, seen, stack = [], set(), [source]
    while stack:
        for node in stack.pop().all_input_nodes:
            if node in seen:
                continue
            seen.add(node)
            stack.append(node)
            value = node.meta.get("val")
            if not isinstance(value, Tensor) or value.dim() != 2 or value.is_floating_point():
                continue
            if _expression(value.shape[1]) == keys and (value.dtype == torch.bool or node in users):
                found.append(node)
    yield from sorted(found, key=lambda n: n.meta["val"].dtype != torch.bool)


def _patterns(ones: dict[str, Tensor], small: bool) -> Iterator[dict[str, Tensor]]:
    """Inputs of one size: as they are, then with zeros left, right and in holes, then with any values."""
    yield ones
    generator = torch.Generator().manual_seed(0)
    integers = [n for n, t in ones.items() if not t.is_floating_point() and t.dim() >= 2]
    if not integers:
        return
    for style in ("left", "right", "holes", "count", "any") if small else ("holes",):
        yield {n: _style(t, style, generator) if n in integers else t for n, t in ones.items()}
    if small:
        for name in integers:
            for style in ("holes", "any"):
                yield {n: _style(t, style, generator) if n == name else t for n, t in ones.items()}


def _style(tensor: Tensor, style: str, generator: torch.Generator) -> Tensor:
    length = tensor.shape[-1]
    position = torch.arange(length, device=tensor.device)
    if style == "count":
        return position.expand(tensor.shape).to(tensor.dtype).clone()
    if style == "any":
        high = 2 if tensor.dtype == torch.bool else 7
        return torch.randint(0, high, tensor.shape, generator=generator).to(tensor)
    out = tensor.clone()
    for row in range(tensor.shape[0]):
        pad = (row + 1) * length // (tensor.shape[0] + 2)
        if style == "left":
            out[row, ..., :pad] = 0
        elif style == "right":
            out[row, ..., length - pad :] = 0
        else:
            holes = torch.rand(length, generator=generator) < 0.3
            out[row, ..., holes.to(tensor.device)] = 0
    return out


def reads_activations(source: fx.Node) -> bool:
    """Whether anything on the way is a matrix product or an attention: then it is no mask."""
    seen, stack = set(), [source]
    heavy = ("linear", "addmm", "mm", "bmm", "matmul", "attention", "convolution")
    while stack:
        for node in stack.pop().all_input_nodes:
            if node not in seen:
                seen.add(node)
                stack.append(node)
                name = str(getattr(node.target, "_opname", ""))
                if node.op == "call_function" and name in heavy:
                    return True
    return False


def config_sizes(model: nn.Module) -> list[int]:
    """Every whole number in the config, nested ones too, ascending: one of them may be a window."""
    config = getattr(model, "config", None)
    stack: list[Any] = [config.to_dict() if config is not None and hasattr(config, "to_dict") else {}]
    found = set()
    while stack:
        value = stack.pop()
        if isinstance(value, dict):
            stack += value.values()
        elif isinstance(value, list | tuple):
            stack += value
        elif isinstance(value, int) and not isinstance(value, bool) and value > 1:
            found.add(value)
    return sorted(found)


def _with(found: Description, **changes: Any) -> Description:
    return Description(**{**found.__dict__, **changes})
