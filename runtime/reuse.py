"""Peers measured in an earlier run, taken over where what was measured again agrees with it.

Compiling a peer for its best takes minutes; measuring eager, a copy and a matrix product takes a second.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from .bench import REGRAFT, Bench, Result
from .errors import InputError
from .timing import Timing

AGREE: Final = 0.05
"""How far an anchor may be from what it was."""

ALIKE: Final = 0.5
"""How far eager, which the host may slow down, may be from what it was where the device's rates agree."""
REPLAYED: Final = ("compile-graphs", "compile-max")
"""Peers whose time hardly depends on the host: the device's rates are an anchor for them.

What the host does for them must be little, though: on one where eager took twice as long, BERT-base 1 x 128 by CUDA
graphs took 1.24 ms instead of 0.91, of which 0.18 had been the host's."""


class Earlier:
    """The results of a JSON file of `bench forward`."""

    def __init__(self, file: str) -> None:
        """Raises InputError for a file that is not one."""
        try:
            self._plain: dict[str, Any] = json.loads(Path(file).read_text())
            self._results = {(r["row"], r["candidate"]): r for r in self._plain["results"]}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"--reuse {file}: not the JSON of `bench forward` ({type(error).__name__})") from error

    def result(self, candidate: str, now: Bench, blank: Result, eager: Result) -> Result | str | None:
        """The earlier result, or why it cannot be taken over, or None where there is none."""
        old = self._results.get((blank.row, candidate))
        if candidate in (REGRAFT, "eager") or old is None or not old["timing"]:
            return None
        for name in ("device", "dtype"):
            if self._plain[name] != getattr(now, name):
                return f"the earlier run had another {name}, {self._plain[name]}"
        for package in ("torch", "triton", "transformers"):
            if self._plain["versions"].get(package) != now.versions.get(package):
                return f"the earlier run had {package} {self._plain['versions'].get(package)}"
        if not self._agrees(old, now, blank, eager):
            return f"neither eager nor device and host are within {AGREE:.0%} of the earlier run's"
        timing = Timing(**old["timing"])
        kept = {k: old[k] for k in ("host_ms", "first_s", "peak_gb", "error", "error_eager", "bound", "problem")}
        return replace(blank, candidate=candidate, timing=timing, reused=self._plain["date"], **kept)

    def _agrees(self, peer: dict[str, Any], now: Bench, blank: Result, eager: Result) -> bool:
        old = self._results.get((blank.row, "eager"))
        before = old["timing"]["median_ms"] if old is not None and old["timing"] else None
        slower = 1.0  # the host
        if old is not None and before is not None and eager.timing is not None:
            if _near(eager.timing.median_ms, before):
                return True
            if not _near(eager.timing.median_ms, before, ALIKE):
                return False  # another model, whatever its name
            slower = eager.host_ms / old["host_ms"] if old["host_ms"] else slower
        rates: Mapping[str, float] = self._plain.get("rates", {})
        same = [_near(now.rates[k], v) for k, v in rates.items() if k in now.rates]
        little = peer["host_ms"] * (slower - 1) <= AGREE * peer["timing"]["median_ms"]
        return peer["candidate"] in REPLAYED and bool(same) and all(same) and little


def _near(now: float, before: float, within: float = AGREE) -> bool:
    return abs(now / before - 1) <= within
