"""Arguments that hold tensors inside tuples, lists, dicts and ModelOutputs, as flat names and back.

`encoder_outputs=BaseModelOutput(last_hidden_state=t)` becomes `encoder_outputs__last_hidden_state=t` and a shape that
puts it together again. A shape is hashable: calls of equal shapes may run the same graph.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

Shape = tuple[Any, ...]
PLAIN = (bool, int, float, str, type(None))


class Unflattenable(TypeError):
    """A value inside an argument that is neither a tensor, nor plain, nor a container of such."""


def flatten(name: str, value: Any, tensors: dict[str, torch.Tensor]) -> Shape:
    """The shape of `value`; its tensors go to `tensors` under names that begin with `name`.

    Raises:
        Unflattenable: names the type that is in the way.
    """
    if type(value) in (torch.Tensor, nn.Parameter):
        tensors[name] = value
        return ("tensor", name)
    if isinstance(value, PLAIN):
        return ("plain", type(value), value)
    if isinstance(value, Mapping) and all(isinstance(k, str) for k in value):
        return ("mapping", type(value), tuple((k, flatten(f"{name}__{k}", v, tensors)) for k, v in value.items()))
    if isinstance(value, (tuple, list)):
        return ("sequence", type(value), tuple(flatten(f"{name}__{i}", v, tensors) for i, v in enumerate(value)))
    raise Unflattenable(f"a {type(value).__name__} in {name}")


def rebuild(shape: Shape, tensors: Mapping[str, torch.Tensor]) -> Any:
    """The value again, with these tensors."""
    kind = shape[0]
    if kind == "tensor":
        return tensors[shape[1]]
    if kind == "plain":
        return shape[2]
    if kind == "mapping":
        items = {k: rebuild(s, tensors) for k, s in shape[2]}
        return shape[1](**items) if shape[1] is not dict else items
    parts = [rebuild(s, tensors) for s in shape[2]]
    return shape[1](*parts) if hasattr(shape[1], "_fields") else shape[1](parts)


def names_in(shape: Shape) -> list[str]:
    """Names of the tensors of a shape."""
    if shape[0] == "tensor":
        return [shape[1]]
    if shape[0] == "plain":
        return []
    parts = (s for _, s in shape[2]) if shape[0] == "mapping" else shape[2]
    return [n for s in parts for n in names_in(s)]


def nest(forward: Callable[..., Any], shapes: Mapping[str, Shape]) -> Callable[..., Any]:
    """`forward` taking the flat names in place of its nested arguments."""
    if not shapes:
        return forward
    inner = {n for shape in shapes.values() for n in names_in(shape)}

    def nested(*args: Any, **kwargs: Any) -> Any:
        flat = {n: kwargs.pop(n) for n in inner}
        return forward(*args, **kwargs, **{n: rebuild(shape, flat) for n, shape in shapes.items()})

    nested.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]
    return nested
