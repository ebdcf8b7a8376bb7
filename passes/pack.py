"""Compute once what depends on weights alone.

    cat(wq, wk, wv)  ->  one packed weight; wq, wk, wv become views of it, so that nothing is stored twice
    anything else made of weights only, up to 1 MiB  ->  a packed copy, renewed when a weight changes
    w.T, where a step of decoding reads its rows     ->  a packed copy as well, on a GPU that has room

Larger results that are no concatenation stay in the graph: a copy would cost the memory of the weight a second time.
The exception are weights that lie `[in, out]` (GPT-2's): kernels for few rows read rows of `[out, in]` in wide loads.
"""

from __future__ import annotations

import time
from typing import Final

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
SHARE_OF_MEMORY: Final = 32
"""One part of so many of a GPU's memory may hold copies of weights by rows."""
ALIGNMENT: Final = 16
"""Bytes that divide a row which kernels read in wide loads."""


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
    room = _room(context) if any(i.kind is InputKind.PAGES for i in program.inputs) else 0
    for root in roots:
        members = _slice_of(root)
        size = _size_by_rows(root, meaning, context)
        by_rows = 0 < size <= room
        if by_rows:
            room -= size
        elif not _worth_packing(root, members):
            continue
        node, packed = _pack(program, root, members, meaning, shared, by_rows)
        root.replace_all_uses_with(node, delete_user_cb=lambda user: user not in constant)  # recipes still read it
        done[root] = node
        result.rewrites.append(
            Rewrite(
                "pack",
                module_of(root),
                source_of(root),
                "laid out by rows" if by_rows else _label(packed.recipe),
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
    if root.target is not aten.cat.default or (root.args[1] if len(root.args) > 1 else 0) != 0:
        return False
    parts = root.args[0]
    assert isinstance(parts, list | tuple)
    return all(isinstance(p, fx.Node) and p.op == "placeholder" for p in parts) and len(set(parts)) == len(parts)


def _worth_packing(root: fx.Node, members: list[fx.Node]) -> bool:
    if all(is_free(n) and role_of(n) is Role.VIEW for n in members):
        return False
    if _is_concatenation(root):
        return True
    value = root.meta["val"]
    return value.numel() * value.element_size() <= LARGEST_COPY


def _room(context: Context) -> int:
    """Bytes that copies of weights may take."""
    device = context.settings.device
    return torch.cuda.get_device_properties(device).total_memory // SHARE_OF_MEMORY if device.type == "cuda" else 0


def _size_by_rows(root: fx.Node, meaning: dict[fx.Node, Input], context: Context) -> int:
    """Bytes of a weight that is read transposed, if its rows are then such as kernels read in wide loads; else 0."""
    weight, value = root.args[0] if root.args else None, root.meta["val"]
    if role_of(root) is not Role.VIEW or not isinstance(weight, fx.Node) or weight.op != "placeholder":
        return 0
    before = weight.meta["val"]
    turned = value.dim() == before.dim() == 2 and value.shape == before.shape[::-1] and min(value.shape) > 1
    if not turned or value.stride() != before.stride()[::-1] or not value.is_floating_point():
        return 0
    if value.is_contiguous() or value.shape[1] * value.element_size() % ALIGNMENT:
        return 0
    live = context.settings.weights
    kind = meaning[weight].kind
    if live is None or kind not in (InputKind.PARAMETER, InputKind.BUFFER) or live(meaning[weight]).is_inference():
        return 0  # of an inference tensor nothing says that its values changed
    return int(value.numel() * value.element_size())


def _pack(
    program: Program,
    root: fx.Node,
    members: list[fx.Node],
    meaning: dict[fx.Node, Input],
    shared: dict[str, fx.GraphModule],
    by_rows: bool = False,
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
    found = copies[root]
    if by_rows:
        found = recipe_graph.call_function(aten.clone.default, (found,), {"memory_format": torch.contiguous_format})
    recipe_graph.output(found)
    key = str(recipe_graph) if len(live) == len(sources) else f"of constants, {root.name}"
    if key not in shared:
        shared[key] = fx.GraphModule(holder, recipe_graph)
    recipe = Recipe(
        shared[key],
        tuple(meaning[s].target for s in live),
        concatenation=_is_concatenation(root) and len(live) == len(sources),
    )
    last = next(reversed([n for n in graph.nodes if n.op == "placeholder"]), None)
    place = last.next if last is not None else next(iter(graph.nodes))
    with graph.inserting_before(place):
        node = graph.placeholder(f"packed_{root.name}")
    node.meta.update(root.meta)
    if by_rows:
        node.meta["val"] = root.meta["val"].contiguous()
    node.meta["weight"] = True
    packed = Input(node.name, InputKind.PACKED, f"{module_of(root) or 'model'}.{node.name}", recipe=recipe)
    program.inputs.append(packed)
    return node, packed


def _label(recipe: Recipe | None) -> str:
    assert recipe is not None
    return f"{len(recipe.sources)} weights laid side by side" if recipe.concatenation else "computed from weights"


def _drop_unread(program: Program) -> None:
    kept: list[Input] = []
    for node, meaning in program.placeholder_inputs().items():
        if meaning.kind is InputKind.USER or node.users:
            kept.append(meaning)
        else:
            program.graph.erase_node(node)
    program.inputs[:] = kept
