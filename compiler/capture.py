"""A live model's forward as a `Program`: one functional ATen graph over its own weights.

    program = capture(model, {"input_ids": ids, "attention_mask": mask}, {"logits_to_keep": 1}, cache=True)

In order: example arguments are enlarged so that no size of 1 is remembered; one concrete run (of fake tensors where the
weights are on meta) compares our ops with the model's own code and shows what the forward returns; `torch.export`
traces the original forward with as many dynamic dimensions as it takes; `functional` brings it to functional ATen;
`lift` names its inputs. Nothing of the model is changed, no weight is copied.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.export import Dim, ExportedProgram

from .cache_recording import Blueprint
from .eager_branches import eager_branches
from .errors import CaptureError, RefusedError, first_lines, model_files, source_line
from .example_inputs import enlarge, on_device, proposals, same_batch, same_length
from .functional import functional
from .huggingface import Capturing, capturing
from .lifting import lift, limits_of
from .module_state import Snapshot, choices_kept, state_of
from .one_tracer import tracing_alone
from .outputs import Structure, caches, flatten, unknown
from .positions import bound_lengths
from .program import Note, Program
from .quiet import loggers_quiet, quiet

log = logging.getLogger(__name__)

Forward = Callable[..., Any]

_ABOUT_VALUES = ("GuardOnDataDependentSymNode", "DataDependentOutputException", "DynamicOutputShapeException")
"""Errors about values of tensors. Fewer dynamic dimensions do not cure them, none at all may: a size that the model
turned into a tensor is a number then."""


def capture(
    model: nn.Module,
    tensors: dict[str, Tensor],
    static: dict[str, Any] | None = None,
    *,
    cache: bool,
    forward: Forward | None = None,
) -> Program:
    """The graph of `forward(model, **tensors, **static)`.

    `tensors` become inputs of the graph, their batch and lengths dynamic from 1 up as far as the model allows
    (`program.limits`); `static` are Python values and stay as given. With `cache`, the key-value cache that the
    original forward returns, if it returns one, is rebuilt from outputs of the graph; without, the model is called with
    `use_cache=False`. `forward` is the original function, `type(model).forward` where not given.

    Raises `CaptureError`; the model is left as it was in any case.
    """
    if model.training:
        raise CaptureError("", "it is in training mode", hint="call model.eval() first")
    static = dict(static or {})
    forward = forward or type(model).forward
    if not cache and _takes_use_cache(model, forward):
        static["use_cache"] = False
    files = model_files(model)
    weight = next(model.parameters(), None)
    device = weight.device if weight is not None else torch.device("cpu")
    enlarged = enlarge(tensors)
    changed = any(enlarged[n] is not t for n, t in tensors.items())
    try:
        program = _capture(model, forward, enlarged, static, device, files)
        fits = not changed or program.limits.violation(tensors) is None
    except RefusedError:
        if not changed:
            raise
        fits = False
    # The model's code fixes a size that was 1 and is not any more: take the arguments as they are.
    return program if fits else _capture(model, forward, tensors, static, device, files)


@tracing_alone()
@loggers_quiet()
def _capture(
    model: nn.Module,
    forward: Forward,
    values: dict[str, Tensor],
    static: dict[str, Any],
    device: torch.device,
    files: frozenset[str],
) -> Program:
    examples = on_device(values, device)
    with torch.no_grad(), choices_kept(model), capturing(model) as state:
        try:
            returned = _checked_run(model, forward, examples, static, state)
        except Exception as error:
            raise _failure(error, files, "its forward fails as it is captured", RefusedError) from error
        blueprint = _blueprint(returned, static)
        call = _Call(model, forward, static, blueprint)
        try:
            exported, notes = _export(call, values, examples, files)
        except CaptureError:
            with eager_branches(model) as others:
                if not others:
                    raise
                exported, notes = _export(call, values, examples, files)
    return _program(exported, call, model, examples, blueprint, [*state.notes, *notes], files)


def _checked_run(
    model: nn.Module, forward: Forward, tensors: dict[str, Tensor], static: dict[str, Any], state: Capturing
) -> Any:
    """What the forward returns on concrete values, with the masks that its attention takes."""
    try:
        returned = _concrete_run(model, forward, tensors, static, state)
    except Exception:
        if not state.give_masks_back():
            raise
    else:
        if not state.give_masks_back():
            return returned
    return _concrete_run(model, forward, tensors, static, state)


def _concrete_run(
    model: nn.Module, forward: Forward, tensors: dict[str, Tensor], static: dict[str, Any], state: Capturing
) -> Any:
    """What the forward returns, while ops are compared with the model's own code."""
    with state.check():
        if any(p.is_meta for p in model.parameters()):
            with FakeTensorMode(allow_non_fake_inputs=True) as mode:
                fake = {n: mode.from_tensor(t) for n, t in tensors.items()}
                return forward(model, **fake, **static)
        before = Snapshot(model)
        returned = forward(model, **tensors, **static)
        kept = state_of(before, lambda others: forward(model, **others, **static), tensors)
        if kept is not None:  # tables stay: the graph reads them
            before.restore()
            raise CaptureError("", f"its forward keeps {kept} for its next call, which no graph does")
        before.restore_choices()  # before the trace, which shows what they depend on
        return returned


