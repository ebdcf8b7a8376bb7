"""`regraft bench generate`: what a user of `generate` waits for, ours beside HuggingFace's and vLLM's.

For each (batch, prompt, new): the time to the first token is that of a call for one token; a step is what each token of
the second half of a longer call takes, when no prompt is computed beside it. Every call has prompts that were never
seen before, the same for each candidate: an engine that knows a prompt has its keys and values in pages already. Tokens
are compared with eager's first: where they differ, the two tokens must be so close in the model's logits one precision
up that the eager model's own error could have chosen either.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any, Final

import torch
from torch import nn
from transformers.generation.streamers import BaseStreamer

from ..compiler.verify import higher
from .bench import REGRAFT, Bench, device_name
from .bench_forward import TimeUp, time_limit
from .checks import dtype_of, weight_bytes
from .generators import EAGER, VLLM, Generate, Runner, kv_bytes, prepared
from .oracle import run_oracle, run_reference
from .timing import device_rates

WARM: Final = 2
"""Calls before any is timed: shapes that come again are run by CUDA graphs from the third on."""


@dataclass(frozen=True)
class GenerateRow:
    """What is asked: `batch` prompts of `prompt` random tokens, each continued by `new`."""

    batch: int
    prompt: int
    new: int

    @property
    def label(self) -> str:
        return f"B={self.batch} prompt={self.prompt} new={self.new}"


@dataclass(frozen=True)
class GenerateResult:
    """One candidate on one row. Times in milliseconds, medians over rounds."""

    row: str
    candidate: str
    batch: int
    prompt: int
    new: int
    ttft_ms: float = 0.0
    """A call for one token."""
    step_ms: float = 0.0
    """(a call for `new` tokens - a call for half of them) / those in between: the prompts are gone by then."""
    itl_ms: dict[str, float] = field(default_factory=dict)
    """Between two tokens as a streamer sees them: median, p95, p99. Empty where the candidate takes no streamer."""
    tokens_per_s: float = 0.0
    """All new tokens over the whole call."""
    first_s: float = 0.0
    """From the model to the first call's result: capture, compilation and warm-up."""
    peak_gb: float = 0.0
    kv_gb: float = 0.0
    """Of keys and values: pages in use where it is paged, else a contiguous cache of all positions."""
    kv_waste: float | None = None
    """Share of the pages in use whose slots hold nothing."""
    tb_s: float = 0.0
    """Weights and the keys and values read in a step, over its time."""
    tflop_s: float = 0.0
    share: float | None = None
    """Of the device's copy bandwidth, which bounds a step."""
    differing: int = 0
    """Sequences whose tokens are not eager's from some point on, all of them near ties there."""
    problem: str = ""


def bench_generate(
    model: nn.Module,
    rows: Sequence[GenerateRow],
    candidates: Sequence[str] = (EAGER, REGRAFT),
    *,
    name: str = "",
    rounds: int = 3,
    limit_s: float = 300.0,
    say: Callable[[str], None] = lambda line: None,
) -> Bench:
    """Measure the candidates on each row. `eager` is run where another is to be compared with it."""
    device = next(model.parameters()).device
    bench = Bench(name or type(model).__name__, str(dtype_of(model)).removeprefix("torch."), device_name(device))
    bench.rates = device_rates(device)
    prompts = {row: prompts_of(model, row) for row in rows}
    expected: dict[GenerateRow, torch.Tensor] = {}
    for choice in dict.fromkeys((EAGER, *candidates)):
        told = choice in candidates
        for result in _candidate(choice, model, prompts, expected, rounds, limit_s, told):
            done = _rated(result, model, bench.rates)
            if told:
                bench.results.append(done)
                say(line_of(done))
    return bench


def _candidate(
    choice: str,
    model: nn.Module,
    prompts: Mapping[GenerateRow, torch.Tensor],
    expected: dict[GenerateRow, torch.Tensor],
    rounds: int,
    limit_s: float,
    told: bool,
) -> list[GenerateResult]:
    """One candidate on all rows, prepared once. A failure is the `problem` of the rows that it costs."""
    device = next(model.parameters()).device
    blanks = {r: GenerateResult(r.label, choice, r.batch, r.prompt, r.new) for r in prompts}
    done: list[GenerateResult] = []
    try:
        with time_limit(limit_s), torch.no_grad():
            start = time.perf_counter()
            with prepared(choice, model, max(r.prompt + r.new for r in prompts)) as run:
                for row, ids in prompts.items():
                    done.append(_measured(blanks[row], run, model, ids, expected, rounds if told else 0, start))
                    start = time.perf_counter()
    except TimeUp:
        problem = f"gave up after {limit_s:.0f} s"
    except Exception as error:  # noqa: BLE001 - a peer may fail in any way; the others are still measured
        problem = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    else:
        problem = ""
    finally:
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return [*done, *(replace(b, problem=problem) for b in list(blanks.values())[len(done) :])]


