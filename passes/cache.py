"""Keep keys and values in pages, so that one graph serves prefill, chunked prefill and decode on flat tokens.

    attention(q, k, v, mask)  [1, H, T, D]
        ->    paged_attention(q', k', v', k_pages, v_pages, slots, cu_seqlens_q, lengths, block_table, max_q)  [T, H, D]

    out = head(x)  [1, T, V]    ->    out = head(x[:, rows])

The tokens of all sequences lie one behind the other in a batch of one. Which keys a token sees is no mask any more:
what its mask says for one sequence (`compiler.causal`) is told to the op, and the part of the graph that made the mask
goes. Layers with the same window share slots and block tables, which are inputs like the pages themselves.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._dynamo.source import ConstantSource
from torch.fx.experimental.symbolic_shapes import DimDynamic, StatelessSymbolicContext

from ..compiler.apart import apart_until
from ..compiler.causal import CacheError, Causal, Reach
from ..compiler.cross import STATES, check_all_visible, forget_input, is_cross
from ..compiler.looked_up import check_looked_up
from ..compiler.opset import OPS, RESHAPES, arguments
from ..compiler.pipeline import Context
from ..compiler.positions import positions_allowed
from ..compiler.program import Input, InputKind, LayerSpec, Program
from ..compiler.provenance import module_of, source_of
from ..compiler.records import PassResult, Rewrite
from ..compiler.rule import Stage
from ..kernels.paged_attention import PAGE_DTYPES, paged_attention

aten = torch.ops.aten

EXAMPLE = (4, 3, 2)
"""Tokens of the sequences in the example that a program is captured and checked with."""
_PAGE = 16
ROWS = "logits_to_keep"
"""The argument by which transformers' models are told which tokens' logits are wanted."""


def cache(program: Program, context: Context) -> PassResult:
    """Rewrite every attention and select the rows, in place.

    Raises `CacheError` where something cannot be: the program is then of no use.
    """
    started = time.perf_counter()
    graph = program.graph
    result = PassResult("cache", Stage.CACHE.name, nodes_before=len(graph.nodes))
    nodes = [n for n in graph.nodes if n.target is torch.ops.regraft.attention.default]
    if not nodes:
        raise CacheError("no attention was recognised whose keys could be kept")
    if context.settings.model is None:
        raise ValueError("the cache pass needs the model, to see what its masks are")
    model = context.settings.model
    crossing = [n for n in nodes if is_cross(program, n)]
    for node in crossing:
        check_all_visible(program, node, model)
    for node in nodes:
        check_looked_up(program, node, (arguments(node)[x] for x in ("q" if node in crossing else "qkv")))
    nodes = [n for n in nodes if n not in crossing]
    causal = Causal(program, model)
    reaches = [causal.of(n) for n in nodes]
    windows = list(dict.fromkeys(r.left for r in reaches))
    dtype = context.settings.page_dtype
    layers = [layer_of(n, r.left, windows.index(r.left), dtype) for n, r in zip(nodes, reaches, strict=True)]
    inputs = _Inputs(program, nodes[0].meta["val"].fake_mode, context.settings.device)
    steps = inputs.step(len(windows))
    for index, (node, reach, layer) in enumerate(zip(nodes, reaches, layers, strict=True)):
        _rewrite(graph, node, reach, layer, inputs.pages(index, layer), steps, inputs)
        kind = "causal" if reach.left < 0 else f"causal, window {reach.left + 1}"
        kind += "" if reach.slopes is None else ", ALiBi"
        kind += "" if reach.relative is None else ", bias by distance"
        label = f"attention -> paged_attention ({kind})"
        result.rewrites.append(Rewrite("cache", module_of(node), source_of(node), label, (node.name,), (node.name,)))
    if crossing:
        states = inputs.encoder()
        for index, node in enumerate(crossing):
            _read_encoder(graph, node, inputs.encoder_pages(index, layer_of(node)), states)
            label = "attention -> paged_attention (all of the encoder's states)"
            result.rewrites.append(
                Rewrite("cache", module_of(node), source_of(node), label, (node.name,), (node.name,))
            )
    _select_rows(program, inputs)
    graph.eliminate_dead_code()
    if STATES in program.limits.tensors:
        forget_input(program, STATES, "input_ids")
    program.layers = tuple(layers)
    program.longest = _longest(program, model, reaches)
    graph.lint()
    program.gm.recompile()
    result.nodes_after = len(graph.nodes)
    result.time_s = time.perf_counter() - started
    return result


def layer_of(node: fx.Node, left: int = -1, group: int = 0, dtype: torch.dtype | None = None) -> LayerSpec:
    """What an attention keeps, in its own dtype or another; raises `CacheError` where its heads have no fixed size."""
    k, v = (arguments(node)[x].meta["val"] for x in ("k", "v"))
    if any(not isinstance(s, int) for s in (k.shape[1], k.shape[3], v.shape[3])):
        raise CacheError(f"the heads of {module_of(node) or node.name} have no fixed size")
    return LayerSpec(int(k.shape[1]), int(k.shape[3]), int(v.shape[3]), left, group, dtype or k.dtype)


def _longest(program: Program, model: nn.Module, reaches: Sequence[Reach]) -> tuple[int, str] | None:
    """The shortest of the ends there are."""
    ends = (
        (positions_allowed(program, model), "the model has no more positions"),
        (apart_until(program, model), "beyond, its rotations depend on how long other sequences are"),
        (min((r.longest for r in reaches if r.longest is not None), default=None), "its table of biases ends there"),
    )
    return min(((end, why) for end, why in ends if end is not None), default=None)


class _Inputs:
    """Adds placeholders behind those that are there, with examples of `EXAMPLE`."""

    def __init__(self, program: Program, mode: Any, device: torch.device) -> None:
        self.program, self.mode, self.device = program, mode, device
        self.buckets: dict[tuple[int, ...], fx.Node] = {}
        self.tables: dict[tuple[fx.Node, fx.Node], fx.Node] = {}
        self.last = [n for n in program.graph.nodes if n.op == "placeholder"][-1]

    def add(self, kind: InputKind, target: str, value: Any, dynamic: Sequence[int] = ()) -> fx.Node:
        """A placeholder; of a tensor the sizes of `dynamic` dimensions are symbols."""
        with self.program.graph.inserting_after(self.last):
            node = self.program.graph.placeholder(target.replace(".", "_"))
        node.meta = {"val": self._fake(value, target, dynamic), "weight": kind is InputKind.CONSTANT}
        self.program.inputs.append(Input(node.name, kind, target, value=value))
        self.last = node
        return node

    def _fake(self, value: Any, target: str, dynamic: Sequence[int]) -> Any:
        if not isinstance(value, Tensor):
            return value
        sizes = [DimDynamic.DYNAMIC if d in dynamic else DimDynamic.STATIC for d in range(value.dim())]
        context: Any = StatelessSymbolicContext(dynamic_sizes=sizes, constraint_sizes=[None] * value.dim())
        return self.mode.from_tensor(value, source=ConstantSource(target), symbolic_context=context)

    def step(self, groups: int) -> dict[str, fx.Node]:
        """What a step says, by target."""
        ends = torch.tensor([0, *EXAMPLE], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        found = {
            "cu_seqlens_q": self._step("cu_seqlens_q", ends),
            "lengths": self._step("lengths", torch.tensor(EXAMPLE, dtype=torch.int32)),
            "max_q": self._step("max_q", max(EXAMPLE)),
            "fresh": self._step("fresh", False),
        }
        pages = torch.tensor([2, 0, 3], dtype=torch.int32)
        slots = [int(page) * _PAGE + i for page, length in zip(pages, EXAMPLE, strict=True) for i in range(length)]
        for group in range(groups):
            for target, value in (("slots", torch.tensor(slots)), ("block_table", pages[:, None].repeat(1, 2))):
                found[f"{target}.{group}"] = self._step(f"{target}.{group}", value)
        return found

    def _step(self, target: str, value: Any) -> fx.Node:
        value = value.to(self.device) if isinstance(value, Tensor) else value
        return self.add(InputKind.STEP, target, value, dynamic=range(value.dim()) if isinstance(value, Tensor) else ())

    def pages(self, index: int, layer: LayerSpec) -> tuple[fx.Node, fx.Node, fx.Node, fx.Node]:
        """Pages of keys and values of one layer, and their scales."""
        sizes = (len(EXAMPLE) + 1, _PAGE, layer.kv_heads)
        quantised = layer.dtype in PAGE_DTYPES
        nodes = []
        for name, shape, dtype in (
            ("k", (*sizes, layer.key_dim), layer.dtype),
            ("v", (*sizes, layer.value_dim), layer.dtype),
            ("k_scale", sizes, torch.float32),
            ("v_scale", sizes, torch.float32),
        ):
            value = torch.zeros(shape, device=self.device).to(dtype) if quantised or "scale" not in name else None
            nodes.append(self.add(InputKind.PAGES, f"{name}.{index}", value, dynamic=(0, 1)))
        return nodes[0], nodes[1], nodes[2], nodes[3]

    def encoder(self) -> dict[str, fx.Node]:
        """What a step says of the encoder's states: each token is a sequence of one query."""
        tokens = sum(EXAMPLE)
        table = torch.tensor([[3, -1], [1, 0], [2, -1]], dtype=torch.int32).repeat_interleave(torch.tensor(EXAMPLE), 0)
        values = {
            "slots": torch.full((tokens,), -1, dtype=torch.int64),
            "starts": torch.arange(tokens + 1, dtype=torch.int32),
            "lengths": torch.tensor([5, 17, 16], dtype=torch.int32).repeat_interleave(torch.tensor(EXAMPLE)),
            "table": table,
        }
        return {name: self._step(f"encoder.{name}", value) for name, value in values.items()}

    def encoder_pages(self, index: int, layer: LayerSpec) -> tuple[fx.Node, fx.Node]:
        """Pages of what one attention reads of the encoder's states."""
        sizes = (len(EXAMPLE) + 1, _PAGE, layer.kv_heads)
        k, v = (
            self.add(
                InputKind.PAGES,
                f"encoder_{name}.{index}",
                torch.zeros((*sizes, dim), device=self.device, dtype=layer.dtype),
                dynamic=(0, 1),
            )
            for name, dim in (("k", layer.key_dim), ("v", layer.value_dim))
        )
        return k, v

    def constant(self, target: str, value: Tensor) -> fx.Node:
        """A tensor that is part of the program."""
        return self.add(InputKind.CONSTANT, target, value.to(self.device))


