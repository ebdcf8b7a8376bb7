"""The live weights of a module: looked up at each call, packed without a second copy, and given back.

A weight that is the concatenation of parameters is one buffer held here, and the parameters become views of it:
nothing is stored twice, names, identity and `state_dict()` stay, and in-place changes are seen without a check. The
buffer is no registered tensor of the module (that would break `save_pretrained`). Everything else packed is a copy, and
remembers the versions of its sources. Views go stale after `.to(dtype)`, `.data =` and replaced Parameters:
`Weights.changes` notices.
"""

from __future__ import annotations

import contextlib
import enum
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from operator import attrgetter, getitem, is_
from typing import Any

import torch
from torch import nn

from ..compiler.program import Input, InputKind, Recipe
from ..compiler.rope_branches import swapped_buffers
from .device_memory import movable, other_graphs, release_unused
from .samples import Samples
from .weight_layout import Room

PackKey = tuple[Any, ...]

_dtype = attrgetter("dtype")
_nbytes = attrgetter("nbytes")
_shape = attrgetter("shape")


@contextlib.contextmanager
def plainly() -> Iterator[None]:
    """Outside of autograd and of inference mode: what is made there can neither be trained nor watched for changes."""
    with torch.inference_mode(False), torch.no_grad():
        yield


class Change(enum.Enum):
    """What happened to the weights since they were last looked at."""

    NONE = "none"
    VALUES = "values"
    """Other tensors of the same form: packed weights have to be made again."""
    FORM = "form"
    """Other shapes, dtypes, devices, ties or modules: the graph is no longer this model's."""


@dataclass
class Pack:
    """A packed weight: its value, and what its sources were when it was made."""

    recipe: Recipe
    value: torch.Tensor
    views: bool
    """The sources are views of `value`, so that their values need no watching."""
    sources: list[torch.Tensor] = field(default_factory=list)
    marks: list[tuple[int, int]] = field(default_factory=list)
    """`(data_ptr, version)` of each source."""


