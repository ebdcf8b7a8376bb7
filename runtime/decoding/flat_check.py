"""Is a flat program as good as the model itself? A ragged batch is compared with runs of each sequence alone.

Three sequences of different lengths: the first step has all of one, a part of another, all of the third; the second
goes on with the rest of the one and decodes the others; two more decode, the last with a row that nobody uses. Pages
are handed out in random order.

First the sequences must stay apart: the flat program, its ops' references one precision up, must say the same in the
ragged steps as for each sequence alone in one step. What mixes tokens in another way than by attention (a convolution,
a state, a maximum over the batch) shows there, however little it is; in bf16 it might hide behind rounding.

Then original and flat program are measured against the model's own code one precision up, as the certificate does: the
flat program's error may be at most twice the original's plus a few ulp.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from torch import Tensor

from ...compiler.causal import CacheError
from ...compiler.cost import called_op
from ...compiler.cross import STATES
from ...compiler.program import InputKind, Program
from ...compiler.verify import Upcast, bound_for, distance, higher, magnitude
from ..ahead import compile_ahead
from ..build import Builder
from ..certificate import named_outputs
from ..checks import dtype_of
from ..oracle import run_oracle, run_reference
from .book import Book
from .encoder import RENAMED, EncoderProgram, as_decoder, width_of
from .program import FlatProgram

LENGTHS: Final = (19, 26, 4)
"""Tokens of the prompts."""
CHUNK: Final = 17
"""Tokens of the second prompt in the first step."""
DECODED: Final = 2
STATES_SEEN: Final = (21, 5, 40)
"""States of the encoder beside which they are decoded, where there is one."""
PADDING: Final = 5
"""Tokens in front of a prompt."""
MOVED: Final = 1e-2
"""Root mean square of a difference, as a share of the logits, from which tokens stand at other positions."""
_LONGEST: Final = 96
LOSS: Final = 0.1
"""Root mean square of what pages of few bits may change, as a share of the logits."""
SAME: Final = {torch.float32: 1e-5, torch.float64: 1e-10}
"""Root mean square of a difference, as a share of the values, that other orders of sums explain; by dtype. Through
many layers they may explain more in float32 than in float64: what differs in one is looked at in the other."""


@dataclass(frozen=True)
class Checked:
    """max |flat - oracle|, max |original - oracle|, and what was allowed."""

    error: float
    error_original: float
    bound: float


@torch.no_grad()
def check(flat: FlatProgram, captured: Program, builder: Builder) -> Checked:
    """Compare; raises CacheError where the flat program is worse than the original. The pages are its own."""
    sequences, states = _sequences(flat, builder), _states(flat, builder)
    _check_apart(flat, sequences, states, builder)
    compile_ahead(builder.device, [lambda: run_ragged(flat, sequences, builder.device, states)])
    found = run_ragged(flat, sequences, builder.device, states)
    beside: Sequence[Tensor | None] = states or [None] * len(sequences)
    answers = []
    for eager in (True, False):
        pairs = zip(sequences, beside, strict=True)
        wanted = [_alone(builder, captured, tokens, s, eager=eager) for tokens, s in pairs]
        original, oracle = [w[0] for w in wanted], [w[1] for w in wanted]
        error, before = distance(found, oracle), distance(original, oracle)
        bound = bound_for(before, oracle, dtype_of(builder.module))
        answers.append(Checked(error.largest, before.largest, bound.largest))
        if error <= bound:
            return answers[-1]
    first = answers[0]
    raise CacheError(
        f"logits of a flat ragged batch are off by {first.error:.1e} from lone runs, the original by "
        f"{first.error_original:.1e}, allowed are {first.bound:.1e}"
    )


class _Meaning(Upcast):
    """A graph one precision up, each op by its reference, whatever kernel it was lowered to."""

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        op = called_op(target)
        return super().call_function(target if op is None else op.reference, args, kwargs)


class _Raised(FlatProgram):
    """A flat program one precision up."""

    def __init__(self, flat: FlatProgram, builder: Builder, target: torch.dtype) -> None:
        super().__init__(flat.program, builder.weights, flat.vocab)
        self.target = target
        self.layers = tuple(replace(layer, dtype=target) for layer in flat.layers)
        self._run = self._run_whole = _Meaning(flat.program.gm, target).run
        if flat.encoder is not None:
            self.encoder = _RaisedEncoder(flat.encoder, builder, target)


class _RaisedEncoder(EncoderProgram):
    """What is kept of an encoder's states, one precision up."""

    def __init__(self, encoder: EncoderProgram, builder: Builder, target: torch.dtype) -> None:
        super().__init__(encoder.program, builder.weights, encoder.masked)
        self.layers = tuple(replace(layer, dtype=target) for layer in encoder.layers)
        self._meaning = _Meaning(encoder.program.gm, target)

    def __call__(self, states: Tensor) -> list[tuple[Tensor, Tensor]]:
        sides = self._meaning.run(*self.executable.values({STATES: states}))
        return list(zip(sides[::2], sides[1::2], strict=True))


