"""Example arguments for tracing, and which of their dimensions may vary.

A traced graph must not remember that a size was 1: sizes of 1 that may vary are enlarged before tracing. Which
dimensions may vary is proposed here from shapes and dtypes alone, boldest first; tracing itself says which of them a
weight or the model's code pins down.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

BATCH = 2
LENGTH = 5
"""Example sizes in place of 1."""


def enlarge(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors with a batch of 1 repeated to `BATCH`, and a length of 1 to `LENGTH`.

    The batch is dimension 0, where all inputs of rank 2 or more have 1 there. The length is dimension 1 of inputs of
    rank 2 and 3, and dimensions 2 and 3 of a mask of rank 4.
    """
    ranked = [t for t in tensors.values() if t.dim() >= 2]
    grow_batch = bool(ranked) and all(t.shape[0] == 1 for t in ranked)
    out = {}
    for name, tensor in tensors.items():
        repeats = [1] * tensor.dim()
        if grow_batch and (tensor.dim() >= 2 or tensor.shape == (1,)):
            repeats[0] = BATCH
        for dim in _length_dims(tensor):
            if tensor.shape[dim] == 1:
                repeats[dim] = LENGTH
        out[name] = tensor.repeat(repeats) if any(r != 1 for r in repeats) else tensor
    return out


def _length_dims(tensor: Tensor) -> tuple[int, ...]:
    if tensor.dim() in (2, 3):
        return (1,)
    if _is_mask4(tensor):
        return (2, 3)
    return ()


def _is_mask4(tensor: Tensor) -> bool:
    """`[B, 1, Q, K]` or `[B, H, Q, K]`: of rank 4 and not an image."""
    return tensor.dim() == 4 and (not tensor.is_floating_point() or tensor.shape[1] == 1)


def proposals(tensors: dict[str, Tensor]) -> Iterator[dict[str, tuple[int, ...]]]:
    """For each input the dimensions that may vary: all plausible, then fewer, at last none."""
    seen: list[dict[str, tuple[int, ...]]] = []
    lengths = {t.shape[1] for t in tensors.values() if t.dim() == 2 and _integral(t)}

    def with_tokens(tensor: Tensor) -> tuple[int, ...]:
        """Of a mask `[B, N, ...]` that goes by the tokens `[B, N]`, the number of tokens, too."""
        dims = _plausible(tensor)
        goes_by_tokens = tensor.dim() >= 3 and _integral(tensor) and tensor.shape[1] in lengths
        return tuple(sorted({*dims, 1})) if goes_by_tokens else dims

    for plan in (with_tokens, _plausible, _integers_only, _batch_only, _nothing):
        dims = {n: tuple(d for d in plan(t) if t.shape[d] > 1) for n, t in tensors.items()}
        if dims not in seen:
            seen.append(dims)
            yield dims


def _plausible(tensor: Tensor) -> tuple[int, ...]:
    if tensor.dim() <= 3:
        return tuple(range(tensor.dim()))
    return (0, 2, 3) if _is_mask4(tensor) else (0,)


def _integers_only(tensor: Tensor) -> tuple[int, ...]:
    return (0,) if tensor.is_floating_point() and tensor.dim() else _plausible(tensor)


def _batch_only(tensor: Tensor) -> tuple[int, ...]:
    return (0,) if tensor.dim() else ()


def _nothing(tensor: Tensor) -> tuple[int, ...]:
    return ()


def same_batch(tensors: dict[str, Tensor], dims: dict[str, tuple[int, ...]]) -> list[str]:
    """Inputs whose dimension 0 varies and is the same size as that of the first such input: one batch."""
    names = [n for n in tensors if 0 in dims[n] and tensors[n].dim() >= 1]
    return [n for n in names if tensors[n].shape[0] == tensors[names[0]].shape[0]]


def same_length(tensors: dict[str, Tensor], dims: dict[str, tuple[int, ...]]) -> list[tuple[str, str]]:
    """Pairs of inputs whose dimension 1 is one length: a mask (rank 2, zeros and ones) and the tokens it is for.

    transformers would take a longer mask and ignore its end; a graph whose mask has a length of its own is harder to
    improve, and nobody calls it so.
    """
    rows = {n: t for n, t in tensors.items() if t.dim() in (2, 3) and 1 in dims[n] and (t.dim() == 3 or _integral(t))}
    masks = [n for n, t in rows.items() if t.dim() == 2 and not t.is_meta and bool(((t == 0) | (t == 1)).all())]
    pairs = []
    for mask in masks:
        same = [n for n, t in rows.items() if n != mask and t.shape[1] == tensors[mask].shape[1]]
        partner = next((n for n in same if n not in masks), next(iter(same), None))
        if partner is not None:
            pairs.append((mask, partner))
    return pairs


def _integral(tensor: Tensor) -> bool:
    return not tensor.is_floating_point()


def on_device(tensors: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """The tensors where the weights are, laid out densely: strides of an example would become conditions of the graph.

    On meta they are shapes only.
    """
    return {n: (t if t.device == device else t.to(device)).contiguous() for n, t in tensors.items()}
