"""A small model of two attentions over pages, one of them with a window, in place of a compiled flat program."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from regraft.compiler.program import LayerSpec
from regraft.kernels.paged_attention import paged_attention
from regraft.runtime.decoding.flat import Step

VOCAB, DIM, WINDOW = 61, 8, 20


class TinyFlat:
    """Behaves as `FlatProgram` does."""

    encoder = None
    token_bytes = 8 * DIM

    def __init__(self, device: str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        windows = (-1, WINDOW)
        made = torch.Generator().manual_seed(7)
        self.layers = tuple(LayerSpec(2, DIM, DIM, left, group, dtype) for group, left in enumerate(windows))
        self.groups, self.vocab, self.version = windows, VOCAB, 0
        self.max_positions = self.tabulated = None
        self.embedding = torch.randn(VOCAB, 2 * DIM, generator=made).to(device, dtype)
        self.places = torch.randn(2200, 2 * DIM, generator=made).to(device, dtype)
        self.head = torch.randn(2 * DIM, VOCAB, generator=made).to(device, dtype)
        self.calls = 0
        self.fail_at = -1
        self.pages: Sequence[tuple[Tensor, Tensor]] = ()

    def fingerprint(self) -> Any:
        return self.version

    def bind(self, pages: Sequence[tuple[Tensor, Tensor]], scales: Any = None, encoder: Any = ()) -> None:
        self.pages = pages

    def __call__(self, step: Step) -> Tensor:
        self.calls += 1
        if self.calls == self.fail_at:
            raise ValueError("something went wrong")
        x = self.embedding[step.input_ids[0]] + self.places[step.position_ids[0]]
        for layer, (k_pages, v_pages) in zip(self.layers, self.pages):
            rows = x.unflatten(-1, (2, DIM))
            x = x + paged_attention(
                rows,
                rows,
                -rows,
                k_pages,
                v_pages,
                step.slots[layer.group],
                step.cu_seqlens_q,
                step.lengths,
                step.tables[layer.group],
                step.max_q,
                scale=0.3,
                left=layer.left,
            ).flatten(1)
        return x[step.rows] @ self.head

    def lone(self, tokens: list[int]) -> Tensor:
        """Logits [V] behind tokens that are alone, without pages, in float64."""
        x = self.embedding.double()[tokens] + self.places.double()[: len(tokens)]
        for layer in self.layers:
            rows = x.unflatten(-1, (2, DIM)).transpose(0, 1)  # [H, T, D]
            scores = 0.3 * rows @ rows.mT
            i = torch.arange(len(tokens), device=x.device)
            seen = i[None] <= i[:, None]
            if layer.left >= 0:
                seen &= i[None] >= i[:, None] - layer.left
            weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
            x = x - (weights @ rows).transpose(0, 1).flatten(1)
        return x[-1] @ self.head.double()

    def greedy(self, tokens: Sequence[int], new: int, stops: frozenset[int] = frozenset()) -> list[int]:
        """The tokens that follow, one at a time."""
        known = list(tokens)
        for _ in range(new):
            known.append(int(self.lone(known).argmax()))
            if known[-1] in stops:
                break
        return known[len(tokens) :]


class Greedy:
    """An epilogue that counts what each row took, to see that rows out of use are left alone."""

    def __init__(self, device: str = "cpu", rows: int = 64) -> None:
        self.graph_key = ()
        self.taken = torch.zeros(rows, dtype=torch.int64, device=device)
        self.owners: dict[int, Any] = {}
        self.log: list[tuple[int, Any]] = []

    def assign(self, row: int, sequence: Any) -> None:
        self.log.append((row, sequence))
        self.owners[row] = sequence
        self.taken[row].fill_(0 if sequence is None else len(sequence.produced))

    def __call__(self, logits: Tensor, active: Tensor) -> Tensor:
        self.taken[: active.shape[0]] += active
        return logits.argmax(-1)


def prompts(count: int, longest: int = 60) -> list[list[int]]:
    """Prompts of all kinds of lengths; every third begins as the one before does."""
    made = torch.Generator().manual_seed(3)
    lengths = torch.randint(1, longest, (count,), generator=made).tolist()
    found = [torch.randint(0, VOCAB, (n,), generator=made).tolist() for n in lengths]
    for i, (before, here) in enumerate(itertools.pairwise(list(found))):
        if i % 3 == 0:
            found[i + 1] = before[: len(before) // 2] + here
    return found