class Weights:
    """Parameters and buffers of one module by qualified name, and what is packed from them."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.packs: dict[PackKey, Pack] = {}
        self.version = 0
        """Another number whenever a weight may be another tensor, or stand elsewhere."""
        self._told: tuple[Any, ...] = ()
        self._laid_out = False
        self.writes = 0
        """Another number after values were written past PyTorch's counts, as far as `look_inside` saw it."""
        self.noted = 0
        """Another number whenever what was there was taken for what `changes` compares with."""
        self._samples = Samples()
        self._look()

    # -- what is there now ------------------------------------------------------------------------------------------

    def _look(self) -> None:
        """Remember the modules and tensors as they are."""
        self._children: list[tuple[dict[str, Any], str, Any]] = []
        self._modules: list[nn.Module] = []
        slots: dict[str, tuple[dict[str, Any], str]] = {}
        for prefix, owner in self.module.named_modules(remove_duplicate=False):
            self._modules.append(owner)
            self._children += [(owner._modules, name, child) for name, child in owner._modules.items()]
            dot = prefix + "." if prefix else ""
            own = swapped_buffers(owner)  # what the model itself exchanges between calls is no change
            for table in (owner._parameters, owner._buffers):
                known = [name for name, tensor in table.items() if tensor is not None and name not in own]
                slots |= {dot + name: (table, name) for name in known}
        self._types = list(map(type, self._modules))
        self._overrides = [m.__dict__.get("forward") for m in self._modules[1:]]
        self._instances = [m.__dict__ for m in self._modules[1:]]
        self._child_tables = [c[0] for c in self._children]
        self._child_names = [c[1] for c in self._children]
        self._child_values = [c[2] for c in self._children]
        self._families = [m._modules for m in self._modules]
        self._child_counts = list(map(len, self._families))
        self.slots = slots
        self._tables = [s[0] for s in slots.values()]
        self._names = [s[1] for s in slots.values()]
        self._note(list(map(getitem, self._tables, self._names)))

    def _note(self, tensors: list[torch.Tensor]) -> None:
        self.noted += 1
        self._tensors = tensors
        self._pointers = list(map(torch.Tensor.data_ptr, tensors))
        self._bytes = list(map(_nbytes, tensors))
        self._strides = list(map(torch.Tensor.stride, tensors))
        self._dtypes = list(map(_dtype, tensors))
        self._shapes = list(map(_shape, tensors))
        packed = [(key, pack.value.data_ptr()) for key, pack in self.packs.items()]
        told = (self._pointers, self._strides, self._dtypes, self._shapes, packed)
        if told != self._told:
            self.version += 1
            self._told = told
        self._devices = [t.device for t in tensors]
        self._ties = _ties(tensors)

    def unmoved(self) -> bool:
        """Whether every weight stands where it stood, as large as it was: a part of what `changes` asks, and faster."""
        try:
            now = list(map(getitem, self._tables, self._names))
        except KeyError:
            return False
        if not all(map(is_, now, self._tensors)):
            return False
        return list(map(torch.Tensor.data_ptr, now)) == self._pointers and list(map(_nbytes, now)) == self._bytes

    def changes(self) -> Change:
        """Compare what is there with what was: a few tens of microseconds, at each call."""
        if self._modules_changed():
            return Change.FORM
        try:
            now = list(map(getitem, self._tables, self._names))
        except KeyError:
            return Change.FORM
        if all(map(is_, now, self._tensors)):
            if list(map(_dtype, now)) != self._dtypes or list(map(_nbytes, now)) != self._bytes:
                return Change.FORM
            if list(map(torch.Tensor.stride, now)) != self._strides:
                return Change.FORM
            if list(map(torch.Tensor.data_ptr, now)) == self._pointers:
                return Change.NONE if all(map(_fresh, self.packs.values())) else Change.VALUES
        if any(not isinstance(t, torch.Tensor) for t in now):
            return Change.FORM
        form = (list(map(_dtype, now)), list(map(_shape, now)), [t.device for t in now], _ties(now))
        return Change.VALUES if form == (self._dtypes, self._shapes, self._devices, self._ties) else Change.FORM

    def look_inside(self) -> Change:
        """Compare values themselves, by samples: what was written through `.data` is counted nowhere.

        VALUES where they are others than at the last look, or than when the first copy was made; then copies have to be
        made again. `changes` has been followed before. The host waits for the device.
        """
        if not self._samples.changed(self._tensors, self.version):
            return Change.NONE
        self.writes += 1
        for pack in self.packs.values():
            pack.marks = []
        return Change.VALUES

    def _modules_changed(self) -> bool:
        try:
            same = all(map(is_, map(getitem, self._child_tables, self._child_names), self._child_values))
        except KeyError:
            return True
        if not same or list(map(type, self._modules)) != self._types:
            return True
        if list(map(len, self._families)) != self._child_counts:
            return True
        return not all(map(is_, map(dict.get, self._instances, itertools.repeat("forward")), self._overrides))

    def refresh(self) -> None:
        """What has changed of the modules since the last look is known to be of no consequence."""
        self._look()

    def look_again(self) -> None:
        """After `Change.FORM`: forget what was packed and start from what is there now."""
        self._samples = Samples()
        self.restore()

    @plainly()
    def repack(self) -> None:
        """After `Change.VALUES`: bring every packed weight up to date and make the sources views again."""
        for key, pack in list(self.packs.items()):
            sources = self._sources(pack.recipe)
            if pack.views:
                if not in_place(pack.value, sources):
                    # never into the old buffer: what was replaced or set aside may still be a view of it
                    self.packs[key] = self._concatenate(pack.recipe)
            elif not (_fresh(pack) and all(map(is_, sources, pack.sources))):
                self.packs[key] = self._copy(pack.recipe)
        self._note(list(map(getitem, self._tables, self._names)))

    # -- values -----------------------------------------------------------------------------------------------------

    def tensor(self, name: str) -> torch.Tensor:
        """The parameter or buffer of that qualified name, as it is now."""
        table, key = self.slots[name]
        return table[key]

    def value(self, meaning: Input) -> torch.Tensor:
        """What an input of a program stands for: a live tensor, a constant, or a packed weight."""
        if meaning.kind is InputKind.CONSTANT:
            assert meaning.value is not None
            return meaning.value
        if meaning.kind is InputKind.PACKED:
            assert meaning.recipe is not None
            pack = self.packs.get(pack_key(meaning.recipe))
            return pack.value if pack is not None else compute(meaning.recipe, self._sources(meaning.recipe))
        return self.tensor(meaning.target)

    def _sources(self, recipe: Recipe) -> list[torch.Tensor]:
        return [self.tensor(name) for name in recipe.sources]

    # -- packing ----------------------------------------------------------------------------------------------------

    @plainly()
    def pack(self, recipes: Iterable[Recipe]) -> None:
        """Make the packed weights one after the other: at no time more than a few of them exist twice.

        On a GPU in the order of the model, and the small weights in between move too: what the parameters leave would
        otherwise be holes between those, too small for the next packed weight.
        """
        wanted = {pack_key(r): r for r in recipes}
        wanted = {key: recipe for key, recipe in wanted.items() if key not in self.packs}
        device = next((d for d in self._devices if d.type == "cuda"), None)
        if device is not None and (wanted or not self._laid_out):
            self._lay_out(wanted, device)
        for key, recipe in wanted.items():
            self._make(key, recipe)
        self._note(list(map(getitem, self._tables, self._names)))
        if not self._samples.taken and not all(pack.views for pack in self.packs.values()):
            self.look_inside()

    def _lay_out(self, wanted: dict[PackKey, Recipe], device: torch.device) -> None:
        """Pack and move on this device; what has no place in the order of the model stays in `wanted`."""
        release_unused()  # not into what a large activation left
        self._laid_out = True
        if not wanted and other_graphs():
            return  # which may read the weights where they are
        known = (pack.recipe for pack in self.packs.values())
        packed = {id(s) for recipe in itertools.chain(known, wanted.values()) for s in self._sources(recipe)}
        by_first = {recipe.sources[0]: key for key, recipe in wanted.items() if recipe.sources}
        order: dict[int, str] = {}  # by any of its names
        for name in self.slots:
            if name in by_first or (id(self.tensor(name)) not in packed and movable(self.tensor(name))):
                order.setdefault(id(self.tensor(name)), name)
        moves = [self._views(wanted[by_first[n]]) if n in by_first else [self.tensor(n)] for n in order.values()]
        leaving = {t.untyped_storage().data_ptr() for move in moves for t in move}
        room = Room((sum(t.nbytes for t in move) for move in moves), device, leaving)
        for name in order.values():
            if name in by_first:
                self._make(by_first[name], wanted.pop(by_first[name]), room)
                torch.cuda.empty_cache()  # what the sources leave may be too small for the next
            else:
                tensor = self.tensor(name)
                tensor.data = room.empty(tensor.shape, tensor.dtype, tensor.stride()).copy_(tensor)
        torch.cuda.empty_cache()

    def _views(self, recipe: Recipe) -> list[torch.Tensor]:
        """The sources, if they become views of one buffer."""
        return self._sources(recipe) if self._may_view(recipe) else []

    def _make(self, key: PackKey, recipe: Recipe, room: Room | None = None) -> None:
        self.packs[key] = self._concatenate(recipe, room) if self._may_view(recipe) else self._copy(recipe)

    def _may_view(self, recipe: Recipe) -> bool:
        """Whether the sources can become views: a parameter can be a view of one buffer only, and only once."""
        sources = self._sources(recipe)
        taken = {id(s) for p in self.packs.values() if p.views for s in p.sources}
        distinct = len({id(s) for s in sources}) == len(sources)
        free = not any(id(s) in taken or s.is_inference() for s in sources)
        alike = len({(s.dtype, s.device, s.shape[1:]) for s in sources}) == 1
        return recipe.concatenation and distinct and free and alike

    def _concatenate(self, recipe: Recipe, room: Room | None = None) -> Pack:
        sources = self._sources(recipe)
        first = sources[0]
        rows = sum(s.shape[0] for s in sources)
        shape = (rows, *first.shape[1:])
        room = room or Room((), first.device)
        value = room.empty(shape, first.dtype)
        pack = Pack(recipe, value, views=True)
        self._lay(pack, sources)
        return pack

    def _lay(self, pack: Pack, sources: Sequence[torch.Tensor]) -> None:
        lay(pack.value, sources)
        pack.sources = list(sources)

    def _copy(self, recipe: Recipe) -> Pack:
        sources = self._sources(recipe)
        value = compute(recipe, sources)
        return Pack(recipe, value, False, sources, [(s.data_ptr(), _version(s)) for s in sources])

    @plainly()
    def restore(self) -> None:
        """Independent contiguous parameters again, bit for bit, one packed weight at a time."""
        self._undo(list(self.packs))
        self._look()

    @plainly()
    def keep(self, recipes: Iterable[Recipe]) -> None:
        """Undo every packed weight but these."""
        wanted = {pack_key(r) for r in recipes}
        self._undo([k for k in self.packs if k not in wanted])
        self._note(list(map(getitem, self._tables, self._names)))

    def _undo(self, keys: Iterable[PackKey]) -> None:
        for key in keys:
            pack = self.packs.pop(key)
            if pack.views:
                start = pack.value.data_ptr()
                end = start + pack.value.numel() * pack.value.element_size()
                for source in pack.sources:
                    if start <= source.data_ptr() < end:
                        source.data = source.data.clone(memory_format=torch.contiguous_format)

    def packed_bytes(self) -> tuple[int, int]:
        """Bytes held as buffers the parameters are views of, and as copies beside the parameters."""
        sizes = [0, 0]
        for pack in self.packs.values():
            sizes[0 if pack.views else 1] += pack.value.numel() * pack.value.element_size()
        return sizes[0], sizes[1]


