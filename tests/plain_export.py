"""A model captured without our ops: `torch.export` on its own eager or SDPA attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from regraft.compiler.lifting import lift
from regraft.compiler.program import Program


class _Flat(nn.Module):
    def __init__(self, model: nn.Module, names: list[str], static: dict[str, Any]) -> None:
        super().__init__()
        self.model, self.names, self.static = model, names, static

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        returned = self.model(**dict(zip(self.names, tensors, strict=True)), **self.static)
        return tuple(t for t in tree_leaves(returned.to_tuple()) if isinstance(t, Tensor))


def export_plain(model: nn.Module, inputs: dict[str, Tensor], implementation: str, **static: Any) -> Program:
    """The model's graph with batch and length dynamic; inputs are named as in `inputs`."""
    model.set_attn_implementation(implementation)
    wrapped = _Flat(model, list(inputs), static)
    shapes = tuple(dict.fromkeys(range(2), torch.export.Dim.AUTO) for _ in inputs)
    with torch.no_grad():
        exported = torch.export.export(wrapped, tuple(inputs.values()), dynamic_shapes=(shapes,), strict=False)
        exported = exported.run_decompositions({})
    gm, lifted = lift(exported, "model.", model)
    names = iter(inputs)
    lifted = [type(i)(i.name, i.kind, next(names)) if i.kind.value == "user" else i for i in lifted]
    return Program(gm, lifted, rebuild=tuple, example=dict(inputs))
