"""What the runtime did to a model, as data; the report is written from it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ..compiler.expected import Expectation
from ..compiler.program import Note
from ..compiler.records import PassResult, Reverted
from .certificate import Certificate


@dataclass
class SignatureRecord:
    """One signature: which arguments, and what became of it."""

    arguments: str
    """`input_ids int64[2], attention_mask int64[2], use_cache=True`: dtype and rank of tensors."""
    served: bool
    reason: str = ""
    """Why the original serves it."""
    passes: list[PassResult] = field(default_factory=list)
    certificate: Certificate | None = None
    notes: list[Note] = field(default_factory=list)
    reverted: list[Reverted] = field(default_factory=list)
    """Rewrites taken back because of the certificate; those a site check caught stand in `passes`."""
    seconds: dict[str, float] = field(default_factory=dict)
    """`capture`, `compile`, `pack`, `certificate`."""
    program: Any = None
    """The rewritten program; left out of copies and pickles, which capture anew."""
    captured: Any = None
    """The program before the passes; left out like `program`."""
    retrace: Callable[[], list[PassResult]] | None = None
    """Runs the same passes again and keeps each one's graph as text; left out like `program`."""
    launches: Callable[[], str] | None = None
    """Says whether forwards run by CUDA graphs just now, and if not, why; left out like `program`."""
    expected: tuple[Expectation, ...] = ()
    """What the model should have, against what was found."""

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "program": None, "captured": None, "retrace": None, "launches": None}


@dataclass
class Record:
    """Everything about one optimized model."""

    model: str
    signatures: list[SignatureRecord] = field(default_factory=list)
    calls: dict[str, int] = field(default_factory=lambda: {"graph": 0, "original": 0})
    generated: dict[str, int] = field(default_factory=dict)
    """Calls of `generate`, by the loop that served them."""
    fallbacks: dict[str, int] = field(default_factory=dict)
    """Calls the original served, by reason."""
    notes: list[Note] = field(default_factory=list)
    dtype: str = ""
    device: str = ""
    parameters: int = 0
    options: dict[str, Any] = field(default_factory=dict)
    """Those of `optimize` that are not at their default."""
    ablation: dict[str, Any] | None = None
    """What each fusion contributes: one result of `bench ablate`."""
    generate: dict[str, Any] | None = None
    """How tokens are generated: `paged` with `layers`, `groups` and the check's errors, or the `reason` why not."""
    memory: dict[str, int] = field(default_factory=dict)
    """Bytes: `weights`, `packed_views` (no extra memory), `packed_copies` (extra)."""
