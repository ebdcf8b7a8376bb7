"""The part of a graph that computes one node, as something that can be run by itself on small inputs.

Masks and positions depend on shapes, on masks and at most on token ids; their slices are small and run in
microseconds, which is how they are classified (`masks`) and bounded (`positions`).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves, tree_map

from .program import Input, InputKind, Program
from .verify import Upcast

_LARGEST_STATE = 1 << 22
"""A slice that reads more elements of parameters than this is not a mask."""


class SliceError(ValueError):
    """The slice cannot be run by itself: it reads weights on meta, or does not run at the sampled size."""


@dataclass(frozen=True)
class Slice:
    """`slice(inputs by keyword) -> one tensor for each node asked for`.

    `users` are the keywords that it reads. Parameters and buffers are looked up in `model` at each call, so that a
    moved or replaced weight is no surprise.
    """

    module: fx.GraphModule
    inputs: tuple[Input, ...]
    model: nn.Module | None
    nodes: int

    @property
    def users(self) -> tuple[str, ...]:
        return tuple(made.target for made in self.inputs if made.kind is InputKind.USER)

    @property
    def users_by_value(self) -> tuple[str, ...]:
        """Inputs of which more is read than their sizes."""
        nodes = [n for n in self.module.graph.nodes if n.op == "placeholder"]
        return tuple(
            made.target
            for node, made in zip(nodes, self.inputs, strict=True)
            if made.kind is InputKind.USER and any(u.target is not torch.ops.aten.sym_size.int for u in node.users)
        )

    @classmethod
    def of(cls, program: Program, nodes: Sequence[fx.Node], model: nn.Module | None) -> Slice:
        """The backward slice of `nodes`; `SliceError` where state is missing, on meta, or too large for a mask."""
        wanted, stack = set(nodes), list(nodes)
        while stack:
            for source in stack.pop().all_input_nodes:
                if source not in wanted:
                    wanted.add(source)
                    stack.append(source)
        graph = fx.Graph()
        env: dict[fx.Node, fx.Node] = {}
        meaning = program.placeholder_inputs()
        inputs = []
        for old in program.graph.nodes:
            if old not in wanted:
                continue
            if old.op == "placeholder":
                made = meaning[old]
                inputs.append(made)
                if made.kind is not InputKind.USER:
                    _state(made, model)
            env[old] = graph.node_copy(old, lambda n: env[n])
            if env[old].kwargs.get("device") == torch.device("meta"):  # captured without weights: there are values here
                env[old].kwargs = {**env[old].kwargs, "device": torch.device("cpu")}
        graph.output(tuple(env[node] for node in nodes))
        return cls(fx.GraphModule(program.gm, graph), tuple(inputs), model, len(wanted))

    def with_number(self, old: int, new: int) -> Slice:
        """The same slice with another number where the graph has `old`: a window of another width, say."""
        graph = copy.deepcopy(self.module.graph)
        for node in graph.nodes:
            if node.op == "call_function":
                node.args, node.kwargs = tree_map(
                    lambda x: new if type(x) is int and x == old else x, (node.args, node.kwargs)
                )
        return replace(self, module=fx.GraphModule(self.module, graph))

    def numbers(self) -> frozenset[int]:
        """The whole numbers in the slice's graph."""
        given = [x for n in self.module.graph.nodes for x in tree_leaves((n.args, n.kwargs))]
        return frozenset(x for x in given if type(x) is int)

    def __call__(self, tensors: dict[str, Tensor], target: torch.dtype | None = None) -> tuple[Tensor, ...]:
        """Evaluate on inputs by keyword, with `target` every floating value in that precision.

        Raises `SliceError` where the slice does not run on them.
        """
        values = [tensors[i.target] if i.kind is InputKind.USER else _state(i, self.model) for i in self.inputs]
        try:
            with torch.no_grad():
                run = self.module if target is None else Upcast(self.module, target).run
                out: tuple[Tensor, ...] = run(*values)
        except (RuntimeError, IndexError, ValueError, TypeError) as error:
            raise SliceError(f"does not run at this size: {error}") from error
        return out


def _state(made: Input, model: nn.Module | None) -> Tensor:
    if made.kind in (InputKind.STEP, InputKind.PAGES):
        raise SliceError(f"it reads {made.target}")
    if made.value is not None:
        tensor = made.value
    elif model is not None and made.kind in (InputKind.PARAMETER, InputKind.BUFFER):
        tensor = _find(model, made.target)
    else:
        raise SliceError(f"{made.target} is not at hand")
    if tensor.is_meta:
        raise SliceError(f"{made.target} is on meta")
    if tensor.numel() > _LARGEST_STATE:
        raise SliceError(f"{made.target} has {tensor.numel()} elements")
    return tensor


def _find(model: nn.Module, name: str) -> Tensor:
    path, _, leaf = name.rpartition(".")
    owner = model.get_submodule(path)
    tensor = owner._parameters.get(leaf)
    found = tensor if tensor is not None else owner._buffers.get(leaf)
    if found is None:
        raise SliceError(f"{name} is not in the model")
    return found


def sizes_of(program: Program, chosen: Mapping[str, int], batch: int = 2, default: int = 6) -> dict[str, int]:
    """A size for each symbol of the inputs: as chosen, else `batch` in dimension 0, `default` elsewhere; in range."""
    sizes = dict(chosen)
    for guard in program.limits.tensors.values():
        for dim, symbol in enumerate(guard.shape):
            if isinstance(symbol, str) and symbol not in sizes:
                low, high = program.limits.ranges.get(symbol, (1, None))
                size = max(low, batch if dim == 0 else default)
                sizes[symbol] = size if high is None else min(size, high)
    return sizes


def sample(program: Program, sizes: Mapping[str, int]) -> dict[str, Tensor]:
    """Inputs of these sizes by symbol: ones for integers and booleans, zeros for floats."""
    chosen = sizes_of(program, sizes)
    device = next((t.device for t in program.example.values() if not t.is_meta), torch.device("cpu"))
    out = {}
    for name, guard in program.limits.tensors.items():
        shape = [s if isinstance(s, int) else chosen[s] for s in guard.shape]
        fill = torch.zeros if guard.dtype.is_floating_point else torch.ones
        out[name] = fill(shape, dtype=guard.dtype, device=device)
    return out
