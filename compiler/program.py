"""What a captured model is to the compiler: one functional ATen graph and the meaning of its inputs and outputs."""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx


class InputKind(enum.Enum):
    """Where the value of a placeholder comes from when the graph is called."""

    USER = "user"
    """A tensor argument of the call; `target` is the keyword of the model's forward."""
    PARAMETER = "parameter"
    """`target` is the qualified name in the module (`model.layers.0.mlp.up_proj.weight`)."""
    BUFFER = "buffer"
    """`target` is the qualified name; persistent or not."""
    CONSTANT = "constant"
    """A tensor made during capture; `value` holds it."""
    PACKED = "packed"
    """Computed once from weights by `recipe`; `target` is a name for it."""
    STEP = "step"
    """What a step of decoding says beside its tokens: `target` is `cu_seqlens_q`, `lengths`, `max_q` (an int), `fresh`
    (a bool), `slots.<group>` or `block_table.<group>`."""
    PAGES = "pages"
    """Memory that the graph reads and writes: `target` is `k.<layer>`, `v.<layer>`, and their scales (None where pages
    are not quantised) `k_scale.<layer>`, `v_scale.<layer>`."""


@dataclass(frozen=True)
class Recipe:
    """How a packed weight is computed: `graph(*sources) -> Tensor`.

    `concatenation` is true where the result is the sources laid one behind the other along dim 0: then the sources
    can become views of it and nothing is stored twice.
    """

    graph: fx.GraphModule
    sources: tuple[str, ...]
    concatenation: bool = False


@dataclass(frozen=True)
class Input:
    """One placeholder of `Program.gm`, in order."""

    name: str
    kind: InputKind
    target: str
    value: Any = None
    """Of a CONSTANT its tensor; of STEP and PAGES an example, by which kernels are checked."""
    recipe: Recipe | None = None


@dataclass(frozen=True)
class LayerSpec:
    """What one attention keeps in pages: keys `[P, page, kv_heads, key_dim]`, values `[..., value_dim]`, of `dtype`.

    The keys of position j are visible from position p where `p - left <= j <= p`; `left` is -1 without a window.
    Layers of one `group` share slots and block tables.
    """

    kv_heads: int
    key_dim: int
    value_dim: int
    left: int
    group: int
    dtype: torch.dtype


@dataclass(frozen=True)
class Note:
    """Something the user should know about the capture: which module, what, and the line in the model's source."""

    module: str
    message: str
    source: str = ""


@dataclass(frozen=True)
class Guard:
    """What the graph takes for one tensor argument: a dimension is a size, or the name of a symbol in `Limits`."""

    dtype: torch.dtype
    shape: tuple[int | str, ...]


