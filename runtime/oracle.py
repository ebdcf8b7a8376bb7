"""The model's own code run one precision up, as the oracle that original and rewritten forward are measured against.

No copy of the model is made: a dispatch mode raises the operands of each operation as it runs. An operation is raised
when it touches a weight, a floating input, or something raised before; what only depends on integers and shapes
(position buckets, masks) stays as the model computes it, so that its discrete decisions stay the model's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..compiler.module_state import choices_kept, state_kept
from ..compiler.verify import upcast

CHUNK = 1 << 22
"""Elements of a weight that are raised at once."""

aten = torch.ops.aten


class Raise(TorchDispatchMode):
    """Runs every operation that touches a weight or a raised value with floating operands in `target`."""

    def __init__(self, module: nn.Module, target: torch.dtype) -> None:
        super().__init__()
        self.target = target
        self._weights: dict[int, torch.Tensor] = {id(t): t for t in (*module.parameters(), *module.buffers())}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        weights = [t for t in tensors if id(t) in self._weights]
        raised = [t for t in tensors if t.dtype == self.target and id(t) not in self._weights]
        if not weights and not raised:
            return func(*args, **kwargs)
        if weights and not raised and _is_view(func):
            out = func(*args, **kwargs)
            self._weights |= {id(t): t for t in tree_leaves(out) if isinstance(t, torch.Tensor)}
            return out
        if func is aten.embedding.default:  # gather first: the table is large, its rows are few
            return func(*args, **kwargs).to(self.target)
        if func in (aten.mm.default, aten.addmm.default) and args[-1].numel() > CHUNK:
            return self._by_columns(func, args, kwargs)
        return func(*upcast(args, self.target), **upcast(kwargs, self.target))

    def _by_columns(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A product with a large matrix, some columns at a time."""
        *front, right = args
        step = max(1, CHUNK // right.shape[0])
        parts = []
        for start in range(0, right.shape[1], step):
            stop = min(start + step, right.shape[1])
            piece = list(upcast(front, self.target))
            if func is aten.addmm.default and piece[0].ndim and piece[0].shape[-1] == right.shape[1]:
                piece[0] = piece[0][..., start:stop]
            parts.append(func(*piece, right[:, start:stop].to(self.target), **kwargs))
        return torch.cat(parts, dim=1)


class Agree(TorchFunctionMode):
    """Raises the operands of functions that refuse mixed dtypes before they reach the dispatcher."""

    STRICT = ("conv", "scaled_dot_product_attention", "grouped_mm", "_grouped_mm", "lstm", "gru", "rnn", "bilinear")

    def __init__(self, target: torch.dtype) -> None:
        super().__init__()
        self.target = target

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "").startswith(self.STRICT):
            tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
            if any(t.dtype == self.target for t in tensors):
                args, kwargs = upcast(args, self.target), upcast(kwargs, self.target)
        return func(*args, **kwargs)


def _is_view(func: Any) -> bool:
    returns = func._schema.returns
    return bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)


@contextmanager
def eager_implementations(module: nn.Module, attention: bool = True, experts: bool = False) -> Iterator[None]:
    """The model's own eager attention and experts, as asked, in every config that its modules hold."""
    names = ["_attn_implementation_internal"] * attention + ["_experts_implementation_internal"] * experts
    held = {id(c): c for m in module.modules() if (c := getattr(m, "config", None)) is not None}
    before = [(c, n, getattr(c, n)) for c in held.values() for n in names if n in getattr(c, "__dict__", {})]
    try:
        for config, name, _ in before:
            setattr(config, name, "eager")
        yield
    finally:
        for config, name, value in before:
            setattr(config, name, value)


@torch.no_grad()
def run_reference(
    module: nn.Module, forward: Callable[..., Any], inputs: Mapping[str, Any], *, eager: bool = True
) -> Any:
    """The original forward in the model's precision, with the model's own eager attention or as it is configured."""
    with choices_kept(module), eager_implementations(module) if eager else nullcontext():
        return forward(**inputs)


@torch.no_grad()
def run_oracle(
    module: nn.Module,
    forward: Callable[..., Any],
    inputs: Mapping[str, Any],
    target: torch.dtype,
    *,
    eager: bool = True,
) -> Any:
    """The original forward with every floating value in `target`; experts run eagerly, attention as `eager` says."""
    raised = {n: upcast(v, target) if isinstance(v, torch.Tensor) else v for n, v in inputs.items()}
    with (
        state_kept(module),
        eager_implementations(module, attention=eager, experts=True),
        Agree(target),
        Raise(module, target),
    ):
        return forward(**raised)
