"""The epilogue of a decoding step: the next tokens from logits, by the settings of each row, without the host."""

from __future__ import annotations

from collections.abc import Hashable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import warpers
from .noise import add_gumbel
from .settings import FLOATS, INTS, Settings

if TYPE_CHECKING:
    from .sequences import Sequence as Running


class Sampler:
    """An `Epilogue` for requests whose `params` are `SamplingParams`; None is greedy decoding."""

    def __init__(self, vocab: int, device: torch.device | str, rows: int = 8) -> None:
        with torch.inference_mode(False):  # what is made here is written to in later calls
            self.settings = Settings(vocab, device, rows)
        self._arrived: dict[int, Tensor] = {}
        """By number of rows what `argmax` counts in; CUDA graphs hold on to them."""

    @property
    def graph_key(self) -> Hashable:
        """The settings in use, and the generation of the tensors they lie in."""
        features = self.settings.features
        return features, self.settings.version if features else 0

    def assign(self, row: int, sequence: Running | None) -> None:
        """Give `row` to a sequence, or to nobody; see `Epilogue.assign`.

        Raises:
            TypeError: the request's `params` are something else than `SamplingParams`.
        """
        self.settings.assign(row, sequence)

    def __call__(self, logits: Tensor, active: Tensor) -> Tensor:
        """The next tokens, int64 [S]; see `Epilogue.__call__`."""
        if not self.settings.features:
            return self._argmax(logits)
        rows = logits.shape[0]
        scores = self.scores(logits)
        n = {name: self.settings.ints[:rows, i] for i, name in enumerate(INTS)}
        if "do_sample" in self.settings.features:
            scores = add_gumbel(scores, n["seed"], n["step"], n["drawn"].bool())
        tokens = self._argmax(scores)
        self._take(tokens, active, n["step"], n["length"])
        return tokens

    def _argmax(self, scores: Tensor) -> Tensor:
        """Of equal ones the first, in every dtype what it is in float32."""
        if scores.is_cuda:
            from ...kernels import argmax_triton  # Triton is not there on every platform

            if argmax_triton.supports(scores):
                rows = scores.shape[0]
                if rows not in self._arrived:
                    self._arrived[rows] = torch.zeros(rows, dtype=torch.int32, device=scores.device)
                return argmax_triton.argmax(scores, self._arrived[rows])
        return scores.argmax(-1)

    def _take(self, tokens: Tensor, active: Tensor, step: Tensor, length: Tensor) -> None:
        """The rows that are active have these tokens from now on."""
        rows, history = tokens.shape[0], self.settings.history
        token, one = tokens[:, None], active[:, None]
        if "repetition_penalty" in self.settings.features:
            seen = self.settings.masks["seen"][:rows]
            seen.scatter_(1, token, seen.gather(1, token) | one)
        if history.shape[1]:
            at = length[:, None].clamp(max=history.shape[1] - 1)
            history[:rows].scatter_(1, at, torch.where(one, token, history[:rows].gather(1, at)))
        step += active
        length += active

    def scores(self, logits: Tensor) -> Tensor:
        """What the processors make of `logits` [S, V]: float32 [S, V]."""
        settings, rows = self.settings, logits.shape[0]
        on = settings.features
        f = {name: settings.floats[:rows, i : i + 1] for i, name in enumerate(FLOATS)}
        n = {name: settings.ints[:rows, i : i + 1] for i, name in enumerate(INTS)}
        masks = {name: mask[:rows] for name, mask in settings.masks.items()}
        scores = logits.to(torch.float32)
        if "sequence_bias" in on:
            scores = self._biased("sequence_bias", scores, n["length"])
        if "repetition_penalty" in on:
            scores = warpers.repetition_penalty(scores, f["repetition_penalty"], masks["seen"])
        most = settings.largest("ngram")
        if most:
            history, size = settings.history[:rows], n["no_repeat_ngram_size"]
            scores = warpers.forbid(scores, warpers.repeated(history, n["length"], size, most, settings.vocab))
        if "bad_words" in on:
            scores = self._biased("bad_words", scores, n["length"])
        if "min_length" in on:
            scores = warpers.forbid(scores, masks["eos"] & (n["length"] < n["min_length"]))
        if "forced_bos" in on:
            scores = warpers.only(scores, masks["bos"], (n["length"] == 1) & (n["forced_bos"] > 0))
        if "forced_eos" in on:
            scores = warpers.only(scores, masks["forced_eos"], n["length"] == n["forced_eos_length"] - 1)
        if "remove_invalid" in on:
            scores = warpers.remove_invalid(scores, n["remove_invalid"] > 0)
        if "suppress" in on:
            scores = warpers.forbid(scores, masks["suppress"])
        if "begin_suppress" in on:
            scores = warpers.forbid(scores, masks["begin_suppress"] & (n["length"] == n["begin_length"]))
        if "temperature" in on:
            scores = scores / f["temperature"]
        most = settings.largest("top_k")
        if most:
            scores = warpers.top_k(scores, n["top_k"], most)
        if "top_p" in on:
            scores = warpers.top_p(scores, f["rest_p"])
        if "min_p" in on:
            scores = warpers.min_p(scores, f["min_p"])
        if "typical_p" in on:
            scores = warpers.typical_p(scores, f["typical_p"])
        if "epsilon_cutoff" in on:
            scores = warpers.epsilon_cutoff(scores, f["epsilon_cutoff"])
        if "eta_cutoff" in on:
            scores = warpers.eta_cutoff(scores, f["eta_cutoff"])
        return scores.log_softmax(-1) if "renormalize" in on else scores

    def _biased(self, name: str, scores: Tensor, length: Tensor) -> Tensor:
        rows, words = scores.shape[0], self.settings.words[name]
        tokens, sizes, values = (tensor[:rows] for tensor in words.tensors)
        return warpers.word_bias(scores, tokens, sizes, values, self.settings.history[:rows], length)
