"""What stands in for a model's forward: serves each call by a captured graph, or by the original where none can.

A graph belongs to a signature (which tensors, of which dtype and rank, which static values), is captured when the
signature is first called, and serves every batch size and length its limits allow.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import logging
import threading
import time
import warnings
from collections.abc import Callable, Hashable, Iterator
from types import CodeType
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel

from ..compiler.errors import CaptureError
from ..compiler.one_tracer import wait_for_tracer
from ..compiler.program import Note
from . import caches
from .build import Builder, Served, Stages, Unserved
from .call import Call, Key, Signature
from .cases import by_tokens
from .checks import StandIn, UnfitError, adapted, check_inputs
from .decoding.paged_cache import PagedCache
from .errors import InputError, RegraftError, RegraftWarning
from .hooks import Hooks
from .options import Options
from .parts import parts_of
from .random_state import kept
from .record import Record
from .report import Report
from .weights import Change, Weights

log = logging.getLogger("regraft")

T = TypeVar("T")

MAX_SIGNATURES = 32
"""Graphs kept for one model; further signatures go to the original."""
MAX_VARIANTS = 4
"""Graphs kept for one signature where the model's code fixes sizes, each of which then needs a graph of its own."""
PATIENCE = 30.0
"""Seconds that graphs may take to make where each length needs its own (a scan unrolled), and that may go by in vain
before signatures that are new are left alone, too."""
TRIED = 3
"""Signatures that are tried however long that takes."""

PARTS_PATIENCE = 60.0
"""Seconds that graphs of a model's parts may take to make, so far or by the time that each took."""


