"""Which provider computes the calls of a model the fastest, measured for `python -m regraft tune MODEL`.

The table that is shipped was made with the sizes of some models; with others, tiles may fill the multiprocessors less
well. Each call for which there was a choice is repeated by every kernel that supports it, compared with the present one
and timed cold; what is faster is kept beside the configurations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import torch

from ..kernels import tuning, tuning_cache
from ..kernels.choice import Choice
from .device_memory import release_unused
from .tune_calls import Likeness, Measure, copies, measure_on, same, tensors

WORTH: Final = 0.95
"""Share of the present kernel's time that another must stay below: libraries have more than one speed on a size."""


@dataclass(frozen=True)
class Fastest:
    """What was found for one op and bucket of sizes."""

    op: str
    features: Mapping[str, int]
    before: str
    before_us: float
    provider: str
    us: float
    tried: int

    def __str__(self) -> str:
        sizes = ", ".join(f"{n} {v}" for n, v in self.features.items())
        change = f"{self.before} {self.before_us:.1f} -> {self.provider} {self.us:.1f} us"
        return f"{self.op}, {sizes}: {change} ({self.tried} tried)"


class Calls(list[Choice]):
    """The first call of each op and bucket without an entry, with no floating-point tensor of the model's alive."""

    def __init__(self, known: Mapping[str, Mapping[tuning_cache.Bucket, tuning_cache.Faster]]) -> None:
        super().__init__()
        self._seen = {(op, place) for op, entries in known.items() for place in entries}

    def append(self, choice: Choice) -> None:
        """Keep it, if it is new, repeating it changes nothing, and its sizes say all: no indices deal out the work."""
        place = (choice.op.name, tuning_cache.call_bucket(dict(choice.features)))
        if place in self._seen or choice.op.overload._schema.is_mutable or any(map(_is_index, choice.args)):
            return
        self._seen.add(place)
        super().append(replace(choice, args=tuple(Likeness.of(a) for a in choice.args)))


def tune_calls(
    calls: Iterable[Choice],
    device: torch.device,
    *,
    say: Callable[[str], None] = lambda line: None,
    measure: Measure | None = None,
) -> list[Fastest]:
    """Measure the providers of each call and keep the fastest."""
    file = tuning.device_limits(device)[0]
    calls, found = list(calls), []
    for number, choice in enumerate(calls):
        say(f"{bar(number, len(calls))} {choice.op.name} {dict(choice.features)}")
        try:
            fastest = _fastest(choice, device, measure or measure_on(device))
        except torch.OutOfMemoryError:
            if device.type == "cuda":
                release_unused()
            say(f"{choice.op.name}: no memory for copies of its arguments; left as it is")
            continue
        if fastest is None:
            say(f"{choice.op.name}: {choice.kernels[0].provider} does not run; left as it is")
            continue
        kept = tuning_cache.Faster(fastest.provider, fastest.before)
        tuning_cache.store_provider(file, fastest.op, fastest.features, kept, fastest.us)
        say(f"  {fastest}")
        found.append(fastest)
    say(f"{bar(len(calls), len(calls))} {len(found)} kept in {tuning_cache.path(file)}")
    return found


def _fastest(choice: Choice, device: torch.device, measure: Measure) -> Fastest | None:
    """None where the present kernel, the first of `choice.kernels`, does not run."""
    given, small = copies(choice.args, device)
    expected: list[torch.Tensor] = []
    calls: dict[str, Sequence[Callable[[], Any]]] = {}
    with torch.no_grad():
        for kernel in choice.kernels:
            try:
                results = tensors(kernel.run(*given[0]))
            except Exception:  # noqa: BLE001 - a kernel may not compile or not fit; the others are tried
                results = []
            if not expected:
                if not results:
                    return None
                expected = [t.clone() for t in results]
            elif len(results) != len(expected) or not all(map(same, results, expected)):
                continue
            calls[kernel.provider] = [lambda args=args, run=kernel.run: run(*args) for args in given]  # type: ignore[misc]
        times = measure(calls, small)
    before = choice.kernels[0].provider
    best = min(times, key=times.__getitem__)
    if times[best] > WORTH * times[before]:
        best = before
    features = dict(choice.features)
    return Fastest(
        choice.op.name, features, before, 1e3 * times[before], best, 1e3 * times[best], len(choice.kernels)
    )  # fmt: skip


def _is_index(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and not value.is_floating_point() and value.dtype != torch.bool


def bar(done: int, of: int) -> str:
    """A line's worth of progress."""
    filled = 20 * done // max(of, 1)
    return f"[{'#' * filled}{'.' * (20 - filled)}] {done}/{of}"
