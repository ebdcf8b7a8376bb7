"""A model as a function of flat tokens: sequences lie one behind the other, keys and values in pages.

    flat = flat_program(model)          # see flat.py
    flat.bind(pages)                    # (k, v) of each layer, [P, page, kv_heads, dim]
    logits = flat(step)                 # [R, V]

One graph serves prefill, chunked prefill and decode, alone and mixed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Hashable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from operator import getitem, itemgetter
from typing import Any, Final

import torch
from torch import Tensor, fx

from ...compiler.program import InputKind, LayerSpec, Program, Recipe
from ...kernels import choice
from ...kernels.paged_attention import PAGE_DTYPES
from ...kernels.replay import ALIGNMENT, observed
from ...passes.cache import ROWS
from ..direct import direct
from ..weights import Weights, pack_key
from .encoder import EncoderProgram

aten = torch.ops.aten

MAX_SHAPES: Final = 1024
"""Sets of sizes whose launch plans are kept."""


@dataclass
class EncoderStep:
    """What T tokens read of their encoders' states: each token is a sequence of one query."""

    slots: Tensor
    """int64 [T], all -1: nothing is written."""
    starts: Tensor
    """int32 [T + 1]: 0, 1, 2, ..."""
    lengths: Tensor
    """int32 [T]: states that the token sees; 0 for padding."""
    table: Tensor
    """int32 [T, most]: the pages that hold what is kept of them."""


@dataclass
class Step:
    """One call: T tokens of S sequences, logits of R of them. Tensors are on the model's device.

    Tokens behind `cu_seqlens_q[-1]` are padding: their slots are -1 and nobody may ask for their rows.
    """

    input_ids: Tensor
    """int64 [1, T]"""
    position_ids: Tensor
    """int64 [1, T], from 0 in each sequence."""
    rows: Tensor
    """int64 [R]: the tokens, counted over the whole batch, whose logits are wanted; at least one."""
    cu_seqlens_q: Tensor
    """int32 [S + 1]: sequence s has the tokens from cu_seqlens_q[s] to cu_seqlens_q[s + 1]."""
    lengths: Tensor
    """int32 [S]: tokens of the sequence after this step; 0 for a row of a bucket that is not used."""
    slots: tuple[Tensor, ...]
    """For each group int64 [T]: where the token's key and value go, page * page size + offset; negative: nowhere."""
    tables: tuple[Tensor, ...]
    """For each group int32 [S, most]: the pages of the sequence, in order."""
    max_q: int
    """The most tokens of one sequence in this step."""
    fresh: bool = False
    """Whether every sequence begins in this step: nothing is read from pages then where a kernel makes use of it."""
    encoder: EncoderStep | None = None
    """Of a decoder beside an encoder."""
    every: bool = False
    """Whether rows are all tokens in order: a step of decoding, which has nothing to pick."""


