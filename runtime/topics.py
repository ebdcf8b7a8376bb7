"""What `REGRAFT_LOGS` lets speak, by the loggers of the standard library under `regraft`.

`regraft.fusions` (each rewrite), `regraft.misses` (what nearly was one), `regraft.recompiles` (captures after the
first), `regraft.certificate`, `regraft.autotune`, `regraft.pages` (the tables of the KV cache, which are checked at
every step while it speaks), `regraft.numerics` (the nodes that first make a NaN or an infinity; every node is looked at
while it speaks, of models optimized from then on). `REGRAFT_LOGS=fusions,misses` lets them speak to stderr,
`REGRAFT_LOGS=all` all of them.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path

from .errors import OptionError, closest

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
