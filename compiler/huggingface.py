"""Everything that is done to a transformers model while it is captured, and undone exactly afterwards.

* Attention, masks and experts go through transformers' own registries under the name `regraft`. The implementation is
  set on the config of every module whose file uses the registry (T5 keeps copies of its config that
  `set_attn_implementation` does not reach); a model that never asks the registry keeps its implementation and the
  masks that belong to it.
* Masks are always built, as dense booleans: whether one is plain causal is found out later, from the graph. Where no
  attention that asks the registry is handed one (GIT: only its picture's attention asks), they are the model's own.
* Rotary modules that branch on the length run without the branch.

Nothing is patched at import. The registries are shared by the process, hence one capture at a time.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from .attention_capture import AttentionCapture
from .experts_capture import ExpertsCapture
from .program import Note
from .rope_branches import branch_free_rope

NAME = "regraft"
_ATTENTION = "_attn_implementation_internal"
_EXPERTS = "_experts_implementation_internal"
_lock = threading.RLock()


class Capturing:
    """One capture of one model: `checking` is true during its concrete run, and `notes` collects what was found."""

    def __init__(self, model: nn.Module) -> None:
        self.names = {module: name for name, module in model.named_modules()}
        self.loaded: dict[int, str | None] = {}
        self.masked: dict[int, Any] = {}
        """Configs that masks were made for, by identity."""
        self.attention = AttentionCapture(self.names, self._loaded_with)
        self.experts = ExpertsCapture(self.names)

    @property
    def notes(self) -> list[Note]:
        """What was found, the same of many layers once: the first one's name, and how many."""
        modules: dict[str, list[str]] = {}
        for note in self.attention.notes + self.experts.notes:
            modules.setdefault(note.message, []).append(note.module)
        return [
            Note(names[0], message if len(names) == 1 else f"{message} (and {len(names) - 1} more alike)")
            for message, names in modules.items()
        ]

    @contextmanager
    def check(self) -> Iterator[None]:
        """The concrete run: what ops stand for is compared with the model's own code."""
        self.attention.checking = self.experts.checking = True
        try:
            yield
        finally:
            self.attention.checking = self.experts.checking = False

    def give_masks_back(self) -> bool:
        """After the concrete run: leave masks that no call of ours took to the model; whether there are any."""
        if self.attention.masked_calls:
            return False
        unused = [c for i, c in self.masked.items() if i not in self.attention.asked and getattr(c, _ATTENTION) == NAME]
        for config in unused:
            setattr(config, _ATTENTION, self.loaded[id(config)])
        return bool(unused)

    def dense_mask(self, *args: Any, **kwargs: Any) -> Tensor | None:
        """transformers' boolean mask `[B, 1, Q, K]`, never skipped."""
        from transformers.masking_utils import sdpa_mask

        config = kwargs.get("config")
        if config is not None:
            self.masked[id(config)] = config
        kwargs["allow_is_causal_skip"] = False
        kwargs["allow_is_bidirectional_skip"] = False
        mask: Tensor | None = sdpa_mask(*args, **kwargs)
        return mask

    def _loaded_with(self, module: nn.Module) -> str | None:
        return self.loaded.get(id(getattr(module, "config", None)))


@contextmanager
def capturing(model: nn.Module) -> Iterator[Capturing]:
    """While active, a forward of `model` emits `regraft::attention` and `regraft::moe_experts`."""
    from transformers.integrations.moe import ExpertsInterface
    from transformers.masking_utils import AttentionMaskInterface
    from transformers.modeling_utils import AttentionInterface

    with _lock:
        state = Capturing(model)
        registries: list[tuple[Any, Any]] = [
            (AttentionInterface._global_mapping, state.attention),
            (AttentionMaskInterface._global_mapping, state.dense_mask),
            (ExpertsInterface._global_mapping, state.experts),
        ]
        before: list[tuple[Any, str, Any]] = []
        try:
            for mapping, function in registries:
                mapping[NAME] = function
            for config in attention_configs(model):
                state.loaded[id(config)] = getattr(config, _ATTENTION)
                before.append((config, _ATTENTION, getattr(config, _ATTENTION)))
            for config in experts_configs(model):
                before.append((config, _EXPERTS, getattr(config, _EXPERTS)))
            for config, attribute, _ in before:
                setattr(config, attribute, NAME)
            with branch_free_rope(model):
                yield state
        finally:
            for config, attribute, value in before:
                setattr(config, attribute, value)
            for mapping, _ in registries:
                mapping.pop(NAME, None)


def attention_configs(model: nn.Module) -> list[Any]:
    """Configs that the attention registry is asked with, once each: those held by a module whose file uses it."""
    from transformers.modeling_utils import AttentionInterface

    return _configs(model, AttentionInterface, _ATTENTION)


def experts_configs(model: nn.Module) -> list[Any]:
    """Configs held by experts that go through the experts registry, once each."""
    found = {id(m.config): m.config for m in model.modules() if hasattr(m, "_apply_gate") and _has(m, _EXPERTS)}
    return list(found.values())


def _configs(model: nn.Module, interface: type, attribute: str) -> list[Any]:
    found: dict[int, Any] = {}
    files: dict[str, bool] = {}
    for module in model.modules():
        name = type(module).__module__
        if name not in files:
            files[name] = any(isinstance(v, interface) for v in vars(sys.modules[name]).values())
        if files[name] and _has(module, attribute):
            found.setdefault(id(module.config), module.config)
    return list(found.values())


def _has(module: nn.Module, attribute: str) -> bool:
    return hasattr(module.__dict__.get("config"), attribute)
