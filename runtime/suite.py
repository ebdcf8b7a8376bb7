"""Rows of models, batch sizes and lengths, measured one after the other, each in a process of its own.

    {"rows": [{"model": "llama_8b", "batch": 1, "length": 512, "peers": ["compile-graphs", "compile-max"]}, ...]}

`model` names a config beside the file, or is a path; `arguments` of a row go to the forward as they are. A row that
crashes, or hangs, costs its own results only.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final

import torch

from .bench import REGRAFT, Bench, Result, summary_table
from .bench_forward import CANDIDATES, bench_forward, row_name
from .loading import ArgumentError, load_model
from .reuse import Earlier

SLACK_S: Final = 120.0
"""For a row beyond the limits of its candidates: the model, the oracle, the measurements."""


@dataclass(frozen=True)
class Row:
    """One line of a suite."""

    model: str
    batch: int
    length: int
    peers: tuple[str, ...] = ("compile-graphs",)
    name: str = ""
    """How results call the model; the config's file name by default."""
    mask: bool = False
    layers: int | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """As in the results."""
        return row_name(self.name, self.batch, self.length, self.arguments)


@dataclass(frozen=True)
class Settings:
    """How rows are measured."""

    device: torch.device
    dtype: torch.dtype
    rounds: int = 5
    calls: int = 10
    limit_s: float = 300.0
    reuse: str | None = None
    candidates: tuple[str, ...] | None = None
    """Instead of eager, regraft and each row's own peers."""


def read_suite(file: str) -> list[Row]:
    """The rows of a file. Raises ArgumentError that says what is wrong with it."""
    path = Path(file)
    try:
        plain = json.loads(path.read_text())
        if not isinstance(plain, dict) or not isinstance(plain.get("rows"), list):
            raise ValueError("expected an object with a list of rows")
        rows = [_row(line, path.parent) for line in plain["rows"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArgumentError(f"suite {file!r}: {type(error).__name__}: {error}") from error
    return rows


def _row(line: dict[str, Any], folder: Path) -> Row:
    known = dict(line)
    model = str(known.pop("model"))
    beside = folder / f"{model}.json"
    name = str(known.pop("name", Path(model).name.removesuffix(".json")))
    peers = tuple(known.pop("peers", Row.peers))
    for peer in peers:
        if peer not in CANDIDATES:
            raise ValueError(f"peer {peer!r} is not one of {', '.join(CANDIDATES)}")
    return Row(str(beside) if beside.is_file() else model, peers=peers, name=name, **known)


def run_row(row: Row, settings: Settings, say: Callable[[str], None]) -> Bench:
    """Load the model and measure."""
    start = time.perf_counter()
    model = load_model(row.model, dtype=settings.dtype, device=settings.device, layers=row.layers)
    say(f"{row.label}: loaded in {time.perf_counter() - start:.1f} s")
    return bench_forward(
        model,
        [(row.batch, row.length)],
        settings.candidates or ("eager", *row.peers, REGRAFT),
        name=row.name,
        rounds=settings.rounds,
        calls=settings.calls,
        limit_s=settings.limit_s,
        mask=row.mask,
        arguments=row.arguments,
        earlier=Earlier(settings.reuse) if settings.reuse else None,
        say=say,
    )


def run_suite(
    rows: Sequence[Row],
    settings: Settings,
    *,
    say: Callable[[str], None] = lambda line: None,
    done: Callable[[Bench], None] = lambda bench: None,
    run: Callable[[Row, Settings, Callable[[str], None]], Bench] = run_row,
) -> Bench:
    """Measure every row; `done` is called with all results so far after each."""
    bench = Bench("suite", str(settings.dtype).removeprefix("torch."), str(settings.device))
    for row in rows:
        count = len(settings.candidates or row.peers) + 2
        found = _apart(row, settings, say, run, settings.limit_s * count + SLACK_S)
        if isinstance(found, str):
            say(f"{row.label}: {found}")
            bench.results.append(Result(row.label, REGRAFT, row.batch, row.length, problem=found))
        else:
            bench.device, bench.rates = found.device, found.rates
            bench.results += found.results
        done(bench)
    for line in summary_table(bench.results):
        say(line)
    return bench


def _apart(
    row: Row,
    settings: Settings,
    say: Callable[[str], None],
    run: Callable[[Row, Settings, Callable[[str], None]], Bench],
    limit_s: float,
) -> Bench | str:
    """The row's results from a forked process, in which all is imported already, or what became of it."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(there, row, settings, say, run))
    process.start()
    there.close()
    answer: Bench | str = f"gave up after {limit_s:.0f} s"
    if here.poll(limit_s):
        try:
            answer = here.recv()
        except EOFError:
            process.join()
            answer = f"its process ended with {process.exitcode}"
    else:
        process.kill()
    process.join()
    here.close()
    return answer


def _child(
    there: Connection,
    row: Row,
    settings: Settings,
    say: Callable[[str], None],
    run: Callable[[Row, Settings, Callable[[str], None]], Bench],
) -> None:
    try:
        there.send(run(row, settings, say))
    except Exception as error:  # noqa: BLE001 - whatever it is, the other rows are still measured
        there.send(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
    there.close()
    os._exit(0)  # the parent's threads are not here, and what waits for them at exit would wait for ever
