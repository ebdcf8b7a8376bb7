"""Assumptions that passes inferred from samples, asked once for every new set of sizes.

Masks were replaced by windows because they agreed at the sizes that were sampled. Whether they agree at the sizes of a
call is seen by computing the original mask once for them (on one row of the batch); where they do not, a graph that
keeps its masks serves the call.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from typing import Any

import torch

from ..compiler.program import Program
from .executable import Executable

log = logging.getLogger("regraft")

Sizes = tuple[tuple[int, ...], ...]

REMEMBERED = 65536
"""Sets of sizes whose answers are kept."""


class Guarded:
    """An executable, and the one without inferred masks for the sizes where they do not hold."""

    def __init__(self, fast: Executable, keeping_masks: Callable[[], Executable]) -> None:
        self.fast = fast
        self._keeping_masks = keeping_masks
        self._kept: Executable | None = None
        self._holds: dict[Sizes, bool] = {}
        self._lock = threading.Lock()

    @property
    def recipes(self) -> list[Any]:
        """What both want packed."""
        return [*self.fast.recipes, *(self._kept.recipes if self._kept is not None else ())]

    def __call__(self, tensors: Mapping[str, torch.Tensor]) -> Any:
        """What the model's forward would return."""
        if not self.fast.program.guards:
            return self.fast(tensors)
        sizes = self._sizes(tensors)
        holds = self._holds.get(sizes)
        if holds is None:
            if len(self._holds) >= REMEMBERED:
                self._holds.clear()
            holds = self._holds[sizes] = all_hold(self.fast.program, tensors)
            if not holds:
                log.warning(
                    "a mask is not what it was inferred to be at sizes %s; a graph that keeps its masks serves them",
                    sizes,
                )
        return self.fast(tensors) if holds else self._with_masks()(tensors)

    def replayed(self, tensors: Mapping[str, torch.Tensor], may: Callable[[], bool]) -> Any:
        """The same, if a CUDA graph with the inferred masks serves the call and `may()`; None otherwise."""
        holds = not self.fast.program.guards or self._holds.get(self._sizes(tensors), False)
        return self.fast.replayed(tensors, may) if holds else None

    def _sizes(self, tensors: Mapping[str, torch.Tensor]) -> Sizes:
        return tuple(tuple(tensors[name].shape) for name in self.fast.arguments)

    def _with_masks(self) -> Executable:
        with self._lock:
            if self._kept is None:
                self._kept = self._keeping_masks()
                self._kept.prepare()
            return self._kept


def all_hold(program: Program, tensors: Mapping[str, torch.Tensor]) -> bool:
    """Whether every guard holds for these inputs, judged on the first row where they have a common batch."""
    shapes = program.limits.tensors
    firsts = {guard.shape[0] for guard in shapes.values() if guard.shape}
    one_batch = len(firsts) == 1 and isinstance(next(iter(firsts)), str)
    row = {n: t[:1] if one_batch and t.dim() else t for n, t in tensors.items()}
    return all(guard(row) for guard in program.guards)
