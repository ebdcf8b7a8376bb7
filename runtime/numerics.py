"""`REGRAFT_LOGS=numerics`: where a NaN or an infinity first comes up.

Programs run node by node then, and after each its numbers are looked at: slow, and without CUDA graphs. Negative
infinities are let be, masks are made of them.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree

from ..compiler.provenance import module_of, source_of
from .topics import asked_for

log = logging.getLogger("regraft.numerics")


def wanted() -> bool:
    """Whether numbers are looked at."""
    return asked_for("numerics")


class Checked(fx.Interpreter):
    """Runs a program and names the nodes that make NaN or infinity out of what has none; each is named once."""

    def __init__(self, program: fx.GraphModule) -> None:
        super().__init__(program)
        self._bad: set[fx.Node] = set()
        self._named: set[fx.Node] = set()

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """The program's result."""
        self._bad.clear()
        return super().run(*args, **kwargs)

    def run_node(self, n: fx.Node) -> Any:
        """One node's result, looked at."""
        result = super().run_node(n)
        if n.op == "output" or not any(map(_is_bad, _pytree.tree_leaves(result))):
            return result
        self._bad.add(n)
        if n not in self._named and not self._bad.intersection(n.all_input_nodes):
            self._named.add(n)
            what = "comes in as" if n.op == "placeholder" else "is made by"
            log.warning("NaN or infinity %s %s (%s) at %s %s", what, n.name, n.target, module_of(n), source_of(n))
        return result


def _is_bad(value: Any) -> bool:
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.numel() == 0 or value.is_meta:
        return False
    if value.itemsize == 1:  # fp8 has few operations
        value = value.to(torch.float32)
    return bool((value.isnan() | value.isposinf()).any())
