"""Tuned configurations, which are data: one file per device in `tuning/`, and `default.json` for all others.

    {"kernels": {"attention": [{"where": {"D": [1, 64], "bytes": [2, 2]},
                                "config": {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 4, "num_stages": 3}}, ...]}}

A device's file may also say, in a section "providers", which provider of an op was measured to be the fastest where
(see `choice.py`). Entries are tried in order, the device's own before the default ones. An entry fits when every
feature in `where` lies in its inclusive range and when its need of shared memory, which the kernel's module computes,
is within the device's limit. Nothing is timed at run time.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
import triton

DIRECTORY: Final = Path(__file__).parent / "tuning"
DEFAULT: Final = "default"
MANY: Final = 1 << 30
"""Stands for a size that is not known when a configuration is looked for."""


@dataclass(frozen=True)
class Config:
    """Block sizes by name, warps per program and pipeline stages."""

    blocks: tuple[tuple[str, int], ...]
    num_warps: int
    num_stages: int

    def __post_init__(self) -> None:
        sizes = (*self.blocks, ("num_warps", self.num_warps))
        for name, value in sizes:
            if value < 1 or value & (value - 1):
                raise ValueError(f"{name} must be a power of two, got {value}")
        if self.num_stages < 1:
            raise ValueError(f"num_stages must be at least 1, got {self.num_stages}")

    def __getitem__(self, block: str) -> int:
        return dict(self.blocks)[block]

    @property
    def launch(self) -> dict[str, int]:
        """The keyword arguments of the launch."""
        return {**dict(self.blocks), "num_warps": self.num_warps, "num_stages": self.num_stages}


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
    blocks = dict(data["config"])
    warps, stages = blocks.pop("num_warps"), blocks.pop("num_stages")
    return Entry(_where(data), Config(tuple(blocks.items()), warps, stages))


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
    file, limit = device_limits(device)
    return select_config(kernel, dict(features), shared_memory, file=file, limit=limit)


@dataclass(frozen=True)
class Asked:
    """One question for a configuration, and its answer."""

    kernel: str
    features: tuple[tuple[str, int], ...]
    shared_memory: SharedMemory
    config: Config

    def __str__(self) -> str:
        return f"{self.kernel} " + ", ".join(f"{name}={value}" for name, value in self.config.launch.items())


_observers: list[list[Asked]] = []
_forced: dict[str, Config] = {}


@contextlib.contextmanager
def recorded() -> Iterator[list[Asked]]:
    """The configurations that launches in the block ask for."""
    seen: list[Asked] = []
    _observers.append(seen)
    try:
        yield seen
    finally:
        _observers.remove(seen)


@contextlib.contextmanager
def forced(kernel: str, config: Config) -> Iterator[None]:
    """Every launch of the kernel in the block takes this configuration."""
    _forced[kernel] = config
    try:
        yield
    finally:
        del _forced[kernel]


def choose(kernel: str, features: Mapping[str, int], shared_memory: SharedMemory, device: torch.device) -> Config:
    """The configuration for one launch, remembered. Raises `LookupError` where none fits the device.

    `shared_memory` must be hashable and equal for equal features: a function, or a frozen dataclass.
    """
    asked = tuple(sorted(features.items()))
    config = _forced.get(kernel) or _choose(kernel, asked, shared_memory, device)
    if config is None:
        raise LookupError(f"no configuration of {kernel} for {dict(features)} fits the shared memory of {device}")
    for seen in _observers:
        seen.append(Asked(kernel, asked, shared_memory, config))
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