def _check_apart(flat: FlatProgram, sequences: Sequence[Tensor], states: Sequence[Tensor], builder: Builder) -> None:
    target = higher(dtype_of(builder.module))
    share = _mixed(_Raised(flat, builder, target), sequences, states, builder)
    if share > SAME[target] and target != torch.float64:
        target = torch.float64
        share = _mixed(_Raised(flat, builder, target), sequences, states, builder)
    if share > SAME[target]:
        raise CacheError(
            f"its tokens mix in another way than by attention: beside others logits change by {share:.0e} of their size"
        )


def _mixed(raised: _Raised, sequences: Sequence[Tensor], states: Sequence[Tensor], builder: Builder) -> float:
    """By how much logits change beside other sequences, as a share of their size; infinite where they are all zero."""
    shares = [0.0]
    ragged = run_ragged(raised, sequences, builder.device, states)
    for index, (tokens, found) in enumerate(zip(sequences, ragged, strict=True)):
        book = Book.of(raised, [len(tokens)], builder.device, states=states[index : index + 1])
        book.bind(raised)
        alone = raised(book.step({0: len(tokens)}, [tokens]))
        off, size = distance(found, alone).rms, magnitude(alone).rms
        if off > 0:
            shares.append(off / size if size else float("inf"))
    return max(shares)


@torch.no_grad()
def check_beyond(flat: FlatProgram, builder: Builder, end: int, bound: float) -> None:
    """A batch of more tokens than a sequence may have must give the same; raises CacheError where it does not.

    The captured code ends at `end` tokens: it may be the mask's, which is gone, or one that is still there.
    """
    tokens, states = _sequences(flat, builder)[:1], _states(flat, builder)[:1]
    results = []
    for padding in (0, end + 1 - len(tokens[0])):
        book = Book.of(flat, [len(tokens[0])], builder.device, states=states)
        book.bind(flat)
        try:
            results.append(flat(book.step({0: len(tokens[0])}, tokens, padding=padding)))
        except (RuntimeError, IndexError) as error:
            raise CacheError(f"its code takes at most {end} tokens in all") from error
    if distance(results[1], results[0]).largest > 2 * bound:
        raise CacheError(f"more than {end} tokens in all change its logits")


@torch.no_grad()
def counts_padding(flat: FlatProgram, builder: Builder) -> bool:
    """Whether padding in front of a prompt moves its tokens: positions that the model counts by itself, past the mask.

    Where positions are an argument, `generate` counts them from the first token that is none.
    """
    module, forward = builder.module, builder.original
    beside, taken = bool(flat.encoder), inspect.signature(forward).parameters
    mask_name = "decoder_attention_mask" if beside else "attention_mask"
    if (RENAMED["position_ids"] if beside else "position_ids") in taken or mask_name not in taken:
        return False
    tokens = _sequences(flat, builder)[0]
    padding = min(PADDING, len(tokens) - 1)
    ids = torch.stack([tokens, torch.cat([tokens[:1].expand(padding), tokens[:-padding]])])
    mask = torch.ones_like(ids)
    mask[1, :padding] = 0
    inputs: dict[str, Any] = {"input_ids": ids, mask_name: mask}
    if beside:
        forward, states = as_decoder(forward), _states(flat, builder)[0]
        inputs[STATES] = states.expand(2, *states.shape[1:])
    try:
        output = run_oracle(module, forward, inputs, higher(dtype_of(module)))
    except Exception:  # noqa: BLE001 - a model's code may refuse another dtype in any way it likes
        output = run_reference(module, forward, inputs)
    logits = named_outputs(output)["logits"].double()
    alone, padded = logits[0, -1 - padding], logits[1, -1]
    return distance(padded, alone).rms > MOVED * magnitude(alone).rms


@torch.no_grad()
def check_scaled(flat: FlatProgram, exact: FlatProgram, builder: Builder) -> float:
    """The share by which pages of few bits change the logits; raises CacheError where that is more than `LOSS`."""
    sequences, states = _sequences(exact, builder), _states(exact, builder)
    own = FlatProgram(exact.program, builder.weights, exact.vocab, exact.encoder)  # whose pages are nobody else's
    found, wanted = (run_ragged(program, sequences, builder.device, states) for program in (flat, own))
    share = distance(found, wanted).rms / magnitude(wanted).rms
    if not share <= LOSS:
        raise CacheError(f"pages of {flat.layers[0].dtype} change its logits by {share:.0%}")
    return share


