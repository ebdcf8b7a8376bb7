"""Which provider computes a call, decided by its sizes, and how the decision is remembered.

Sizes may change from call to call, so LOWER can only say which kernels are right; which is fastest is looked up, when
a set of shapes comes first, in the table of what was measured on the device (section "providers" of its tuning file):

    "providers": {"attention": [{"where": {"D": [65, 128], "Q": [512, 1073741824]}, "provider": "cudnn"}]}

The first entry whose ranges hold decides, if its provider is among the kernels that support the call; without one it is
the first kernel of all. Where `python -m regraft tune` found another to be faster on this machine than that, for calls
of about these sizes, it is the other.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from . import replay, tuning, tuning_cache
from .features import features_of
from .op import Kernel, Op


@dataclass(frozen=True)
class Choice:
    """A call for which there was one."""

    op: Op
    features: tuple[tuple[str, int], ...]
    kernels: tuple[Kernel, ...]
    """All that support it; the first was chosen."""
    args: tuple[Any, ...]


_observers: list[list[Choice]] = []


@contextlib.contextmanager
def recorded(into: list[Choice]) -> Iterator[None]:
    """The choices that are made in the block, appended to `into`."""
    _observers.append(into)
    try:
        yield
    finally:
        _observers[:] = [o for o in _observers if o is not into]  # by identity: empty lists are equal


def choose(op: Op, kernels: Sequence[Kernel], args: Sequence[Any], device: torch.device) -> Kernel:
    """The kernel for these arguments; `kernels` all support their signature, best first."""
    if len(kernels) == 1:
        return kernels[0]
    given = arranged(op, tuple(args), {})
    features = features_of(op.name, given)
    best = _fastest(op, kernels, features, device)
    for seen in _observers if not replay.compiling() else ():
        rest = (kernel for kernel in kernels if kernel is not best)
        seen.append(Choice(op, tuple(features.items()), (best, *rest), given))
    return best


def _fastest(op: Op, kernels: Sequence[Kernel], features: dict[str, int], device: torch.device) -> Kernel:
    """By the table, or that which was measured to be faster here."""
    file = tuning.device_limits(device)[0]
    by_name = {kernel.provider: kernel for kernel in kernels}
    fitting = (
        e.provider for e in tuning.providers(file).get(op.name, ()) if e.provider in by_name and e.matches(features)
    )
    found = next(fitting, kernels[0].provider)
    if file != tuning.DEFAULT:
        mine = tuning_cache.providers(file).get(op.name, {}).get(tuning_cache.call_bucket(features))
        if mine is not None and mine.instead == found and mine.provider in by_name:
            found = mine.provider
    return by_name[found]


log = logging.getLogger("regraft")


class _Script(threading.local):
    """The plans of a straight-line program, in the order of its calls: None while nothing is noted or followed."""

    noted: list[Any] | None = None
    followed: Iterator[Any] | None = None


_script = _Script()


def noting(function: Callable[..., Any], args: Sequence[Any]) -> tuple[Any, tuple[Any, ...]]:
    """`function(*args)`, and the plans by which its calls of bound kernels can be repeated for equal shapes."""
    noted: list[Any] = []
    _script.noted = noted
    try:
        return function(*args), tuple(noted)
    finally:
        _script.noted = None


def following(plans: Sequence[Any], function: Callable[..., Any], args: Sequence[Any]) -> Any:
    """`function(*args)` by the plans noted before: no call has to find its own again."""
    _script.followed = iter(plans)
    try:
        return function(*args)
    finally:
        _script.followed = None


def bind(op: Op, kernels: Sequence[Kernel]) -> Callable[..., Any]:
    """A function with the op's arguments that runs the best of `kernels` by launch plans."""
    kernels = tuple(kernels)
    plans: dict[replay.Key, replay.Plan] = {}

    @functools.wraps(kernels[0].run)
    def bound(*args: Any, **kwargs: Any) -> Any:
        if kwargs:
            args = arranged(op, args, kwargs)
        if _script.followed is not None:
            shape, plan = next(_script.followed)
            if plan is not None and args[0].shape == shape:
                return plan(args)
        key = replay.key_of(args)
        if replay.compiling():
            return replay.once((bound, key), lambda: first(key, args))
        plan = plans.get(key) if not replay.observed() else None
        if _script.noted is not None:
            _script.noted.append((args[0].shape, plan))
        return plan(args) if plan is not None else first(key, args)

    def first(key: replay.Key, args: tuple[Any, ...]) -> Any:
        device = next(a.device for a in args if isinstance(a, torch.Tensor))
        best = choose(op, kernels, args, device)
        planned = key[-1] is not None and not replay.compiling()
        result, run, plan = _first_that_runs(op, [best, *(k for k in kernels if k is not best)], args, planned)
        if planned and device.type == "cuda" and device.index in (None, torch.cuda.current_device()):
            if len(plans) >= replay.MAX_PLANS:
                plans.clear()
            plans[key] = plan if plan is not None else lambda given: run(*given)
        return result

    return bound


def arranged(op: Op, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """All arguments by position, defaults filled in."""
    rest = op.overload._schema.arguments[len(args) :]
    return (*args, *(kwargs.get(a.name, a.default_value) for a in rest))


def _first_that_runs(
    op: Op, kernels: Sequence[Kernel], args: tuple[Any, ...], planned: bool
) -> tuple[Any, Callable[..., Any], replay.Plan | None]:
    """Result, function and, if one is wanted, plan of the first kernel that can be compiled and launched here."""
    for kernel in kernels:
        try:
            with tuning.calling(kernel.run, args):
                result, plan = replay.record(kernel.run, args) if planned else (kernel.run(*args), None)
        except Exception as error:
            if not is_kernel_failure(error):
                raise
            log.warning("the %s kernel of %s does not run here: %s", kernel.provider, op.name, brief(error))
        else:
            return result, kernel.run, plan
    return op.reference(*args), op.reference, None


def is_kernel_failure(error: Exception) -> bool:
    """Whether a kernel could not be compiled or needs more than the device has, as opposed to a wrong call."""
    names = {base.__name__ for base in type(error).__mro__}
    return "TritonError" in names or type(error) is LookupError or "PassManager" in str(error)


def brief(error: BaseException) -> str:
    """The last line of a message that may be a page long."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1][:200]}" if lines else type(error).__name__
