"""Compute once what depends on weights alone.

    cat(wq, wk, wv)  ->  one packed weight; wq, wk, wv become views of it, so that nothing is stored twice
    w.T, of a matrix that is read in no other way  ->  the same, since kernels for few rows read rows of `[out, in]`
    anything else made of weights only, up to 1 MiB  ->  a packed copy, renewed when a weight changes

Larger results that are no concatenation stay in the graph: a copy would cost the memory of the weight a second time.
"""

from __future__ import annotations

import time
from typing import Any, Final

import torch
from torch import fx

from ..compiler.opset import Role, is_free, role_of
from ..compiler.pipeline import Context
from ..compiler.program import Input, InputKind, Program, Recipe
from ..compiler.provenance import module_of, source_of
from ..compiler.records import PassResult, Rewrite
from ..compiler.rule import Stage

aten = torch.ops.aten

LARGEST_COPY: Final = 1 << 20
"""Bytes of a packed copy."""
ALIGNMENT: Final = 16
"""Bytes that divide a row which kernels read in wide loads."""
TRANSPOSES: Final = (aten.t.default, aten.transpose.int, aten.permute.default)


def pack(program: Program, context: Context) -> PassResult:
    """Replace constant subgraphs by PACKED inputs, in place, and drop weights that are not read any more."""
    started = time.perf_counter()
    graph = program.graph
    result = PassResult("pack", Stage.PACK.name, nodes_before=len(graph.nodes))
    meaning = program.placeholder_inputs()
    constant = _constant_nodes(graph)
    roots = [n for n in constant if any(u not in constant for u in n.users)]
    shared: dict[str, fx.GraphModule] = {}
    done: dict[fx.Node, fx.Node] = {}
    for root in roots:
        members = _slice_of(root)
        if not _worth_packing(root, members):
            continue
        node, packed = _pack(program, root, members, meaning, shared)
        root.replace_all_uses_with(node, delete_user_cb=lambda user: user not in constant)  # recipes still read it
        done[root] = node
        result.rewrites.append(
            Rewrite(
                "pack",
                module_of(root),
                source_of(root),
                _label(packed.recipe),
                tuple(n.name for n in members),
                (packed.name,),
            )
        )
    graph.eliminate_dead_code()
    for root, node in done.items():
        if not root._erased:
            root.replace_all_uses_with(node)
    graph.eliminate_dead_code()
    _drop_unread(program)
    graph.lint()
    result.nodes_after = len(graph.nodes)
    result.time_s = time.perf_counter() - started
    return result


def _constant_nodes(graph: fx.Graph) -> dict[fx.Node, None]:
    found: dict[fx.Node, None] = {}
    for node in graph.nodes:
        if node.op != "call_function" or not isinstance(node.meta.get("val"), torch.Tensor) or not _is_pure(node):
            continue
        if any(isinstance(s, torch.SymInt) for s in node.meta["val"].shape):
            continue
        if all(i in found or i.meta.get("weight") for i in node.all_input_nodes):
            found[node] = None
    return found


def _is_pure(node: fx.Node) -> bool:
    if not isinstance(node.target, torch._ops.OpOverload) or role_of(node) is Role.MUTATE:
        return False
    return torch.Tag.nondeterministic_seeded not in node.target.tags


def _slice_of(root: fx.Node) -> list[fx.Node]:
    """What the root is computed from, placeholders excluded, in graph order."""
    seen: set[fx.Node] = set()
    stack = [root]
    while stack:
        node = stack.pop()
        if node not in seen and node.op != "placeholder":
            seen.add(node)
            stack.extend(node.all_input_nodes)
    return [n for n in root.graph.nodes if n in seen]


def _is_concatenation(root: fx.Node) -> bool:
    """Of weights, or of transposed ones; one transposed weight as well."""
    parts = _parts(root)
    whole = [p for p in parts if isinstance(p, fx.Node) and p.op == "placeholder"]
    return len(whole) == len(set(parts)) == len(parts) > 0 or _is_transposed(root)


