"""Tuned configurations, which are data: one file per device in `tuning/`, and `default.json` for all others.

    {"kernels": {"attention": [{"where": {"D": [1, 64], "bytes": [2, 2]},
                                "config": {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 4, "num_stages": 3}}, ...]}}

A device's file may also say, in a section "providers", which provider of an op was measured to be the fastest where
(see `choice.py`). The default file names the `device` on which it was made. Entries are tried in order, the device's
own before the default ones. An entry fits when every feature in `where` lies in its inclusive range and when its need
of shared memory, which the kernel's module computes, is within the device's limit. Nothing is timed at run time:
`python -m regraft tune` does that, and what it finds comes before all tables (see `tuning_cache.py`).
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
import triton

from . import tuning_cache
from .config import Config

log = logging.getLogger("regraft")

DIRECTORY: Final = Path(__file__).parent / "tuning"
DEFAULT: Final = "default"
MANY: Final = 1 << 30
"""Stands for a size that is not known when a configuration is looked for."""


@dataclass(frozen=True)
class Entry:
    """A configuration and the range of each feature for which it was made."""

    where: tuple[tuple[str, int, int], ...]
    config: Config

    def matches(self, features: Mapping[str, int]) -> bool:
        """Whether every feature that `where` names is in its range; a name that is no feature is an error."""
        return all(low <= features[name] <= high for name, low, high in self.where)


def _where(data: Mapping[str, Any]) -> tuple[tuple[str, int, int], ...]:
    return tuple((name, int(low), int(high)) for name, (low, high) in data.get("where", {}).items())


@dataclass(frozen=True)
class Provided:
    """Where a provider was measured to be the fastest."""

    where: tuple[tuple[str, int, int], ...]
    provider: str

    def matches(self, features: Mapping[str, int]) -> bool:
        """Whether every feature that `where` names is in its range."""
        return all(low <= features[name] <= high for name, low, high in self.where)


SharedMemory = Callable[[Config], int]
"""An upper bound of the bytes of shared memory that one program needs."""


def parse(text: str) -> dict[str, tuple[Entry, ...]]:
    """The entries by kernel. Raises `ValueError`, `KeyError` or `TypeError` on a malformed file."""
    return {kernel: tuple(_entry(e) for e in entries) for kernel, entries in json.loads(text)["kernels"].items()}


def _entry(data: Mapping[str, Any]) -> Entry:
    return Entry(_where(data), Config.of(data["config"]))


@functools.cache
def providers(name: str) -> Mapping[str, tuple[Provided, ...]]:
    """The entries of the section "providers" of one file of `tuning/`, by op; empty where there is none."""
    path = DIRECTORY / f"{name}.json"
    section = json.loads(path.read_text()).get("providers", {}) if path.exists() else {}
    return {op: tuple(Provided(_where(e), str(e["provider"])) for e in entries) for op, entries in section.items()}


def device_file(name: str) -> str:
    """`NVIDIA H200` -> `nvidia_h200`."""
    return "_".join(name.lower().replace("-", " ").split())


@functools.cache
def load(name: str) -> Mapping[str, tuple[Entry, ...]]:
    """The entries of one file of `tuning/`; empty when there is none for that device."""
    path = DIRECTORY / f"{name}.json"
    return parse(path.read_text()) if path.exists() else {}


def known_configs(kernel: str) -> list[Config]:
    """Every configuration of the kernel in any file of `tuning/`."""
    found = [e.config for p in sorted(DIRECTORY.glob("*.json")) for e in load(p.stem).get(kernel, ())]
    return list(dict.fromkeys(found))


@functools.cache
def device_limits(device: torch.device) -> tuple[str, int | None]:
    """Name of the tuning file and bytes of shared memory a program may have; `None` = no limit (interpreter)."""
    if device.type != "cuda":
        return DEFAULT, None
    index = torch.cuda.current_device() if device.index is None else device.index
    limit: int = triton.runtime.driver.active.utils.get_device_properties(index)["max_shared_mem"]
    return device_file(torch.cuda.get_device_name(index)), limit


def select_config(
    kernel: str, features: Mapping[str, int], shared_memory: SharedMemory, *, file: str, limit: int | None
) -> Config | None:
    """The first entry that matches the features and fits in `limit` bytes, or `None`."""
    for entry in (*load(file).get(kernel, ()), *load(DEFAULT)[kernel]):
        if entry.matches(features) and (limit is None or shared_memory(entry.config) <= limit):
            return entry.config
    return None


@functools.lru_cache(maxsize=4096)
def _choose(
    kernel: str, features: tuple[tuple[str, int], ...], shared_memory: SharedMemory, device: torch.device
) -> Config | None:
    """What was measured here for these sizes, the device's own table, what was measured here nearby, the default."""
    file, limit = device_limits(device)
    known = dict(features)
    if file != DEFAULT:
        mine = tuning_cache.entries(file).get(kernel, {})
        shipped = select_config(kernel, known, shared_memory, file=file, limit=limit)

        def fits(config: Config | None) -> bool:
            """Not from a file of another version of the kernel, and not too large."""
            same = config is not None and shipped is not None and config.launch.keys() == shipped.launch.keys()
            return same and config is not None and (limit is None or shared_memory(config) <= limit)

        exact = mine.get(tuning_cache.bucket(known))
        if fits(exact):
            return exact
        if not _measured(kernel, known, file):
            _say_untuned(kernel, known, file)
            near = tuning_cache.nearest(mine, known)
            if fits(near):
                return near
    return select_config(kernel, known, shared_memory, file=file, limit=limit)