class FlatProgram:
    """A compiled program over pages, bound to the live weights of a model."""

    def __init__(self, program: Program, weights: Weights, vocab: int, encoder: EncoderProgram | None = None) -> None:
        self.program = program
        self.encoder = encoder
        """What computes the keys and values of an encoder's states, if there is an encoder."""
        self.layers = program.layers
        self.groups = _windows(program.layers)
        """The window `left` of each group; -1: all keys are visible."""
        self.vocab = vocab
        self.max_positions = None if program.longest is None else program.longest[0]
        """The most tokens that a sequence may have; `program.longest` says why."""
        self.tabulated = program.tabulated
        """The most tokens for which there are values of positions; None: they are computed."""
        self.counts_padding = False
        """Whether the model itself gives tokens behind padding other positions than they have here."""
        self.uncounted: int | None = None
        """The number of tokens that the model itself counts as no positions, in a prompt."""
        self.captured: Program | None = None
        """The forward over flat tokens as it was captured."""
        self._weights = weights
        by_kind = {kind: [i for i in program.inputs if i.kind is kind] for kind in InputKind}
        live = by_kind[InputKind.PARAMETER] + by_kind[InputKind.BUFFER]
        self._tables, self._names = zip(*(weights.slots[i.target] for i in live), strict=True)
        self._constants = [weights.value(i) for i in by_kind[InputKind.CONSTANT]]
        own_recipes = [i.recipe for i in by_kind[InputKind.PACKED] if i.recipe is not None]
        self._packs = [pack_key(r) for r in own_recipes]
        self.recipes: list[Recipe] = own_recipes + (encoder.recipes if encoder is not None else [])
        self._of_step = [_reader(i.target) for i in by_kind[InputKind.USER] + by_kind[InputKind.STEP]]
        self._paged = [i.target for i in by_kind[InputKind.PAGES]]
        self._pages: list[Tensor | None] | None = None
        own = by_kind[InputKind.USER] + by_kind[InputKind.STEP]
        ordered = own + by_kind[InputKind.PAGES] + live + by_kind[InputKind.CONSTANT] + by_kind[InputKind.PACKED]
        place = {id(meaning): index for index, meaning in enumerate(ordered)}
        self._arrange = itemgetter(*(place[id(meaning)] for meaning in program.inputs))
        self._plans: dict[tuple[Any, ...], tuple[Any, ...]] = {}
        self._seen: set[tuple[Any, ...]] = set()
        self._version = -1

    @cached_property
    def _whole(self) -> Program:
        """Of steps that want every token's logits."""
        return unpicked(self.program)

    @cached_property
    def _run(self) -> Callable[..., Any]:
        return direct(self.program.gm)

    @cached_property
    def _run_whole(self) -> Callable[..., Any]:
        return self._run if self._whole is self.program else direct(self._whole.gm)

    @cached_property
    def token_bytes(self) -> int:
        """About what a token of a step takes while it is computed: its two widest results `[1, T, ...]`."""
        found = [n for n, i in self.program.placeholder_inputs().items() if i.target == "input_ids"]
        tokens = [str(size) for size in found[0].meta["val"].shape]
        widths = [0]
        for node in self.program.graph.nodes:
            value = node.meta.get("val")
            if node.op == "call_function" and isinstance(value, Tensor) and [*map(str, value.shape[:2])] == tokens:
                widths.append(math.prod(s for s in value.shape[2:] if isinstance(s, int)) * value.dtype.itemsize)
        return 2 * max(widths)

    @property
    def version(self) -> int:
        """Another number after weights moved: what was made of the old ones, such as a CUDA graph, is stale."""
        return self._weights.version

    def fingerprint(self) -> Hashable:
        """Another value after the weights were changed: keys and values of before are not these weights'.

        As far as PyTorch counts what is written, and samples show what it does not (`Weights.look_inside`).
        """
        live: list[Tensor] = list(map(getitem, self._tables, self._names))
        versions = tuple([0 if t.is_inference() else t._version for t in live])
        return self.version, self._weights.writes, versions

    def bind(
        self,
        pages: Sequence[tuple[Tensor, Tensor]],
        scales: Sequence[tuple[Tensor, Tensor]] | None = None,
        encoder: Sequence[tuple[Tensor, Tensor]] = (),
    ) -> None:
        """Use these pages from now on: K and V of each layer, and their scales (float32 `[P, page, kv_heads]`).

        `encoder` are those of each attention to an encoder's states. They are read and written where they are. Raises
        ValueError where they are not as `layers` says.
        """
        layers = (*self.layers, *(self.encoder.layers if self.encoder is not None else ()))
        for index, (layer, pair) in enumerate(zip(layers, (*pages, *encoder), strict=True)):
            for tensor, name, dim in zip(pair, ("k", "v"), (layer.key_dim, layer.value_dim), strict=True):
                if tensor.dim() != 4 or tuple(tensor.shape[2:]) != (layer.kv_heads, dim):
                    wanted = f"[P, page, {layer.kv_heads}, {dim}]"
                    raise ValueError(f"{name} pages of layer {index} are {list(tensor.shape)}, wanted {wanted}")
                if tensor.dtype != layer.dtype:
                    raise ValueError(f"{name} pages of layer {index} are {tensor.dtype}, wanted {layer.dtype}")
        if (scales is None) == any(layer.dtype in PAGE_DTYPES for layer in self.layers):
            raise ValueError(f"pages of {self.layers[0].dtype} {'need' if scales is None else 'have no'} scales")
        given: dict[str, Tensor] = {}
        for kind, pairs in (("{}", pages), ("{}_scale", scales or ()), ("encoder_{}", encoder)):
            for index, (k, v) in enumerate(pairs):
                given |= {f"{kind.format('k')}.{index}": k, f"{kind.format('v')}.{index}": v}
        self._pages = [given.get(name) for name in self._paged]
        self._forget()

    def unbind(self) -> None:
        """Hold no pages any more."""
        self._pages = None
        self._forget()

    @torch.no_grad()
    def __call__(self, step: Step) -> Tensor:
        """Write the keys and values of the tokens into the pages, and return logits `[R, V]`.

        Who calls has made sure that the model's weights are as they were (`flat_program` looks). Raises RuntimeError
        before `bind`.
        """
        arranged = self.values(step)
        run = self._run_whole if step.every else self._run
        logits: Tensor = (self._planned(run, step, arranged) if step.input_ids.is_cuda else run(*arranged))[0]
        return logits[0]

    def program_of(self, step: Step) -> Program:
        """What is run for a step."""
        return self._whole if step.every else self.program

    def values(self, step: Step) -> Sequence[Any]:
        """What the placeholders of the program's graph are in a call, in their order."""
        if self._pages is None:
            raise RuntimeError("a flat program needs pages: call bind(pages) first")
        own = [read(step) for read in self._of_step]
        values = [*own, *self._pages, *map(getitem, self._tables, self._names), *self._constants]
        packs = self._weights.packs
        values += [packs[key].value for key in self._packs]
        arranged: Sequence[Any] = self._arrange(values)
        return arranged

    def _planned(self, run: Callable[..., Any], step: Step, values: Sequence[Any]) -> Any:
        """The program, each kernel by the plan that was noted when these sizes came last."""
        if observed():
            return run(*values)
        if self._version != self._weights.version:
            self._version = self._weights.version
            self._forget()
        given = (step.input_ids, step.position_ids, step.rows, step.cu_seqlens_q, step.lengths)
        tensors = (*given, *step.slots, *step.tables)
        if step.encoder is not None:
            tensors += (step.encoder.slots, step.encoder.starts, step.encoder.lengths, step.encoder.table)
        key = (step.max_q, step.fresh, step.every, *[(t.shape, t.stride(), t.data_ptr() % ALIGNMENT) for t in tensors])
        plans = self._plans.get(key)
        if plans is not None:
            return choice.following(plans, run, values)
        if key not in self._seen:  # kernels make their plans in the first call
            self._seen.add(key)
            return run(*values)
        if len(self._seen) > MAX_SHAPES:
            self._forget()
        result, self._plans[key] = choice.noting(run, values)
        return result

    def _forget(self) -> None:
        self._plans.clear()
        self._seen.clear()


