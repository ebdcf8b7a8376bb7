"""From the first call of a signature to something that serves it: capture, compile, pack, compare with the original."""

from __future__ import annotations

import inspect
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import nn

from ..compiler.errors import CaptureError
from ..compiler.expected import PASS_OF, expectations
from ..compiler.program import Input, InputKind, Note, Program, Recipe
from ..compiler.records import PassResult
from . import caches
from .call import Call
from .certificate import Certificate
from .certify import Certifier
from .checks import device_of
from .cuda_graphs import graph_bytes
from .device_memory import release_unused
from .errors import CompileError, ParityError, RegraftError, RegraftWarning, StrictError
from .executable import Executable
from .guarded import Guarded
from .logs import tell
from .nested import nest
from .options import Options
from .record import Record, SignatureRecord
from .repair import Attempt, Compile, Site, repair
from .shortened import shortened, unpadded
from .weights import Weights

log = logging.getLogger("regraft")


class CompiledLike(Protocol):
    """What a compiler returns."""

    @property
    def program(self) -> Program: ...

    @property
    def passes(self) -> list[PassResult]: ...


class Stages(Protocol):
    """The two halves of the compiler, as the runtime calls them."""

    def capture(self, module: nn.Module, call: Call, forward: Callable[..., Any] | None) -> Program:
        """The forward of `module` as a graph; raises CaptureError."""
        ...

    def compile(
        self,
        program: Program,
        options: Options,
        weights: Callable[[Input], torch.Tensor],
        *,
        verify: str,
        deny: frozenset[Site],
        kernels: bool,
        module: nn.Module,
        device: torch.device,
        keep_text: bool = False,
        form: str = "forward",
        page_dtype: torch.dtype | None = None,
        positions: int | None = None,
    ) -> CompiledLike:
        """The program after all passes, with their results; `program` stays as it was.

        Without `kernels` every op is computed by its reference. `keep_text` keeps each pass's graph as text. In the
        `form` "paged" keys and values lie in pages, of `page_dtype` if not of their own, for sequences of up to
        `positions` tokens if not the model's longest; "encoded" are those of an encoder's states; CacheError where they
        cannot.
        """
        ...


@dataclass(frozen=True)
class Unserved:
    """A signature that the original serves, and why."""

    reason: str


@dataclass
class Served:
    """A signature that a graph serves."""

    executable: Executable
    run: Guarded
    """Calls go through here: the executable where what was inferred of its masks holds."""
    cache_kinds: tuple[Any, ...] | None = None
    captured: Program | None = None
    """The program before the passes."""
    seconds: float = 0.0
    """What it took to make."""

    def violation(self, tensors: Mapping[str, torch.Tensor]) -> str | None:
        """Why the graph cannot serve these shapes, or None."""
        return self.executable.program.limits.violation(dict(tensors))

    def too_long(self, tensors: Mapping[str, torch.Tensor]) -> str | None:
        """Why the model itself cannot take tensors this long, or None."""
        return self.executable.program.limits.too_long(dict(tensors))

    def fits(self, past: object) -> bool:
        """Whether an empty cache given by the caller is of the kind the graph makes."""
        return caches.fits(past, self.cache_kinds)


