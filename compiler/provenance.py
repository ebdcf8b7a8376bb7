"""Where a node comes from: the module of the user's model, the source line, and what a rule did to it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from functools import lru_cache

from torch import fx

_FRAME = re.compile(r'File "([^"]+)", line (\d+), in (\S+)\n\s*(.*)')


def module_of(node: fx.Node) -> str:
    """Qualified name of the innermost module that made the node; empty where it was made outside any."""
    stamped = node.meta.get("module")
    if stamped is not None:
        return str(stamped)
    stack = node.meta.get("nn_module_stack") or {}
    paths = [entry[0] if isinstance(entry, tuple) else str(entry) for entry in stack.values()]
    return clean_path(paths[-1]) if paths else ""


@lru_cache(maxsize=65536)
def clean_path(path: str) -> str:
    """`L['self'].model.layers.0` or `L__self__.model.layers.0` without what tracing put in front."""
    path = re.sub(r"^L\['self'\]\.?|^L__self__\.?|^L_self__?\.?", "", path)
    path = re.sub(r"\._modules\['([^']+)'\]|\['([^']+)'\]", lambda m: "." + (m[1] or m[2]), path)
    return re.sub(r"\.slice\([^)]*\)", "", path).strip(".")


def common_module(nodes: Iterable[fx.Node]) -> str:
    """The innermost module that contains every node."""
    paths = [module_of(n).split(".") for n in nodes if n.op == "call_function"]
    paths = [p for p in paths if p != [""]]
    if not paths:
        return ""
    shared = os.path.commonprefix([tuple(p) for p in paths])  # type: ignore[list-item]  # noqa: RUF071 - compares whole parts
    return ".".join(shared)


def source_of(node: fx.Node) -> str:
    """`modeling_llama.py:64 return self.weight * hidden_states`, or empty where nothing is known."""
    stamped = node.meta.get("source")
    if stamped is not None:
        return str(stamped)
    return _last_frame(node.meta.get("stack_trace") or "")


@lru_cache(maxsize=4096)
def _last_frame(trace: str) -> str:
    frames = _FRAME.findall(trace)
    if not frames:
        return ""
    file, line, _, code = frames[-1]
    return f"{file.rsplit('/', 1)[-1]}:{line} {code.strip()}".strip()


def stamp(new: Sequence[fx.Node], old: Sequence[fx.Node], rule: str, anchor: fx.Node) -> None:
    """Give new nodes the provenance of those they replace: module, source, stack, and the rules they went through."""
    module, source = common_module(old) or module_of(anchor), source_of(anchor)
    history = tuple(dict.fromkeys(entry for n in old for entry in n.meta.get("rewrites", ())))
    record = (rule, tuple(n.name for n in old))
    for node in new:
        for key in ("nn_module_stack", "stack_trace", "source_fn_stack"):
            if key in anchor.meta:
                node.meta[key] = anchor.meta[key]
        node.meta["module"], node.meta["source"] = module, source
        node.meta["rewrites"] = (*history, record)


def rewritten_by(node: fx.Node) -> tuple[str, ...]:
    """Names of the rules a node went through, oldest first."""
    return tuple(rule for rule, _ in node.meta.get("rewrites", ()))
