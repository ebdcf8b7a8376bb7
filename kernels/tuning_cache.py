"""Configurations measured on this machine, kept on disk.

One file for each device and version of Triton, in `REGRAFT_CACHE_DIR` or `~/.cache/regraft`:

    {"kernels": {"linear": [{"features": {"M": 2048, "N": 4096, ...}, "config": {...}, "us": 97.1}]},
     "providers": {"linear_act": [{"features": {"M": 2048, "N": 4096, ...}, "provider": "wgmma", "instead": "cublas",
                                   "torch": "2.11.0", "us": 97.1}]}}

An entry stands for all calls in its bucket of sizes, one of a provider for those of them for which the table says what
it was found faster than, and for the version of torch that brought the libraries. A file that cannot be read is left
alone, with a warning.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
import logging
import math
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import filelock
import torch

from .config import Config

log = logging.getLogger("regraft")

Features = Mapping[str, int]
Bucket = tuple[tuple[str, int], ...]

EXACT: Final = 16
"""Sizes up to here have buckets of their own."""

_chosen: list[Path] = []


def use(folder: Path | None) -> None:
    """Keep and look for configurations in this folder; None for the default one."""
    _chosen[:] = [folder] if folder is not None else []
    forget()


def forget() -> None:
    """Read the file anew."""
    _measured.cache_clear()


def directory() -> Path:
    """The folder in use, else `REGRAFT_CACHE_DIR`, else `~/.cache/regraft`."""
    if _chosen:
        return _chosen[-1]
    return Path(os.environ.get("REGRAFT_CACHE_DIR") or Path.home() / ".cache" / "regraft").expanduser()


def path(device: str) -> Path:
    """The file of a device."""
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        version = "none"
    return directory() / f"{device}-triton{version}.json"


def bucket(features: Features) -> Bucket:
    """Sizes rounded up to a power of two or one and a half times one; small ones as they are."""
    return tuple(sorted((name, _round(value)) for name, value in features.items()))


def call_bucket(features: Features) -> Bucket:
    """As `bucket`, but with the sizes of a weight as they are: whether its tiles fill the multiprocessors decides."""
    exact = ("N", "K") if "M" in features else ()
    return tuple(sorted((name, value if name in exact else _round(value)) for name, value in features.items()))


def _round(value: int) -> int:
    if value <= EXACT:
        return value
    power = 1 << (value - 1).bit_length()
    return power * 3 // 4 if value <= power * 3 // 4 else power


def span(rounded: int) -> tuple[int, int]:
    """The smallest and the largest size that `bucket` rounds so."""
    if rounded <= EXACT:
        return rounded, rounded
    power = 1 << (rounded - 1).bit_length()
    return (power * 3 // 4 if rounded == power else power // 2) + 1, rounded


def entries(device: str) -> Mapping[str, Mapping[Bucket, Config]]:
    """What was measured, by kernel and bucket; empty, with a warning, where the file is not one of ours."""
    return _measured(device)[0]


@dataclass(frozen=True)
class Faster:
    """A provider, and the table's for the call with which it was compared: the same where nothing was faster."""

    provider: str
    instead: str


def providers(device: str) -> Mapping[str, Mapping[Bucket, Faster]]:
    """Which provider was measured to be the fastest, by op and `call_bucket`; empty where `entries` is."""
    return _measured(device)[1]


Sections = dict[str, dict[str, list[dict[str, Any]]]]
Measured = tuple[Mapping[str, Mapping[Bucket, Config]], Mapping[str, Mapping[Bucket, Faster]]]


@functools.cache
def _measured(device: str) -> Measured:
    file = path(device)
    try:
        sections = _read(file)
        return _configs(sections), _providers(sections)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        log.warning("%s is not a file of tuned configurations and is ignored (%s)", file, type(error).__name__)
        return {}, {}


def _read(file: Path) -> Sections:
    if not file.exists():
        return {}
    read = json.loads(file.read_text())
    return {"kernels": read["kernels"], "providers": read.get("providers", {})}


def _configs(sections: Sections) -> dict[str, dict[Bucket, Config]]:
    found: dict[str, dict[Bucket, Config]] = {}
    for kernel, measured in sections.get("kernels", {}).items():
        for entry in measured:
            found.setdefault(kernel, {})[bucket(entry["features"])] = Config.of(entry["config"])
    return found


def _providers(sections: Sections) -> dict[str, dict[Bucket, Faster]]:
    found: dict[str, dict[Bucket, Faster]] = {}
    for op, measured in sections.get("providers", {}).items():
        for entry in measured:
            if entry["torch"] == torch.__version__:
                place = call_bucket(entry["features"])
                found.setdefault(op, {})[place] = Faster(str(entry["provider"]), str(entry["instead"]))
    return found


def nearest(mine: Mapping[Bucket, Config], features: Features) -> Config | None:
    """The configuration of the nearest bucket, by the logarithms of sizes; small numbers, which may be kinds, agree."""
    wanted = dict(bucket(features))
    best: tuple[float, Config] | None = None
    for other, config in mine.items():
        sizes = dict(other)
        if sizes.keys() != wanted.keys() or any(_kind(n, v, sizes[n]) and v != sizes[n] for n, v in wanted.items()):
            continue
        away = sum(abs(math.log2(v / sizes[n])) for n, v in wanted.items() if v > EXACT)
        if best is None or away < best[0]:
            best = (away, config)
    return best[1] if best is not None else None


def _kind(name: str, one: int, other: int) -> bool:
    """Whether a feature says what a call is rather than how large: these agree or the entry does not fit."""
    return min(one, other) <= EXACT or name.startswith("BLOCK_") or name == "rope"


def store(device: str, kernel: str, features: Features, config: Config, us: float) -> None:
    """Add or replace one entry; the file is replaced as a whole, so that a reader never sees half of it.

    Processes that tune at the same time take turns, and each adds to what the others have stored.
    """
    entry = {"features": dict(features), "config": config.launch, "us": round(us, 3)}
    _add(device, "kernels", kernel, entry, bucket)


def store_provider(device: str, op: str, features: Features, faster: Faster, us: float) -> None:
    """As `store`, of the fastest provider of a call."""
    named = {"provider": faster.provider, "instead": faster.instead, "torch": torch.__version__}
    entry = {"features": dict(features), **named, "us": round(us, 3)}
    _add(device, "providers", op, entry, call_bucket)


def _add(device: str, section: str, name: str, entry: dict[str, Any], place: Callable[[Features], Bucket]) -> None:
    file = path(device)
    file.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(file.with_suffix(".lock")):
        _store(file, device, section, name, entry, place)
    forget()


def _store(
    file: Path, device: str, section: str, name: str, entry: dict[str, Any], place: Callable[[Features], Bucket]
) -> None:
    try:
        sections = _read(file)
        _configs(sections), _providers(sections)
    except (ValueError, KeyError, TypeError, AttributeError):
        sections = {}
        os.replace(file, file.with_suffix(".unreadable"))
    mine = sections.setdefault(section, {})
    mine[name] = [*(e for e in mine.get(name, []) if place(e["features"]) != place(entry["features"])), entry]
    with tempfile.NamedTemporaryFile("w", dir=file.parent, suffix=".tmp", delete=False) as out:
        json.dump({"device": device, "kernels": {}, **sections}, out, indent=1)
    os.chmod(out.name, 0o644)
    os.replace(out.name, file)
