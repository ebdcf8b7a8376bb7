"""How the next token of one sequence is chosen: the settings of HuggingFace's logits processors, as plain data."""

from __future__ import annotations

import functools
from dataclasses import dataclass, fields

Bias = tuple[tuple[int, ...], float]
"""`(tokens, bias)`: the last of `tokens` gets the bias where the others were the latest tokens (`sequence_bias`)."""

BY_THEMSELVES = (
    "sequence_bias",
    "repetition_penalty",
    "bad_words",
    "forced_bos",
    "forced_eos",
    "remove_invalid",
    "suppress",
    "begin_suppress",
    "do_sample",
    "temperature",
    "top_p",
    "min_p",
    "typical_p",
    "epsilon_cutoff",
    "eta_cutoff",
    "renormalize",
)
"""Settings that are a feature under their own name, where they are not the default."""


@dataclass(frozen=True)
class SamplingParams:
    """The settings of one sequence; the defaults are greedy decoding. Lengths count tokens, `padding` included.

    The settings act in the order in which HuggingFace prepares its processors, which is that of the fields.
    """

    sequence_bias: tuple[Bias, ...] = ()
    repetition_penalty: float = 1.0
    repetition_skip: int = 0
    """The first tokens that carry no penalty (`prompt_ignore_length`)."""
    no_repeat_ngram_size: int = 0
    bad_words: tuple[Bias, ...] = ()
    min_length: int = 0
    """No token of `eos` before the sequence has that many."""
    eos: tuple[int, ...] = ()
    forced_bos: int | None = None
    forced_eos: tuple[int, ...] = ()
    forced_eos_length: int = 0
    """With `forced_eos`: the length at which one of these tokens must come, so that it is the last."""
    remove_invalid: bool = False
    suppress: tuple[int, ...] = ()
    begin_suppress: tuple[int, ...] = ()
    begin_length: int = 0
    """The length at which no token of `begin_suppress` may come."""
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    epsilon_cutoff: float = 0.0
    eta_cutoff: float = 0.0
    renormalize: bool = False
    seed: int = 0
    """Of this sequence alone: its tokens do not depend on which others are in the batch."""
    padding: tuple[int, ...] = ()
    """Tokens that processors see before the prompt though the model does not: left padding."""

    def __post_init__(self) -> None:
        for name in ("temperature", "repetition_penalty"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)}: it has to be above 0")
        for name in ("top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)}: it has to be between 0 and 1")
        for name in ("top_k", "no_repeat_ngram_size", "repetition_skip", "min_length"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)}: it must not be negative")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed={self.seed}: it has to be a non-negative 63-bit integer")

    @functools.cached_property
    def features(self) -> frozenset[str]:
        """Names of the settings that do something: what a sampler must be made for. Sizes of top_k come in powers."""
        found = {name for name in BY_THEMSELVES if getattr(self, name) != _DEFAULTS[name]}
        if self.min_length > len(self.padding) and self.eos:
            found.add("min_length")
        if self.top_k:
            found.add(f"top_k:{max(64, 1 << (self.top_k - 1).bit_length())}")
        if self.no_repeat_ngram_size:
            found.add(f"ngram:{self.no_repeat_ngram_size}")
        return frozenset(found)


_DEFAULTS = {field.name: field.default for field in fields(SamplingParams)}
