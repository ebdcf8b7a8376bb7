"""Runs the steps that a scheduler or a session makes up, on a flat program and its pages."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable
from collections.abc import Sequence as Items
from typing import Any, Final

import torch
from torch import Tensor

from .. import numerics
from . import warm_up
from .buckets import batch_bucket, batch_buckets, token_bucket
from .encoder_pages import Encoded, EncoderPages
from .flat import FlatProgram
from .graphs import NotCaptured, StepGraphs
from .memory import LONGEST, Limits, block_bytes, count_blocks
from .packing import packed, unpacked
from .pages import Pages
from .pool import BlockPool
from .readback import Readback
from .requests import Epilogue
from .scheduler import Chunk
from .sequences import Sequence
from .state import RING, DecodeState
from .tables import PageTables
from .warm_up import SHORT, Shape, padded

log = logging.getLogger("regraft")

MAX_PREFILLS: Final = 24
"""CUDA graphs of mixed steps."""
GRAPHED: Final = 2048
"""Tokens of the longest mixed step that has one."""
GRAPHED_BYTES: Final = 64 << 20
"""What such a step may take while it is computed: with more the GPU is slower than the host that launches."""
UNBOUNDED: Final = 1 << 30
"""The limit of a row whose host counts its steps itself."""


class Executor:
    """Pages, device state and CUDA graphs of one model.

    Rows of the device follow the sequences that the host names: each step says which, and what differs is sent before.

    Args:
        model_length: the longest sequence that the model is made for; None: not known.
        verbose: whether captures of CUDA graphs and the compiling of kernels are announced.
    """

    def __init__(
        self,
        flat: FlatProgram,
        limits: Limits,
        device: torch.device,
        model_length: int | None = None,
        verbose: bool = True,
    ) -> None:
        self.flat, self.limits, self.device = flat, limits, device
        lengths = [n for n in (limits.max_seq_len, flat.max_positions) if n is not None]
        length = min(lengths) if lengths else model_length or LONGEST
        length = length if flat.tabulated is None else min(length, flat.tabulated)
        size = limits.block_size
        self.encoder = EncoderPages(flat.encoder, limits, device) if flat.encoder is not None else None
        """What is kept of encoders' states."""
        counts = count_blocks(flat.layers, flat.groups, limits, length, device)
        full = [n for n, left in zip(counts, flat.groups) if left < 0]
        self.max_seq_len = min(length, min(full) * size) if full else length
        self.block_bytes = [block_bytes(flat.layers, group, size) for group in range(len(counts))]
        """Bytes of a page of each group."""
        self.pages = Pages(flat.layers, counts, size, device)
        flat.bind(self.pages.layers, self.pages.scales, self.encoder.pages.layers if self.encoder is not None else ())
        self.tables = PageTables([BlockPool(n, size) for n in counts], flat.groups)
        self.state = self._new_state()
        with_graphs = device.type == "cuda" and not numerics.wanted()
        self.graphs = StepGraphs(device, verbose) if with_graphs else None
        self._owners: list[tuple[Sequence | None, int]] = [(None, 0)] * self.state.rows
        """Whose table a row has, and which of the sequence's tables (`written_anew`)."""
        self._encoded: list[Encoded | None] = [None] * self.state.rows
        self._assigned: list[tuple[Sequence | None, Epilogue | None]] = [(None, None)] * self.state.rows
        self._sent: list[list[int]] = [[0] * len(counts) for _ in range(self.state.rows)]
        self._lengths: list[tuple[int, int]] = [(0, 0)] * self.state.rows
        self._tick = 0
        self._version = flat.version
        self._verbose = verbose
        self._cold = limits.warm_up_seconds > 0 and with_graphs
        self._warm: set[bool] = set()
        """Whether kernels were compiled for steps of one row, and of several."""
        self._graphed = min(GRAPHED, max(SHORT, GRAPHED_BYTES // max(1, flat.token_bytes)))
        self._prefills: dict[tuple[Shape, int], int | Tensor] = {}
        """Of mixed steps by shape and rows: how often they came, then the input of their graph."""

    def _new_state(self) -> DecodeState:
        size, beside = self.limits.block_size, self.encoder.width if self.encoder is not None else 0
        width = -(-self.max_seq_len // size)
        return DecodeState(
            batch_bucket(self.limits.max_batch_size), len(self.flat.groups), width, size, self.device, beside
        )

    # -- rows of the device -----------------------------------------------------------------------------------------

    def forget(self) -> None:
        """Something went wrong on the way: nothing is known of the device's rows, and they are out of use."""
        self.state.reset()
        self._tick = 0
        self._owners = [(None, 0)] * self.state.rows
        self._encoded = [None] * self.state.rows
        self._lengths = [(0, 0)] * self.state.rows
        for row, (_, epilogue) in enumerate(self._assigned):
            if epilogue is not None:
                epilogue.assign(row, None)
            self._assigned[row] = (None, None)

    def _send_tables(self, sequences: Items[Sequence]) -> None:
        for sequence in sequences:
            row = sequence.row
            assert row is not None
            if self._owners[row] != (sequence, sequence.written_anew):
                self._owners[row] = (sequence, sequence.written_anew)
                self._sent[row] = [0] * len(sequence.tables)
                self._lengths[row] = (-1, -1)
            if self._encoded[row] is not sequence.encoded and sequence.encoded is not None:
                self.state.set_encoder(row, sequence.encoded.blocks, sequence.encoded.length)
                self._encoded[row] = sequence.encoded
            for group, table in enumerate(sequence.tables):
                begin = min(self._sent[row][group], len(table))
                if len(table) > begin:
                    self.state.set_pages(row, group, begin, table[begin:])
                    self._sent[row][group] = len(table)

    def _send_lengths(self, starts: dict[int, tuple[int, int]]) -> list[int]:
        """Rows that begin somewhere else than where the device left them; all others are out of use."""
        moved = []
        for row in range(self.state.rows):
            wanted = starts.get(row)
            if wanted is None:
                if self._lengths[row] != (0, 0):
                    self.state.set_length(row, 0, 0)
                    self._lengths[row] = (0, 0)
            elif self._lengths[row] != wanted:
                self.state.set_length(row, *wanted)
                if self._lengths[row][0] != wanted[0]:
                    moved.append(row)
                self._lengths[row] = wanted
        return moved

    def _assign(self, epilogue: Epilogue, sequences: Items[Sequence]) -> None:
        wanted = {s.row: s for s in sequences}
        for row in range(self.state.rows):
            owner = wanted.get(row)
            if self._assigned[row] != (owner, epilogue) and (owner or self._assigned[row][0]):
                former = self._assigned[row][1]
                if former is not None and former is not epilogue:
                    former.assign(row, None)
                self._assigned[row] = (owner, epilogue)  # first: `forget` clears what is interrupted on the way
                epilogue.assign(row, owner)
                if owner is None:
                    self._assigned[row] = (None, None)

    def release(self, sequences: Items[Sequence]) -> None:
        """These are gone: their rows keep nothing of them."""
        for row in range(self.state.rows):
            owner, epilogue = self._assigned[row]
            if owner in sequences:
                if epilogue is not None:
                    epilogue.assign(row, None)
                self._assigned[row] = (None, None)
            if self._owners[row][0] in sequences:
                self._owners[row] = (None, 0)

    # -- mixed steps ------------------------------------------------------------------------------------------------

    def mixed(self, chunks: list[Chunk], epilogue: Epilogue) -> Readback:
        """Compute chunks of any length; a token of each that `samples`, none of the others."""
        logits, sampled = self._forward(chunks, epilogue)
        self._assign(epilogue, [c.sequence for c in chunks])  # while the device computes
        with torch.no_grad():
            tokens = epilogue(logits, sampled)
        return Readback(tokens[None], [(_row(c.sequence), 0, int(c.samples)) for c in chunks])

    def forward(self, chunks: Items[Chunk]) -> Tensor:
        """Compute chunks of any length; logits [S, V], line r of the last token of the chunk in row r.

        S is the bucket of the largest row; lines without a chunk hold what nobody asked for. The tensor may be that
        of a CUDA graph: it is gone with the next step.
        """
        return self._forward(chunks)[0]

    def _forward(self, chunks: Items[Chunk], epilogue: Epilogue | None = None) -> tuple[Tensor, Tensor]:
        self._fresh()
        chunks = sorted(chunks, key=lambda c: _row(c.sequence))
        self._send_tables([c.sequence for c in chunks])
        self.state.send()
        rows = batch_bucket(1 + _row(chunks[-1].sequence))
        total, longest = sum(c.count for c in chunks), max(c.count for c in chunks)
        size = padded(total)
        fresh = total > SHORT and not any(c.start for c in chunks)
        shape = Shape(size, 1 if longest == 1 else min(size, token_bucket(longest)), fresh)
        if self._cold and (rows > 1) not in self._warm:
            if epilogue is not None:
                self._assign(epilogue, [c.sequence for c in chunks])
            self._compile_kernels(rows, shape, epilogue)
        host = packed(chunks, rows, size, len(self.flat.groups), self.limits.block_size)
        if self.device.type == "cuda":
            host = host.pin_memory()
        captured = Shape(size, size) if total <= SHORT else shape
        words = self._graph_input(host, captured, rows)
        if words is None or self.graphs is None:
            return self._compute(host.to(self.device, non_blocking=True), rows, shape)
        words.copy_(host, non_blocking=True)
        logits, sampled = self.graphs.replay(("prefill", captured, rows))
        return logits, sampled

    def _compile_kernels(self, rows: int, first: Shape, epilogue: Epilogue | None) -> None:
        """Have the kernels of all steps of so many rows: of this one, of decoding, of others; nothing is written."""
        from ...kernels.compiling import compile_behind, compile_only  # Triton is not there on every platform
        from ...kernels.thresholds import thresholds

        self._warm.add(rows > 1)
        limits, flat = self.limits, self.flat
        budget = max(limits.budget(self.tables.windows), limits.max_batch_size)
        most = min(budget, rows * self.max_seq_len)
        others = [s for s in warm_up.shapes(rows, most, thresholds(self.device), first.tokens) if s != first]
        if self._verbose:
            print(warm_up.announced([first, *others], rows, limits.warm_up_seconds, flat.token_bytes), flush=True)

        @torch.no_grad()
        def compute(shape: Shape) -> tuple[Tensor, Tensor]:
            nothing = packed((), rows, shape.tokens, len(flat.groups), limits.block_size).to(self.device)
            return self._compute(nothing, rows, shape)

        @torch.no_grad()
        def compute_and_decode(shape: Shape) -> None:
            logits, sampled = compute(shape)
            if epilogue is not None:
                epilogue(logits, sampled)
            spare = self._new_state()
            for some in batch_buckets(rows):
                self._one(spare, some, epilogue)

        warm_up.run([first], compute_and_decode, compile_only, limits.warm_up_seconds)
        warm_up.run(others, compute, compile_behind, limits.warm_up_seconds)

    def _graph_input(self, host: Tensor, shape: Shape, rows: int) -> Tensor | None:
        """The input of the graph for this shape, which is captured when the shape comes for the third time."""
        if self.graphs is None or shape.tokens > self._graphed:
            return None
        place, key = (shape, rows), ("prefill", shape, rows)
        seen = self._prefills.get(place, 0)
        if isinstance(seen, int):
            self._prefills[place] = seen + 1
            if seen < 2 or sum(isinstance(s, Tensor) for s in self._prefills.values()) >= MAX_PREFILLS:
                return None
            self._prefills[place] = seen = torch.zeros_like(host, device=self.device)
        words = seen
        if key not in self.graphs:
            nothing = packed((), rows, shape.tokens, len(self.flat.groups), self.limits.block_size)
            words.copy_(nothing)
            held = 4 * rows * self.flat.vocab + shape.tokens * self.flat.token_bytes
            self.graphs.announce("prefill, tokens", [shape.tokens], held)
            what = f"prompts of {shape.tokens} tokens and more"
            if not self._captured(what, key, lambda: self._compute(words, rows, shape)):
                self._prefills[place] = 0
                self._graphed = shape.tokens - 1
                return None
        return words

    def _captured(self, what: str, key: Hashable, function: Callable[[], Any]) -> bool:
        """Capture a graph; where that fails, such steps are launched kernel by kernel from now on."""
        assert self.graphs is not None
        try:
            self.graphs.capture(key, function)
        except NotCaptured as error:
            log.warning("%s could not be captured as a CUDA graph and run without: %s", what, error)
            return False
        return True

    def _compute(self, words: Tensor, rows: int, shape: Shape) -> tuple[Tensor, Tensor]:
        """Logits [rows, V] of a step as `packed` laid it out, and which rows sample."""
        step, sampled = unpacked(words, self.state.tables, rows, shape.tokens, shape.max_q, shape.fresh)
        step.encoder = self.state.encoder_of_tokens(step.cu_seqlens_q, shape.tokens)
        return self.flat(step), sampled

    # -- decoding ---------------------------------------------------------------------------------------------------

    def burst(self, chunks: list[Chunk], epilogue: Epilogue) -> Readback:
        """Decode each chunk's row `count` steps on; the token that a row begins with is known or on the device."""
        self._assign(epilogue, [c.sequence for c in chunks])
        rows = self._begin(chunks, {_row(c.sequence): c.sequence.limit - 1 for c in chunks})
        steps, first = max(c.count for c in chunks), self._tick
        for _ in range(steps):
            self._decode(rows, epilogue)
        self._tick = (first + steps) % RING
        return Readback(self.state.ring, [(_row(c.sequence), first, c.count) for c in chunks])

    def step(self, sequences: Items[Sequence], tokens: Tensor) -> Tensor:
        """Append tokens, int64 [B], to sequences in rows 0 to B-1, whose pages have room; logits [S, V].

        The tensor is gone with the next step.
        """
        chunks = [Chunk(s, s.computed, 1) for s in sequences]
        rows = self._begin(chunks, dict.fromkeys(range(len(chunks)), UNBOUNDED), tokens_follow=True)
        self.state.ids[: len(chunks)].copy_(tokens, non_blocking=True)
        return self._decode(rows, None)

    def warm_up(self, batch: int, epilogue: Epilogue | None) -> None:
        """Capture the graphs of decoding up to `batch` rows, the largest first, so that they share its memory."""
        if self.graphs is None:
            return
        self._fresh()
        wanted = [b for b in reversed(batch_buckets(batch)) if self._key(b, epilogue) not in self.graphs]
        if wanted:
            self.graphs.announce("decoding, batch", wanted, 4 * wanted[0] * self.flat.vocab)
        for rows in wanted:
            if not self._capture(rows, epilogue):
                return

    def _begin(self, chunks: Items[Chunk], limits: dict[int, int], tokens_follow: bool = False) -> int:
        self._fresh()
        self._send_tables([c.sequence for c in chunks])
        moved = self._send_lengths({_row(c.sequence): (c.start, limits[_row(c.sequence)]) for c in chunks})
        for chunk in chunks:
            row = _row(chunk.sequence)
            if not tokens_follow and row in moved:
                self.state.set_token(row, chunk.sequence.tokens[chunk.start])
            self._lengths[row] = (chunk.start + chunk.count, limits[row])
        self.state.send()
        return batch_bucket(1 + max(_row(c.sequence) for c in chunks))

    def _key(self, rows: int, epilogue: Epilogue | None) -> Hashable:
        return ("decode", rows, epilogue, epilogue.graph_key if epilogue is not None else None)

    def _decode(self, rows: int, epilogue: Epilogue | None) -> Tensor:
        key = self._key(rows, epilogue)
        if self.graphs is not None and key not in self.graphs:
            self.graphs.announce("decoding, batch", [rows], 4 * rows * self.flat.vocab)
            self._capture(rows, epilogue)
        if self.graphs is None:
            return self._one(self.state, rows, epilogue)
        logits: Tensor = self.graphs.replay(key)
        return logits

    def _capture(self, rows: int, epilogue: Epilogue | None) -> bool:
        """While no row is in use, so that nothing is written."""
        state = self.state
        kept = [t.clone() for t in (state.limits, state.tick, state.ids)]
        state.limits.zero_()
        captured = self._captured("steps", self._key(rows, epilogue), lambda: self._one(state, rows, epilogue))
        if not captured:
            self.graphs = None
        for tensor, value in zip((state.limits, state.tick, state.ids), kept):
            tensor.copy_(value)
        return captured

    @torch.no_grad()
    def _one(self, state: DecodeState, rows: int, epilogue: Epilogue | None) -> Tensor:
        logits = self.flat(state.advance(rows))
        if epilogue is not None:
            state.take(epilogue(logits, state.active[:rows]))
        return logits

    def _fresh(self) -> None:
        """Graphs of weights that are gone are not replayed."""
        if self.flat.version != self._version:
            self._version = self.flat.version
            if self.graphs is not None:
                self.graphs.clear()


def _row(sequence: Sequence) -> int:
    assert sequence.row is not None
    return sequence.row
