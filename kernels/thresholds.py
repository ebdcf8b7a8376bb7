"""Numbers of rows at which the tables of a device go over to another kernel, or to another configuration of one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import torch

from . import tuning, tuning_cache

COUNTS: Final = frozenset({"M", "T", "Q", "R", "rows"})
"""Features that count tokens, rows of a matrix, or queries: they grow with what is computed, not with the model."""


def thresholds(device: torch.device) -> list[int]:
    """Where ranges of such features begin, or have just ended, in any table for the device; smallest first.

    Tables are the shipped ones and the providers that were measured on this machine.
    """
    file, _ = tuning.device_limits(device)
    tables: list[Iterable[tuple[tuple[str, int, int], ...]]] = [
        *((entry.where for entry in entries) for entries in tuning.providers(file).values()),
        *((entry.where for entry in e) for name in (file, tuning.DEFAULT) for e in tuning.load(name).values()),
    ]
    ranges = [(low, high) for table in tables for where in table for name, low, high in where if name in COUNTS]
    mine = tuning_cache.providers(file).values() if file != tuning.DEFAULT else ()
    faster = (place for entries in mine for place, found in entries.items() if found.provider != found.instead)
    ranges += [tuning_cache.span(value) for place in faster for name, value in place if name in COUNTS]
    return sorted({bound for low, high in ranges for bound in (low, high + 1) if 1 < bound <= tuning.MANY})