@dataclass
class Limits:
    """For which arguments a captured graph is right.

    `ranges` bounds each symbol, both ends included (`None` = no upper bound); `reasons` says where an upper bound that
    a person can run into comes from (learned positions). `conditions` are further checks on the tensors by keyword,
    with the text they came from.
    """

    tensors: dict[str, Guard] = field(default_factory=dict)
    ranges: dict[str, tuple[int, int | None]] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    conditions: list[tuple[str, Callable[[dict[str, torch.Tensor]], bool]]] = field(default_factory=list)
    _checked: dict[tuple[torch.Size, ...], str | None] = field(default_factory=dict, repr=False)

    def violation(self, tensors: dict[str, torch.Tensor]) -> str | None:
        """Why the graph cannot serve these tensors (by keyword), or `None`."""
        if tensors.keys() != self.tensors.keys():
            return f"captured for {sorted(self.tensors)}, called with {sorted(tensors)}"
        sizes: dict[str, int] = {}
        for name, guard in self.tensors.items():
            tensor = tensors[name]
            if tensor.dtype != guard.dtype:
                return f"{name} has dtype {tensor.dtype}, captured with {guard.dtype}"
            if tensor.dim() != len(guard.shape):
                return f"{name} has {tensor.dim()} dimensions, captured with {len(guard.shape)}"
            for dim, (size, wanted) in enumerate(zip(tensor.shape, guard.shape, strict=True)):
                if isinstance(wanted, int):
                    if size != wanted:
                        return f"dimension {dim} of {name} is {size}, captured with {wanted}"
                    continue
                if sizes.setdefault(wanted, size) != size:
                    return f"dimension {dim} of {name} is {size}, but {sizes[wanted]} was expected from another input"
                low, high = self.ranges.get(wanted, (1, None))
                if size < low or (high is not None and size > high):
                    reason = self.reasons.get(wanted, "the captured graph's range")
                    return f"dimension {dim} of {name} is {size}, outside {low} to {high} ({reason})"
        shapes = tuple(tensors[name].shape for name in self.tensors)
        if shapes not in self._checked:
            if len(self._checked) > 4096:
                self._checked.clear()
            broken = next((text for text, holds in self.conditions if not holds(tensors)), None)
            self._checked[shapes] = None if broken is None else f"the captured graph needs {broken[:200]}"
        return self._checked[shapes]

    def sizes(self, tensors: dict[str, torch.Tensor]) -> dict[str, int]:
        """The value of each symbol for these tensors."""
        return {
            wanted: size
            for name, guard in self.tensors.items()
            for size, wanted in zip(tensors[name].shape, guard.shape, strict=True)
            if isinstance(wanted, str)
        }

    def too_long(self, tensors: dict[str, torch.Tensor]) -> str | None:
        """A sentence where a dimension is longer than the model itself allows (learned positions), else `None`."""
        for name, guard in self.tensors.items():
            tensor = tensors.get(name)
            if tensor is None or tensor.dim() != len(guard.shape):
                continue
            for dim, (size, symbol) in enumerate(zip(tensor.shape, guard.shape, strict=True)):
                if isinstance(symbol, str) and symbol in self.reasons:
                    high = self.ranges[symbol][1]
                    if high is not None and size > high:
                        return f"dimension {dim} of {name} is {size}; {self.reasons[symbol]} allow at most {high}"
        return None


@dataclass
class Program:
    """A captured forward.

    `gm.graph` has one placeholder for each of `inputs`, is functional, and returns a flat tuple; `rebuild` turns that
    tuple into the object the model's forward returns. Every node has `meta["val"]` (fake tensor or SymInt).
    """

    gm: fx.GraphModule
    inputs: list[Input]
    rebuild: Callable[[Sequence[Any]], Any]
    notes: list[Note] = field(default_factory=list)
    example: dict[str, torch.Tensor] = field(default_factory=dict)
    """Tensors for the USER inputs by keyword, of the shapes used at capture."""
    limits: Limits = field(default_factory=Limits)
    """Which other arguments the graph serves."""
    cache: bool = False
    """Whether `rebuild` returns a key-value cache built from outputs of the graph."""
    guards: list[Callable[[dict[str, torch.Tensor]], bool]] = field(default_factory=list)
    """Assumptions that passes inferred from samples: each says whether it holds for these inputs by keyword. They
    depend on sizes, so the runtime asks once for every new set of sizes."""

    layers: tuple[LayerSpec, ...] = ()
    """Of a graph whose keys and values lie in pages: each attention, in the order of the graph."""
    longest: tuple[int, str] | None = None
    """Of such a graph: the most tokens that a sequence may have, and why; None where there is no end."""
    tabulated: int | None = None
    """Of such a graph: how many positions its tables have; None where it has none."""
    uncounted: int | None = None
    """Of such a graph: tokens of this number are no positions for the model, in a prompt."""

    @property
    def graph(self) -> fx.Graph:
        return self.gm.graph

    def placeholder_inputs(self) -> dict[fx.Node, Input]:
        """Each placeholder node with its meaning."""
        nodes = [n for n in self.graph.nodes if n.op == "placeholder"]
        return dict(zip(nodes, self.inputs, strict=True))
