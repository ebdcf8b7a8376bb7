"""The settings of every row of a batch as tensors, written when a row gets another sequence.

One captured graph reads them, whatever they are; it needs to be another one only when a tensor was replaced by a larger
one (`version`) or other kinds of settings come into use (`features`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .params import Bias, SamplingParams

if TYPE_CHECKING:
    from .sequences import Sequence as Running

FLOATS = ("temperature", "rest_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "repetition_penalty")
INTS = (
    "seed",
    "step",
    "length",
    "drawn",
    "top_k",
    "no_repeat_ngram_size",
    "min_length",
    "begin_length",
    "forced_bos",
    "forced_eos_length",
    "remove_invalid",
)
MASKS = ("seen", "eos", "suppress", "begin_suppress", "forced_eos", "bos")
"""Sets of tokens, bool [rows, vocab], each made when a row first needs it."""
MASK_OF = {"repetition_penalty": "seen", "min_length": "eos", "forced_bos": "bos"}
"""The mask that a setting needs, where it has not the setting's own name."""
WORDS = ("sequence_bias", "bad_words")


@dataclass
class Words:
    """Biased sequences of tokens of each row, as `warpers.word_bias` takes them."""

    tokens: Tensor
    sizes: Tensor
    values: Tensor

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.tokens, self.sizes, self.values


