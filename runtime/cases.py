"""The batches that original and graph are compared on: as given, padded left, padded right, of a second shape.

Only real rows count: what a model computes at padding is nobody's business, and eager and fused attention differ there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

PADDED_LEFT = "padded left"
LENGTHWISE = ("input_ids", "inputs_embeds", "attention_mask", "token_type_ids", "position_ids")


@dataclass(frozen=True)
class Case:
    """One batch; `rows` marks its real tokens, where the outputs have one row a token."""

    name: str
    tensors: dict[str, torch.Tensor]
    rows: torch.Tensor | None

    def real(self, name: str, output: torch.Tensor) -> torch.Tensor:
        """The real rows of `[B, S, ...]`, of keys and values `[B, H, S, D]`, of N states `[N, B, S, D]`; else all.

        An output with fewer rows than tokens (`logits_to_keep`, a sliding window's cache) has the last ones.
        """
        rows = self.rows
        if rows is None or bool(rows.all()) or output.ndim < 2:
            return output
        if output.ndim == 4 and output.shape[0] != rows.shape[0] and output.shape[1:3] == rows.shape:
            return output[:, rows.to(output.device)]
        if output.shape[0] != rows.shape[0]:
            return output
        if name.endswith((".keys", ".values")) and output.ndim == 4:
            output = output.transpose(1, 2)
        length, tokens = output.shape[1], rows.shape[1]
        if length > tokens or (length < tokens and output.ndim < 3):
            return output
        return output[rows[:, tokens - length :].to(output.device)]

    def alone(self) -> dict[str, Any] | None:
        """The first sequence without its padding, a batch of its own; None where nothing says which tokens are real."""
        if self.rows is None or not self.rows.any(1)[0]:
            return None
        first = {n: t[:1] for n, t in self.tensors.items()}
        return {n: t[:, self.rows[0]] if by_tokens(n) and t.ndim >= 2 else t for n, t in first.items()}


def make_cases(
    tensors: Mapping[str, torch.Tensor], encoder_decoder: bool = False, pad_token: int | None = None
) -> list[Case]:
    """Variants of one call. A variant the original refuses is left out by the caller."""
    given = dict(tensors)
    cases = [_case("as given", given, encoder_decoder)]
    mask = given.get("attention_mask")
    if mask is not None and mask.ndim == 2 and mask.shape[1] >= 4 and bool((mask == 1).all()):
        for name, left in ((PADDED_LEFT, True), ("padded right", False)):
            padded = given | {"attention_mask": _padded(mask, left=left)}
            if pad_token is not None and "input_ids" in padded:
                padded["input_ids"] = padded["input_ids"].masked_fill(padded["attention_mask"] == 0, pad_token)
            cases.append(_case(name, padded, encoder_decoder))
    second = _second_shape(given)
    if second is not None:
        cases.append(_case("second shape", second, encoder_decoder))
    return cases


def _case(name: str, tensors: dict[str, torch.Tensor], encoder_decoder: bool) -> Case:
    mask = tensors.get("decoder_attention_mask" if encoder_decoder else "attention_mask")
    rows = mask != 0 if mask is not None and mask.ndim == 2 and bool((mask >= 0).all()) else None  # not an added mask
    return Case(name, tensors, rows)


def _padded(mask: torch.Tensor, *, left: bool) -> torch.Tensor:
    """Every row but the last loses a few tokens, each row another number."""
    out = mask.clone()
    batch, length = mask.shape
    for row in range(max(1, batch - 1)):
        pad = 1 + row % max(1, length // 3)
        if left:
            out[row, :pad] = 0
        else:
            out[row, length - pad :] = 0
    return out


def _second_shape(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor] | None:
    """One row of the batch and, of what goes by tokens, another length."""
    lengths = {t.shape[1] for n, t in tensors.items() if by_tokens(n) and t.ndim >= 2}
    batches = {t.shape[0] for t in tensors.values() if t.ndim >= 1}
    if len(batches) != 1 or not lengths:
        return None
    out = {}
    for name, tensor in tensors.items():
        out[name] = tensor[:1]
        if by_tokens(name) and tensor.ndim >= 2 and tensor.shape[1] > 4:
            out[name] = out[name][:, : tensor.shape[1] - 3]
        out[name] = out[name].contiguous()
    return out


def by_tokens(name: str) -> bool:
    """Whether dimension 1 of this argument counts tokens."""
    return name.removeprefix("decoder_") in LENGTHWISE