def _windows(layers: Sequence[LayerSpec]) -> tuple[int, ...]:
    """The window of each group, by its number."""
    found = {layer.group: layer.left for layer in layers}
    return tuple(found[group] for group in range(len(found)))


def unpicked(program: Program) -> Program:
    """The program for steps whose rows are all tokens in order, so that picking them changes nothing."""
    names = {i.name for i in program.inputs if i.target in (ROWS, "rows")}
    graph = fx.Graph()
    graph.output(graph.graph_copy(program.graph, {}))
    found = [n for n in graph.nodes if _picks(n, names)]
    for node in found:
        node.replace_all_uses_with(node.args[0])
        graph.erase_node(node)
    return replace(program, gm=fx.GraphModule(program.gm, graph)) if found else program


def _picks(node: fx.Node, names: Collection[str]) -> bool:
    """Whether this is `x[:, rows]` of the input of one of these names."""
    if node.target is aten.index.Tensor:
        where: Any = node.args[1]
        return len(where) == 2 and where[0] is None and getattr(where[1], "name", None) in names
    if node.target is aten.index_select.default:
        return bool(node.args[1] == 1) and getattr(node.args[2], "name", None) in names
    return False


_FIELDS: Final = {ROWS: "rows", "slots": "slots", "block_table": "tables"}


def _reader(target: str) -> Callable[[Step], Any]:
    """What reads an input of the program from a step."""
    name, _, group = target.partition(".")
    field = _FIELDS.get(name, name)
    if not group:
        return lambda step: getattr(step, field)
    if name == "encoder":
        return lambda step: getattr(step.encoder, group)
    index = int(group)
    return lambda step: getattr(step, field)[index]
