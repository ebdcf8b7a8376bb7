"""The phases of a model, profiled: its forward, and a step of decoding over pages."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from .decoding.program import Step
from .decoding.serving import Paged, paged_of
from .errors import InputError
from .loading import inputs_for
from .optimize import optimize, restore
from .profile import Line, Phase, profile_call, profile_graph, wall_us

STEPS: Final = 32
"""Of decoding, at most, in a profile."""


def profile_model(model: nn.Module, batch: int, length: int, *, trace: Path | None = None) -> list[Phase]:
    """The phases of a model, which is as it was afterwards: the forward over `[batch, length]`, and, where the model
    generates over pages, a step of decoding behind prompts of that length, or of the longest that leave room for it;
    where there can be no such step, its phase says why.

    `trace` gets the forward, the file beside it with `decode` in its name the step.

    Raises:
        CaptureError: no graph can serve the forward.
    """
    inputs = inputs_for(model, batch, length, mask=False)
    optimized: Any = optimize(model, example_inputs=inputs, verbose=False, on_error="raise")
    try:
        (served, *_) = optimized.forward.graphs
        values = served.executable.values(inputs)
        with torch.no_grad():
            name = f"forward {batch}x{length}"
            phases = [profile_call(name, served.executable.program, values, lambda: optimized(**inputs), trace=trace)]
        paged = paged_of(optimized) if "input_ids" in inputs else None
        if paged is not None:
            beside = trace.with_name(f"{trace.stem}_decode{trace.suffix}") if trace is not None else None
            phases.append(profile_decode(paged, inputs["input_ids"].tolist(), beside))
        return phases
    finally:
        restore(model)


def profile_decode(paged: Paged, prompts: list[list[int]], trace: Path | None = None) -> Phase:
    """A step of decoding, one token for each prompt, which is cut to what leaves room for the steps of a profile."""
    executor = paged.engine.executor
    device, flat, graphs = executor.device, executor.flat, executor.graphs
    room = max(1, executor.max_seq_len - STEPS + 1)
    prompts = [tokens[:room] for tokens in prompts]
    name = f"decode {len(prompts)} x 1 behind {max(map(len, prompts))}"
    try:
        session = paged.session(prompts, max_new_tokens=STEPS)
    except InputError as error:
        return Phase(name, 0.0, missing=str(error))
    watched: Any = _Watched(flat, trace)
    try:
        tokens = session.prefill().argmax(-1)
        wall = wall_us(lambda: session.step(tokens), device)
        executor.flat, executor.graphs = watched, None  # node by node
        session.step(tokens)
    finally:
        executor.flat, executor.graphs = flat, graphs
        session.close()
    return Phase(name, wall, watched.lines)


class _Watched:
    """A flat program whose call is profiled."""

    def __init__(self, flat: Any, trace: Path | None) -> None:
        self._flat, self._trace = flat, trace
        self.lines: tuple[Line, ...] = ()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._flat, name)

    def __call__(self, step: Step) -> Any:
        values = self._flat.values(step)
        self.lines = profile_graph(self._flat.program_of(step), values, step.lengths.device, self._trace)
        return self._flat(step)