def _call(graph: fx.Graph, like: fx.Node, target: Any, *args: Any) -> fx.Node:
    """A node with its fake value, from the place in the model where `like` stands."""
    node = graph.call_function(target, args)
    fakes = fx.map_arg(args, lambda n: n.meta["val"])
    node.meta = {**like.meta, "val": target(*fakes)}
    return node


def _rewrite(
    graph: fx.Graph,
    node: fx.Node,
    reach: Reach,
    layer: LayerSpec,
    pages: tuple[fx.Node, ...],
    steps: dict[str, fx.Node],
    inputs: _Inputs,
) -> None:
    given = arguments(node)
    slopes = None if reach.slopes is None else _slopes(inputs, reach.slopes)
    buckets = None if reach.relative is None else _buckets(inputs, reach.relative.buckets)
    with node.meta["val"].fake_mode, graph.inserting_before(node):
        q, k, v = (heads_inside(graph, given[x]) for x in ("q", "k", "v"))
        table = (steps[f"slots.{layer.group}"], steps["cu_seqlens_q"], steps["lengths"])
        rest = (steps[f"block_table.{layer.group}"], steps["max_q"], given["sinks"], slopes)
        numbers: list[Any] = [given["scale"], reach.left, given["softcap"], steps["fresh"]]
        if reach.relative is not None and buckets is not None:
            numbers.append(_table(graph, node, inputs, reach.relative.weight, buckets))
        paged = _call(graph, node, paged_attention.overload, q, k, v, *pages[:2], *table, *rest, *pages[2:], *numbers)
    _replace(graph, node, paged)