def pack_key(recipe: Recipe) -> PackKey:
    """Equal for recipes that compute the same value, whichever program they come from."""
    if recipe.concatenation:
        return ("concatenation", recipe.sources)
    constants = any(n.op == "get_attr" for n in recipe.graph.graph.nodes)
    return (id(recipe) if constants else recipe.graph.code, recipe.sources)


@plainly()
def lay(value: torch.Tensor, sources: Sequence[torch.Tensor]) -> None:
    """Copy sources that are not there yet into their rows of the buffer, and let them be views of it."""
    starts = itertools.accumulate((s.shape[0] for s in sources), initial=0)
    places = [(s, value.narrow(0, start, s.shape[0])) for s, start in zip(sources, starts, strict=False)]
    moved = [(s, rows) for s, rows in places if s.data_ptr() != rows.data_ptr() or not s.is_contiguous()]
    storage = value.untyped_storage().data_ptr()
    inside = {id(s): s.clone() for s, _ in moved if s.untyped_storage().data_ptr() == storage}  # exchanged rows
    for source, rows in moved:
        rows.copy_(inside.get(id(source), source))
        source.data = rows


def in_place(value: torch.Tensor, sources: Sequence[torch.Tensor]) -> bool:
    """Whether the sources are the rows of the buffer, in order."""
    starts = itertools.accumulate((s.shape[0] for s in sources), initial=0)
    return all(
        s.data_ptr() == value[start:].data_ptr() and s.is_contiguous()
        for s, start in zip(sources, starts, strict=False)
    )


@plainly()
def compute(recipe: Recipe, sources: Sequence[torch.Tensor]) -> torch.Tensor:
    """The packed weight from its sources, sharing no storage with them."""
    if recipe.concatenation:
        return torch.cat([s.detach() for s in sources])
    value = recipe.graph(*sources)
    value = value[0] if isinstance(value, (tuple, list)) else value
    shared = {s.untyped_storage().data_ptr() for s in sources}
    return value.detach().clone() if value.untyped_storage().data_ptr() in shared else value.detach()


def _fresh(pack: Pack) -> bool:
    """Whether a packed weight still says what its sources say; views do by construction, while they are views."""
    return pack.views or [(s.data_ptr(), _version(s)) for s in pack.sources] == pack.marks


def _version(tensor: torch.Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


def _ties(tensors: Sequence[torch.Tensor]) -> list[int]:
    """For each tensor the position of the first that is the same object."""
    first: dict[int, int] = {}
    return [first.setdefault(id(t), i) for i, t in zip(itertools.count(), tensors)]
