"""`optimize(model)` and `restore(model)`."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import torch
from torch import nn

from ..compiler.module_state import state_kept
from ..compiler.program import Note
from ..kernels import tuning
from .announce import announcement
from .build import Stages, Unserved, evaluating
from .checks import check_inputs, check_model, device_of, dtype_of, weight_bytes
from .decoding import install as plug_in
from .decoding.serving import make_engine
from .dispatch import Dispatch
from .errors import InputError, closest
from .examples import make_examples
from .options import Options, PassChoice, make_options
from .record import Record
from .report import Report
from .stages import PASS_NAMES, Pipeline, is_rule
from .topics import listen

log = logging.getLogger("regraft")

M = TypeVar("M", bound=nn.Module)
LEFT = Note("", "REGRAFT_DISABLE is set: the model is left as it is")


def optimize(
    model: M,
    *,
    mode: str = "default",
    rules: Iterable[Any] | None = None,
    passes: PassChoice = None,
    verify: str = "fast",
    strict: bool = False,
    on_error: str = "fallback",
    dry_run: bool = False,
    cache_dir: str | os.PathLike[str] | None = None,
    example_inputs: Mapping[str, Any] | None = None,
    decoding: Mapping[str, Any] | None = None,
    verbose: bool | None = None,
    **unknown: Any,
) -> Any:
    """Rewrite the forward of a live model onto fused kernels; the model stays the same object.

        model = regraft.optimize(AutoModelForCausalLM.from_pretrained(...))

    The forward is captured as a graph for each signature (which arguments, of which dtype and rank), the first one now
    and others when they are first called; a graph serves every batch size and length. Every rewrite is verified on the
    model's own weights, and so is the whole. What no graph can serve goes to the original forward, with one warning
    that names the argument. Weights are repacked in place without a second copy; their names, values and identity stay,
    and later changes to them are followed. `regraft.restore(model)` gives back the original.

    Args:
        model: a `torch.nn.Module`, usually a transformers model, with its weights on one device.
        mode: the names of `torch.compile`. "default" runs a forward by a CUDA graph where the GPU would wait for the
            host and the outputs have at most 512 MiB or 1/128 of the GPU's memory; "reduce-overhead" up to twice that;
            "max-autotune-no-cudagraphs" never. "max-autotune" is "default": tuning is `python -m regraft tune`.
        rules: instances of `regraft.Rule` and `regraft.GroupRule` of your own, for this model only.
        passes: what to switch, as `{"rope": False}` or `["-rope", "+qkv"]`; all run by default.
        verify: "fast" checks one site of each kind of rewrite, "full" every site, both then the whole model; "off"
            checks nothing.
        strict: raise where something was not captured or not rewritten that should have been.
        on_error: "fallback" lets the original serve what cannot be captured, "raise" raises.
        dry_run: change nothing and return the report alone; works on meta weights too.
        cache_dir: where configurations are that `python -m regraft tune` measured: for the whole process, and
            `REGRAFT_CACHE_DIR` or `~/.cache/regraft` by default.
        example_inputs: the arguments of a typical call, by name. Made from the config where not given.
        decoding: what `generate` may take, as `{"max_batch_size": 64, "max_seq_len": 4096}`: sequences decoded at
            once, their greatest length, or `memory_fraction` of the free memory for keys and values (half of it by
            default), allocated when `generate` is first called; `block_size`, `token_budget`, `prefix_sharing`,
            `warm_up_seconds`.
        verbose: True prints the whole report, None a few lines, False nothing.

    `REGRAFT_DISABLE=1` leaves the model as it is; `REGRAFT_PASSES`, `REGRAFT_LOGS` and `REGRAFT_DUMP_DIR` are read too.

    Returns:
        `model` itself, with `model.report`; under `dry_run` the `Report`.

    Raises:
        TypeError: `model` is not a module.
        OptionError: an unknown option, pass or value; the closest known one is named.
        UnsupportedModelError: quantised, offloaded, adapted, split, of mixed dtypes, or already optimized.
        InputError: `example_inputs` that the model cannot take.
        CaptureError, ParityError, StrictError: only under `strict` or `on_error="raise"`.
    """
    listen()
    options = make_options(
        PASS_NAMES,
        is_rule=is_rule,
        mode=mode,
        rules=rules,
        passes=passes,
        verify=verify,
        strict=strict,
        on_error=on_error,
        dry_run=dry_run,
        cache_dir=cache_dir,
        example_inputs=example_inputs,
        decoding=decoding,
        verbose=verbose,
        **unknown,
    )
    if os.environ.get("REGRAFT_DISABLE", "0") not in ("", "0"):
        return leave(model, options)
    return install(model, options, Pipeline())


def leave(model: M, options: Options) -> Any:
    """What `optimize` does under `REGRAFT_DISABLE=1`: a report that says so, and nothing else."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"optimize(model): model is {type(model).__name__}, not a torch.nn.Module")
    record = new_record(model, options)
    record.notes.append(LEFT)
    log.warning("REGRAFT_DISABLE is set: %s is left as it is", type(model).__name__)
    if options.dry_run:
        return Report(record)
    if not hasattr(model, "report"):
        model.__dict__["report"] = Report(record)
    return model


