"""What is logged and dumped while a model is optimized.

Loggers are those of the standard library, under `regraft`: `regraft.fusions` (each rewrite), `regraft.misses` (what
nearly was one), `regraft.recompiles` (captures after the first), `regraft.certificate`, `regraft.autotune`,
`regraft.pages` (the tables of the KV cache, which are checked at every step while it speaks), `regraft.numerics` (the
nodes that first make a NaN or an infinity; every node is looked at while it speaks, of models optimized from then on).
`REGRAFT_LOGS=fusions,misses` lets them speak to stderr, `REGRAFT_LOGS=all` all of them. `REGRAFT_DUMP_DIR` gets one
readable file a pass, with the diff to the one before.
"""

from __future__ import annotations

import difflib
import logging
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from ..compiler.records import PassResult
from .errors import OptionError, closest
from .record import SignatureRecord

TOPICS = ("fusions", "misses", "recompiles", "certificate", "autotune", "pages", "numerics")


def listen(environ: Mapping[str, str] | None = None) -> None:
    """Let the topics of `REGRAFT_LOGS` speak, and make the folder of `REGRAFT_DUMP_DIR`.

    Raises:
        OptionError: a topic that does not exist, or a folder that cannot be made.
    """
    environ = os.environ if environ is None else environ
    directory = environ.get("REGRAFT_DUMP_DIR")
    if directory:
        try:
            Path(directory).expanduser().mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OptionError(
                f"REGRAFT_DUMP_DIR={directory!r} is no folder that can be made: {error.strerror}"
            ) from error
    wanted = environ.get("REGRAFT_LOGS", "").replace(",", " ").split()
    if not wanted:
        return
    for topic in wanted:
        if topic not in (*TOPICS, "all"):
            raise OptionError(
                f"REGRAFT_LOGS: unknown topic {topic!r}{closest(topic, TOPICS)} Known: {', '.join(TOPICS)}"
            )
        names = ("regraft", *(f"regraft.{t}" for t in TOPICS)) if topic == "all" else (f"regraft.{topic}",)
        for name in names:
            logging.getLogger(name).setLevel(logging.INFO)
    root = logging.getLogger("regraft")
    if not root.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("[%(name)s] %(message)s"))
        root.addHandler(handler)


def asked_for(topic: str) -> bool:
    """Whether this very topic was told to speak: what slows a model down is not for every program that logs at INFO."""
    return logging.NOTSET < logging.getLogger(f"regraft.{topic}").level <= logging.INFO


def tell(model: str, entry: SignatureRecord) -> None:
    """Log what happened to a signature, and write the dump where one is wanted."""
    fusions, misses = logging.getLogger("regraft.fusions"), logging.getLogger("regraft.misses")
    for result in entry.passes:
        for rewrite in result.rewrites:
            fusions.info("%s: %s at %s (%s)", result.name, rewrite.label, rewrite.module, rewrite.source)
        for miss in result.misses:
            misses.info(
                "%s: %s (x%d) wanted %s, found %s (%s)",
                miss.rule,
                miss.module,
                miss.count,
                miss.wanted,
                miss.found,
                miss.source,
            )
        for reverted in result.reverted:
            fusions.warning("%s reverted at %s: %s", reverted.rule, reverted.module, reverted.reason)
    directory = os.environ.get("REGRAFT_DUMP_DIR")
    if directory:
        dump(Path(directory).expanduser(), model, entry.arguments, entry.passes)


def dump(directory: Path, model: str, arguments: str, passes: Iterable[PassResult]) -> Path:
    """Write `model/arguments/NNN_STAGE_pass.py`: what the pass did, its diff, and the graph after it."""
    place = directory / model / (re.sub(r"[^\w=]+", "_", arguments)[:100].strip("_") or "call")
    place.mkdir(parents=True, exist_ok=True)
    for index, result in enumerate(passes):
        lines = [f"# {result.stage} {result.name}: {result.nodes_before} -> {result.nodes_after} nodes"]
        lines += [f"# {r.label} at {r.module}   {r.source}" for r in result.rewrites]
        lines += [f"# reverted {r.rule} at {r.module}: {r.reason}" for r in result.reverted]
        lines += [f"# near miss {m.rule} at {m.module} (x{m.count}): {m.found}" for m in result.misses]
        before, after = result.before.splitlines(), result.after.splitlines()
        lines += [f"# {line}" for line in difflib.unified_diff(before, after, "before", "after", lineterm="", n=1)]
        name = f"{index:03d}_{result.stage}_{result.name}.py"
        (place / name).write_text("\n".join([*lines, "", *after, ""]), encoding="utf-8")
    return place
