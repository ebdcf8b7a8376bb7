"""CUDA graphs of a program for shapes that come again: the host launches one graph instead of every kernel.

A graph is made when a set of shapes comes for the third time and the GPU waited for the host the second time, and used
once its first replay was seen to agree with its kernels launched one by one. Inputs are copied into the graph's own.
Small outputs are copied out. Large ones are lent: the caller gets the graph's own memory, and as long as any tensor on
it lives the graph is not run again; another one or the direct way serves. Such a graph has a memory pool of its own.
The others of a device share one, since none runs beside another and what a replay leaves is copied out before the next.
Outputs in between are lent by one graph of a device while its program has one set of shapes and nobody keeps them: a
copy would be memory on top, and so would be a pool for each program. Whether anybody keeps what was lent is told from
the tensors that live: who reads one on another stream, or in another process, has to hold it until that has ended.
What a program's graphs hold is bounded in number and in bytes, and those not used for longest go first.

Where no graph is used, the launch plans of all calls are kept for the shapes, so that no call has to look for its own.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor

from ..kernels import choice
from ..kernels.replay import ALIGNMENT
from .device_memory import captured as captured_here
from .device_memory import release_unused
from .options import Options

log = logging.getLogger("regraft")

BEFORE: Final = 2
"""Calls with the same shapes that run directly first: one compiles what is missing, one is watched."""
HOST_SHARE: Final = 0.3
"""Of the time from the first kernel's start to the last one's end: where the host takes less, the GPU hardly waits."""
COPIES: Final = 2
"""Graphs for the same shapes whose outputs are lent: a caller often keeps one result while the next is computed."""
MAX_GRAPHS: Final = 16
MAX_COPIED_BYTES: Final = 64 << 20
"""Outputs up to here are copied out of the graph; larger ones are lent."""
LENT_ALONE: Final = (1 << 20) + 1
"""Outputs from here on, too large to be among small tensors, are lent by the first graph of a device that has such. It
gives way to the next of its program, which copies: for other shapes, or since somebody keeps what was lent."""
MAX_OUTPUT_BYTES: Final = 512 << 20
"""Outputs above it, or above `MEMORY_SHARE` of the device's memory where that is more: the forward runs directly."""
MEMORY_SHARE: Final = 1 / 128
MAX_SHAPES: Final = 4096
"""Shapes that are counted, and shapes whose launch plans are kept."""
HELD: Final = 2
"""What the graphs of one program may hold in memory, in largest outputs."""

FACTOR_OF_MODE: Final = {"default": 1, "max-autotune": 1, "reduce-overhead": 2, "max-autotune-no-cudagraphs": 0}

Shapes = tuple[Any, ...]


def graph_bytes(options: Options, device: torch.device) -> int:
    """The largest outputs, in bytes, with which a forward is run by a CUDA graph; 0: none is."""
    memory = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0
    return FACTOR_OF_MODE[options.mode] * max(MAX_OUTPUT_BYTES, int(memory * MEMORY_SHARE))


@dataclass(eq=False)
class _Captured:
    graph: torch.cuda.CUDAGraph
    inputs: list[Tensor]
    outputs: list[Any]
    copied: list[int]
    """Which outputs are tensors of the graph's own, each tensor once."""
    same: dict[int, int]
    """Outputs that are the same tensor as one of `copied`."""
    passed: dict[int, int]
    """Outputs that are an input as it came: of which place."""
    held: int
    stream: int
    """The one that was current when the graph was captured; others do not get what it lends."""
    lends: bool = False
    counts: list[tuple[int, int]] = field(default_factory=list)
    """Of each lent storage, its handle and how many tensors of ours are on it."""

    def free(self, stream: int) -> bool:
        """Whether the graph may run on this stream: nobody holds what it lent."""
        if self.lends and stream != self.stream:
            return False
        return all(torch._C._storage_Use_Count(handle) == count for handle, count in self.counts)


