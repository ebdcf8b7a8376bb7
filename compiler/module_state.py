"""What a forward leaves behind in its modules: put back after a look at the model, and found out where it matters.

A graph computes outputs and nothing else: a forward whose next call reads what this one kept (a state, a count) cannot
be one. Tables that are made when they are first needed are no such thing: they come out the same for other values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import NoneType
from typing import Any, Final

import torch
from torch import Tensor, nn

_PLAIN: Final = (int, float, str, tuple, NoneType)


class Snapshot:
    """Attributes, buffers and parameters of all modules as they are now; values of tensors that are no parameters."""

    def __init__(self, model: nn.Module) -> None:
        self._names = {id(m): name for name, m in model.named_modules()}
        owners = list(model.modules())
        tables = ((m, t) for m in owners for t in (m.__dict__, m._parameters, m._buffers, m._modules))
        self._tables = [(m, t, dict(t)) for m, t in tables]
        kept = [
            v for _, t, old in self._tables for v in old.values() if _is_state(v) and not isinstance(v, nn.Parameter)
        ]
        self._values = [(t, t._version, t.detach().clone()) for t in kept]
        own = {id(t) for _, t, _ in self._tables} | {id(m._modules) for m in owners}
        held = (v for _, _, old in self._tables for v in old.values() if type(v) in (dict, list) and id(v) not in own)
        self._held = [(v, v.copy()) for v in held]

    def written(self) -> dict[str, Any]:
        """Tensors and numbers that are others than they were, by qualified name; a tensor's value as of now."""
        found: dict[str, Any] = {}
        inplace = {id(t) for t, version, _ in self._values if t._version != version}
        for module, table, old in self._tables:
            if table is module._parameters:
                continue
            for name, value in table.items():
                if not isinstance(value, Tensor | int | float):
                    continue
                other = name not in old or value is not old[name]
                if other and not isinstance(value, Tensor) and name in old:
                    other = type(value) is not type(old[name]) or value != old[name]
                if other or id(value) in inplace:
                    path = ".".join(part for part in (self._names[id(module)], name) if part)
                    found[path] = value.detach().clone() if isinstance(value, Tensor) else value
        return found

    def restore_choices(self) -> None:
        """Numbers, names and submodules as they were, but for modules that wrote a tensor, which may belong to them.

        Swin shrinks its windows for good where a stage is no larger, BigBird leaves its sparse attention where a text
        is short: what a look at the model chose is no choice for the calls that follow.
        """
        wrote = {name.rpartition(".")[0] for name, value in self.written().items() if isinstance(value, Tensor)}
        for module, table, old in self._tables:
            if self._names[id(module)] in wrote:
                continue
            for name in old.keys() & table.keys():
                for kind in (_PLAIN, nn.Module):
                    if isinstance(old[name], kind) and isinstance(table[name], kind):
                        table[name] = old[name]

    def restore(self) -> None:
        """Everything as it was."""
        for _, table, old in self._tables:
            for name in table.keys() - old.keys():
                del table[name]
            table.update(old)
        with torch.no_grad():
            for tensor, version, value in self._values:
                if tensor._version != version:
                    tensor.copy_(value)
        for held, copy in self._held:
            if list(map(id, _items(held))) != list(map(id, _items(copy))):
                held.clear()
                held.update(copy) if isinstance(held, dict) else held.extend(copy)


def _items(held: dict[Any, Any] | list[Any]) -> list[Any]:
    return [*held.keys(), *held.values()] if isinstance(held, dict) else held


def _is_state(value: Any) -> bool:
    return isinstance(value, Tensor) and not value.is_meta and not value.is_inference() and type(value) is Tensor


@contextmanager
def state_kept(model: nn.Module) -> Iterator[Snapshot]:
    """Whatever its forwards leave in the modules meanwhile is gone afterwards."""
    snapshot = Snapshot(model)
    try:
        yield snapshot
    finally:
        snapshot.restore()


@contextmanager
def choices_kept(model: nn.Module) -> Iterator[None]:
    """What its forwards choose meanwhile is not chosen afterwards; tables that they make stay."""
    snapshot = Snapshot(model)
    try:
        yield
    finally:
        snapshot.restore_choices()


def state_of(
    snapshot: Snapshot, run: Callable[[Mapping[str, Tensor]], Any], tensors: Mapping[str, Tensor]
) -> str | None:
    """The first attribute in which `run` keeps something for its next call, after a first run on `tensors`; or None.

    Run again on other values of the same sizes: what was written and comes out another is no table.
    """
    first = snapshot.written()
    if not first:
        return None
    run({name: _other(t) for name, t in tensors.items()})
    again = snapshot.written()
    return next((name for name, value in first.items() if not _same(value, again.get(name))), None)


def _other(tensor: Tensor) -> Tensor:
    """Other values of the same kind; flags stay."""
    if tensor.is_floating_point():
        return tensor * 0.75 + 0.1
    if tensor.dim() < 2 or tensor.dtype == torch.bool or int(tensor.max()) <= 1:
        return tensor
    return tensor.roll(1, dims=-1)


def _same(value: Any, other: Any) -> bool:
    if isinstance(value, Tensor):
        return isinstance(other, Tensor) and value.shape == other.shape and torch.equal(value, other)
    return bool(value == other)
