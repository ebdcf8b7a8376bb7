"""A program as the fastest Python that runs it: operators called by torch's own bindings.

`torch.ops.aten.view.default(x, ...)` goes through Python before it reaches the dispatcher, `torch.Tensor.view(x, ...)`
does not. The graph that passes and reports see stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Final

import torch
from torch import fx

from . import numerics

aten = torch.ops.aten

BINDINGS: Final[Mapping[Any, Callable[..., Any]]] = MappingProxyType(
    {
        aten.view.default: torch.Tensor.reshape,  # a kernel may have made contiguous what was permuted
        aten.reshape.default: torch.Tensor.reshape,
        aten.expand.default: torch.Tensor.expand,
        aten.transpose.int: torch.transpose,
        aten.permute.default: torch.permute,
        aten.unsqueeze.default: torch.unsqueeze,
        aten.squeeze.dim: torch.squeeze,
        aten.split_with_sizes.default: torch.split_with_sizes,
        aten.select.int: torch.select,
        aten.cat.default: torch.cat,
        aten.clone.default: torch.clone,
        aten.linear.default: torch._C._nn.linear,
        aten.add.Tensor: torch.add,
        aten.mul.Tensor: torch.mul,
    }
)
"""Bindings that take the same arguments by the same names, and run the same operator."""


def direct(program: fx.GraphModule) -> Callable[..., Any]:
    """The forward of a copy whose calls are those of `BINDINGS`; under `REGRAFT_LOGS=numerics` it looks at each."""
    if numerics.wanted():
        return numerics.Checked(program).run
    graph = fx.Graph()
    graph.output(graph.graph_copy(program.graph, {}))
    for node in graph.nodes:
        if node.op == "call_function":
            node.target = BINDINGS.get(node.target, node.target)
    made = fx.GraphModule(program, graph)
    return made.forward