class Graphs:
    """Runs `function(*values)` by CUDA graphs where its shapes come again.

    `values[:count]` are tensors that change from call to call; the others stay where they are as long as `version`,
    which the caller gives, stays the same.
    """

    def __init__(self, function: Callable[..., Any], count: int, max_output_bytes: int = MAX_OUTPUT_BYTES) -> None:
        self._function, self._count, self._max_output_bytes = function, count, max_output_bytes
        self._seen: dict[Shapes, int] = {}
        self._plans: dict[Shapes, tuple[Any, ...]] = {}
        self._graphs: OrderedDict[Shapes, list[_Captured]] = OrderedDict()
        self._direct: dict[Shapes, str] = {}
        """Shapes for which a graph is of no use, and why."""
        self._watched: dict[Shapes, tuple[float, torch.cuda.Event, torch.cuda.Event, int]] = {}
        self._lending: set[Shapes] = set()
        """Shapes whose outputs are too large to be copied."""
        self._between: set[Shapes] = set()
        """Shapes whose outputs may be copied, or lent by a graph that is alone."""
        self._alone: Shapes | None = None
        """Of these, the one whose graph lends."""
        self._copying = False
        """Whether graphs of `_between` copy, since one was not enough."""
        self._version: object = None
        self.refused: str | None = None
        """Why no further graph is made."""

    def replayed(self, given: Sequence[Tensor], version: object, may: Callable[[], bool]) -> list[Any] | None:
        """What the graph for these gives, if there is one and `may()` says that the other values are in place."""
        device = _common_device(given) if self._graphs else None
        if device is None:
            return None
        key, shared = _key(given), _shared(device)
        with shared.lock:
            stream = torch.cuda.current_stream(device).cuda_stream
            captured = self._free(key, stream) if version == self._version else None
            return self._replay(shared, captured, given) if captured is not None and may() else None

    def __call__(self, values: Sequence[Any], version: object) -> Any:
        """What `function(*values)` returns."""
        given = values[: self._count]
        device = _common_device(given)
        if device is None:
            return self._function(*values)
        key, shared = _key(given), _shared(device)
        with shared.lock:
            if version != self._version:
                self._graphs.clear()
                self._plans.clear()
                self._version = version
            stream = torch.cuda.current_stream(device).cuda_stream
            captured = self._free(key, stream)
            if captured is not None:
                return self._replay(shared, captured, given)
            if len(self._graphs.get(key, ())) < COPIES and self._due(key):
                return self._first(shared, key, values, stream)
            plans = self._plans.get(key)
            seen = self._seen.get(key, 0)
        if plans is not None:
            return choice.following(plans, self._function, values)
        if seen == BEFORE and self._may_capture():
            return self._watch(key, values)
        if seen < BEFORE or len({t.data_ptr() for t in given}) < len(given):
            return self._function(*values)
        result, plans = choice.noting(self._function, values)  # every call has its plan by now
        with shared.lock:
            if version == self._version and len(self._plans) < MAX_SHAPES:
                self._plans[key] = plans
        return result

    def _free(self, key: Shapes, stream: int) -> _Captured | None:
        """A graph for these shapes that may run on this stream."""
        captured = next((c for c in self._graphs.get(key, ()) if c.free(stream)), None)
        if captured is not None:
            self._graphs.move_to_end(key)
        return captured

    def _watch(self, key: Shapes, values: Sequence[Any]) -> Any:
        """Run directly, and see whether the host or the GPU takes longer, and how large the outputs are."""
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start = time.perf_counter()
        begin.record()
        result = self._function(*values)
        end.record()
        host_ms = 1e3 * (time.perf_counter() - start)
        self._watched[key] = (host_ms, begin, end, _bytes(result))
        return result

    def _worth_it(self, key: Shapes) -> bool:
        """Whether the GPU waited for the host in the call that was watched; decided once."""
        watched = self._watched.pop(key, None)
        if watched is not None:
            host_ms, begin, end, size = watched
            end.synchronize()
            share = host_ms / max(begin.elapsed_time(end), 1e-6)
            if size > self._max_output_bytes:
                self._direct[key] = f"outputs of {size >> 20} MiB, above {self._max_output_bytes >> 20}"
            elif share < HOST_SHARE:
                self._direct[key] = (
                    f"the host takes {100 * share:.0f} % of the GPU's time, below {100 * HOST_SHARE:.0f}"
                )
            elif size > MAX_COPIED_BYTES:
                self._lending.add(key)
            elif size >= LENT_ALONE:
                self._between.add(key)
        return key not in self._direct

    @property
    def held(self) -> int:
        """Bytes of memory that the graphs hold."""
        return sum(c.held for made in self._graphs.values() for c in made)

    def told(self) -> str:
        """Whether forwards run by graphs, and if not, why: one line."""
        if self._max_output_bytes <= 0:
            return "each kernel by the host: the mode asks for no CUDA graphs"
        parts = []
        if len(self):
            parts.append(f"{len(self)} CUDA graph{'s' * (len(self) > 1)}, {self.held >> 20} MiB")
        if self.refused is not None:
            parts.append(f"no further one: {self.refused}" if parts else f"no CUDA graph: {self.refused}")
        elif self._direct:
            reasons = "; ".join(dict.fromkeys(self._direct.values()))
            parts.append(f"no CUDA graph for {len(self._direct)} of {len(self._seen)} shapes: {reasons}")
        return ", ".join(parts) or "no CUDA graph yet: one is made when shapes come for the third time"

    def __len__(self) -> int:
        return sum(map(len, self._graphs.values()))

    def _due(self, key: Shapes) -> bool:
        if len(self._seen) > MAX_SHAPES:
            self._seen.clear()
            self._watched.clear()
            self._direct.clear()
        seen = self._seen[key] = self._seen.get(key, 0) + 1
        return seen > BEFORE and self._may_capture() and self._worth_it(key)

    def _may_capture(self) -> bool:
        return self.refused is None and self._max_output_bytes > 0

    def _capture(
        self, shared: _Shared, key: Shapes, values: Sequence[Any], stream: int, lends: bool
    ) -> _Captured | None:
        device = shared.device
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize(device)
        release_unused(for_capture=True)
        before = torch.cuda.memory_reserved(device)
        current = torch.cuda.current_stream(device)
        # its two numbers would have a segment of their own on the stream of the capture
        graph.register_generator_state(torch.cuda.default_generators[_index(device)])
        try:
            with torch.inference_mode(False), torch.no_grad():  # what is made here is written to in later calls
                fixed = list(values[self._count :])
                pool = None if lends else shared.pool()
                with torch.cuda.graph(graph, pool=pool, stream=shared.stream, capture_error_mode="thread_local"):
                    inputs = [torch.empty_like(t) for t in values[: self._count]]  # each replay brings their values
                    result = self._function(*inputs, *fixed)
        except torch.OutOfMemoryError:
            self._direct[key] = "no memory for a graph"
            _leave_capture(device, current)
            return None
        except RuntimeError as error:
            self.refused = f"a CUDA graph could not be captured: {first_message(error)}"
            log.warning("%s; forwards run without one", self.refused)
            _leave_capture(device, current)
            return None
        captured_here(graph)
        outputs = list(result)
        del result
        captured = _Captured(graph, inputs, outputs, [], {}, {}, 0, stream)
        by_id: dict[int, int] = {}
        origin = {id(t): i for i, t in enumerate([*inputs, *fixed])}
        for place, output in enumerate(outputs):
            if not isinstance(output, Tensor):
                continue
            if id(output) in origin:
                captured.passed[place] = origin[id(output)]
            elif id(output) in by_id:
                captured.same[place] = by_id[id(output)]
            else:
                by_id[id(output)] = place
                captured.copied.append(place)
        if any(i >= self._count for i in captured.passed.values()):  # a weight as it is
            self._direct[key] = "an output is a weight"
            return None
        captured.held = max(torch.cuda.memory_reserved(device) - before, _bytes(outputs))
        if lends:
            captured.lends = True
            handles = {outputs[i].untyped_storage()._cdata for i in captured.copied}
            captured.counts = [(handle, torch._C._storage_Use_Count(handle)) for handle in handles]
        else:
            shared.copying.add(captured)
        if lends and key in self._between:
            shared.lender = weakref.ref(captured)
        self._keep(key, captured)
        return captured

    def _lends(self, shared: _Shared, key: Shapes) -> bool:
        """Whether the graph to be captured lends its outputs; one that did so alone gives way to it."""
        if key not in self._between or self._copying:
            return key in self._lending
        if self._alone is None or self._alone not in self._graphs:
            if shared.lender is not None and shared.lender() is not None:
                return False  # another program's
            self._alone = key
            return True
        del self._graphs[self._alone]  # what it lent stays until nobody holds it
        release_unused()
        self._copying = True
        return False

    def _keep(self, key: Shapes, captured: _Captured) -> None:
        """Add a graph; those of the shapes that were not used for longest make room."""
        self._graphs.setdefault(key, []).append(captured)
        self._graphs.move_to_end(key)
        while len(self) > MAX_GRAPHS or (self.held > HELD * self._max_output_bytes and len(self._graphs) > 1):
            oldest, _ = self._graphs.popitem(last=False)
            self._seen.pop(oldest, None)

    def _first(self, shared: _Shared, key: Shapes, values: Sequence[Any], stream: int) -> Any:
        """Make a graph, and use it if it gives what a direct call gives."""
        lends = self._lends(shared, key)
        result = self._function(*values)  # before the graph, whose memory would come on top of what this takes
        captured = self._capture(shared, key, values, stream, lends)
        if captured is None:
            return result
        again = self._replay(shared, captured, values[: self._count])
        if all(map(_same, result, again)):
            result = again
        else:
            self.refused = "the CUDA graph gave another result than the same kernels launched one by one"
            log.warning("%s; forwards run without one", self.refused)
            self._graphs.clear()
        del again
        release_unused()  # what comparing took
        return result

    @staticmethod
    def _replay(shared: _Shared, captured: _Captured, given: Sequence[Tensor]) -> list[Any]:
        if shared.last is not None:
            shared.last.wait()  # the last replay may have been on another stream
        torch._foreach_copy_(captured.inputs, list(given))
        captured.graph.replay()
        outputs = list(captured.outputs)
        mine = [captured.outputs[i] for i in captured.copied]
        out = [t.detach() if captured.lends else torch.empty_like(t) for t in mine]
        if out and not captured.lends:
            torch._foreach_copy_(out, mine)
        for place, tensor in zip(captured.copied, out, strict=True):
            outputs[place] = tensor
        for place, source in captured.same.items():
            outputs[place] = outputs[source]
        for place, source in captured.passed.items():
            outputs[place] = given[source]
        if shared.last is None:
            shared.last = torch.cuda.Event()
        shared.last.record()
        return outputs