def _measured(
    blank: GenerateResult,
    run: Runner,
    model: nn.Module,
    ids: torch.Tensor,
    expected: dict[GenerateRow, torch.Tensor],
    rounds: int,
    start: float,
) -> GenerateResult:
    row = GenerateRow(blank.batch, blank.prompt, blank.new)
    device = ids.device
    tokens = run.generate(ids, row.new)
    _wait(device)
    result = replace(blank, first_s=time.perf_counter() - start)
    if blank.candidate == EAGER:
        expected[row] = tokens
    elif row not in expected:
        return replace(result, problem="eager gave no tokens to compare with")
    elif blank.candidate != VLLM or tokens.shape != expected[row].shape:  # vLLM's weights are others
        differing, wrong = differences(model, ids, expected[row], tokens)
        result = replace(result, differing=differing, problem=wrong)
        if wrong:
            return result
    if rounds == 0:
        return result
    unseen = (prompts_of(model, row, number) for number in count(1))
    for _ in range(WARM):
        run.generate(next(unseen), 1)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    first = [_timed(run.generate, next(unseen), 1) for _ in range(max(rounds, 3))]
    half = max(1, row.new // 2)
    shorter = first if half == 1 else [_timed(run.generate, next(unseen), half) for _ in range(rounds)]
    whole = [_timed(run.generate, next(unseen), row.new) for _ in range(rounds)]
    peak = torch.cuda.max_memory_reserved(device) / 1e9 if device.type == "cuda" else 0.0
    ttft, total = statistics.median(first), statistics.median(whole)
    kv, waste = run.kv(row.batch, row.prompt + row.new) if run.kv is not None else (0, None)
    return replace(
        result,
        ttft_ms=ttft,
        step_ms=max(0.0, total - statistics.median(shorter)) / max(1, row.new - half),
        itl_ms=_intervals(run, next(unseen), row.new),
        tokens_per_s=1e3 * row.batch * row.new / total,
        peak_gb=peak,
        kv_gb=kv / 1e9,
        kv_waste=waste,
    )


# -- correctness -------------------------------------------------------------------------------------------------------


def differences(
    model: Any, ids: torch.Tensor, expected: torch.Tensor, tokens: torch.Tensor, most: int = 4
) -> tuple[int, str]:
    """How many sequences differ from eager's, and what is wrong with the first `most` of them, or "".

    Up to the first difference both read the same tokens. There the gap between the two choices in the oracle's logits
    must be at most four times the largest error of the eager logits: each of the two may be off in either direction.
    """
    if tokens.shape != expected.shape:
        return 0, f"wrong: {list(tokens.shape)} tokens, expected {list(expected.shape)}"
    rows = (tokens != expected).any(dim=1).nonzero().flatten().tolist()
    for row in rows[:most]:
        at = int((tokens[row] != expected[row]).nonzero()[0])
        prefix = torch.cat((ids[row], expected[row, :at])).unsqueeze(0)
        forward = type(model).forward.__get__(model)
        oracle = run_oracle(model, forward, {"input_ids": prefix}, higher(dtype_of(model))).logits[0, -1]
        eager = run_reference(model, forward, {"input_ids": prefix}).logits[0, -1]
        allowed = 4 * float((eager.to(oracle.dtype) - oracle).abs().max())
        gap = float(oracle[expected[row, at]] - oracle[tokens[row, at]])
        if gap > allowed:
            return len(rows), f"wrong: sequence {row}, token {at}: logits {gap:.2e} apart, near ties are {allowed:.2e}"
    return len(rows), ""


def prompts_of(model: nn.Module, row: GenerateRow, number: int = 0) -> torch.Tensor:
    """Random tokens `[batch, prompt]`, others for each number."""
    vocab = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator, union-attr]
    generator = torch.Generator().manual_seed((number * 1_009 + row.batch) * 1_000_003 + row.prompt)
    ids = torch.randint(min(10, vocab - 1), vocab, (row.batch, row.prompt), generator=generator)
    return ids.to(next(model.parameters()).device)


