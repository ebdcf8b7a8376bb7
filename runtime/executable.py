"""A compiled program bound to a module's live weights: straight-line Python, one call per kernel."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from operator import getitem, itemgetter
from typing import Any

import torch

from ..compiler.program import InputKind, Program, Recipe
from . import numerics
from .cuda_graphs import Graphs
from .direct import direct
from .weights import Weights, pack_key


class Executable:
    """Runs `program` on tensors given by argument name.

    Where each weight lives is resolved once; what stands there is read at every call, so that a replaced or moved
    parameter is used as it is. The caller has asked `Weights.changes()` before. On a GPU, shapes that come again are
    run by a CUDA graph if their outputs have at most `graph_bytes` bytes; with None each call runs as if it
    were the first.
    """

    def __init__(self, program: Program, weights: Weights, graph_bytes: int | None = None) -> None:
        self.program = program
        self._weights = weights
        self._run = direct(program.gm)
        kinds = (InputKind.USER, InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT, InputKind.PACKED)
        grouped = {kind: [i for i in program.inputs if i.kind is kind] for kind in kinds}
        live = grouped[InputKind.PARAMETER] + grouped[InputKind.BUFFER]
        slots = [weights.slots[i.target] for i in live]
        self._tables = [s[0] for s in slots]
        self._names = [s[1] for s in slots]
        self._constants = [weights.value(i) for i in grouped[InputKind.CONSTANT]]
        self.recipes: list[Recipe] = [i.recipe for i in grouped[InputKind.PACKED] if i.recipe is not None]
        self._packs = [pack_key(r) for r in self.recipes]
        self.arguments = tuple(i.target for i in grouped[InputKind.USER])
        ordered = grouped[InputKind.USER] + live + grouped[InputKind.CONSTANT] + grouped[InputKind.PACKED]
        place = {id(meaning): index for index, meaning in enumerate(ordered)}
        order = [place[id(meaning)] for meaning in program.inputs]
        self._arrange: Callable[[Sequence[Any]], Any] = itemgetter(*order) if len(order) > 1 else list
        graphs = graph_bytes is not None and not numerics.wanted()
        self.graphs = Graphs(self._arranged, len(self.arguments), graph_bytes or 0) if graphs else None

    def _arranged(self, *values: Any) -> Any:
        return self._run(*self._arrange(values))

    def prepare(self) -> None:
        """Pack what the program wants packed."""
        self._weights.pack(self.recipes)

    def flat(self, tensors: Mapping[str, torch.Tensor], *, directly: bool = False) -> Any:
        """The graph's flat tuple of outputs."""
        version = self._weights.version  # before the weights: what is repacked in between is then of an older version
        values = self._values(tensors)
        with torch.no_grad():
            if self.graphs is not None and not directly:
                return self.graphs(values, version)
            return self._arranged(*values)

    def replayed(self, tensors: Mapping[str, torch.Tensor], may: Callable[[], bool]) -> Any:
        """What a call returns, if there is a CUDA graph for it and `may()` says that it may run; None otherwise.

        Weights must neither move before this returns nor, for what it returns to be right, have changed.
        """
        if self.graphs is None:
            return None
        with torch.no_grad():
            flat = self.graphs.replayed([tensors[name] for name in self.arguments], self._weights.version, may)
        return None if flat is None else self.program.rebuild(flat)

    def _values(self, tensors: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        packs = self._weights.packs
        values = [tensors[name] for name in self.arguments]
        values += map(getitem, self._tables, self._names)
        values += self._constants
        values += [packs[key].value for key in self._packs]
        return values

    def values(self, tensors: Mapping[str, torch.Tensor]) -> Sequence[Any]:
        """What the placeholders of the program's graph are in a call, in their order."""
        found: Sequence[Any] = self._arrange(self._values(tensors))
        return found

    def directly(self, tensors: Mapping[str, torch.Tensor]) -> Any:
        """As a call, without a CUDA graph and without counting its shapes."""
        return self.program.rebuild(self.flat(tensors, directly=True))

    def __call__(self, tensors: Mapping[str, torch.Tensor]) -> Any:
        """What the model's forward would return, without autograd."""
        return self.program.rebuild(self.flat(tensors))
