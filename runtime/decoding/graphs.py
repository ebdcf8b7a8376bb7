"""CUDA graphs of decoding and of short prefills. All of an executor share one memory pool; the largest come first."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Final

import torch

from ..cuda_graphs import capture_alone, first_message
from ..errors import RegraftError

MAX_GRAPHS: Final = 64
"""Graphs of one executor; the one that was made first goes when there are more."""
WARM: Final = 2
"""Runs before a capture: kernels are compiled in the first, their launch plans noted in the second."""


class NotCaptured(RegraftError):
    """A step cannot be captured: it looks at a value, or there is no memory for the graph."""


class StepGraphs:
    """Graphs by key. What a function computes stays in the graph's memory until any of them runs again."""

    def __init__(self, device: torch.device, verbose: bool = True) -> None:
        self.device, self._verbose = device, verbose
        self.held = 0
        """Bytes that the graphs hold."""
        self._graphs: dict[Hashable, tuple[torch.cuda.CUDAGraph, Any]] = {}
        self._seconds = 0.0

    def __len__(self) -> int:
        return len(self._graphs)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._graphs

    def clear(self) -> None:
        """What they were made of is gone."""
        self._graphs.clear()
        self.held = 0

    def replay(self, key: Hashable) -> Any:
        """Run a graph that was captured; returns what its function returned, the same tensors every time."""
        graph, result = self._graphs[key]
        graph.replay()
        return result

    def capture(self, key: Hashable, function: Callable[[], Any]) -> None:
        """Make the graph of a function that may run any number of times without effect.

        Raises:
            NotCaptured: there is no graph of it.
        """
        started = time.perf_counter()
        try:
            self._capture(key, function)
        except RuntimeError as error:
            raise NotCaptured(first_message(error)) from error
        self._seconds = time.perf_counter() - started

    def _capture(self, key: Hashable, function: Callable[[], Any]) -> None:
        while len(self._graphs) >= MAX_GRAPHS:
            del self._graphs[next(iter(self._graphs))]
        with capture_alone(self.device) as stream, torch.no_grad():
            before = torch.cuda.memory_reserved(self.device)
            stream.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(stream):
                for _ in range(WARM):
                    function()
            torch.cuda.synchronize(self.device)
            pool = next((graph.pool() for graph, _ in self._graphs.values()), None)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                result = function()
            self._graphs[key] = (graph, result)
            self.held += max(0, torch.cuda.memory_reserved(self.device) - before)

    def announce(self, what: str, sizes: Sequence[int], bytes_each: int) -> None:
        """Say which graphs are about to be captured, and how long that takes and what it holds, as estimated."""
        if self._verbose:
            seconds = (self._seconds or 1.0) * len(sizes)
            print(
                f"regraft: capturing {len(sizes)} CUDA graph{'s' if len(sizes) > 1 else ''} ({what} "
                f"{', '.join(map(str, sizes))}): about {seconds:.1f} s and {max(1, bytes_each >> 20)} MiB",
                flush=True,
            )
