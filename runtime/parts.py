"""What cannot be captured whole is captured in parts: the models inside it, or else its blocks.

A part has a dispatch of its own, which serves only while the original forward of the whole runs in place of a graph
that could not be captured. In every other call (labels, hooks, training) the parts stay out of the way.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn


def parts_of(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """Submodules worth capturing alone, by name: inner models, or else the blocks of the largest stack.

    An inner model that cannot be captured whole either has parts of its own.
    """
    models = list(_inner_models(module, ""))
    return models or _blocks(module)


def _inner_models(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    from transformers import PreTrainedModel

    for name, child in module.named_children():
        path = f"{prefix}.{name}" if prefix else name
        if isinstance(child, PreTrainedModel):
            yield path, child
        else:
            yield from _inner_models(child, path)


def _blocks(module: nn.Module) -> list[tuple[str, nn.Module]]:
    stacks = [(n, m) for n, m in module.named_modules() if isinstance(m, nn.ModuleList) and len(m) > 1]
    if not stacks:
        return []
    name, longest = max(stacks, key=lambda pair: sum(p.numel() for p in pair[1].parameters()))
    return [(f"{name}.{i}", block) for i, block in enumerate(longest)]