def use_cache(folder: Path | None) -> None:
    """Look for what was measured on this machine in this folder from now on; None for the default one."""
    tuning_cache.use(folder)
    _choose.cache_clear()


def _measured(kernel: str, features: Mapping[str, int], file: str) -> bool:
    """Whether an entry made on this device covers the sizes; the default file names the device it was made on."""
    if any(e.matches(features) for e in load(file).get(kernel, ())):
        return True
    return file == _made_on() and any(e.where and e.matches(features) for e in load(DEFAULT).get(kernel, ()))


@functools.cache
def _made_on() -> str:
    return str(json.loads((DIRECTORY / f"{DEFAULT}.json").read_text()).get("device", ""))


untuned: dict[str, str] = {}
"""By kernel, sizes for which nothing was measured on this device, said once each."""


def _say_untuned(kernel: str, features: Mapping[str, int], file: str) -> None:
    if kernel in untuned:
        return
    sizes = ", ".join(f"{name} {value}" for name, value in features.items())
    untuned[kernel] = f"{kernel} was not measured on {file} for {sizes}; the nearest known configuration runs"
    log.info("%s; `python -m regraft tune MODEL` measures", untuned[kernel])


def forget() -> None:
    """Look up everything anew: what was measured here has changed."""
    tuning_cache.forget()
    _choose.cache_clear()
    untuned.clear()


Call = tuple[Callable[..., Any], tuple[Any, ...]]


@dataclass(frozen=True)
class Asked:
    """One question for a configuration, its answer, and the launcher that asked with its arguments."""

    kernel: str
    features: tuple[tuple[str, int], ...]
    shared_memory: SharedMemory
    config: Config
    call: Call | None = None

    def __str__(self) -> str:
        return f"{self.kernel} " + ", ".join(f"{name}={value}" for name, value in self.config.launch.items())


_observers: list[list[Asked]] = []
_forced: contextvars.ContextVar[Mapping[str, Config]] = contextvars.ContextVar("forced", default={})  # noqa: B039
_call: contextvars.ContextVar[Call | None] = contextvars.ContextVar("call", default=None)


@contextlib.contextmanager
def recorded(into: list[Asked] | None = None) -> Iterator[list[Asked]]:
    """The configurations that launches in the block ask for, appended to `into` or to a new list."""
    seen = [] if into is None else into
    _observers.append(seen)
    try:
        yield seen
    finally:
        _observers[:] = [o for o in _observers if o is not seen]  # by identity: empty lists are equal


@contextlib.contextmanager
def calling(run: Callable[..., Any], args: tuple[Any, ...]) -> Iterator[None]:
    """Says which launcher asks in the block, while somebody records."""
    if not _observers:
        yield
        return
    token = _call.set((run, args))
    try:
        yield
    finally:
        _call.reset(token)


@contextlib.contextmanager
def forced(kernel: str, config: Config) -> Iterator[None]:
    """Every launch of the kernel in the block, on this thread, takes this configuration."""
    token = _forced.set({**_forced.get(), kernel: config})
    try:
        yield
    finally:
        _forced.reset(token)


def choose(kernel: str, features: Mapping[str, int], shared_memory: SharedMemory, device: torch.device) -> Config:
    """The configuration for one launch, remembered. Raises `LookupError` where none fits the device.

    `shared_memory` must be hashable and equal for equal features: a function, or a frozen dataclass.
    """
    asked = tuple(sorted(features.items()))
    config = _forced.get().get(kernel) or _choose(kernel, asked, shared_memory, device)
    if config is None:
        raise LookupError(f"no configuration of {kernel} for {dict(features)} fits the shared memory of {device}")
    for seen in _observers:
        seen.append(Asked(kernel, asked, shared_memory, config, _call.get()))
    return config


def refuse_memory(
    kernel: str, features: Mapping[str, int], shared_memory: SharedMemory, device: torch.device
) -> str | None:
    """Why no configuration fits the device, or `None`; a size that is not known is given as `MANY`."""
    if _choose(kernel, tuple(sorted(features.items())), shared_memory, device) is not None:
        return None
    return f"every configuration needs more than the {device_limits(device)[1]} bytes of shared memory of the device"


@dataclass(frozen=True)
class RowMemory:
    """For kernels that keep rows of `width` in registers: what reductions and layout conversions take at most."""

    width: int

    def __call__(self, config: Config) -> int:
        return self.width + 1024