def _common_device(given: Sequence[Tensor]) -> torch.device | None:
    """The device of all of them, if a CUDA graph may run on it now."""
    device = given[0].device if given else None
    if device is None or device.type != "cuda" or any(t.device != device for t in given):
        return None
    elsewhere = torch.cuda.current_device() != _index(device)
    return None if elsewhere or torch.cuda.is_current_stream_capturing() else device


def _key(given: Sequence[Tensor]) -> Shapes:
    return tuple([(t.shape, t.stride(), t.dtype, t.data_ptr() % ALIGNMENT) for t in given])


def _bytes(outputs: Sequence[Any]) -> int:
    """What distinct tensors among the outputs hold."""
    tensors = {id(t): t for t in outputs if isinstance(t, Tensor)}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def _same(one: Any, other: Any) -> bool:
    """Equal numbers, NaN equal to itself; or as near as another order of sums, which a library may choose, is."""
    if not isinstance(one, Tensor) or not isinstance(other, Tensor):
        return True  # comes from no kernel
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if torch.equal(one, other):
        return True  # without masks in memory as large as they
    if bool(((one == other) | ((one != one) & (other != other))).all()):
        return True
    if not one.is_floating_point():
        return False
    apart, size = ((t.float().square().mean()).sqrt() for t in (one - other, one))
    return bool(apart <= max(4 * torch.finfo(one.dtype).eps, 1e-4) * size)


