"""`optimize(model)` and `restore(model)`."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import torch
from torch import nn

from ..compiler.program import Note
from .build import Stages, Unserved, evaluating
from .checks import check_inputs, check_model, device_of, weight_bytes
from .dispatch import Dispatch
from .errors import InputError, closest
from .examples import make_examples
from .options import Options, PassChoice, make_options
from .record import Record

log = logging.getLogger("regraft")

M = TypeVar("M", bound=nn.Module)


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
    verbose: bool | None = None,
    **unknown: Any,
) -> Any:
    from .stages import PASS_NAMES, Pipeline, is_rule

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
        verbose=verbose,
        **unknown,
    )
    return install(model, options, Pipeline())


def install(model: M, options: Options, stages: Stages) -> Any:
    """`optimize` after its options were read, with the compiler as an argument."""
    check_model(model, dry_run=options.dry_run)
    record = Record(type(model).__name__, memory={"weights": weight_bytes(model)})
    dispatch = Dispatch(model, options, stages, record)
    try:
        capture_first(dispatch)
    except BaseException:
        dispatch.release()
        raise
    if options.dry_run:
        return record
    model.forward = dispatch  # type: ignore[method-assign]
    return model


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
    made = make_examples(module, dispatch.original)
    reason = "its config does not say what they look like" if made is None else _refusal(dispatch, made)
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
        with torch.no_grad(), evaluating(dispatch.module):
            dispatch.original(**examples)
    except Exception as error:  # noqa: BLE001 - a model's code refuses arguments in any way it likes
        return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return None


def restore(model: M) -> M:
    """Give back the original forward, and independent contiguous parameters, bit for bit.

    Raises:
        ValueError: the model is not optimized.
    """
    dispatch = model.__dict__.get("forward") if isinstance(model, nn.Module) else None
    if not isinstance(dispatch, Dispatch):
        raise ValueError(f"restore(model): this {type(model).__name__} is not optimized")
    if dispatch.overridden is not None:
        model.forward = dispatch.overridden  # type: ignore[method-assign]
    else:
        del model.__dict__["forward"]
    dispatch.release()
    return model
