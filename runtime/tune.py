"""`python -m regraft tune MODEL`: measure configurations for the sizes that a model's kernels ask for, and keep them.

The model runs once while launchers' questions are recorded. For each kernel and bucket of sizes without an entry of
its own, candidates are the configurations in all tables and the neighbours of the present one, without those that need
more shared memory than there is or that a count of tiles rules out. They are compiled in parallel, compared with the
present one, timed cold, and the neighbours of the best are tried until none is better. Then each call is timed by all
kernels that could have computed it (see `tune_providers.py`).
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from torch import nn

from ..kernels import choice as choices
from ..kernels import tuning, tuning_cache
from ..kernels.config import Config
from ..kernels.tuning import Asked
from .bench_forward import bound_call
from .loading import inputs_for
from .optimize import optimize
from .tune_calls import Likeness, Measure, copies, measure_on, same, tensors
from .tune_providers import Calls, Fastest, bar, tune_calls

MOST: Final = 16
"""Candidates of one round."""
STEPS: Final = 3
"""Rounds of neighbours at most."""
WORTH: Final = 0.98
"""Share of the present configuration's time that another must stay below to replace it."""


@dataclass(frozen=True)
class Tuned:
    """What was found for one kernel and bucket."""

    kernel: str
    features: Mapping[str, int]
    before_us: float
    us: float
    before: Config
    config: Config
    tried: int

    def __str__(self) -> str:
        sizes = ", ".join(f"{n} {v}" for n, v in self.features.items())
        blocks = ", ".join(f"{n}={v}" for n, v in self.config.launch.items())
        return f"{self.kernel}, {sizes}: {self.before_us:.1f} -> {self.us:.1f} us ({blocks}; {self.tried} tried)"


def tune(
    model: nn.Module,
    shapes: Sequence[tuple[int, int]],
    *,
    limit_s: float = 60.0,
    say: Callable[[str], None] = lambda line: None,
) -> list[Tuned | Fastest]:
    """Optimize the model, run it at each (batch, length), and tune what its kernels asked for there."""
    device = next(model.parameters()).device
    optimize(model, verbose=False, on_error="raise")
    file = tuning.device_limits(device)[0]
    asked, calls = Questions(tuning_cache.entries(file)), Calls(tuning_cache.providers(file))
    for shape in shapes:
        with tuning.recorded(asked), choices.recorded(calls):
            bound_call(model, inputs_for(model, *shape))()
    return [*tune_asked(asked, device, say=say, limit_s=limit_s), *tune_calls(calls, device, say=say)]


class Questions(list[Asked]):
    """The first question for each kernel and bucket without an entry, with no tensor of the model's alive."""

    def __init__(self, known: Mapping[str, Mapping[tuning_cache.Bucket, Config]]) -> None:
        super().__init__()
        self._seen = {(kernel, bucket) for kernel, entries in known.items() for bucket in entries}

    def append(self, question: Asked) -> None:
        """Keep it, if it is a new one."""
        place = (question.kernel, tuning_cache.bucket(dict(question.features)))
        if question.call is None or place in self._seen:
            return
        self._seen.add(place)
        run, args = question.call
        super().append(replace(question, call=(run, tuple(Likeness.of(a) for a in args))))


def tune_asked(
    asked: Iterable[Asked],
    device: torch.device,
    *,
    say: Callable[[str], None] = lambda line: None,
    measure: Measure | None = None,
    limit_s: float = 60.0,
) -> list[Tuned]:
    """Tune each kernel and bucket once, for about `limit_s` seconds each; entries that are on disk already are left."""
    file, limit = tuning.device_limits(device)
    known = tuning_cache.entries(file)
    new: dict[tuple[str, tuning_cache.Bucket], Asked] = {}
    for question in asked:
        place = (question.kernel, tuning_cache.bucket(dict(question.features)))
        if question.call is not None and place[1] not in known.get(question.kernel, {}):
            new.setdefault(place, question)
    found = []
    for number, question in enumerate(new.values()):
        say(f"{bar(number, len(new))} {question.kernel} {dict(question.features)}")
        tuned = _tune(question, device, limit, measure or measure_on(device), limit_s)
        if tuned is None:
            say(f"{question.kernel}: the present configuration does not run; left as it is")
            continue
        tuning_cache.store(file, tuned.kernel, tuned.features, tuned.config, tuned.us)
        say(f"  {tuned}")
        found.append(tuned)
    say(f"{bar(len(new), len(new))} {len(found)} kept in {tuning_cache.path(file)}")
    tuning.forget()
    return found


# -- one kernel and bucket ---------------------------------------------------------------------------------------------


def _tune(question: Asked, device: torch.device, limit: int | None, measure: Measure, limit_s: float) -> Tuned | None:
    assert question.call is not None
    trial = _Trial(question, device, limit_s)
    if not trial.add(question.config):
        return None
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8
    fits = _Fits(question, limit, multiprocessors)
    first = [*tuning.known_configs(question.kernel), *neighbours(question.config)]
    trial.try_all(fits.best(c for c in first if c not in trial.calls))
    times = dict(trial.time(list(trial.calls), measure))
    for _ in range(STEPS):
        best = min(times, key=times.__getitem__)
        fresh = trial.try_all(fits.best(c for c in neighbours(best) if c not in trial.calls and c not in trial.failed))
        if not fresh or trial.late:
            break
        times |= trial.time([best, *fresh], measure)
        if min(times, key=times.__getitem__) == best:
            break
    before = times[question.config]
    best = min(times, key=times.__getitem__)
    if times[best] > WORTH * before:
        best = question.config
    return Tuned(
        question.kernel,
        dict(question.features),
        1e3 * before,
        1e3 * times[best],
        question.config,
        best,
        len(trial.calls) + len(trial.failed),
    )


