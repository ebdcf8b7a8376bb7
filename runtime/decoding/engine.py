"""Decoding of one model: who may run when, and that nothing is left behind by whoever ends."""

from __future__ import annotations

import contextlib
import itertools
import logging
import threading
import weakref
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator
from collections.abc import Sequence as Items
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError, RegraftError
from ..topics import asked_for
from .calls import Call
from .encoder_pages import Encoded, EncoderPages
from .executor import Executor
from .flat import FlatProgram
from .memory import Limits
from .requests import Epilogue, Request
from .scheduler import Scheduler
from .sequences import Sequence
from .session import Session
from .tables import Use

log = logging.getLogger("regraft.pages")


@dataclass(frozen=True)
class Stats:
    """What decoding held and did so far."""

    kv_bytes: int
    """Of the KV cache, allocated once."""
    peak_kv_bytes: int
    """Of the most pages that were held at once."""
    waste: float
    """The share of slots in these pages that held no token."""
    preemptions: int
    graphs: int
    graph_bytes: int


class Engine:
    """A flat program with its pages. Calls of several threads follow one another, and never mix.

    Args:
        flat: the program.
        device: where its weights are.
        limits: memory and sizes.
        model_length: the longest sequence that the model is made for, where its program sets no bound.
        verbose: whether captures of CUDA graphs are announced.
    """

    def __init__(
        self,
        flat: FlatProgram,
        device: torch.device | str,
        limits: Limits | None = None,
        model_length: int | None = None,
        verbose: bool = True,
    ) -> None:
        self.limits = limits if limits is not None else Limits()
        with torch.inference_mode(False):  # what is made here is written to in later calls
            self.executor = Executor(flat, self.limits, torch.device(device), model_length, verbose)
        self._lock = threading.RLock()
        self._running: Call | None = None
        self._sessions: weakref.WeakSet[Session] = weakref.WeakSet()
        self._reserved: dict[int, list[int]] = {}
        """Pages of each group that an open session may come to hold, by the session's number."""
        self._numbers = itertools.count()
        self._lost: deque[tuple[int, list[Sequence], list[Encoded]]] = deque()
        """Of sessions that nobody closed."""
        self._last: Any = None
        self._weights: Hashable = None
        self._peak = Use(0, 0)
        self._peak_bytes = 0
        self._preemptions = 0

    # -- calls ------------------------------------------------------------------------------------------------------

    def run(
        self,
        requests: Iterable[Request],
        epilogue: Epilogue,
        on_token: Callable[[int, int], None] | None = None,
        burst: int | None = None,
        states: Items[Tensor] | None = None,
    ) -> list[list[int]]:
        """Continue all requests, as many at once as there is room for; returns the new tokens of each, in order.

        Args:
            epilogue: chooses the tokens. Give the same one in later calls, so that its CUDA graphs serve again.
            on_token: called with the number of the request and each of its tokens, as they arrive.
            states: of a decoder beside an encoder, the states `[N, E]` that each request sees.
            burst: decoding steps between two looks at the tokens, up to 16; None: 8, or 2 for who listens.

        Raises:
            InputError: a request could never run, however long it waited; nothing was run.
            RegraftError: called from `on_token` of a call of this engine.
        """
        given = list(requests)
        steps = min(burst, 16) if burst is not None else 8 if on_token is None else 2
        with self.turn(), self._kept(states) as encoded:
            self._look_at_weights()
            tables = self.executor.tables
            batch = self.limits.max_batch_size
            budget, sharing = self.limits.budget(tables.windows), self.limits.prefix_sharing
            scheduler = Scheduler(tables, batch, self.executor.max_seq_len, budget, sharing)
            call = Call(scheduler, self.executor, epilogue, steps)
            if encoded:
                given = [replace(r, salt=(r.salt, e.number)) for r, e in zip(given, encoded, strict=True)]
            sequences = [call.add(request) for request in given]
            for sequence, beside in zip(sequences, encoded):
                sequence.encoded = beside
            self._running = call
            numbers = {s: i for i, s in enumerate(sequences)}
            warm = len(given) <= batch
            while not call.done:
                for sequence, tokens in call.step():
                    if on_token is not None:
                        for token in tokens:
                            on_token(numbers[sequence], token)
                self.look(call)
                if not warm and scheduler.running:
                    self.executor.warm_up(batch, epilogue)
                    warm = True
            self.executor.release(sequences)
            self._preemptions += scheduler.preemptions
            return [s.produced for s in sequences]

    @contextlib.contextmanager
    def _kept(self, states: Items[Tensor] | None) -> Iterator[list[Encoded]]:
        """What is kept of encoders' states, meanwhile."""
        pages = self._encoder_pages(states)
        encoded = pages.keep(states) if pages is not None and states is not None else []
        try:
            yield encoded
        finally:
            if pages is not None:
                pages.give_back(encoded)

    def _encoder_pages(self, states: Items[Tensor] | None) -> EncoderPages | None:
        pages = self.executor.encoder
        if (pages is None) != (states is None):
            raise ValueError("states of an encoder are given where the model has one, and only there")
        return pages

    def session(
        self,
        batch_ids: Items[Items[int]],
        max_new_tokens: int | None = None,
        states: Items[Tensor] | None = None,
    ) -> Session:
        """A batch of prompts, without padding, that is continued in step.

        Args:
            max_new_tokens: tokens that are appended at most: whether they fit is known before anything runs, and no
                other session takes their pages.
            states: of a decoder beside an encoder, the states `[N, E]` that each row sees.

        Raises:
            InputError: more rows, tokens or pages than there are.
        """
        with self.turn():
            self._look_at_weights()
            executor, tables = self.executor, self.executor.tables
            new = max_new_tokens if max_new_tokens is not None else 1
            if not batch_ids or len(batch_ids) > self.limits.max_batch_size:
                raise InputError(f"a batch of {len(batch_ids)}: expected 1 to {self.limits.max_batch_size} sequences")
            longest = max(map(len, batch_ids))
            if longest + new - 1 > executor.max_seq_len:
                raise InputError(
                    f"a prompt of {longest} tokens and {new} new ones need {longest + new - 1} positions; "
                    f"a sequence has at most {executor.max_seq_len} (max_seq_len)"
                )
            budget = self.limits.budget(tables.windows)
            needed = []
            for group, pool in enumerate(tables.pools):
                needed.append(sum(tables.peak(group, len(t) + new - 1, budget) for t in batch_ids))
                free = pool.num_blocks - sum(r[group] for r in self._reserved.values())
                if needed[group] > free:
                    raise InputError(
                        f"{len(batch_ids)} sequences of up to {longest} tokens with {new} new ones need "
                        f"{needed[group]} pages of {tables.block_size} tokens; the KV cache has {free} to give"
                    )
            pages = self._encoder_pages(states)
            encoded = pages.keep(states) if pages is not None and states is not None else None
            session = Session(self, next(self._numbers), batch_ids, encoded)
            self._reserved[session.number] = needed
            self._sessions.add(session)
            weakref.finalize(
                session, self._lost.append, (session.number, session.sequences, session.encoded)
            ).atexit = False
            return session

    @property
    def masked(self) -> bool:
        """Whether `attention_mask` says which of an encoder's states are seen; only where there is an encoder."""
        return self.executor.encoder is not None and self.executor.encoder.masked

    def refusal(self, lengths: Iterable[int]) -> str | None:
        """Why states of an encoder, of these lengths, cannot be kept now, or None."""
        with self.turn():
            pages = self.executor.encoder
            return "no encoder" if pages is None else pages.refusal(lengths)

    def closed(self, session: Session) -> None:
        """A session gives its pages back."""
        self._reserved.pop(session.number, None)
        self._sessions.discard(session)

    @property
    def stats(self) -> Stats:
        """Numbers for reports."""
        graphs = self.executor.graphs
        return Stats(
            kv_bytes=self.executor.pages.nbytes + (self.executor.encoder.pages.nbytes if self.executor.encoder else 0),
            peak_kv_bytes=self._peak_bytes,
            waste=self._peak.waste,
            preemptions=self._preemptions,
            graphs=len(graphs) if graphs is not None else 0,
            graph_bytes=graphs.held if graphs is not None else 0,
        )

    # -- order ------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """Nobody else uses the engine meanwhile; what comes later on another stream comes later on the device too."""
        with self._lock, torch.inference_mode(False), torch.no_grad(), _on(self.executor.device):
            if self._running is not None:
                raise RegraftError("the engine was used from within on_token of one of its calls")
            if self._last is not None:
                self._last.wait()
            while self._lost:
                number, sequences, encoded = self._lost.popleft()
                if self._reserved.pop(number, None) is not None:
                    self.executor.release(sequences)
                    for sequence in sequences:
                        self.executor.tables.release(sequence)
                    if self.executor.encoder is not None:
                        self.executor.encoder.give_back(encoded)
            try:
                yield
            except BaseException as error:
                if self._running is not None or not isinstance(error, InputError):
                    self._recover()
                raise
            finally:
                self._running = None
                if self.executor.device.type == "cuda":
                    if self._last is None:
                        self._last = torch.cuda.Event()
                    self._last.record()

    def _recover(self) -> None:
        """Whatever was interrupted where: afterwards only open sessions hold pages, and nothing can be found."""
        self.executor.forget()
        sessions = list(self._sessions)
        self._lost.clear()
        self._reserved = {s.number: self._reserved[s.number] for s in sessions if s.number in self._reserved}
        self.executor.tables.rebuild([q for s in sessions for q in s.sequences])
        if self.executor.encoder is not None:
            self.executor.encoder.rebuild(e for s in sessions for e in s.encoded)

    def _look_at_weights(self) -> None:
        """Pages written with other weights are not shared."""
        now = self.executor.flat.fingerprint()
        if now != self._weights:
            self._weights = now
            for pool in self.executor.tables.pools:
                pool.forget_all()

    def look(self, call: Call | None = None) -> None:
        """Note what is held, and under `REGRAFT_LOGS=pages` check every table."""
        tables = self.executor.tables
        held = sum(p.used * b for p, b in zip(tables.pools, self.executor.block_bytes))
        checked = asked_for("pages")
        if not checked and held <= self._peak_bytes + (self._peak_bytes >> 5):
            return
        sequences = [s for session in list(self._sessions) for s in session.sequences]
        running = call if call is not None else self._running
        if running is not None:
            sequences += running.scheduler.running
        if held > self._peak_bytes:
            self._peak, self._peak_bytes = tables.use(sequences), held
        if checked:
            tables.check(sequences)
            log.info("%s pages held by %d sequences", "+".join(str(p.used) for p in tables.pools), len(sequences))


def _on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """While this device is the current one."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