class Builder:
    """Builds what serves a signature of one module, and records what happened."""

    def __init__(
        self,
        module: nn.Module,
        weights: Weights,
        options: Options,
        record: Record,
        original: Callable[..., Any],
        overridden: bool,
        stages: Stages,
    ) -> None:
        self.module, self.weights, self.options, self.record = module, weights, options, record
        self.original, self.overridden, self.stages = original, overridden, stages
        self.start_anew()

    def start_anew(self) -> None:
        """After the weights took another form: nothing that was built is right any more."""
        self.device = device_of(self.module)
        self.served: list[Served] = []
        self.paged: list[Recipe] = []
        """What the graphs over pages want packed."""

    def build(self, call: Call) -> Served:
        """Capture, compile, pack and certify.

        Raises:
            CaptureError: the forward cannot become a graph.
            ParityError: the graph differs from the original, whatever rewrite is left out.
        """
        entry = SignatureRecord(describe(call), served=False)
        self.record.signatures.append(entry)
        try:
            with evaluating(self.module):
                served = self._build(call, entry)
        except Exception as error:
            if not isinstance(error, (CaptureError, RegraftError)):
                log.debug("compiling %s failed", entry.arguments, exc_info=True)
                cause = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
                error = CompileError(f"the compiler failed ({cause}); to see where: optimize(model, on_error='raise')")
                error.__cause__ = sys.exception()
            entry.reason = str(error)
            if isinstance(error, CaptureError):
                entry.notes.append(Note(error.module, error.reason, error.source))
            else:
                entry.notes.append(Note("", str(error)))
            log.warning("%s: %s", entry.arguments, error)
            self.weights.keep([*(r for s in self.served for r in s.run.recipes), *self.paged])
            raise error
        if self.device.type == "cuda":
            release_unused()  # what checking took
        entry.served = True
        if served.executable.graphs is not None:
            entry.launches = served.executable.graphs.told
        served.seconds = sum(entry.seconds.values())
        self.served.append(served)
        views, copies = self.weights.packed_bytes()
        self.record.memory |= {"packed_views": views, "packed_copies": copies}
        return served

    def _build(self, call: Call, entry: SignatureRecord) -> Served:
        with timed(entry.seconds, "capture"):
            unbound = self.unbound if self.overridden else type(self.module).forward
            forward = nest(unbound, call.shapes) if self.overridden or call.shapes else None
            program = self.stages.capture(self.module, call, forward)
        live = (i.target for i in program.inputs if i.kind in (InputKind.PARAMETER, InputKind.BUFFER))
        if any(name not in self.weights.slots for name in live):  # a table that the forward made when it first ran
            self.weights.refresh()
        entry.notes += program.notes
        program.example = self._short(program, entry)

        certifier = Certifier(self.module, nest(self.original, call.shapes), program, call.given, self.weights.value)
        attempt = self._attempts(program, entry, certifier)
        tried = attempt(self.options.verify, frozenset(), True)
        if not tried.certificate.passed:
            log.warning("%s: %s; looking for the rewrite", entry.arguments, tried.certificate.reason)
            with timed(entry.seconds, "certificate"):
                note = certifier.check_capture(Executable(program, self.weights).directly)
            if note is not None:
                entry.notes.append(note)
                tried = attempt(self.options.verify, frozenset(), True)
        if not tried.certificate.passed:
            tried, entry.reverted = repair(attempt, tried.certificate.reason)
            for reverted in entry.reverted:
                log.warning("reverted %s at %s: %s", reverted.rule, reverted.module or "the model", reverted.reason)
        entry.passes, entry.program, entry.captured = tried.passes, tried.candidate.program, program
        self._expect(entry)
        tell(self.record.model, entry)
        if self.options.dry_run:
            return Served(tried.candidate, self._guarded(tried.candidate, program), captured=program)
        entry.certificate = tried.certificate if self.options.verify != "off" else None
        if tried.certificate.passed:
            self._tell_apart(certifier.disagreement(), entry)
        if not tried.certificate.passed:
            raise ParityError(f"the graph differs from the original: {tried.certificate.reason}")
        self._pack(tried.candidate, entry)
        kinds = caches.kinds_of_output(tried.candidate.directly(program.example)) if call.cache else None
        return Served(
            tried.candidate,
            self._guarded(tried.candidate, program, frozenset((r.rule, "*") for r in entry.reverted)),
            kinds,
            program,
        )

    @staticmethod
    def _short(program: Program, entry: SignatureRecord) -> dict[str, torch.Tensor]:
        """What the program is checked with: long calls cost more memory in higher precision than there may be."""
        example = shortened(unpadded(program.example), program.limits)
        name, cut = next(((n, t) for n, t in example.items() if t.shape != program.example[n].shape), (None, None))
        if name is not None and cut is not None:
            entry.notes.append(
                Note("", f"checked with {name} {list(cut.shape)}, called with {list(program.example[name].shape)}")
            )
        return example

    def _guarded(self, executable: Executable, program: Program, deny: frozenset[Site] = frozenset()) -> Guarded:
        def keeping_masks() -> Executable:
            options = replace(self.options, passes={**self.options.passes, "masks": False})
            made = self.stages.compile(
                program,
                options,
                self.weights.value,
                verify=options.verify,
                deny=deny,
                kernels=True,
                module=self.module,
                device=self.device,
            )
            return Executable(made.program, self.weights, graph_bytes(options, self.device))

        return Guarded(executable, keeping_masks)

    def _tell_apart(self, disagreement: Note | None, entry: SignatureRecord) -> None:
        """Note that results are other than those of the model as it is configured, and warn of it once."""
        if disagreement is None:
            return
        if all(disagreement not in other.notes for other in self.record.signatures):
            warnings.warn(f"{type(self.module).__name__}: {disagreement.message}", RegraftWarning, stacklevel=2)
        entry.notes.append(disagreement)

    def _expect(self, entry: SignatureRecord) -> None:
        """Compare what was found with what this model should have.

        Raises:
            StrictError: less was found than expected, and `strict` was asked for.
        """
        disabled = [name for name, enabled in self.options.passes.items() if not enabled]
        config = getattr(self.module, "config", None)
        entry.expected = expectations(entry.program, config, self.module, disabled)
        short = [e for e in entry.expected if not e.met]
        for e in short:
            log.warning("%s: %d of %d found; %s", e.what, e.found, e.expected, "; ".join(e.missing[:3]))
        if short and self.options.strict:
            told = "; ".join(f"{e.what}: {e.found} of {e.expected} found ({', '.join(e.missing[:3])})" for e in short)
            raise StrictError(
                f"less was recognised than {type(self.module).__name__} should have: {told}. "
                f"To go on without: optimize(model, passes={{{PASS_OF[short[0].what]!r}: False}}) or strict=False"
            )
        reverted = [*entry.reverted, *(r for p in entry.passes for r in p.reverted)]
        if reverted and self.options.strict:
            told = "; ".join(f"{r.rule} at {r.module or 'the model'} ({r.reason})" for r in reverted[:3])
            raise StrictError(f"rewrites of {type(self.module).__name__} were reverted: {told}")

    def _attempts(self, program: Program, entry: SignatureRecord, certifier: Certifier) -> Compile[Executable]:
        """What compiles, packs and certifies candidates for one captured program."""

        def attempt(verify: str, deny: frozenset[Site], kernels: bool) -> Attempt[Executable]:
            compile_it = partial(
                self.stages.compile,
                program,
                self.options,
                self.weights.value,
                verify=verify,
                deny=deny,
                kernels=kernels,
                module=self.module,
                device=self.device,
            )
            entry.retrace = lambda: compile_it(keep_text=True).passes
            with timed(entry.seconds, "compile"):
                compiled = compile_it(keep_text=bool(os.environ.get("REGRAFT_DUMP_DIR")))
                executable = Executable(compiled.program, self.weights, graph_bytes(self.options, self.device))
            if self.options.dry_run or verify == "off":
                return Attempt(executable, compiled.passes, Certificate(True))
            self._pack(executable, entry)
            with timed(entry.seconds, "certificate"):
                return Attempt(executable, compiled.passes, certifier.measure(executable.directly))

        return attempt

    def _pack(self, executable: Executable, entry: SignatureRecord) -> None:
        """Pack what this and the graphs already in use want, and nothing else."""
        with timed(entry.seconds, "pack"):
            self.weights.keep([*(r for s in self.served for r in s.run.recipes), *self.paged, *executable.recipes])
            executable.prepare()

    @property
    def unbound(self) -> Callable[..., Any]:
        """An overridden forward as a function of the module too, which is how captured functions are called."""

        def unbound(module: nn.Module, **kwargs: Any) -> Any:
            return self.original(**kwargs)

        unbound.__signature__ = inspect.signature(self.original)  # type: ignore[attr-defined]
        return unbound


@contextmanager
def timed(seconds: dict[str, float], what: str) -> Iterator[None]:
    """Add the time the block takes to `seconds[what]`."""
    start = time.perf_counter()
    try:
        yield
    finally:
        seconds[what] = seconds.get(what, 0.0) + time.perf_counter() - start


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """In evaluation mode, every submodule's flag put back afterwards."""
    training = [m for m in module.modules() if m.training]
    for m in training:
        m.training = False
    try:
        yield
    finally:
        for m in training:
            m.training = True


def describe(call: Call) -> str:
    """`input_ids int64[2], use_cache=True`: dtype and rank of tensors, values of the rest."""
    tensors = [f"{n} {str(t.dtype).removeprefix('torch.')}[{t.ndim}]" for n, t in call.tensors.items()]
    given = {**call.given, **({"use_cache": True} if call.cache else {})}
    return ", ".join([*tensors, *(f"{n}={v!r}" for n, v in given.items())])
