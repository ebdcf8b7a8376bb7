"""Forward hooks on submodules: a graph would bypass them, so a model that carries any is served by its original."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.nn.modules import module as registry

KINDS = ("_forward_hooks", "_forward_pre_hooks")
EVERYWHERE: tuple[Mapping[int, Any], ...] = (registry._global_forward_hooks, registry._global_forward_pre_hooks)
"""Torch's own tables of the hooks that run around every module."""
HARMLESS = ("transformers.utils.output_capturing",)
"""Modules whose hooks only record what `output_hidden_states` asks for, which a graph returns anyway."""


class Hooks:
    """Watches the hook tables of all submodules; the root's own hooks run around `forward` and are not bypassed."""

    def __init__(self, module: nn.Module) -> None:
        self._names: list[str] = []
        self._tables: list[Mapping[int, Any]] = []
        for name, submodule in module.named_modules():
            if submodule is not module:
                self._names += [name] * len(KINDS)
                self._tables += [getattr(submodule, kind) for kind in KINDS]

    def foreign(self) -> str | None:
        """The name of a submodule with a hook, or None."""
        for table in EVERYWHERE:
            if _any_foreign(table):
                return "every module"
        if not any(self._tables):
            return None
        for name, table in zip(self._names, self._tables, strict=True):
            if _any_foreign(table):
                return name
        return None


def on_itself(module: nn.Module) -> bool:
    """Whether a hook runs around the module's own `forward`, for who computes without calling it."""
    return any(_any_foreign(getattr(module, kind)) for kind in KINDS)


def _any_foreign(table: Mapping[int, Any]) -> bool:
    return any(getattr(hook, "__module__", None) not in HARMLESS for hook in table.values())
