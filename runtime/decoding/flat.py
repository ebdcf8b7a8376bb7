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
from .flat_check import Checked, check
from .program import FlatProgram, Step

__all__ = ["FlatProgram", "LayerSpec", "Step", "Unserved", "flat_program"]

log = logging.getLogger("regraft")


def flat_program(model: nn.Module) -> FlatProgram | Unserved:
    """The flat program of an optimized model; the first call makes it, later ones see that it is still right.

    Call it before each use: after the weights changed it brings packed ones up to date (`FlatProgram.version` is
    another number then), and after they took another form it makes another program. Raises ValueError where the model
    is not optimized.
    """
    dispatch = model.__dict__.get("forward")
    if not isinstance(dispatch, Dispatch):
        raise ValueError(f"this {type(model).__name__} is not optimized; call regraft.optimize(model) first")
    return dispatch.once("flat", _make)


def _make(builder: Builder) -> FlatProgram | Unserved:
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
    flat = FlatProgram(made, weights, vocab)
    before = [p.recipe for p in weights.packs.values()]
    weights.pack(flat.recipes)
    try:
        checked = check(flat, program, builder)
    except CacheError:
        weights.keep(before)
        raise
    builder.paged = flat.recipes
    return flat, checked


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
        low, high = program.limits.ranges.get(guard.shape[-1], (1, None))
        if low > 1 or high is not None:
            raise CacheError(f"{name} may only have {low} to {high} tokens in all")
    program.example = tensors
    return program