def _read_encoder(graph: fx.Graph, node: fx.Node, pages: tuple[fx.Node, fx.Node], states: dict[str, fx.Node]) -> None:
    """Attention of every token to all states, whose keys and values are there: nothing is written.

    The op's last query sees all keys, so that each token is a sequence of one query. It wants something of the shape of
    new keys and values, which is q itself: no slot is given, and it is not read.
    """
    given = arguments(node)
    layer = layer_of(node)
    with node.meta["val"].fake_mode, graph.inserting_before(node):
        q = heads_inside(graph, given["q"])
        heads, width = q.meta["val"].shape[1:]
        if layer.kv_heads > heads or layer.value_dim > width or layer.key_dim != width:
            raise CacheError(f"{module_of(node) or node.name} reads larger heads of the encoder's states than it has")
        k = q if layer.kv_heads == heads else _call(graph, node, aten.slice.Tensor, q, 1, 0, layer.kv_heads)
        v = k if layer.value_dim == width else _call(graph, node, aten.slice.Tensor, k, 2, 0, layer.value_dim)
        table = (states["slots"], states["starts"], states["lengths"], states["table"])
        numbers = (given["scale"], -1, given["softcap"])
        rest = (1, given["sinks"], None, None, None)
        paged = _call(graph, node, paged_attention.overload, q, k, v, *pages, *table, *rest, *numbers)
    _replace(graph, node, paged)


def _replace(graph: fx.Graph, node: fx.Node, paged: fx.Node) -> None:
    """`[1, T, H, D]` by `[T, H, D]`."""
    with node.meta["val"].fake_mode, graph.inserting_before(node):
        batch = _call(graph, node, aten.unsqueeze.default, paged, 0)
    for user in list(node.users):
        if user.target in RESHAPES:  # of [T, H, D] as well as of [1, T, H, D]
            user.replace_input_with(node, paged)
    node.replace_all_uses_with(batch)
    graph.erase_node(node)


