"""From an optimized model to its flat program: captured over flat tokens, compiled, compared with lone runs.

flat = flat_program(model)          # FlatProgram, or Unserved with the reason, which the report has too
"""

from __future__ import annotations

import inspect
import logging
import time
from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers import GenerationMixin

from ...compiler.arange import positions_as_input
from ...compiler.cache_recording import Blueprint
from ...compiler.capture import capture
from ...compiler.causal import CacheError
from ...compiler.cross import STATES
from ...compiler.errors import CaptureError, first_lines
from ...compiler.flatten import flattened
from ...compiler.module_state import state_kept
from ...compiler.outputs import caches
from ...compiler.program import InputKind, LayerSpec, Program
from ...kernels.paged_attention import PAGE_DTYPES
from ...passes.cache import EXAMPLE, ROWS, picks_logits
from ..build import Builder, Unserved, evaluating
from ..checks import adapted
from ..dispatch import Dispatch
from .encoder import RENAMED, EncoderProgram, as_decoder, is_encoder_decoder, sees_masked
from .flat_check import Checked, check, check_beyond, check_scaled, counts_padding, states_of
from .program import FlatProgram, Step

__all__ = ["FlatProgram", "LayerSpec", "Step", "Unserved", "flat_program"]

STATES_EXAMPLE = 11
"""States of the encoder beside which a decoder is captured."""

log = logging.getLogger("regraft")


def flat_program(model: nn.Module, page_dtype: torch.dtype | None = None) -> FlatProgram | Unserved:
    """The flat program of an optimized model; the first call makes it, later ones see that it is still right.

    `page_dtype`: float8_e4m3fn or int8, with scales, half the memory of bf16 for some loss; by default the model's.

    Call it before each use: after the weights changed it brings packed ones up to date (`FlatProgram.version` is
    another number then), and after they took another form it makes another program. A model that no graph may serve
    just now, such as one in training mode, is Unserved for as long. Raises ValueError where it is not optimized, and
    for another dtype.
    """
    dispatch = model.__dict__.get("forward")
    if not isinstance(dispatch, Dispatch):
        raise ValueError(f"this {type(model).__name__} is not optimized; call regraft.optimize(model) first")
    if page_dtype is not None and page_dtype not in PAGE_DTYPES:
        known = ", ".join(str(d).removeprefix("torch.") for d in PAGE_DTYPES)
        raise ValueError(f"pages of {page_dtype} are not known; give {known}, or None for the model's own dtype")
    reason = dispatch.unservable()
    if reason is not None:
        return Unserved(reason)
    exact = dispatch.once("flat", make)
    if page_dtype is None or isinstance(exact, Unserved):
        return exact
    return dispatch.once(("flat", page_dtype), lambda builder: make_scaled(builder, exact, page_dtype))


def make(builder: Builder) -> FlatProgram | Unserved:
    started = time.perf_counter()
    record = builder.record
    try:
        reason = adapted(builder.module)
        if reason is not None:
            raise CacheError(reason)
        with evaluating(builder.module):
            _check_state(builder)
            _check_tokens(builder)
            flat, checked, again = _build(builder)
    except (CacheError, CaptureError) as error:
        reason = error.reason if isinstance(error, CaptureError) else str(error)
        record.generate = {"paged": False, "reason": reason}
        log.info("%s is not generated from pages: %s", record.model, reason)
        return Unserved(reason)
    flat.counts_padding = counts_padding(flat, builder)
    flat.unbind()
    views, copies = builder.weights.packed_bytes()
    record.memory |= {"packed_views": views, "packed_copies": copies}
    record.generate = {
        "paged": True,
        "layers": len(flat.layers),
        "windows": list(flat.groups),
        "longest": list(flat.program.longest) if flat.program.longest is not None else None,
        "error": checked.error,
        "error_original": checked.error_original,
        "bound": checked.bound,
        "captured_again": again,
        "seconds": round(time.perf_counter() - started, 2),
    }
    return flat


