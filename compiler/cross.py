"""Attention to an encoder's states: which attentions of a decoder that are, and that every token sees all the states.

A decoder is captured over its tokens and one more input, `encoder_states` `[1, N, E]`. Keys and values that read
nothing else are the same in every step: they can be computed once.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

import torch
from torch import Tensor, fx, nn

from .causal import CacheError
from .opset import arguments
from .program import InputKind, Program
from .provenance import module_of
from .slices import Slice, SliceError, sample

aten = torch.ops.aten

STATES: Final = "encoder_states"
"""The keyword by which a captured decoder takes what its encoder made."""
_SAMPLES: Final = ((1, 5), (4, 3), (3, 50), (7, 130))
"""Tokens and states for which masks are looked at."""


def is_cross(program: Program, node: fx.Node) -> bool:
    """Whether the keys and values of an attention are computed from the encoder's states alone."""
    given = arguments(node)
    return keywords(program, (given["k"], given["v"])) == {STATES}


def keywords(program: Program, nodes: Iterable[fx.Node]) -> set[str]:
    """The inputs of the call, by keyword, of which these nodes read more than sizes."""
    meaning = program.placeholder_inputs()
    seen, stack, found = set[fx.Node](), list(nodes), set[str]()
    while stack:
        node = stack.pop()
        if node in seen or node.target is aten.sym_size.int:
            continue
        seen.add(node)
        made = meaning.get(node)
        if made is not None and made.kind is InputKind.USER:
            found.add(made.target)
        stack += node.all_input_nodes
    return found


def check_all_visible(program: Program, node: fx.Node, model: nn.Module) -> None:
    """Raise `CacheError` where a token does not see all states, or scores have something added to them."""
    given, place = arguments(node), module_of(node) or node.name
    if (given["left"], given["right"]) != (-1, -1):
        raise CacheError(f"{place} sees a window of the encoder's states")
    sources = [given[x] for x in ("mask", "bias", "key_mask") if given[x] is not None]
    if not sources:
        return
    try:
        piece = Slice.of(program, sources, model)
        for tokens, states in _SAMPLES:
            if not all(map(_says_nothing, piece(sample(program, _sizes(program, tokens, states))))):
                raise CacheError(f"{place} has a mask or bias over the encoder's states")
    except SliceError as error:
        raise CacheError(f"the mask of {place} is not known: {error}") from error


def _sizes(program: Program, tokens: int, states: int) -> dict[str, int]:
    guards = program.limits.tensors
    wanted: dict[Any, int] = {guards["input_ids"].shape[1]: tokens, guards[STATES].shape[1]: states}
    return {symbol: size for symbol, size in wanted.items() if isinstance(symbol, str)}


def _says_nothing(value: Tensor) -> bool:
    return bool(value.all()) if value.dtype == torch.bool else not bool(value.any())


def forget_input(program: Program, keyword: str, instead: str) -> None:
    """Take an input away that nothing computes with; its batch size is read from another.

    Raises `CacheError` where something does.
    """
    places = {made.target: node for node, made in program.placeholder_inputs().items() if made.kind is InputKind.USER}
    node = places[keyword]
    for user in list(node.users):
        if user.target is aten.sym_size.int and user.args[1] == 0:
            user.args = (places[instead], 0)
    if node.users:
        raise CacheError(f"{next(iter(node.users)).name} reads {keyword} beside attention")
    kept = [made for held, made in program.placeholder_inputs().items() if held is not node]
    program.graph.erase_node(node)
    program.inputs = kept