class Dispatch(StandIn):
    """The instance attribute `forward` of an optimized model.

    Calls may come from several threads: captures and repacking hold a lock, running a graph does not.
    """

    def __init__(
        self, module: nn.Module, options: Options, stages: Stages, record: Record, whole: Dispatch | None = None
    ) -> None:
        self.module, self.options, self.stages, self.record = module, options, stages, record
        self.whole = whole
        """For a part of a model that could not be captured whole: the dispatch of that model."""
        self.parts: list[Dispatch] = []
        self.overridden: Callable[..., Any] | None = module.__dict__.get("forward")
        self._begin()

    def _begin(self) -> None:
        """Locks and tables, which are never copied."""
        self.__doc__ = self.original.__doc__
        self.__name__ = "forward"
        self._lock = threading.RLock()
        self._count_lock = threading.Lock()
        self._local = threading.local()
        self._table: dict[Key, list[Served] | Unserved] = {}
        self._said: set[str] = set()
        self._bound: _Bound | None = None
        self._spent: list[float] = []
        """Seconds that each graph of a part took, or the attempt to make one."""
        self._in_vain: list[float] = []
        """Seconds that each capture took which failed since one did not."""

    @property
    def original(self) -> Callable[..., Any]:
        """The forward that was there before."""
        if self.overridden is not None:
            return self.overridden
        forward: Callable[..., Any] = type(self.module).forward.__get__(self.module)
        return forward

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.original)

    @property
    def __code__(self) -> CodeType:
        """That of the original, by which `torch.export` tells arguments apart; inside it the original runs."""
        return inspect.unwrap(self.original).__code__

    @property
    def bound(self) -> _Bound:
        """What belongs to the module's weights; made when first needed, since a copy is put together piece by piece."""
        found = self._bound
        if found is None:
            with self._lock:
                found = self._bound = self._bound or _Bound(self)
        return found

    @property
    def graphs(self) -> list[Served]:
        """The graphs captured so far."""
        return [s for served in self._table.values() if not isinstance(served, Unserved) for s in served]

    @property
    def report(self) -> Report:
        """What happened to the model."""
        return Report(self.record)

    # -- calls ------------------------------------------------------------------------------------------------------

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        wait_for_tracer()
        if torch.compiler.is_compiling() or getattr(self._local, "inside", False):
            return self.original(*args, **kwargs)
        if isinstance(kwargs.get("past_key_values"), PagedCache):
            return kwargs["past_key_values"].serve(kwargs)
        if self.whole is not None and not self.whole.lets_parts_serve:
            return self.original(*args, **kwargs)
        bound = self.bound
        reason = self._unservable(bound)
        if reason is not None:
            return self._by_original(reason, args, kwargs)
        call = bound.signature.take_apart(args, kwargs)
        if self.whole is None:  # what a model hands to its parts is its own affair
            try:
                check_inputs(call.tensors, call.past)
            except UnfitError as refused:
                if call.unserved is not None or getattr(self._local, "lenient", False):
                    reason = call.unserved or "arguments that do not fit each other"
                    return self._by_original(reason, args, kwargs)  # which judges what it alone can take
                try:
                    return self._by_original(refused.what, args, kwargs)
                except Exception as error:  # it does not take them either, and says so less clearly
                    raise refused from error
        if call.unserved is not None:
            return self._by_original(call.unserved, args, kwargs)
        if call.past is not None and self.whole is not None and not isinstance(self.module, PreTrainedModel):
            return self._by_original("past_key_values of a block, which does not return what it writes", args, kwargs)
        output = self._ahead(bound, call)
        if output is not None:
            return self._counted(output, call)
        served = self._find(bound, call)
        if isinstance(served, Unserved):
            try:
                return self._by_original(served.reason, args, kwargs, by_parts=bool(self.parts))
            except Exception:
                if self._table.get(call.key) is served:  # these arguments were wrong: that is not the signature's fault
                    del self._table[call.key]
                raise
        if call.past is not None and not served.fits(call.past):
            return self._by_original("a past_key_values of another kind than the model makes", args, kwargs)
        return self._counted(served.run(call.tensors), call)

    def _counted(self, output: Any, call: Call) -> Any:
        """What a graph gave, as the caller gets it."""
        if call.past is not None:
            output = caches.fill(output, call.past)
        with self._count_lock:
            self.record.calls["graph"] += 1
        return output

    def _ahead(self, bound: _Bound, call: Call) -> Any:
        """What a CUDA graph gives that is launched before all is looked at; None where there is none, or no use for it.

        Where weights stand is known before, so that no memory is read that was given back. Whether they and the modules
        are as they were is seen while the GPU computes. Meanwhile another thread may have followed a change, after
        which nothing seems to have changed.
        """
        served = self._fitting(self._table.get(call.key), call)
        if served is None or not served.executable.graphs:
            return None
        if call.past is not None and not served.fits(call.past):
            return None
        if not self._lock.acquire(blocking=False):  # nobody moves weights between the look and the launch
            return None
        try:
            noted = bound.weights.noted
            output = served.run.replayed(call.tensors, bound.weights.unmoved)
        finally:
            self._lock.release()
        if output is None or bound.weights.changes() is not Change.NONE or bound.weights.noted != noted:
            return None
        return output

    def prepare(self, kwargs: dict[str, Any]) -> Served | Unserved:
        """Capture the signature of these arguments now, whatever mode the model is in."""
        call = self.bound.signature.take_apart((), kwargs)
        check_inputs(call.tensors, call.past)
        return Unserved(call.unserved) if call.unserved is not None else self._find(self.bound, call)

    def once(self, key: Hashable, make: Callable[[Builder], T]) -> T:
        """What `make` makes of the model, made again only after its weights took another form.

        Packed weights are up to date then, with what was written through `.data` as far as `Weights.look_inside` sees.
        """
        bound = self.bound
        with self._lock:
            if bound.weights.changes() is not Change.NONE:
                self._follow(bound)
            if bound.weights.look_inside() is not Change.NONE:
                self._follow(bound)
            if key not in bound.made:
                with self._making(bound):
                    bound.made[key] = make(bound.builder)
            found: T = bound.made[key]
            return found

    def unservable(self) -> str | None:
        """Why no call can be served by a graph just now, whatever its arguments."""
        return self._unservable(self.bound)

    @contextlib.contextmanager
    def lenient(self) -> Iterator[None]:
        """In this thread the arguments are made by a loop of HuggingFace's: odd ones are for the original to judge."""
        before = getattr(self._local, "lenient", False)
        self._local.lenient = True
        try:
            yield
        finally:
            self._local.lenient = before

    def leave_unsaid(self, reason: str) -> None:
        """Calls that the original serves for this reason are to be expected, and counted without a warning."""
        self._said.add(reason)

    def _unservable(self, bound: _Bound) -> str | None:
        if self.module.training:
            return "the model in training mode (model.eval() for inference)"
        hooked = bound.hooks.foreign()
        if hooked is not None:
            return f"a hook on {hooked}, which a graph would bypass"
        if torch.is_autocast_enabled(bound.builder.device.type):
            return "autocast, which changes the dtypes of a model's operations"
        return None

    def _find(self, bound: _Bound, call: Call) -> Served | Unserved:
        if bound.weights.changes() is not Change.NONE:
            self._follow(bound)
        found = self._known(call)
        if found is None:
            with self._lock:
                found = self._known(call) or self._capture(bound, call)  # another thread may have been first
        return found

    def _known(self, call: Call) -> Served | Unserved | None:
        known = self._table.get(call.key)
        if known is None or isinstance(known, Unserved):
            return known
        fitting = self._fitting(known, call)
        if fitting is not None:
            return fitting
        for served in known:
            too_long = served.too_long(call.tensors)
            if too_long is not None:
                raise InputError(f"{type(self.module).__name__}: {too_long}")
        return None

    @staticmethod
    def _fitting(known: list[Served] | Unserved | None, call: Call) -> Served | None:
        if known is None or isinstance(known, Unserved):
            return None
        return next((served for served in known if served.violation(call.tensors) is None), None)

    def _capture(self, bound: _Bound, call: Call) -> Served | Unserved:
        if len(self.graphs) >= MAX_SIGNATURES:
            return Unserved(f"a signature beyond the {MAX_SIGNATURES} that are kept")
        reason = adapted(self.module)
        if reason is not None:
            return Unserved(reason)
        known = self._table.get(call.key, [])
        assert isinstance(known, list)
        if len(known) >= MAX_VARIANTS:
            violation = known[0].violation(call.tensors)
            return Unserved(f"sizes beyond the {MAX_VARIANTS} fixed ones that are kept ({violation})")
        if self._takes_long(call, known):
            return Unserved(
                f"a length that the model's code fixes: graphs for each of them would take over {PATIENCE:.0f} s"
            )
        if len(self._in_vain) >= TRIED and sum(self._in_vain) > PATIENCE:
            return Unserved(
                f"arguments of another kind than {len(self._in_vain)} that could not be captured, which took over "
                f"{PATIENCE:.0f} s"
            )
        if self.whole is not None and self.whole.parts_take_long():
            return Unserved("a part of a model whose parts take long to capture")
        started = time.perf_counter()
        try:
            with self._making(bound):
                served = bound.builder.build(call)
        except (CaptureError, RegraftError) as error:
            if self.options.raises:
                raise
            unserved = Unserved(f"arguments that could not be captured ({error})")
            if not known:
                self._table[call.key] = unserved
            if isinstance(error, CaptureError) and not self.graphs and not self.parts:
                self._take_parts()
            self._in_vain.append(time.perf_counter() - started)
            return unserved
        finally:
            if self.whole is not None:
                self.whole._spent.append(time.perf_counter() - started)
        self._in_vain.clear()
        self._table[call.key] = [*known, served]
        violation = served.violation(call.tensors)
        if violation is not None:
            return Unserved(f"sizes that no graph could be captured for ({violation})")
        return served

    @contextlib.contextmanager
    def _making(self, bound: _Bound) -> Iterator[None]:
        """Meanwhile calls are served by the original, and random numbers are drawn aside."""
        self._local.inside = True
        try:
            with kept(bound.builder.device):
                yield
        finally:
            self._local.inside = False

    def _takes_long(self, call: Call, known: list[Served]) -> bool:
        """Whether graphs that hold for one length each, of whatever signatures, take too long with one for this call.

        They take as long as they are long. A signature that is new has its share of the time that they all have.
        """
        estimated, spent = 0.0, 0.0
        for served in self.graphs:
            ratio = _ratio(call, served)
            estimated = max(estimated, served.seconds * ratio)
            spent += served.seconds if ratio or any(served is other for other in known) else 0.0
        return bool(estimated) and estimated + spent > PATIENCE

    def parts_take_long(self) -> bool:
        """Whether no more parts are captured, which is noted once: a forward that waits for them seems to hang."""
        spent = sum(self._spent)
        wanted = spent / max(1, len(self._spent)) * len(self.parts)
        if max(spent, wanted) <= PARTS_PATIENCE:
            return False
        text = f"capturing its parts would take over {PARTS_PATIENCE:.0f} s: the original serves those that remain"
        root = self
        while root.whole is not None:
            root = root.whole
        if all(note.message != text for note in root.record.notes):
            root.record.notes.append(Note("", text))
            log.warning("%s: %s", self.record.model, text)
        return True

    def _take_parts(self) -> None:
        """Give each part of the model a dispatch of its own; nothing is captured before it is called."""
        for name, part in parts_of(self.module):
            record = Record(f"{self.record.model}.{name}", device=self.record.device, dtype=self.record.dtype)
            dispatch = Dispatch(part, self.options, self.stages, record, whole=self)
            part.forward = dispatch
            self.parts.append(dispatch)
        if self.parts:
            names = [p.record.model.partition(".")[2] for p in self.parts]
            told = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
            self.record.notes.append(Note("", f"captured in parts, since it could not be captured whole: {told}"))
            self.bound.weights.refresh()

    @property
    def lets_parts_serve(self) -> bool:
        """Whether the original runs in this thread only because no graph of the whole could be captured."""
        return bool(getattr(self._local, "by_parts", False)) and not getattr(self._local, "inside", False)

    def _follow(self, bound: _Bound) -> None:
        """The weights are others than they were: make the packed ones again, or start anew."""
        with self._lock:
            change = bound.weights.changes()
            if change is Change.VALUES:
                bound.weights.repack()
            elif change is Change.FORM:
                self._table.clear()
                self._in_vain.clear()
                bound.start_anew()

    def _by_original(
        self, reason: str, args: tuple[Any, ...], kwargs: dict[str, Any], *, by_parts: bool = False
    ) -> Any:
        text = f"{type(self.module).__name__}: a call with {reason} is served by the original forward"
        with self._count_lock:
            first = reason not in self._said
            self._said.add(reason)
            self.record.calls["original"] += 1
            self.record.fallbacks[reason] = self.record.fallbacks.get(reason, 0) + 1
        if first and self.whole is None:
            warnings.warn(text, RegraftWarning, stacklevel=5)
        if not by_parts:
            return self.original(*args, **kwargs)
        self._local.by_parts = True
        try:
            with torch.no_grad():
                return self.original(*args, **kwargs)
        finally:
            self._local.by_parts = False

    def __repr__(self) -> str:
        return f"<regraft forward of {type(self.module).__name__}, {len(self.graphs)} graphs>"

    def release(self) -> None:
        """Undo what was done to the weights; nothing stays served."""
        with self._lock:
            for part in self.parts:
                part.release()
                if part.overridden is not None:
                    part.module.forward = part.overridden
                else:
                    part.module.__dict__.pop("forward", None)
            self.parts = []
            if self._bound is not None:
                self._bound.weights.restore()
            self._bound = None
            self._table = {}

    # -- copies -----------------------------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        names = ("module", "options", "stages", "record", "whole", "parts", "overridden")
        return {name: self.__dict__[name] for name in names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copied or loaded model captures anew when it is first called."""
        self.__dict__.update(state)
        self._begin()

    def __deepcopy__(self, memo: dict[int, Any]) -> Dispatch:
        other = type(self).__new__(type(self))
        memo[id(self)] = other
        state = self.__getstate__()
        shared = {name: state.pop(name) for name in ("options", "stages")}
        other.__setstate__({**copy.deepcopy(state, memo), **shared})
        return other


def _ratio(call: Call, served: Served) -> float:
    """How much longer a call is than the one length that a graph holds for; 0 where that does not keep it from it."""
    found = 0.0
    for name, guard in served.executable.program.limits.tensors.items():
        tensor = call.tensors.get(name)
        if tensor is None or tensor.dim() < 2 or len(guard.shape) != tensor.dim():
            continue
        if not by_tokens(name) and (tensor.dim() != 3 or not tensor.is_floating_point()):
            continue  # neither tokens nor the states of a block
        fixed = guard.shape[1]
        if isinstance(fixed, int) and tensor.shape[1] != fixed:
            found = max(found, tensor.shape[1] / fixed)
    return found


class _Bound:
    """The parts of a dispatch that hold on to the module's tensors and submodules."""

    def __init__(self, dispatch: Dispatch) -> None:
        self._module = dispatch.module
        self.signature = Signature(dispatch.original, dispatch.module)
        self.weights = Weights(dispatch.module)
        self.hooks = Hooks(dispatch.module)
        self.builder = Builder(
            dispatch.module,
            self.weights,
            dispatch.options,
            dispatch.record,
            dispatch.original,
            dispatch.overridden is not None,
            dispatch.stages,
        )

        self.made: dict[Hashable, Any] = {}

    def start_anew(self) -> None:
        self.made.clear()
        self.weights.look_again()
        self.hooks = Hooks(self._module)
        self.builder.start_anew()
