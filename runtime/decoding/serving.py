"""The engine of an optimized model, as `generate` asks for it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicCache

from ...compiler.program import LayerSpec
from ..checks import device_of
from ..dispatch import Dispatch
from .beside import Keeps
from .engine import Engine
from .flat import FlatProgram, Unserved, flat_program
from .generate import Generate, Serves
from .memory import Limits
from .requests import Request
from .sampling import Sampler
from .session import Session

log = logging.getLogger("regraft")


class Paged:
    """An engine with its sampler, whose CUDA graphs serve again in later calls."""

    def __init__(self, flat: FlatProgram, model: Any, limits: Limits) -> None:
        device = device_of(model)
        length = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        self.flat, self.limits = flat, limits
        self.longest = length if limits.max_seq_len is None and flat.max_positions is None else None
        """Of the model, where nothing but its config bounds a sequence: HuggingFace goes on with a warning."""
        self.remembered = remembered(model.config, flat.layers)
        self.engine = Engine(flat, device, limits, length)
        self.sampler = Sampler(flat.vocab, device, rows=limits.max_batch_size)

    @property
    def rows(self) -> int:
        """The most sequences that go on in step."""
        return self.limits.max_batch_size

    @property
    def counts_padding(self) -> bool:
        """Whether the model gives tokens behind padding other positions than they have alone."""
        return self.flat.counts_padding

    @property
    def uncounted(self) -> int | None:
        """Tokens of this number are no positions for the model, in a prompt."""
        return self.flat.uncounted

    @property
    def encoder(self) -> Keeps | None:
        """What keeps an encoder's states, where the model has one."""
        return self.engine if self.flat.encoder is not None else None

    def run(
        self,
        requests: list[Request],
        on_token: Callable[[int, int], None] | None = None,
        states: list[Tensor] | None = None,
    ) -> list[list[int]]:
        """The output of each request, in order; more of them than there are rows wait for their turn."""
        return self.engine.run(requests, self.sampler, on_token, states=states)

    def session(self, batch_ids: list[list[int]], max_new_tokens: int, states: list[Tensor] | None = None) -> Session:
        """A batch that goes on in step."""
        return self.engine.session(batch_ids, max_new_tokens, states)


def remembered(config: Any, layers: Sequence[LayerSpec]) -> int | None:
    """The most columns for which transformers' cache holds all keys that `layers` see; None: for any number.

    It forgets what lies behind the window of a config, also where the model's masks have no window: a step of decoding
    then sees fewer keys than a forward over the whole sequence does, and pages would hold them all.
    """
    made = DynamicCache(config=config.get_text_config(decoder=True)).layers
    kept = [getattr(layer, "sliding_window", None) for layer in made]
    pairs = zip(kept, layers, strict=False)  # fewer where layers share one
    return min((w for w, layer in pairs if w is not None and not 0 <= layer.left < w), default=None)


def paged_of(model: Any) -> Paged | None:
    """The engine that serves `generate` of an optimized model now, or None."""
    generate = model.__dict__.get("generate")
    found = generate.decoding.engine() if isinstance(generate, Generate) else None
    return found if isinstance(found, Paged) else None


class Broken(str):
    """A reason that is not asked for again."""


def make_engine(model: Any, before: Serves | str | None) -> Serves | str:
    """The engine of the model as it is now, `before` where its program is the same, or why it has none.

    Where making one fails in a way that nobody foresaw, the model generates as it did, and the failure is said;
    under `strict` and `on_error="raise"` it is raised.
    """
    if not isinstance(model.__dict__.get("forward"), Dispatch):
        return "another forward, set after optimize"
    if isinstance(before, Broken):
        return before
    try:
        return _engine_of(model, before)
    except Exception as error:
        if model.forward.options.raises:
            raise
        log.debug("%s: no engine", type(model).__name__, exc_info=True)
        return Broken(f"its engine could not be made ({type(error).__name__}: {' '.join(str(error).split())[:200]})")


def _engine_of(model: Any, before: Serves | str | None) -> Serves | str:
    options = model.forward.options
    limits = options.decoding if options.decoding is not None else Limits()
    flat = flat_program(model, limits.kv_dtype)
    if isinstance(flat, Unserved):
        return flat.reason
    if isinstance(before, Paged) and before.flat is flat:
        return before
    return Paged(flat, model, limits)