def _parts(root: fx.Node) -> list[Any]:
    """What is laid one behind the other along dim 0."""
    if root.target is not aten.cat.default or (root.args[1] if len(root.args) > 1 else 0) != 0:
        return []
    parts = root.args[0]
    assert isinstance(parts, list | tuple)
    return list(parts)


def _is_transposed(root: fx.Node) -> bool:
    """A weight, or several, each of which is nowhere read but transposed and by whole rows then."""
    parts = _parts(root) or [root]
    weights = [_transposed_weight(p) for p in parts]
    return None not in weights and len(set(weights)) == len(parts)


def _transposed_weight(node: Any) -> fx.Node | None:
    if not isinstance(node, fx.Node) or node.target not in TRANSPOSES:
        return None
    weight, value = node.args[0], node.meta["val"]
    assert isinstance(weight, fx.Node)
    if weight.op != "placeholder" or value.dim() != 2 or weight.meta["val"].stride() != value.stride()[::-1]:
        return None
    aligned = value.shape[1] * value.element_size() % ALIGNMENT == 0
    alone = all(user.target in TRANSPOSES for user in weight.users)
    return weight if aligned and alone and min(value.shape) > 1 else None


def _worth_packing(root: fx.Node, members: list[fx.Node]) -> bool:
    if _is_concatenation(root):
        return True
    if all(is_free(n) and role_of(n) is Role.VIEW for n in members):
        return False
    value = root.meta["val"]
    return value.numel() * value.element_size() <= LARGEST_COPY


def _pack(
    program: Program,
    root: fx.Node,
    members: list[fx.Node],
    meaning: dict[fx.Node, Input],
    shared: dict[str, fx.GraphModule],
) -> tuple[fx.Node, Input]:
    """A PACKED input that stands for `root`; equal recipes of several layers share one graph module."""
    graph = program.graph
    sources = list(dict.fromkeys(i for n in members for i in n.all_input_nodes if i.op == "placeholder"))
    recipe_graph = fx.Graph()
    holder = torch.nn.Module()
    copies: dict[fx.Node, fx.Node] = {}
    live = [s for s in sources if meaning[s].kind in (InputKind.PARAMETER, InputKind.BUFFER)]
    for source in live:
        copies[source] = recipe_graph.placeholder(f"weight_{len(copies)}")
    for source in sources:
        if source not in copies:
            holder.register_buffer(source.name, meaning[source].value)
            copies[source] = recipe_graph.get_attr(source.name)
    for node in members:
        copied = recipe_graph.node_copy(node, copies.__getitem__)
        copied.name = f"step_{len(copies)}"
        copies[node] = copied
    recipe_graph.output(copies[root])
    key = str(recipe_graph) if len(live) == len(sources) else f"of constants, {root.name}"
    if key not in shared:
        shared[key] = fx.GraphModule(holder, recipe_graph)
    whole = _is_concatenation(root) and len(live) == len(sources)
    recipe = Recipe(
        shared[key],
        tuple(meaning[s].target for s in live),
        concatenation=whole,
        transposed=whole and _is_transposed(root),
    )
    last = next(reversed([n for n in graph.nodes if n.op == "placeholder"]), None)
    place = last.next if last is not None else next(iter(graph.nodes))
    with graph.inserting_before(place):
        node = graph.placeholder(f"packed_{root.name}")
    node.meta.update(root.meta)
    node.meta |= {"weight": True, "val": root.meta["val"].contiguous()}
    packed = Input(node.name, InputKind.PACKED, f"{module_of(root) or 'model'}.{node.name}", recipe=recipe)
    program.inputs.append(packed)
    return node, packed


def _label(recipe: Recipe | None) -> str:
    assert recipe is not None
    if recipe.concatenation and len(recipe.sources) > 1:
        return f"{len(recipe.sources)} weights laid side by side"
    return "laid out by rows" if recipe.concatenation else "computed from weights"


def _drop_unread(program: Program) -> None:
    kept: list[Input] = []
    for node, meaning in program.placeholder_inputs().items():
        if meaning.kind is InputKind.USER or node.users:
            kept.append(meaning)
        else:
            program.graph.erase_node(node)
    program.inputs[:] = kept