class Settings:
    """Tensors with a row for each sequence; rows without a sequence, or without settings, hold what changes nothing."""

    def __init__(self, vocab: int, device: torch.device | str, rows: int = 8) -> None:
        self.vocab, self.device = vocab, torch.device(device)
        self.features: frozenset[str] = frozenset()
        """Kinds of settings that some row uses."""
        self.version = 0
        """Counts replacements of tensors that a captured graph reads."""
        self.floats = torch.ones(0, len(FLOATS), device=self.device)
        self.ints = torch.zeros(0, len(INTS), dtype=torch.int64, device=self.device)
        self.history = torch.zeros(0, 0, dtype=torch.int64, device=self.device)
        """Tokens of a row, padding first, where a setting looks at them."""
        self.masks: dict[str, Tensor] = {}
        self.words: dict[str, Words] = {}
        self._params: dict[int, SamplingParams] = {}
        self._rows = 0
        self._grow(rows)

    def largest(self, feature: str) -> int:
        """Of a feature that comes in sizes (`top_k:64`), the largest in use; 0 where it is not."""
        return max((int(f.partition(":")[2]) for f in self.features if f.startswith(f"{feature}:")), default=0)

    def assign(self, row: int, sequence: Running | None) -> None:
        """Give `row` to a sequence, or to nobody; see `Epilogue.assign`.

        Raises:
            TypeError: the request's `params` are something else than `SamplingParams`.
            ValueError: a sequence with a bias has a token beyond the vocabulary.
        """
        if sequence is None:
            self._params.pop(row, None)
            self._in_use()
            return
        params = sequence.request.params
        params = SamplingParams() if params is None else params
        if not isinstance(params, SamplingParams):
            raise TypeError(f"params of a request are {type(params).__name__}, not SamplingParams")
        _check_words(params, self.vocab)
        if row >= self._rows:
            self._grow(row + 1)
        self._params[row] = params
        self._in_use()
        if not self.features:
            return
        history = [*params.padding, *sequence.tokens]
        self._write(row, params, sequence)
        used = {MASK_OF.get(feature, feature) for feature in params.features}
        for name in MASKS:
            if name in used:
                self._write_mask(name, row, _tokens_of(name, params, history))
            elif name in self.masks:
                self.masks[name][row].zero_()
        for name in WORDS:
            if name in used:
                self._write_words(name, row, getattr(params, name))
            elif name in self.words:
                self.words[name].sizes[row].zero_()
        if any(f in WORDS or f.startswith("ngram:") for f in params.features):
            most = len(params.padding) + sequence.prompt_length + sequence.request.max_new_tokens
            self._write_history(row, history, most)

    def _in_use(self) -> None:
        found = frozenset[str]().union(*(p.features for p in self._params.values()))
        if found and not self.features:  # rows that were assigned while nothing was in use were not written
            floats, ints = self._pack(SamplingParams(), 0, 0)
            self.floats.copy_(_upload(floats, torch.float32, self.device).expand_as(self.floats))
            self.ints.copy_(_upload(ints, torch.int64, self.device).expand_as(self.ints))
            for stale in (*self.masks.values(), *(words.sizes for words in self.words.values())):
                stale.zero_()
        self.features = found

    def _pack(self, p: SamplingParams, length: int, step: int) -> tuple[list[float], list[int]]:
        floats = {
            "temperature": p.temperature,
            "rest_p": 1 - p.top_p if p.top_p < 1 else -1.0,
            "min_p": p.min_p,
            "typical_p": p.typical_p if p.typical_p < 1 else 2.0,
            "epsilon_cutoff": p.epsilon_cutoff,
            "eta_cutoff": p.eta_cutoff,
            "repetition_penalty": p.repetition_penalty,
        }
        ints = {
            "seed": p.seed,
            "step": step,
            "length": length,
            "drawn": int(p.do_sample),
            "top_k": min(p.top_k, self.vocab),
            "no_repeat_ngram_size": p.no_repeat_ngram_size,
            "min_length": p.min_length if p.eos else 0,
            "begin_length": p.begin_length if p.begin_suppress else -1,
            "forced_bos": int(p.forced_bos is not None),
            "forced_eos_length": p.forced_eos_length if p.forced_eos else -1,
            "remove_invalid": int(p.remove_invalid),
        }
        return [floats[name] for name in FLOATS], [ints[name] for name in INTS]

    def _write(self, row: int, params: SamplingParams, sequence: Running) -> None:
        length = len(params.padding) + len(sequence.tokens)
        floats, ints = self._pack(params, length, len(sequence.tokens) - sequence.prompt_length)
        self.floats[row].copy_(_upload(floats, torch.float32, self.device), non_blocking=True)
        self.ints[row].copy_(_upload(ints, torch.int64, self.device), non_blocking=True)

    def _write_mask(self, name: str, row: int, tokens: Sequence[int]) -> None:
        if name not in self.masks:
            self.masks[name] = torch.zeros(self._rows, self.vocab, dtype=torch.bool, device=self.device)
            self.version += 1
        mask = self.masks[name][row]
        mask.zero_()
        inside = [t for t in tokens if 0 <= t < self.vocab]
        mask.index_fill_(0, _upload(inside, torch.int64, self.device), True)

    def _write_words(self, name: str, row: int, biases: Sequence[Bias]) -> None:
        count, most = len(biases), max(len(tokens) for tokens, _ in biases)
        words = self.words.get(name)
        if words is None or words.tokens.shape[1] < count or words.tokens.shape[2] < most:
            before = words.tokens.shape[1:] if words is not None else (0, 0)
            shape = (self._rows, max(count, before[0]), max(most, before[1]))
            fresh = Words(
                torch.zeros(shape, dtype=torch.int64, device=self.device),
                torch.zeros(shape[:2], dtype=torch.int64, device=self.device),
                torch.zeros(shape[:2], device=self.device),
            )
            if words is not None:
                fresh.tokens[:, : before[0], shape[2] - before[1] :] = words.tokens
                fresh.sizes[:, : before[0]] = words.sizes
                fresh.values[:, : before[0]] = words.values
            self.words[name] = words = fresh
            self.version += 1
        _, slots, width = words.tokens.shape
        blank = [[0] * width] * (slots - count)
        aligned = [[0] * (width - len(tokens)) + list(tokens) for tokens, _ in biases]
        sizes = [len(tokens) for tokens, _ in biases] + [0] * (slots - count)
        values = [value for _, value in biases] + [0.0] * (slots - count)
        words.tokens[row].copy_(_upload(aligned + blank, torch.int64, self.device), non_blocking=True)
        words.sizes[row].copy_(_upload(sizes, torch.int64, self.device), non_blocking=True)
        words.values[row].copy_(_upload(values, torch.float32, self.device), non_blocking=True)

    def _write_history(self, row: int, tokens: list[int], most: int) -> None:
        if self.history.shape[1] < most:
            width = 1 << (most - 1).bit_length()
            fresh = torch.zeros(self._rows, width, dtype=torch.int64, device=self.device)
            fresh[:, : self.history.shape[1]] = self.history
            self.history = fresh
            self.version += 1
        self.history[row, : len(tokens)].copy_(_upload(tokens, torch.int64, self.device), non_blocking=True)

    def _grow(self, rows: int) -> None:
        before, rows = self._rows, max(8, 1 << (rows - 1).bit_length())
        self.floats, self.ints = _taller(self.floats, rows), _taller(self.ints, rows)
        floats, ints = self._pack(SamplingParams(), 0, 0)
        self.floats[before:] = _upload(floats, torch.float32, self.device)
        self.ints[before:] = _upload(ints, torch.int64, self.device)
        self.history = _taller(self.history, rows)
        self.masks = {name: _taller(mask, rows) for name, mask in self.masks.items()}
        self.words = {n: Words(*(_taller(t, rows) for t in w.tensors)) for n, w in self.words.items()}
        self._rows = rows
        self.version += 1


def _check_words(params: SamplingParams, vocab: int) -> None:
    for name in WORDS:
        beyond = [t for tokens, _ in getattr(params, name) for t in tokens if not 0 <= t < vocab]
        if beyond:
            raise ValueError(f"{name}: the model's vocabulary has {vocab} tokens; {beyond} are beyond it")


def _tokens_of(name: str, params: SamplingParams, history: Sequence[int]) -> Sequence[int]:
    """The set of tokens that a mask holds for a row."""
    if name == "seen":
        return history[params.repetition_skip :]
    if name == "bos":
        return () if params.forced_bos is None else (params.forced_bos,)
    tokens: Sequence[int] = getattr(params, name)
    return tokens


def _upload(data: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    """On the device in the order of the stream, without waiting."""
    host = torch.tensor(data, dtype=dtype, pin_memory=device.type == "cuda")
    return host.to(device, non_blocking=True)


def _taller(tensor: Tensor, rows: int) -> Tensor:
    """The same with more rows, of zeros."""
    fresh = tensor.new_zeros(rows, *tensor.shape[1:])
    fresh[: tensor.shape[0]] = tensor
    return fresh