class _Trial:
    """A launcher on copies of the arguments it was called with, under one configuration after the other."""

    def __init__(self, question: Asked, device: torch.device, limit_s: float) -> None:
        self._until = time.monotonic() + limit_s
        assert question.call is not None
        self._question = question
        self._run, args = question.call
        self._copies, self.small = copies(args, device)
        self._expected: list[torch.Tensor] = []
        self.calls: dict[Config, list[Callable[[], Any]]] = {}
        self.failed: set[Config] = set()

    def add(self, config: Config) -> bool:
        """Compile and run it once, and compare; False where it does not run or computes something else."""
        try:
            found = tensors(self._call(config, self._copies[0]))
        except Exception:  # noqa: BLE001 - a configuration may not compile or not fit; the others are tried
            self.failed.add(config)
            return False
        if not self._expected:
            self._expected = [t.clone() for t in found]
        elif not all(same(a, b) for a, b in zip(found, self._expected, strict=True)):
            self.failed.add(config)
            return False
        self.calls[config] = [lambda args=args: self._call(config, args) for args in self._copies]  # type: ignore[misc]
        return True

    def try_all(self, configs: Sequence[Config]) -> list[Config]:
        """Those that run; compiled in parallel. None is begun when no time is left, and all have ended on return."""
        with quiet():
            return self._try_all(configs)

    def _try_all(self, configs: Sequence[Config]) -> list[Config]:
        pool = ThreadPoolExecutor(max(1, (os.cpu_count() or 2) - 1))
        started = {pool.submit(self.add, c): c for c in configs}
        wait(started, timeout=max(0.0, self._until - time.monotonic()))
        pool.shutdown(wait=True, cancel_futures=True)  # what is being compiled would disturb what is timed next
        return [c for f, c in started.items() if not f.cancelled() and f.result()]

    @property
    def late(self) -> bool:
        """Whether the time is over."""
        return time.monotonic() > self._until

    def time(self, configs: Iterable[Config], measure: Measure) -> dict[Config, float]:
        """Milliseconds of each."""
        by_name = {str(i): c for i, c in enumerate(configs)}
        with torch.no_grad():
            found = measure({name: self.calls[c] for name, c in by_name.items()}, self.small)
        return {c: found[name] for name, c in by_name.items()}

    def _call(self, config: Config, args: tuple[Any, ...]) -> Any:
        with torch.no_grad(), tuning.forced(self._question.kernel, config):
            return self._run(*args)


@dataclass(frozen=True)
class _Fits:
    """Rules out candidates before they are compiled."""

    question: Asked
    limit: int | None
    multiprocessors: int

    def best(self, configs: Iterable[Config]) -> list[Config]:
        """At most `MOST`, those with the least work first: shared memory that is there, few tiles, full waves."""
        sizes = dict(self.question.features)
        names = {n for n, _ in self.question.config.blocks}
        fitting = [
            c
            for c in dict.fromkeys(configs)
            if {n for n, _ in c.blocks} == names
            and (self.limit is None or self.question.shared_memory(c) <= self.limit)
        ]
        return sorted(fitting, key=lambda c: work(sizes, c, self.multiprocessors))[:MOST]


def work(sizes: Mapping[str, int], config: Config, multiprocessors: int) -> float:
    """An estimate to rank tiles by: the tiles that one multiprocessor computes, padding counted, and what each reads.

    For kernels whose sizes and blocks do not name tiles it is 0 for all.
    """
    blocks = dict(config.blocks)
    pairs = [(sizes[n], blocks[f"BLOCK_{n}"]) for n in ("M", "N", "Q", "T") if n in sizes and f"BLOCK_{n}" in blocks]
    if len(pairs) < 2:
        return 0.0
    tiles = math.prod(-(-size // block) for size, block in pairs)
    area, edge = math.prod(block for _, block in pairs), sum(block for _, block in pairs)
    return -(-tiles // multiprocessors) * (area + 64.0 * edge)


def neighbours(config: Config) -> list[Config]:
    """Each block halved and doubled, other numbers of warps and stages, and one block doubled with another halved."""
    found = []
    blocks = dict(config.blocks)
    for name, value in blocks.items():
        for other in (value // 2, value * 2):
            if other >= 1:
                found.append(Config(tuple({**blocks, name: other}.items()), config.num_warps, config.num_stages))
                for warps in (config.num_warps // 2, config.num_warps * 2):
                    if 1 <= warps <= 16:
                        found.append(Config(tuple({**blocks, name: other}.items()), warps, config.num_stages))
    for warps in (config.num_warps // 2, config.num_warps * 2):
        if 1 <= warps <= 16:
            found.append(Config(config.blocks, warps, config.num_stages))
    for stages in (config.num_stages - 1, config.num_stages + 1):
        if 1 <= stages <= 6:
            found.append(Config(config.blocks, config.num_warps, stages))
    return list(dict.fromkeys(found))


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps what compilers write to standard error, pages for each candidate that does not compile, off the screen."""
    sys.stderr.flush()
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
