"""A call of a model's forward, taken apart: its tensors, its static values, and whether a graph may serve it.

Two calls with the same `Key` run the same graph; shapes are not part of it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import NoneType
from typing import Any

import torch
from torch import nn

from .caches import is_empty
from .nested import Shape, Unflattenable, flatten

Key = tuple[tuple[Any, ...], ...]
"""`(name, dtype, rank, device)` for each tensor, `(name, type, value)` for static values, then shapes of containers."""

CONFIG_DEFAULTS = ("use_cache", "return_dict", "output_hidden_states", "output_attentions", "output_router_logits")
"""Arguments whose default a HuggingFace model takes from its config, which the user may change between calls.

So it does for every argument without a default of its own that is a flag in the config.
"""


@dataclass(frozen=True)
class Call:
    """The arguments of one call, by name. `None` and arguments left out are not there."""

    tensors: dict[str, torch.Tensor]
    given: dict[str, Any]
    """Values the caller gave that are not tensors."""
    key: Key
    cache: bool = False
    """Whether the model will return a KV cache: `use_cache` as given, or as its config says."""
    unserved: str | None = None
    """The argument no graph can serve, with the reason."""
    past: Any = None
    """An empty cache the caller wants filled."""
    shapes: dict[str, Shape] = field(default_factory=dict)
    """How arguments that hold several tensors are put together from `tensors`."""

    @property
    def static(self) -> dict[str, Any]:
        """What capture is given beside the tensors and `cache`: `use_cache=False` is said by the latter."""
        return {n: v for n, v in self.given.items() if n != "use_cache" or v}


class Signature:
    """Binds calls of one forward; the parts that need `inspect` are done once."""

    def __init__(self, forward: Callable[..., Any], module: nn.Module) -> None:
        self.signature = inspect.signature(forward)
        self._module = module
        parameters = self.signature.parameters.values()
        positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        self.positional = tuple(p.name for p in parameters if p.kind in positional)
        self.keywords = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)
        self.variadic = any(p.kind is inspect.Parameter.VAR_POSITIONAL for p in parameters)
        self._order = {p.name: i for i, p in enumerate(parameters)}
        self._defaults = {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}
        config = getattr(module, "config", None)
        flags = (n for n, d in self._defaults.items() if d is None and isinstance(getattr(config, n, None), bool))
        self._configured = tuple(dict.fromkeys((*CONFIG_DEFAULTS, *flags)))

    def unknown(self, names: Iterable[str]) -> list[str]:
        """Names that forward does not take."""
        return [] if self.keywords else [n for n in names if n not in self._order]

    def bind(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any] | None:
        """Arguments by name, without those that are None; None where the call does not fit the signature."""
        if len(args) > len(self.positional):
            return None
        bound = dict(zip(self.positional, args, strict=False))
        for name, value in kwargs.items():
            if name in bound or (name not in self._order and not self.keywords):
                return None
            bound[name] = value
        return {n: v for n, v in bound.items() if v is not None or self._defaults.get(n) is not None}

    def take_apart(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Call:
        """The call as tensors, static values and key. Never raises: what cannot be served is named in `unserved`."""
        bound = self.bind(args, kwargs)
        if bound is None or self.variadic:
            return Call({}, {}, (), unserved="arguments that do not fit the signature of forward")
        past = bound.pop("past_key_values", None)
        unserved = None
        if past is not None and not is_empty(past):
            unserved = "past_key_values with content"
        tensors: dict[str, torch.Tensor] = {}
        static: dict[str, Any] = {}
        shapes: dict[str, Shape] = {}
        for name in sorted(bound, key=lambda n: (self._order.get(n, len(self._order)), n)):
            value = bound[name]
            if type(value) in (torch.Tensor, nn.Parameter):
                tensors[name] = value
            elif isinstance(value, (bool, int, float, str, NoneType)):
                static[name] = value
            else:
                try:
                    shapes[name] = flatten(name, value, tensors)
                except Unflattenable as error:
                    unserved = unserved or f"{name} ({error})"
            if "label" in name:
                unserved = unserved or name
        resolved = self._from_config(static)
        if resolved.get("output_attentions"):
            unserved = unserved or "output_attentions"
        cache = bool(resolved.get("use_cache", False))
        if past is not None and not (cache and resolved.get("return_dict", True)):
            unserved = unserved or "past_key_values with use_cache=False or return_dict=False"
        if not tensors:
            unserved = unserved or "a call without tensors"
        if torch.is_grad_enabled():
            wants = [n for n, t in tensors.items() if t.requires_grad]
            unserved = unserved or (f"{wants[0]} that requires grad" if wants else None)
        key: Key = tuple((n, t.dtype, t.ndim, t.device) for n, t in tensors.items())
        key += tuple((n, type(v), v) for n, v in sorted(resolved.items()))
        key += tuple(shapes.items())
        return Call(tensors, static, key, cache, unserved, past, shapes)

    def _from_config(self, static: Mapping[str, Any]) -> dict[str, Any]:
        """`static` and, for what was left out, the values the model will take from its config."""
        found = dict(static)
        config = getattr(self._module, "config", None)
        for name in self._configured:
            if name in found or not (name in self._order or self.keywords):
                continue
            value = self._defaults.get(name)
            value = _config_value(config, name) if value is None else value
            if value is not None:
                found[name] = value if isinstance(value, bool) else repr(value)
        return found


def _config_value(config: object, name: str) -> Any:
    """`config.use_cache`, or that of the text part, where composite models keep it."""
    value = getattr(config, name, None)
    text = getattr(config, "get_text_config", None)
    if value is None and name == "use_cache" and callable(text):
        value = getattr(text(decoder=True), name, None)
    return value