def _takes_use_cache(model: nn.Module, forward: Forward) -> bool:
    parameters = inspect.signature(forward).parameters
    if "use_cache" in parameters:
        return True
    open_ended = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    config = getattr(model, "config", None)
    text: Any = config.get_text_config() if config is not None and hasattr(config, "get_text_config") else config
    return open_ended and hasattr(text, "use_cache")


def _blueprint(returned: Any, static: dict[str, Any]) -> Blueprint | None:
    other = unknown(returned)
    if other is not None:  # said before a trace, which may take its time
        raise CaptureError("", f"its forward returns a {other}, of which no graph can make another")
    found = caches(returned)
    if not found:
        return None
    if len(found) > 1:
        raise CaptureError("", "its forward returns more than one cache", hint="call it with use_cache=False")
    try:
        return Blueprint.of(found[0])
    except ValueError as error:
        raise CaptureError("", str(error), hint="with use_cache=False it can be captured") from error


class _Returned:
    """Where the traced call leaves what it returned; export puts back plain attributes of a module."""

    structure: Structure


class _Call(nn.Module):
    """What is exported: the original forward with these keywords, its result taken apart into tensors."""

    def __init__(self, model: nn.Module, forward: Forward, static: dict[str, Any], blueprint: Blueprint | None) -> None:
        super().__init__()
        self.model = model
        self._original = forward
        self._static = static
        self._blueprint = blueprint
        self.batch: tuple[str, ...] = ()
        self.lengths: tuple[tuple[str, str], ...] = ()
        self.returned = _Returned()

    def forward(self, tensors: dict[str, Tensor]) -> tuple[Any, ...]:
        for name in self.batch[1:]:
            torch._check(tensors[name].shape[0] == tensors[self.batch[0]].shape[0])
        for name, other in self.lengths:
            torch._check(tensors[name].shape[1] == tensors[other].shape[1])
        static = dict(self._static)
        if self._blueprint is not None:
            static["past_key_values"] = self._blueprint.recorder()
        structure, leaves = flatten(self._original(self.model, **tensors, **static), self._blueprint)
        self.returned.structure = structure
        return tuple(leaves)


def _export(
    call: _Call, values: dict[str, Tensor], tensors: dict[str, Tensor], files: frozenset[str]
) -> tuple[ExportedProgram, list[Note]]:
    """With the most dynamic dimensions that export takes; `values` are the tensors before they went to meta."""
    refused: Exception | None = None
    for dims in proposals(tensors):
        if refused is not None and any(dims.values()) and any(name in _chain(refused) for name in _ABOUT_VALUES):
            continue
        call.batch, call.lengths = tuple(same_batch(tensors, dims)), tuple(same_length(values, dims))
        shapes = {n: [Dim.AUTO if d in dims[n] else Dim.STATIC for d in range(t.dim())] for n, t in tensors.items()}
        try:
            with quiet():
                exported = torch.export.export(call, (tensors,), dynamic_shapes=(shapes,), strict=False)
            exported = functional(exported)
        except Exception as error:  # noqa: BLE001  (export raises whatever the traced code raises)
            refused = refused or error
            log.debug("export with dynamic %s failed: %s", dims, error)
            continue
        return exported, _fixed(exported, dims, refused, files)
    assert refused is not None
    raise _failure(refused, files, "torch.export refuses its forward") from refused


def _chain(error: BaseException) -> str:
    names, seen = [], error
    while seen is not None:
        names.append(type(seen).__name__)
        seen = seen.__cause__ or seen.__context__  # type: ignore[assignment]
    return " ".join(names)


def _fixed(
    exported: ExportedProgram, dims: dict[str, tuple[int, ...]], refused: Exception | None, files: frozenset[str]
) -> list[Note]:
    """Notes on dimensions that one would expect to vary and that do not."""
    notes = []
    if refused is not None:
        free = ", ".join(f"{n} {list(d)}" for n, d in dims.items() if d) or "none"
        message = f"not all dimensions could be dynamic ({first_lines(refused)}); dynamic are: {free}"
        notes.append(Note("", message, source_line(refused, files)))
    return notes


def _failure(
    error: Exception, files: frozenset[str], reason: str, kind: type[CaptureError] = CaptureError
) -> CaptureError:
    if isinstance(error, CaptureError):
        return error
    hint = "The model keeps its own forward; parts of it may still be captured"
    return kind("", f"{reason} ({first_lines(error)})", source_line(error, files), hint)


def _program(
    exported: ExportedProgram,
    call: _Call,
    model: nn.Module,
    tensors: dict[str, Tensor],
    blueprint: Blueprint | None,
    notes: Sequence[Note],
    files: frozenset[str],
) -> Program:
    try:
        module, inputs = lift(exported, "model.", model)
    except ValueError as error:
        raise CaptureError("", str(error), hint="such state cannot live in a graph") from error
    limits = limits_of(exported, module, inputs)
    program = Program(
        gm=module,
        inputs=inputs,
        rebuild=call.returned.structure.rebuild,
        notes=list(notes),
        example=tensors,
        limits=limits,
        cache=blueprint is not None,
    )
    bound_lengths(program, model)
    for name, guard in limits.tensors.items():
        for dim, size in enumerate(guard.shape[:2]):
            integer = not guard.dtype.is_floating_point
            if isinstance(size, int) and size == tensors[name].shape[dim] > 1 and (dim == 0 or integer):
                program.notes.append(Note("", f"dimension {dim} of {name} is fixed to {size} by the model's code"))
    return program