def _sequences(flat: FlatProgram, builder: Builder) -> list[Tensor]:
    """Tokens of each sequence, `[n]`; longer where that reaches beyond a window."""
    windows = [w for w in flat.groups if 0 <= w <= _LONGEST // 2]
    extra = max(windows, default=0)
    generator = torch.Generator().manual_seed(0)
    most = _LONGEST if flat.max_positions is None else min(flat.max_positions, _LONGEST)
    lengths = [min(n + extra + DECODED, most) for n in LENGTHS[:2]] + [min(LENGTHS[2] + DECODED, most)]
    known = min(flat.vocab, _tokens_known(builder))
    low = min(3, known - 1)
    return [torch.randint(low, known, (n,), generator=generator).to(builder.device) for n in lengths]


def states_of(builder: Builder, count: int, seed: int) -> Tensor:
    """States as an encoder might make them, `[1, count, E]`, in the model's dtype."""
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(1, count, width_of(builder.module), generator=generator)
    return states.to(builder.device, dtype_of(builder.module))


def _states(flat: FlatProgram, builder: Builder) -> list[Tensor]:
    """Beside what each sequence is decoded; nothing where there is no encoder."""
    if flat.encoder is None:
        return []
    return [states_of(builder, count, seed) for seed, count in enumerate(STATES_SEEN)]


def _tokens_known(builder: Builder) -> int:
    """Rows of the embedding, which may be fewer than the logits."""
    get: Any = getattr(builder.module, "get_input_embeddings", None)
    return int(getattr(get() if get is not None else None, "num_embeddings", 0)) or 1 << 30


def _alone(
    builder: Builder, captured: Program, tokens: Tensor, states: Tensor | None, *, eager: bool
) -> tuple[Tensor, Tensor]:
    """Logits `[n, V]` of the model for one sequence, in its precision and one up."""
    module, forward, inputs = builder.module, builder.original, {"input_ids": tokens[None]}
    if states is not None:
        forward, inputs = as_decoder(forward), {**inputs, STATES: states}
    original = _logits(run_reference(module, forward, inputs, eager=eager))
    target = higher(dtype_of(module))
    try:
        oracle = _logits(run_oracle(module, forward, inputs, target, eager=eager))
    except Exception:  # noqa: BLE001 - a model's code may refuse another dtype in any way it likes
        oracle = _raised(builder, captured, inputs, target)
    return original, oracle


def _raised(builder: Builder, captured: Program, inputs: Mapping[str, Tensor], target: torch.dtype) -> Tensor:
    """The second best oracle: the captured graph one precision up."""
    tokens = inputs["input_ids"]
    everything = torch.arange(tokens.shape[1], device=tokens.device)
    given: Mapping[str, Tensor] = {**inputs, "position_ids": everything[None]}
    values = [
        given.get(i.target, everything) if i.kind is InputKind.USER else builder.weights.value(i).detach()
        for i in captured.inputs
    ]
    return _logits(captured.rebuild(Upcast(captured.gm, target).run(*values)))


def _logits(output: Any) -> Tensor:
    named = named_outputs(output)
    return named["logits"][0] if "logits" in named else next(iter(named.values()))[0]


def run_ragged(
    flat: FlatProgram, sequences: Sequence[Tensor], device: torch.device, states: Sequence[Tensor] = ()
) -> list[Tensor]:
    """Logits `[n, V]` of each of three sequences from the flat program, over pages that are made here and bound."""
    book = Book.of(flat, [len(s) for s in sequences], device, states=states)
    book.bind(flat)
    chunk = max(1, min(CHUNK, len(sequences[1]) - DECODED - 1))
    takes = [
        {0: len(sequences[0]) - DECODED, 1: chunk, 2: len(sequences[2]) - DECODED},
        {0: 1, 1: len(sequences[1]) - DECODED - chunk, 2: 1},
        {0: 1, 1: 1, 2: 1},
        {1: 1},
    ]
    rows: list[list[Tensor]] = [[] for _ in sequences]
    for take in takes:
        alone = int(len(take) == 1)
        step = book.step(take, sequences, padding=alone, absent=alone)
        for index, part in zip(take, flat(step).split(list(take.values())), strict=True):
            rows[index].append(part)
    return [torch.cat(parts) for parts in rows]
