"""Whether an attention on pages stands behind a look-up of its tokens.

Kernels of ours overlap: decode attention reads lengths, slots and tables before the kernels in front of it have ended
(`kernels/paged_decode_kernel.py`). What wrote these must be over by then, so an ordinary kernel, which begins when all
before it have ended and lets none behind it begin early, has to lie in between. PyTorch's are ordinary, and none of our
ops takes numbers of tokens: what turns these into activations, the look-up of embeddings, is such a kernel.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, fx

from .causal import CacheError
from .cross import keywords
from .program import Program
from .provenance import module_of


def check_looked_up(program: Program, attention: fx.Node, given: Iterable[fx.Node]) -> None:
    """Raise `CacheError` where none of these arguments of an attention is looked up by numbers that a step brings."""
    seen, stack = set[fx.Node](), list(given)
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if _looks_up(program, node):
            return
        stack += node.all_input_nodes
    raise CacheError(f"{module_of(attention) or attention.name} computes nothing from tokens or positions")


def _looks_up(program: Program, node: fx.Node) -> bool:
    """Whether an op of PyTorch makes activations of integers that come with the call."""
    if not isinstance(node.target, torch._ops.OpOverload) or node.target.namespace != "aten" or not _is_float(node):
        return False
    integers = [i for i in node.all_input_nodes if isinstance(i.meta.get("val"), Tensor) and not _is_float(i)]
    return bool(keywords(program, integers))


def _is_float(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.is_floating_point()