def make_scaled(builder: Builder, exact: FlatProgram, page_dtype: torch.dtype) -> FlatProgram | Unserved:
    """The same program over pages of few bits, whose loss the report says."""
    assert exact.captured is not None and builder.record.generate is not None
    flat = _compiled(builder, exact.captured, exact.encoder, page_dtype)
    before = [p.recipe for p in builder.weights.packs.values()]
    builder.weights.pack(flat.recipes)
    flat.counts_padding = exact.counts_padding
    losses = builder.record.generate.setdefault("losses", {})
    name = str(page_dtype).removeprefix("torch.")
    try:
        losses[name] = check_scaled(flat, exact, builder)
    except CacheError as error:
        losses[name] = str(error)
        builder.weights.keep(before)
        return Unserved(str(error))
    builder.paged = [*builder.paged, *flat.recipes]
    flat.unbind()
    return flat


def _check_state(builder: Builder) -> None:
    """Raises CacheError where a step of decoding reads more of its past than keys and values, which are all pages hold.

    Seen from the cache that the model makes, before a capture: that of a scan over many tokens may take minutes.
    """
    if is_encoder_decoder(builder.module) or any(s.captured is not None and s.captured.cache for s in builder.served):
        return
    try:
        with torch.no_grad(), state_kept(builder.module):
            returned = builder.original(input_ids=torch.tensor([[3, 4]], device=builder.device), use_cache=True)
    except Exception:
        log.debug("%s: its cache could not be looked at", builder.record.model, exc_info=True)
        return
    for cache in caches(returned):
        try:
            Blueprint.of(cache)
        except ValueError as error:
            raise CacheError(str(error)) from error


def _check_tokens(builder: Builder) -> None:
    """Raises CacheError where `generate` gives the model other tokens than the prompt's and those it said."""
    prepare = getattr(type(builder.module), "prepare_inputs_for_generation", None)
    if prepare in (None, GenerationMixin.prepare_inputs_for_generation) or is_encoder_decoder(builder.module):
        return
    tokens = torch.tensor([[3, 4]], device=builder.device)
    try:
        given = prepare(builder.module, tokens, attention_mask=torch.ones_like(tokens), is_first_iteration=True)
    except Exception as error:
        raise CacheError(f"its prepare_inputs_for_generation fails for two tokens: {first_lines(error)}") from error
    prepared = given.get("input_ids")
    if isinstance(prepared, Tensor) and not torch.equal(prepared, tokens):
        raise CacheError("its prepare_inputs_for_generation adds tokens of its own")


def _build(builder: Builder) -> tuple[FlatProgram, Checked, str | None]:
    """The program, how good it is, and why the forward's own capture was not enough, if one was tried.

    Raises CacheError or CaptureError where the model cannot be served so.
    """
    again = None
    try:
        program = _from_forward(builder)
        if program is not None:
            return *_compared(builder, program, last=False), None
    except Exception as error:  # noqa: BLE001 - whatever fails on the short way, the long one does not depend on it
        again = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        log.debug("%s is captured again for flat tokens: %s", builder.record.model, again)
    return *_compared(builder, _captured(builder)), again


def _compared(builder: Builder, program: Program, last: bool = True) -> tuple[FlatProgram, Checked]:
    """The program compiled, and compared with lone runs; another than the `last` must pick rows before the head."""
    weights = builder.weights
    end = _end_of(program)
    flat = _compiled(builder, program, _encoder(builder, program))
    if not last and picks_logits(flat.program):
        raise CacheError("all logits would be computed")
    before = [p.recipe for p in weights.packs.values()]
    try:
        weights.pack(flat.recipes)
        checked = check(flat, program, builder)
        if end is not None:
            check_beyond(flat, builder, end[0], checked.bound)
    except BaseException:
        weights.keep(before)
        raise
    builder.paged = flat.recipes
    return flat, checked


def _encoder(builder: Builder, program: Program) -> EncoderProgram | None:
    """What computes the keys and values of an encoder's states, where the program has them as an input."""
    if STATES not in program.example:
        return None
    given = program.example[STATES], program.example["input_ids"]
    masked = sees_masked(builder.module, as_decoder(builder.original), *given)
    return EncoderProgram(_in_form(builder, program, "encoded"), builder.weights, masked)