def heads_inside(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """`[1, H, T, D]` as a view `[T, H, D]`."""
    given = arguments(node)
    if node.target is aten.transpose.int and (given["dim0"], given["dim1"]) == (-3, -2):
        return _call(graph, node, aten.select.int, given["self"], 0, 0)
    return _call(graph, node, aten.transpose.int, _call(graph, node, aten.select.int, node, 0, 0), 0, 1)


def _table(graph: fx.Graph, node: fx.Node, inputs: _Inputs, weight: fx.Node, buckets: fx.Node) -> fx.Node:
    """`[H, W]` of the weight as it is in the call; attentions with one bias share it."""
    if (weight, buckets) not in inputs.tables:
        rows = _call(graph, node, aten.embedding.default, weight, buckets)
        across = _call(graph, node, aten.transpose.int, rows, 0, 1)
        inputs.tables[weight, buckets] = _call(graph, node, aten.clone.default, across)
    return inputs.tables[weight, buckets]


def _buckets(inputs: _Inputs, buckets: Tensor) -> fx.Node:
    """The constant; not to be called under a fake mode, in which those of a device cannot be read."""
    key = tuple(buckets.tolist())
    if key not in inputs.buckets:
        inputs.buckets[key] = inputs.constant(f"buckets.{len(inputs.program.inputs)}", buckets)
    return inputs.buckets[key]


def _slopes(inputs: _Inputs, slopes: Tensor) -> fx.Node:
    for node, made in inputs.program.placeholder_inputs().items():
        if (
            made.kind is InputKind.CONSTANT
            and made.target.startswith("slopes.")
            and torch.equal(made.value.cpu(), slopes.cpu())
        ):
            return node
    return inputs.constant(f"slopes.{len(inputs.program.inputs)}", slopes)


def _select_rows(program: Program, inputs: _Inputs) -> None:
    """Leave of the outputs the logits alone, `[1, R, V]`."""
    graph = program.graph
    output = next(n for n in graph.nodes if n.op == "output")
    logits = output.args[0][_place_of_logits(program, len(output.args[0]))]
    if logits.meta["val"].dim() != 3:
        raise CacheError("its logits are not [batch, tokens, vocabulary]")
    if ROWS not in program.limits.tensors:
        rows = inputs.add(InputKind.STEP, "rows", torch.tensor([2, 6, 8], device=inputs.device), dynamic=(0,))
        place = _head(logits)
        with logits.meta["val"].fake_mode, graph.inserting_after(max(place, rows, key=_order(graph))):
            picked = _call(graph, place, aten.index_select.default, place, 1, rows)
        if place is logits:
            logits = picked
        else:
            place.replace_all_uses_with(picked, delete_user_cb=lambda user: user is not picked)
            _refresh(graph, picked)
    output.args = ((logits,),)
    program.rebuild = tuple


def picks_logits(program: Program) -> bool:
    """Whether rows are picked of the logits, since what makes them is not known to go row by row."""
    output: Any = next(n for n in program.graph.nodes if n.op == "output").args[0]
    return any(n.target is aten.index_select.default for n in output)


def _order(graph: fx.Graph) -> Any:
    place = {n: i for i, n in enumerate(graph.nodes)}
    return place.__getitem__


def _place_of_logits(program: Program, outputs: int) -> int:
    """Which output of the graph is the model's `logits`, or the first thing that it returns."""
    returned = program.rebuild(range(outputs))
    found = getattr(returned, "logits", None)
    if found is None and isinstance(returned, tuple) and returned:
        found = returned[0]
    if not isinstance(found, int):
        raise CacheError("its forward returns no logits")
    return found


_LINEAR = frozenset([aten.linear.default, torch.ops.regraft.linear_act.default])
_BY_ROW = _LINEAR | {torch.ops.regraft.activation.default}
_BY_ROW |= frozenset(t for name in ("mul", "div", "add", "sub", "tanh", "cast") for t in OPS[name].targets)


def _head(logits: fx.Node) -> fx.Node:
    """What the last linear layer reads, where only operations row by row follow it; else the logits."""
    node = logits
    while node.op == "call_function":
        sources = [i for i in node.all_input_nodes if not i.meta.get("weight")]
        if node.target not in _BY_ROW or len(sources) != 1 or len(node.users) != 1:
            return logits
        linear = node.target in _LINEAR
        node = sources[0]
        if linear:
            return node if node.meta["val"].dim() == 3 and len(node.users) == 1 else logits
    return logits


def _refresh(graph: fx.Graph, first: fx.Node) -> None:
    """New fake values for what follows a node."""
    changed = {first}
    for node in graph.nodes:
        if node.op == "call_function" and node not in changed and any(i in changed for i in node.all_input_nodes):
            args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), lambda n: n.meta["val"])
            with first.meta["val"].fake_mode:
                node.meta["val"] = node.target(*args, **kwargs)
            changed.add(node)
