"""Launch plans: what a launcher did for one set of shapes, done again without its Python and without Triton's.

Triton's `kernel[grid](...)` takes tens of microseconds of host time: it binds arguments, specialises them, looks the
binary up. All of that is the same for equal shapes, strides, dtypes and alignment. So a launcher, which is a pure
function of these, is run once under a recording; afterwards the recorded allocations and launches are repeated with
the new tensors' addresses by a few lines of generated Python.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor

ALIGNMENT: Final = 16
MAX_PLANS: Final = 4096
"""Plans kept for one launcher; all are dropped when there are more."""

Plan = Callable[..., Any]
Key = tuple[Any, ...]


class _Current(threading.local):
    recording: _Recording | None = None
    seen: dict[Any, tuple[list[_Form], bool]] | None = None
    """Results of calls while nothing is launched, by what was called."""
    kernel: Any = None
    """What was last compiled instead of launched."""


_current = _Current()


@contextlib.contextmanager
def launching_nothing() -> Iterator[None]:
    """Launches in the block compile their kernels and no more; what a kernel would have written is 0."""
    _current.seen = {}
    try:
        yield
    finally:
        _current.seen = None


def compiling() -> bool:
    """Whether nothing is launched just now."""
    return _current.seen is not None


def being_compiled() -> Any:
    """The kernel that is compiled now instead of being launched."""
    return _current.kernel


_Form = tuple[torch.Size, tuple[int, ...], torch.dtype, torch.device]


def once(key: Any, call: Callable[[], Any]) -> Any:
    """While nothing is launched: the result of the call, or zeros of the form that it had for this key before.

    Equal layers of a model are gone through once.
    """
    assert _current.seen is not None
    known = _current.seen.get(key)
    if known is not None:
        forms, single = known
        made = [torch.empty_strided(s, t, dtype=d, device=at).zero_() for s, t, d, at in forms]
        return made[0] if single else tuple(made)
    result = call()
    single = isinstance(result, Tensor)
    tensors = [result] if single else list(result)
    if all(isinstance(t, Tensor) and t.data_ptr() % ALIGNMENT == 0 for t in tensors):
        _current.seen[key] = ([(t.shape, t.stride(), t.dtype, t.device) for t in tensors], single)
    return result


class _Behind:
    """What compiles kernels while others run; it has a method `launch`."""

    mode: Any = None


def behind() -> Any:
    """What compiles kernels while others run, or None."""
    return _Behind.mode


def set_behind(mode: Any) -> None:
    """Kernels that are launched for the first time may be among those that `mode` compiles."""
    _Behind.mode = mode


def forget_behind(mode: Any) -> None:
    """It has compiled all."""
    if _Behind.mode is mode:
        _Behind.mode = None


def empty(shape: tuple[int, ...] | torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialised contiguous tensor: a launcher allocates its outputs and temporaries with it."""
    if compiling():  # whoever reads places must not find them anywhere
        return torch.zeros(shape, dtype=dtype, device=device)
    return _noted(torch.empty(shape, dtype=dtype, device=device))