# -- numbers -----------------------------------------------------------------------------------------------------------


class _Clock(BaseStreamer):  # type: ignore[misc]
    """When tokens arrive."""

    def __init__(self) -> None:
        self.at: list[float] = []

    def put(self, value: Any) -> None:
        self.at.append(time.perf_counter())

    def end(self) -> None:
        pass


def _intervals(run: Runner, ids: torch.Tensor, new: int) -> dict[str, float]:
    if run.streamed is None or new < 4:
        return {}
    clock = _Clock()
    run.streamed(ids, new, clock)
    times = [1e3 * (b - a) for a, b in zip(clock.at[1:], clock.at[2:], strict=False)]  # the first is the prompt
    if len(times) < 2:
        return {}
    cuts = statistics.quantiles(times, n=100, method="inclusive")
    return {"median": statistics.median(times), "p95": cuts[94], "p99": cuts[98]}


def _timed(generate: Generate, ids: torch.Tensor, new: int) -> float:
    _wait(ids.device)
    start = time.perf_counter()
    generate(ids, new)
    _wait(ids.device)
    return 1e3 * (time.perf_counter() - start)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _rated(result: GenerateResult, model: Any, rates: Mapping[str, float]) -> GenerateResult:
    """With the traffic and the arithmetic of the mean step."""
    if not result.step_ms:
        return result
    element = torch.empty(0, dtype=dtype_of(model)).element_size()
    read = (
        weight_bytes(model)
        - _gathered(model)
        + kv_bytes(model.config, result.batch, result.prompt + result.new // 2, element)
    )
    flops = 2 * result.batch * (weight_bytes(model) - _gathered(model)) / element
    tb_s = read / result.step_ms / 1e9
    copy = rates.get("copy_tb_s")
    return replace(
        result, tb_s=tb_s, tflop_s=flops / result.step_ms / 1e9, share=tb_s / copy if copy is not None else None
    )


def _gathered(model: Any) -> int:
    """Bytes of the embedding table, of which a step reads a few rows, unless it is the output layer too."""
    table = model.get_input_embeddings().weight
    out = model.get_output_embeddings()
    return 0 if out is None or out.weight is table else int(table.nbytes)


def line_of(result: GenerateResult) -> str:
    """One line of the table."""
    head = f"{result.row:<28} {result.candidate:<15}"
    if result.problem:
        return f"{head} {result.problem}"
    parts = [
        f"TTFT {result.ttft_ms:8.2f} ms",
        f"step {result.step_ms:7.3f} ms",
        f"{result.tokens_per_s:9.0f} tokens/s",
    ]
    if result.itl_ms:
        parts.append("inter-token " + " / ".join(f"{result.itl_ms[k]:.2f}" for k in ("median", "p95", "p99")) + " ms")
    parts.append(f"{result.tb_s:.2f} TB/s" + (f" ({result.share:.0%} of copy)" if result.share else ""))
    parts.append(f"KV {result.kv_gb:.3f} GB")
    parts += [f"waste {result.kv_waste:.1%}"] if result.kv_waste is not None else []
    parts += [f"peak {result.peak_gb:.2f} GB"] if result.peak_gb else []
    parts += [f"{result.differing} differ at near ties"] if result.differing else []
    return head + "  ".join([*parts, f"first {result.first_s:.1f} s"])


def slower(results: Sequence[GenerateResult], baseline: Mapping[str, Any], threshold: float) -> list[str]:
    """What of regraft got slower than in an earlier run's JSON by more than `threshold`, as a share of its time."""
    before = {(r["row"], r["candidate"]): r for r in baseline["results"]}
    lines = []
    for result in results:
        old = before.get((result.row, result.candidate))
        if old is None or old["problem"] or result.candidate != REGRAFT:
            continue
        if result.problem:
            lines.append(f"{result.row}: {result.problem}")
            continue
        for what, unit in (("ttft_ms", "time to the first token"), ("step_ms", "step")):
            now, was = getattr(result, what), old[what]
            if was and now > was * (1 + threshold):
                lines.append(f"{result.row}: {unit} {was:.3f} -> {now:.3f} ms")
    return lines
