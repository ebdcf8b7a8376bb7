"""HuggingFace's prepared logits processors as `SamplingParams`, where they can be said that way."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor
from transformers.generation import logits_process as hf

from .params import SamplingParams


class Untranslated(Exception):
    """Names what only HuggingFace's own loop can do."""


def _ids(tokens: Tensor) -> tuple[int, ...]:
    return tuple(int(token) for token in tokens.flatten().tolist())


def _words(processor: Any) -> tuple[tuple[tuple[int, ...], float], ...]:
    return tuple((tuple(int(t) for t in tokens), float(bias)) for tokens, bias in processor.sequence_bias.items())


def _length(p: Any) -> dict[str, Any]:
    return {"min_length": p.min_length, "eos": _ids(p.eos_token_id)}


def _new_length(p: Any) -> dict[str, Any]:
    return {"min_length": p.prompt_length_to_skip + p.min_new_tokens, "eos": _ids(p.eos_token_id)}


def _penalty(p: Any) -> dict[str, Any]:
    return {"repetition_penalty": p.penalty, "repetition_skip": p.prompt_ignore_length or 0}


def _forced_eos(p: Any) -> dict[str, Any]:
    return {"forced_eos": _ids(p.eos_token_id), "forced_eos_length": p.max_length}


def _begin(p: Any) -> dict[str, Any]:
    return {"begin_suppress": _ids(p.begin_suppress_tokens), "begin_length": p.begin_index}


KNOWN: dict[type, Callable[[Any], dict[str, Any]]] = {
    hf.SequenceBiasLogitsProcessor: lambda p: {"sequence_bias": _words(p)},
    hf.RepetitionPenaltyLogitsProcessor: _penalty,
    hf.NoRepeatNGramLogitsProcessor: lambda p: {"no_repeat_ngram_size": p.ngram_size},
    hf.NoBadWordsLogitsProcessor: lambda p: {"bad_words": _words(p)},
    hf.MinLengthLogitsProcessor: _length,
    hf.MinNewTokensLengthLogitsProcessor: _new_length,
    hf.ForcedBOSTokenLogitsProcessor: lambda p: {"forced_bos": p.bos_token_id},
    hf.ForcedEOSTokenLogitsProcessor: _forced_eos,
    hf.InfNanRemoveLogitsProcessor: lambda p: {"remove_invalid": True},
    hf.SuppressTokensLogitsProcessor: lambda p: {"suppress": _ids(p.suppress_tokens)},
    hf.SuppressTokensAtBeginLogitsProcessor: _begin,
    hf.TemperatureLogitsWarper: lambda p: {"temperature": p.temperature},
    hf.TopKLogitsWarper: lambda p: {"top_k": p.top_k},
    hf.TopPLogitsWarper: lambda p: {"top_p": p.top_p},
    hf.MinPLogitsWarper: lambda p: {"min_p": p.min_p},
    hf.TypicalLogitsWarper: lambda p: {"typical_p": p.mass},
    hf.EpsilonLogitsWarper: lambda p: {"epsilon_cutoff": p.epsilon},
    hf.EtaLogitsWarper: lambda p: {"eta_cutoff": float(p.epsilon)},
    hf.LogitNormalization: lambda p: {"renormalize": True},
}
"""What each processor says, in the order in which `SamplingParams` acts."""
ORDER = {kind: place for place, kind in enumerate(KNOWN)}


def translate(processors: Iterable[Any], do_sample: bool) -> SamplingParams:
    """The settings that processors stand for; seed and padding are the caller's.

    Raises:
        Untranslated: a processor that is not known, or known ones in another order or with settings of their own.
    """
    settings: dict[str, Any] = {"do_sample": do_sample}
    before = -1
    for processor in processors:
        kind = type(processor)
        name = kind.__name__
        if kind not in KNOWN:
            raise Untranslated(f"the logits processor {name}")
        if ORDER[kind] <= before:
            raise Untranslated(f"the logits processor {name} behind others that HuggingFace puts after it")
        before = ORDER[kind]
        if getattr(processor, "filter_value", float("-inf")) != float("-inf"):
            raise Untranslated(f"the logits processor {name} with a filter_value of its own")
        if getattr(processor, "min_tokens_to_keep", 1) != 1:
            raise Untranslated(f"the logits processor {name} with min_tokens_to_keep")
        said = KNOWN[kind](processor)
        if "eos" in said and "eos" in settings:  # min_length beside min_new_tokens: until both are reached
            if said["eos"] != settings["eos"]:
                raise Untranslated(f"the logits processor {name} with other eos tokens than the one before it")
            said["min_length"] = max(said["min_length"], settings["min_length"])
        settings.update(said)
    try:
        return SamplingParams(**settings)
    except ValueError as error:
        raise Untranslated(f"a setting that is out of range ({error})") from error