def first_message(error: BaseException) -> str:
    """The message of what went wrong first: ending a capture that failed raises once more."""
    while error.__context__ is not None:
        error = error.__context__
    return " ".join(str(error).split())[:300]


def _leave_capture(device: torch.device, stream: torch.cuda.Stream) -> None:
    """A capture that failed leaves the generator in it, and every later random number would be an error."""
    torch.cuda.set_stream(stream)
    torch.cuda.synchronize(device)
    generator = torch.cuda.default_generators[_index(device)]
    fresh = torch.Generator(device=device)
    fresh.set_state(generator.get_state())
    generator.graphsafe_set_state(fresh.graphsafe_get_state())


class _Shared:
    """What all graphs of one device have in common: one is captured or replayed at a time."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.lock = threading.RLock()
        self.stream = torch.cuda.Stream(device)
        self.last: torch.cuda.Event | None = None
        """Recorded behind the last replay and what was copied out of it."""
        self.copying: weakref.WeakSet[_Captured] = weakref.WeakSet()
        self.lender: weakref.ref[_Captured] | None = None
        """The graph that lends outputs which could be copied."""

    def pool(self) -> Any:
        """The handle of the pool of those whose outputs are copied; it ends with the last of them."""
        for captured in self.copying:
            return captured.graph.pool()
        return None


_devices: dict[int, _Shared] = {}
_devices_lock = threading.Lock()


def _shared(device: torch.device) -> _Shared:
    index = _index(device)
    with _devices_lock:
        if index not in _devices:
            _devices[index] = _Shared(torch.device("cuda", index))
        return _devices[index]


@contextlib.contextmanager
def capture_alone(device: torch.device) -> Iterator[torch.cuda.Stream]:
    """While graphs of others on the device are neither captured nor replayed; gives the stream to capture on."""
    shared = _shared(device)
    current = torch.cuda.current_stream(device)
    with shared.lock:
        torch.cuda.synchronize(device)
        try:
            yield shared.stream
        except RuntimeError:
            _leave_capture(device, current)
            raise


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index