def empty_like(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised tensor with the shape and, where x is dense, the strides of x."""
    make = torch.zeros_like if compiling() else torch.empty_like
    return _noted(make(x, dtype=x.dtype if dtype is None else dtype))


def rows_like(x: Tensor, dtype: torch.dtype) -> Tensor:
    """An uninitialised tensor with the shape of x: strided as x if its last dimension is contiguous, else contiguous.

    Sums of a permuted tensor (what follows a convolution) would otherwise stay permuted through the whole model.
    """
    return empty_like(x, dtype) if x.stride(-1) == 1 else empty(x.shape, dtype, x.device)


def _noted(tensor: Tensor) -> Tensor:
    if _current.recording is not None:
        _current.recording.allocations.append(tensor)
    return tensor


def library(function: Callable[..., Tensor], *args: Any) -> Tensor:
    """`function(*args)`, which returns one tensor that is no argument; its tensors are the launcher's arguments."""
    result = function(*args)
    recording = _current.recording
    if recording is not None:
        recording.calls[len(recording.allocations)] = (function, [recording.source(a) for a in args])
        recording.allocations.append(result)
    return result


def _in_clusters(compiled: Any, programs: int) -> None:
    """Has a kernel launched in clusters that was compiled, as Gluon's are here, for programs of their own."""
    from triton.compiler.compiler import make_backend  # only where kernels run

    if hasattr(compiled, "result"):  # it is being compiled by somebody else's threads, and launched as what they return
        compiled = compiled.result()
    if compiled is None:  # a hook of somebody else's compiles nothing, and then nothing is launched
        return
    metadata = compiled.metadata._replace(num_ctas=programs)
    compiled.packed_metadata = make_backend(metadata.target).pack_metadata(metadata)


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
    """`kernel[grid](*args, **constants)`, remembered if a recording is under way."""
    _launch(1, kernel, grid, args, constants)


def launch_in_clusters(size: int, kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
    """As `launch`; each `size` programs next to each other, of `grid` in all, are a cluster."""
    _launch(size, kernel, grid, args, constants)


def _launch(cluster: int, kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], constants: dict[str, Any]) -> None:
    if compiling():
        _current.kernel = kernel
        kernel.run(*args, grid=grid, warmup=True, **constants)
        return
    clusters = (grid[0] // cluster, *grid[1:])

    def run() -> Any:
        if cluster > 1:
            _in_clusters(kernel.run(*args, grid=grid, warmup=True, **constants), cluster)
        return kernel[clusters](*args, **constants)

    mode = _Behind.mode
    compiled = run() if mode is None else mode.launch(run)
    recording = _current.recording
    if recording is not None:
        recording.add(kernel, compiled, clusters, args, constants)


@dataclass(frozen=True)
class _Address:
    """A tensor of the launcher: the `index`-th argument or allocation, and bytes from its start."""

    allocated: bool
    index: int
    offset: int

    def source(self) -> str:
        name = f"p{self.index}" if self.allocated else f"a{self.index}"
        return f"{name} + {self.offset}" if self.offset else name

    def tensor(self) -> str:
        return f"t{self.index}" if self.allocated else f"args[{self.index}]"


@dataclass(frozen=True)
class _Descriptor:
    """A TMA descriptor over a tensor of the launcher."""

    base: _Address
    given: Any


@dataclass
class _Recording:
    """What a launcher does for one key. `broken` says why it cannot be repeated."""

    arguments: tuple[Any, ...]
    allocations: list[Tensor] = field(default_factory=list)
    calls: dict[int, tuple[Callable[..., Tensor], list[Any]]] = field(default_factory=dict)
    """The functions that return an allocation instead of `empty`, by its index, with the sources of their arguments."""
    launches: list[tuple[Any, tuple[int, int, int], list[Any]]] = field(default_factory=list)
    broken: str | None = None

    def add(self, kernel: Any, compiled: Any, grid: tuple[int, ...], args: tuple[Any, ...], constants: Any) -> None:
        if not hasattr(compiled, "packed_metadata"):
            self.broken = "an interpreted kernel"
            return
        names = [p.name for p in kernel.params]
        given = {n: v for n, v in constants.items() if n in names}
        bound = kernel.signature.bind(*args, **given)
        bound.apply_defaults()
        values = [self._value(v) for v in bound.arguments.values()]
        x, y, z = (*grid, 1, 1)[:3]
        self.launches.append((compiled, (x, y, z), values))

    def _value(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self.address(value)
        if type(value).__name__ == "TensorDescriptor":  # Triton's or Gluon's
            return _Descriptor(self.address(value.base), value)
        return value

    def source(self, value: Any) -> Any:
        """What a library function is given: an argument of the launcher as `_Address`, or a value that is no tensor."""
        if not isinstance(value, Tensor):
            return value
        for index, argument in enumerate(self.arguments):
            if argument is value:
                return _Address(False, index, 0)
        self.broken = "a library function of tensors that are no arguments"
        return None

    def address(self, tensor: Tensor) -> _Address:
        """Where the tensor comes from: an argument as it is, or memory of an allocation or of one argument."""
        for index, argument in enumerate(self.arguments):
            if isinstance(argument, Tensor) and argument.data_ptr() == tensor.data_ptr():
                return _Address(False, index, 0)
        storage = tensor.untyped_storage().data_ptr()
        for index, allocation in enumerate(self.allocations):
            if allocation.untyped_storage().data_ptr() == storage:
                return _Address(True, index, tensor.data_ptr() - allocation.data_ptr())
        owners = [
            index
            for index, argument in enumerate(self.arguments)
            if isinstance(argument, Tensor) and argument.untyped_storage().data_ptr() == storage
        ]
        if len(owners) == 1:
            argument = self.arguments[owners[0]]
            return _Address(False, owners[0], tensor.data_ptr() - argument.data_ptr())
        self.broken = "memory that is neither an argument's nor allocated by empty()"
        return _Address(False, 0, 0)

    def plan(self, result: Any, device: torch.device) -> Plan | None:
        """The launches as a function of the arguments, or None where they cannot be repeated."""
        outputs = [result] if isinstance(result, Tensor) else list(result)
        returned = [(self.address(t), t) for t in outputs]
        if self.broken is not None or not self.launches or not all(a.allocated for a, _ in returned):
            return None
        return _Writer(self, device).write(returned, isinstance(result, Tensor))


class _Writer:
    """Writes the source of a plan."""

    def __init__(self, recording: _Recording, device: torch.device) -> None:
        import triton  # only where kernels run

        self.recording = recording
        self.index = torch.cuda.current_device() if device.index is None else device.index
        self.names: dict[str, Any] = {
            "make": torch.empty_strided,
            "device": torch.device("cuda", self.index),
            "raw_stream": triton.runtime.driver.active.get_current_stream,
        }

    def name(self, prefix: str, value: Any) -> str:
        name = f"{prefix}{len(self.names)}"
        self.names[name] = value
        return name

    def write(self, returned: list[tuple[_Address, Tensor]], single: bool) -> Plan:
        recording = self.recording
        lines = ["def plan(args):"]
        used = {
            v.base if isinstance(v, _Descriptor) else v
            for _, _, values in recording.launches
            for v in values
            if isinstance(v, (_Address, _Descriptor))
        }
        for index in sorted({a.index for a in used if not a.allocated}):
            lines.append(f"    a{index} = args[{index}].data_ptr()")
        for index, tensor in enumerate(recording.allocations):
            lines.append(f"    t{index} = {self._allocation(index, tensor)}")
            lines.append(f"    p{index} = t{index}.data_ptr()")
        lines.append(f"    stream = raw_stream({self.index})")
        for compiled, (x, y, z), values in recording.launches:
            run, function = self.name("run", compiled.run), self.name("function", compiled.function)
            packed = self.name("packed", compiled.packed_metadata)
            passed = ", ".join(map(self._argument, values))
            head = f"{x}, {y}, {z}, stream, {function}, {packed}"
            lines.append(f"    {run}({head}, None, None, None, {passed})")
        results = [self._result(a, t) for a, t in returned]
        lines.append("    return " + (results[0] if single else "(" + ", ".join(results) + ",)"))
        exec("\n".join(lines), self.names)
        plan: Plan = self.names["plan"]
        return plan

    def _allocation(self, index: int, tensor: Tensor) -> str:
        if index in self.recording.calls:
            function, given = self.recording.calls[index]
            sources = [v.tensor() if isinstance(v, _Address) else self.name("value", v) for v in given]
            return f"{self.name('function', function)}({', '.join(sources)})"
        size, dtype = self.name("size", tuple(tensor.shape)), self.name("dtype", tensor.dtype)
        stride = self.name("stride", tuple(tensor.stride()))
        return f"make({size}, {stride}, dtype={dtype}, device=device)"

    def _argument(self, value: Any) -> str:
        if isinstance(value, _Address):
            return value.source()
        if isinstance(value, _Descriptor):
            return self._descriptor(value)
        if value is None or type(value) in (int, bool):
            return repr(value)
        return self.name("value", value)

    def _descriptor(self, value: _Descriptor) -> str:
        """Remembered by address: weights stay where they are, and the allocator hands out the same blocks again."""
        kind, dtype = type(value.given), value.given.base.dtype
        rest = {name: field for name, field in value.given.__dict__.items() if name != "base"}  # a plan keeps no tensor
        known: dict[int, Any] = {}

        def made(address: int) -> Any:
            found = known.get(address)
            if found is None:
                if len(known) >= 64:
                    known.clear()
                found = known[address] = object.__new__(kind)
                found.__dict__.update(rest, base=_At(address, dtype))
            return found

        return f"{self.name('descriptor', made)}({value.base.source()})"

    def _result(self, address: _Address, tensor: Tensor) -> str:
        allocation = self.recording.allocations[address.index]
        if allocation.shape == tensor.shape and allocation.stride() == tensor.stride() and not address.offset:
            return f"t{address.index}"
        size, stride = self.name("size", tuple(tensor.shape)), self.name("stride", tuple(tensor.stride()))
        return f"t{address.index}.as_strided({size}, {stride}, {address.offset // tensor.element_size()})"


@dataclass(frozen=True)
class _At:
    """As much of a tensor as Triton asks of the base of a descriptor."""

    address: int
    dtype: torch.dtype

    def data_ptr(self) -> int:
        return self.address


SEVERAL_DEVICES: Final[bool] = torch.cuda.device_count() > 1


def _device() -> int:
    return torch.cuda.current_device()


def key_of(args: tuple[Any, ...]) -> Key:
    """What a launcher's behaviour may depend on: shapes, strides, dtypes, alignment, and values that are no tensors.

    Tensors that start at one address make the key one that is never planned for (`None` in its last place).
    """
    key: list[Any] = [_device()] if SEVERAL_DEVICES else []
    pointers: list[int] = []
    for value in args:
        if isinstance(value, Tensor):
            pointer = value.data_ptr()
            pointers.append(pointer)
            key += (value.shape, value.stride(), value.dtype, pointer % ALIGNMENT)
            if SEVERAL_DEVICES:
                key.append(value.device)
        else:
            key.append(value)
    key.append(None if len(set(pointers)) < len(pointers) else 1)
    return tuple(key)


def observed() -> bool:
    """Whether a profiler wants to see every launch, or nothing is to be launched: plans are not used then."""
    triton = sys.modules.get("triton")
    return triton is not None and (compiling() or bool(triton.knobs.runtime.launch_enter_hook.calls))


def record(run: Callable[..., Any], args: tuple[Any, ...]) -> tuple[Any, Plan | None]:
    """The result of `run(*args)`, and the plan that repeats it, where it can be repeated."""
    first = next((a for a in args if isinstance(a, Tensor)), None)
    if first is None or not first.is_cuda or _current.recording is not None:
        return run(*args), None
    recording = _Recording(args)
    _current.recording = recording
    try:
        result = run(*args)
    finally:
        _current.recording = None
    return result, recording.plan(result, first.device)
