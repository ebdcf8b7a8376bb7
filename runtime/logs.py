"""What is told of a model while it is optimized: log lines by topic, and a readable file for each pass.

`REGRAFT_DUMP_DIR` gets the files, each with the diff to the one before.
"""

from __future__ import annotations

import difflib
import logging
import os
import re
from collections.abc import Iterable
from pathlib import Path

from ..compiler.records import PassResult
from .record import SignatureRecord


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
