"""Replace the masks of attention by what they say:

    attention(q, k, v, mask)    ->    attention(q, k, v, key_mask=attention_mask, left=w-1, right=0)

What a mask says is found by running the part of the graph that makes it (`compiler.masks`). That is evidence from
samples, so the program keeps a guard for each replacement; the runtime asks it once for every new length, and uses a
graph that still has the masks where it does not hold.
"""

from __future__ import annotations

import time
from dataclasses import replace

import torch
from torch import fx

from ..compiler.masks import Description, MaskGuard, Masks
from ..compiler.opset import arguments
from ..compiler.pipeline import Context
from ..compiler.program import Program
from ..compiler.provenance import module_of, source_of
from ..compiler.records import NearMiss, PassResult, Rewrite
from ..compiler.rule import Stage

aten = torch.ops.aten


def masks(program: Program, context: Context) -> PassResult:
    """Classify every attention's mask and drop those that a window and a padding mask express, in place."""
    started = time.perf_counter()
    graph = program.graph
    result = PassResult("masks", Stage.RAISE.name, nodes_before=len(graph.nodes))
    nodes = [n for n in graph.nodes if n.target is torch.ops.regraft.attention.default]
    if context.settings.model is not None and nodes:
        classified = Masks(program, context.settings.model)
        found = [(node, classified.classify(node)) for node in nodes]
        guards: dict[tuple[object, ...], MaskGuard] = {}
        for node, description in found:
            if description.replaceable:
                guards.setdefault(_key(node, description), classified.guard(node, description))
        for node, description in found:
            if description.replaceable:
                result.rewrites.append(_replace(graph, node, description))
            elif description.kind != "none":
                _tell(result, node, description)
        program.guards += [g.holds for g in guards.values()]
        graph.eliminate_dead_code()
    graph.lint()
    program.gm.recompile()
    result.nodes_after = len(graph.nodes)
    result.time_s = time.perf_counter() - started
    return result


def _key(node: fx.Node, found: Description) -> tuple[object, ...]:
    given = arguments(node)
    return given[found.argument], found, *(str(given[x].meta["val"].shape[2]) for x in ("q", "k"))


def _replace(graph: fx.Graph, node: fx.Node, found: Description) -> Rewrite:
    given = arguments(node)
    given[found.argument] = None
    given["left"] = _narrower(given["left"], found.left)
    given["right"] = _narrower(given["right"], found.right)
    if found.key_mask is not None:
        given["key_mask"] = _as_bool(graph, node, found.key_mask)
    node.args, node.kwargs = tuple(given.values()), {}
    return Rewrite("masks", module_of(node), source_of(node), f"mask -> {found.kind}", (node.name,), (node.name,))


def _narrower(a: int, b: int) -> int:
    """The smaller of two reaches, of which -1 is unlimited."""
    return max(a, b) if min(a, b) < 0 else min(a, b)


def _as_bool(graph: fx.Graph, node: fx.Node, mask: fx.Node) -> fx.Node:
    value = mask.meta["val"]
    if value.dtype is torch.bool:
        return mask
    with graph.inserting_before(node):
        cast = graph.call_function(aten._to_copy.default, (mask,), {"dtype": torch.bool})
    with value.fake_mode:
        cast.meta["val"] = value.to(torch.bool)
    return cast


def _tell(result: PassResult, node: fx.Node, found: Description) -> None:
    miss = NearMiss(
        "masks",
        module_of(node),
        source_of(node),
        "a window around the query, with padding",
        f"{found.kind}: {found.reason}",
        1,
        1,
    )
    same = [i for i, m in enumerate(result.misses) if (m.source, m.found) == (miss.source, miss.found)]
    if same:
        first = result.misses[same[0]]
        result.misses[same[0]] = replace(first, count=first.count + 1)
    else:
        result.misses.append(miss)
