"""From an optimized model to its flat program: captured over flat tokens, compiled, compared with lone runs.

flat = flat_program(model)          # FlatProgram, or Unserved with the reason, which the report has too
"""

from __future__ import annotations

import inspect
import logging
import time
from dataclasses import replace

import torch
from torch import nn

from ...compiler.capture import capture
from ...compiler.causal import CacheError
from ...compiler.errors import CaptureError
from ...compiler.program import InputKind, LayerSpec, Program
from ...passes.cache import EXAMPLE, ROWS
from ..build import Builder, Unserved, evaluating
from ..dispatch import Dispatch
from .flat_check import Checked, check, check_beyond
from .program import FlatProgram, Step

__all__ = ["FlatProgram", "LayerSpec", "Step", "Unserved", "flat_program"]

log = logging.getLogger("regraft")


def flat_program(model: nn.Module) -> FlatProgram | Unserved:
    """The flat program of an optimized model; the first call makes it, later ones see that it is still right.

    Call it before each use: after the weights changed it brings packed ones up to date (`FlatProgram.version` is
    another number then), and after they took another form it makes another program. A model that no graph may serve
    just now, such as one in training mode, is Unserved for as long. Raises ValueError where it is not optimized.
    """
    dispatch = model.__dict__.get("forward")
    if not isinstance(dispatch, Dispatch):
        raise ValueError(f"this {type(model).__name__} is not optimized; call regraft.optimize(model) first")
    reason = dispatch.unservable()
    return Unserved(reason) if reason is not None else dispatch.once("flat", make)


def make(builder: Builder) -> FlatProgram | Unserved:
    started = time.perf_counter()
    record = builder.record
    try:
        with evaluating(builder.module):
            flat, checked = _build(builder)
    except (CacheError, CaptureError) as error:
        reason = error.reason if isinstance(error, CaptureError) else str(error)
        record.generate = {"paged": False, "reason": reason}
        log.info("%s is not generated from pages: %s", record.model, reason)
        return Unserved(reason)
    flat.unbind()
    record.generate = {
        "paged": True,
        "layers": len(flat.layers),
        "windows": list(flat.groups),
        "longest": list(flat.program.longest) if flat.program.longest is not None else None,
        "error": checked.error,
        "error_original": checked.error_original,
        "bound": checked.bound,
        "seconds": round(time.perf_counter() - started, 2),
    }
    return flat


def _build(builder: Builder) -> tuple[FlatProgram, Checked]:
    """Raises CacheError or CaptureError where the model cannot be served so."""
    module, weights = builder.module, builder.weights
    if getattr(getattr(module, "config", None), "is_encoder_decoder", False):
        raise CacheError("encoder-decoder")
    program = _captured(builder)
    compiled = builder.stages.compile(
        program,
        builder.options,
        weights.value,
        verify=builder.options.verify,
        deny=frozenset((r.rule, "*") for s in builder.record.signatures for r in s.reverted),
        kernels=True,
        module=module,
        device=builder.device,
        paged=True,
    )
    made = compiled.program
    made.inputs = [replace(i, value=None) if i.kind in (InputKind.STEP, InputKind.PAGES) else i for i in made.inputs]
    output = next(n for n in made.graph.nodes if n.op == "output")
    vocab = int(output.args[0][0].meta["val"].shape[-1])
    end = _end_of(program)
    made.longest = min((x for x in (made.longest, end) if x is not None), default=None)
    flat = FlatProgram(made, weights, vocab)
    before = [p.recipe for p in weights.packs.values()]
    weights.pack(flat.recipes)
    try:
        checked = check(flat, program, builder)
        if end is not None:
            check_beyond(flat, builder, end[0], checked.bound)
    except CacheError:
        weights.keep(before)
        raise
    builder.paged = flat.recipes
    return flat, checked


def _end_of(program: Program) -> tuple[int, str] | None:
    """How long a sequence may be for the captured code, and why: a table of masks or positions ends there."""
    symbol = program.limits.tensors["input_ids"].shape[-1]
    high = program.limits.ranges.get(str(symbol), (1, None))[1]
    return None if high is None else (high, program.limits.reasons.get(str(symbol), "the model's code ends there"))


def _captured(builder: Builder) -> Program:
    """The forward over flat tokens, with an example of `EXAMPLE`."""
    taken = inspect.signature(builder.original).parameters
    if "input_ids" not in taken:
        raise CacheError("its forward takes no input_ids")
    count = sum(EXAMPLE)
    positions = [i for length in EXAMPLE for i in range(length)]
    tensors = {
        "input_ids": torch.arange(3, 3 + count)[None],
        "position_ids": torch.tensor([positions]),
        ROWS: torch.arange(len(EXAMPLE)) + count - len(EXAMPLE),
    }
    tensors = {name: t.to(builder.device) for name, t in tensors.items() if name in taken}
    forward = builder.unbound if builder.overridden else None
    try:
        program = capture(builder.module, tensors, {}, cache=False, forward=forward)
    except CaptureError as error:
        if tensors.pop(ROWS, None) is None:
            raise
        log.debug("%s with rows: %s", builder.record.model, error)
        program = capture(builder.module, tensors, {}, cache=False, forward=forward)
    violation = program.limits.violation(tensors)
    if violation is not None:
        raise CacheError(f"its code fixes sizes: {violation}")
    for name, guard in program.limits.tensors.items():
        if isinstance(guard.shape[-1], int):
            raise CacheError(f"its code fixes the number of tokens: {name} is {list(guard.shape)}")
        low, _ = program.limits.ranges.get(guard.shape[-1], (1, None))
        if low > 1:
            raise CacheError(f"{name} has at least {low} tokens")
    program.example = tensors
    return program