def _compiled(
    builder: Builder, program: Program, encoder: EncoderProgram | None, page_dtype: torch.dtype | None = None
) -> FlatProgram:
    made = _in_form(builder, program, "paged", page_dtype)
    made.inputs = [replace(i, value=None) if i.kind in (InputKind.STEP, InputKind.PAGES) else i for i in made.inputs]
    made.longest = min((x for x in (made.longest, _end_of(program)) if x is not None), default=None)
    output = next(n for n in made.graph.nodes if n.op == "output")
    flat = FlatProgram(made, builder.weights, int(output.args[0][0].meta["val"].shape[-1]), encoder)
    flat.captured = program
    flat.uncounted = program.uncounted
    return flat


def _in_form(builder: Builder, program: Program, form: str, page_dtype: torch.dtype | None = None) -> Program:
    limits = builder.options.decoding
    return builder.stages.compile(
        program,
        builder.options,
        builder.weights.value,
        verify=builder.options.verify,
        deny=frozenset((r.rule, "*") for s in builder.record.signatures for r in s.reverted),
        kernels=True,
        module=builder.module,
        device=builder.device,
        form=form,
        page_dtype=page_dtype,
        positions=None if limits is None else limits.max_seq_len,
    ).program


def _end_of(program: Program) -> tuple[int, str] | None:
    """How long a sequence may be for the captured code, and why: a table of masks or positions ends there."""
    symbol = program.limits.tensors["input_ids"].shape[-1]
    high = program.limits.ranges.get(str(symbol), (1, None))[1]
    return None if high is None else (high, program.limits.reasons.get(str(symbol), "the model's code ends there"))


def _captured(builder: Builder) -> Program:
    """The forward over flat tokens, with an example of `EXAMPLE`."""
    taken = set(inspect.signature(builder.original).parameters)
    beside = is_encoder_decoder(builder.module)
    if beside:
        taken = {name for name in taken if name not in RENAMED} | {n for n, own in RENAMED.items() if own in taken}
    if "input_ids" not in taken:
        raise CacheError("its forward takes no input_ids")
    everything = _example(builder)
    tensors = {name: t for name, t in everything.items() if name in taken}
    forward = builder.unbound if builder.overridden else None
    if beside:
        tensors[STATES] = states_of(builder, STATES_EXAMPLE, seed=0)
        forward = as_decoder(forward or type(builder.module).forward)
    tensors = {name: t.to(builder.device) for name, t in tensors.items()}
    try:
        program = capture(builder.module, tensors, {}, cache=False, forward=forward)
    except CaptureError as error:
        if tensors.pop(ROWS, None) is None:
            raise
        log.debug("%s with rows: %s", builder.record.model, error)
        program = capture(builder.module, tensors, {}, cache=False, forward=forward)
    _check_sizes(program, tensors)
    program.example = tensors
    if "position_ids" not in tensors:
        positions_as_input(program, everything["position_ids"], builder.module, beside)
    return program


def _from_forward(builder: Builder) -> Program | None:
    """The same made of a forward that was captured for batches, or None where that cannot be."""
    if is_encoder_decoder(builder.module):
        return None
    for served in builder.served:
        program = flattened(served.captured, _example(builder)) if served.captured is not None else None
        if program is not None:
            _check_sizes(program, program.example)
            return program
    return None


def _example(builder: Builder) -> dict[str, Tensor]:
    count = sum(EXAMPLE)
    positions = [i for length in EXAMPLE for i in range(length)]
    tensors = {
        "input_ids": torch.arange(3, 3 + count)[None],
        "position_ids": torch.tensor([positions]),
        ROWS: torch.arange(len(EXAMPLE)) + count - len(EXAMPLE),
    }
    return {name: t.to(builder.device) for name, t in tensors.items()}


def _check_sizes(program: Program, tensors: dict[str, Tensor]) -> None:
    """Raises CacheError where the code takes no flat tokens, or not any number of them."""
    violation = program.limits.violation(tensors)
    if violation is not None:
        raise CacheError(f"its code fixes sizes: {violation}")
    for name, guard in program.limits.tensors.items():
        length = guard.shape[min(1, len(guard.shape) - 1)]
        if isinstance(length, int):
            raise CacheError(f"its code fixes the number of tokens: {name} has {length}")
        low, _ = program.limits.ranges.get(length, (1, None))
        if low > 1:
            raise CacheError(f"{name} has at least {low} tokens")