def install(model: M, options: Options, stages: Stages) -> Any:
    """`optimize` after its options were read, with the compiler as an argument."""
    check_model(model, dry_run=options.dry_run)
    record = new_record(model, options)
    dispatch = Dispatch(model, options, stages, record)
    try:
        capture_first(dispatch)
    except BaseException:
        dispatch.release()
        raise
    report = Report(record)
    if options.verbose is not False:
        print(str(report) if options.verbose else announcement(report))
    if options.dry_run:
        dispatch.release()
        return report
    model.forward = dispatch
    plug_in.install(model, dispatch, make_engine)
    if hasattr(model, "report"):
        record.notes.append(Note("", "the model has an attribute `report` of its own; see model.forward.report"))
    else:
        model.__dict__["report"] = report
    return model


def new_record(model: nn.Module, options: Options) -> Record:
    """A record that says which model, and under which options."""
    record = Record(
        type(model).__name__,
        dtype=str(dtype_of(model)).removeprefix("torch."),
        device=str(device_of(model)),
        parameters=sum(p.numel() for p in model.parameters()),
        options=options.chosen(),
        memory={"weights": weight_bytes(model)},
    )
    if options.mode.startswith("max-autotune"):
        text = f"mode={options.mode!r} tunes nothing by itself: python -m regraft tune MODEL does"
        record.notes.append(Note("", text))
    if options.cache_dir is not None:
        tuning.use_cache(options.cache_dir)
    return record


def capture_first(dispatch: Dispatch) -> None:
    """Capture the signature a caller most likely uses, so that the first call need not.

    Raises:
        InputError: the user's example inputs do not fit the model, or no graph can serve them.
    """
    module, record = dispatch.module, dispatch.record
    given = dispatch.options.example_inputs
    if given is not None:
        examples = _on_device(given, device_of(module))
        _check_examples(dispatch, examples)
        served = dispatch.prepare(examples)
        if isinstance(served, Unserved) and not record.signatures:
            raise InputError(f"example_inputs: {served.reason} cannot be served by a graph; leave it out")
        return
    reason: str | None = "its config does not say what they look like"
    try:
        made = make_examples(module, dispatch.original)
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        made, reason = None, f"its config says it in a way of its own, {type(error).__name__}: {error}"
    if made is not None:
        reason = _refusal(dispatch, made)
    if made is None or reason is not None:
        message = f"no example inputs could be made ({reason}); what is captured is decided by the first call"
        record.notes.append(Note("", message))
        log.info("%s: %s", record.model, message)
        return
    dispatch.prepare(dict(made))


def _on_device(inputs: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    return {n: v.detach().to(device) if isinstance(v, torch.Tensor) else v for n, v in inputs.items()}


def _check_examples(dispatch: Dispatch, examples: dict[str, Any]) -> None:
    name = type(dispatch.module).__name__
    unknown = dispatch.bound.signature.unknown(examples)
    if unknown:
        known = list(dispatch.bound.signature.signature.parameters)
        hint = closest(unknown[0], known)
        raise InputError(
            f"example_inputs: {name}.forward has no argument {unknown[0]!r}{hint} It takes {', '.join(known)}"
        )
    check_inputs(examples, examples.get("past_key_values"))
    refused = _refusal(dispatch, examples)
    if refused is not None:
        raise InputError(f"example_inputs: {name} itself refuses them: {refused}")


def _refusal(dispatch: Dispatch, examples: Mapping[str, Any]) -> str | None:
    """Why the original cannot run on these arguments, or None. Weights on meta are not asked."""
    if device_of(dispatch.module).type == "meta":
        return None
    try:
        with torch.no_grad(), evaluating(dispatch.module), state_kept(dispatch.module):
            dispatch.original(**examples)
    except Exception as error:  # noqa: BLE001 - a model's code refuses arguments in any way it likes
        return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return None


def restore(model: M) -> M:
    """Give back the original forward, and independent contiguous parameters, bit for bit.

    Raises:
        ValueError: the model is not optimized, or another forward was set on it since.
    """
    dispatch = model.__dict__.get("forward") if isinstance(model, nn.Module) else None
    report = model.__dict__.get("report") if isinstance(model, nn.Module) else None
    if not isinstance(dispatch, Dispatch):
        if not isinstance(report, Report):
            raise ValueError(f"restore(model): this {type(model).__name__} is not optimized")
        if LEFT not in report.record.notes:
            raise ValueError(
                f"restore(model): another forward was set on this {type(model).__name__} after optimize; "
                "put the one before it back first"
            )
    if isinstance(report, Report):
        del model.__dict__["report"]
    if not isinstance(dispatch, Dispatch):
        return model
    plug_in.remove(model)
    if dispatch.overridden is not None:
        model.forward = dispatch.overridden
    else:
        del model.__dict__["forward"]
    dispatch.release()
    return model
