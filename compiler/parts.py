"""A model that no graph holds whole, captured in parts: the base model, else its submodules, else each block.

One run of the original shows which submodules are called, and with what. From the outside in, each is captured like a
model of its own; what fails is opened and its children are tried, down to blocks that are not worth it. A part is a
`Program` whose names are those inside the submodule: served in place of that submodule's forward, it is called with
the same arguments, tensors inside tuples and dicts under flat names (`position_embeddings__0`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .capture import Forward, capture
from .errors import CaptureError
from .program import Note, Program

SMALLEST = 3
"""A submodule with fewer modules in it than this (a norm, a linear layer) is no part."""


@dataclass(frozen=True)
class Part:
    """`module` is the qualified name; `containers` says how nested arguments are put together from flat names."""

    module: str
    program: Program
    containers: Mapping[str, Any]


@dataclass(frozen=True)
class Parts:
    """Submodules that became graphs, none inside another, and notes on what did not."""

    parts: list[Part] = field(default_factory=list)
    notes: list[Note] = field(default_factory=list)


def capture_parts(
    model: nn.Module,
    tensors: dict[str, Tensor],
    static: dict[str, Any] | None = None,
    *,
    forward: Forward | None = None,
) -> Parts:
    """The largest submodules of `model` that can be captured, as called by `forward(model, **tensors, **static)`.

    Raises `CaptureError` where the model does not run on these arguments, or is in training mode.
    """
    if model.training:
        raise CaptureError("", "it is in training mode", hint="call model.eval() first")
    with _recorded(model) as calls, torch.no_grad():
        (forward or type(model).forward)(model, **tensors, **dict(static or {}))
    found = Parts()
    for name, child in model.named_children():
        _descend(name, child, calls, found)
    return found


@contextmanager
def _recorded(model: nn.Module) -> Iterator[dict[nn.Module, tuple[tuple[Any, ...], dict[str, Any]]]]:
    """The arguments of the first call of each submodule."""
    calls: dict[nn.Module, tuple[tuple[Any, ...], dict[str, Any]]] = {}

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.setdefault(module, (args, kwargs))

    handles = [m.register_forward_pre_hook(keep, with_kwargs=True) for m in model.modules() if m is not model]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _descend(
    name: str, module: nn.Module, calls: Mapping[nn.Module, tuple[tuple[Any, ...], dict[str, Any]]], found: Parts
) -> None:
    if sum(1 for _ in module.modules()) < SMALLEST or next(module.parameters(), None) is None:
        return
    if module in calls:
        try:
            found.parts.append(_capture(name, module, *calls[module]))
            return
        except CaptureError as error:
            found.notes.append(Note(name, f"not captured: {error.reason}", error.source))
    for child_name, child in module.named_children():
        _descend(f"{name}.{child_name}", child, calls, found)


def _capture(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Part:
    original = type(module).forward
    try:
        bound = inspect.signature(original).bind(module, *args, **kwargs)
    except TypeError as error:
        raise CaptureError(name, str(error)) from error
    given: dict[str, Any] = {}
    for parameter in list(inspect.signature(original).parameters.values())[1:]:
        if parameter.name not in bound.arguments:
            continue
        value = bound.arguments[parameter.name]
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            given.update(value)
        elif parameter.kind is inspect.Parameter.VAR_POSITIONAL:
            raise CaptureError(name, "it takes any number of positional arguments")
        elif value is not None:
            given[parameter.name] = value
    tensors: dict[str, Tensor] = {}
    containers: dict[str, Any] = {}
    plain: dict[str, Any] = {}
    for key, value in given.items():
        if isinstance(value, Tensor):
            tensors[key] = value
        elif isinstance(value, tuple | list | dict) and value:
            containers[key] = _flat(name, key, value, tensors)
        elif value is None or isinstance(value, bool | int | float | str | tuple | list | dict):
            plain[key] = value
        else:
            raise CaptureError(name, f"it is called with a {type(value).__name__} as {key}")
    if not tensors:
        raise CaptureError(name, "it is called without tensors")
    return Part(name, capture(module, tensors, plain, cache=False, forward=_nested(original, containers)), containers)


def _flat(module: str, name: str, value: Any, tensors: dict[str, Tensor]) -> Any:
    """The structure of a nested argument with names in place of its tensors."""
    if isinstance(value, Tensor):
        tensors[name] = value
        return _Name(name)
    if isinstance(value, dict):
        return {k: _flat(module, f"{name}__{k}", v, tensors) for k, v in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(_flat(module, f"{name}__{i}", v, tensors) for i, v in enumerate(value))
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise CaptureError(module, f"it is called with a {type(value).__name__} in {name}")


@dataclass(frozen=True)
class _Name:
    name: str


def _nested(original: Callable[..., Any], containers: Mapping[str, Any]) -> Callable[..., Any]:
    def forward(module: nn.Module, **given: Any) -> Any:
        used: set[str] = set()
        nested = {name: _fill(shape, given, used) for name, shape in containers.items()}
        return original(module, **{n: v for n, v in given.items() if n not in used}, **nested)

    forward.__signature__ = inspect.signature(original)  # type: ignore[attr-defined]
    return forward


def _fill(shape: Any, given: Mapping[str, Any], used: set[str]) -> Any:
    if isinstance(shape, _Name):
        used.add(shape.name)
        return given[shape.name]
    if isinstance(shape, dict):
        return {k: _fill(v, given, used) for k, v in shape.items()}
    if isinstance(shape, tuple | list):
        return type(shape)(_fill(v, given, used) for v in shape)
    return shape
