"""HuggingFace's logits processors (transformers/generation/logits_process.py) on rows that each have settings of their
own: the same operations in the same order, without a value read on the host and without shapes that depend on data.
No number of the host is an operand of `torch.where`, which would copy it to the device: a graph cannot capture that.

Scores are float32 [S, V], settings [S, 1]. Each function has a setting at which it changes nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

REMOVED = float("-inf")


def forbid(scores: Tensor, mask: Tensor) -> Tensor:
    """No token of `mask` [S, V] bool."""
    return scores.masked_fill(mask, REMOVED)


def repetition_penalty(scores: Tensor, penalty: Tensor, seen: Tensor) -> Tensor:
    """Tokens that were there, `seen` [S, V] bool, get less likely (arXiv 1909.05858); 1: off."""
    return torch.where(seen, torch.where(scores < 0, scores * penalty, scores / penalty), scores)


def repeated(history: Tensor, length: Tensor, size: Tensor, largest: int, vocab: int) -> Tensor:
    """The tokens that would complete a run of `size` tokens that was there before; bool [S, vocab].

    Args:
        history: int64 [S, N], of which the first `length` [S, 1] are there.
        size: int64 [S, 1], at most `largest`; 0: off.
    """
    rows, most = history.shape
    start = torch.arange(most, device=history.device)[None, :]  # [1, N], first token of an earlier run
    matches = (size > 0) & (start + size <= length)
    for back in range(1, largest):  # the token `back` places before the one that would come
        last = history.gather(1, (length - back).clamp(min=0))  # [S, 1]
        at = (start + size - 1 - back).clamp(0, most - 1)
        matches &= (history.gather(1, at) == last) | (back >= size)
    following = history.gather(1, (start + size - 1).clamp(0, most - 1))
    banned = torch.zeros(rows, vocab + 1, dtype=torch.bool, device=history.device)
    return banned.scatter_(1, following.masked_fill(~matches, vocab), True)[:, :vocab]


def word_bias(scores: Tensor, words: Tensor, sizes: Tensor, values: Tensor, history: Tensor, length: Tensor) -> Tensor:
    """Add to the last token of each word its bias where the tokens before it are the latest.

    Args:
        words: int64 [S, W, N], right-aligned. sizes: int64 [S, W], 0 for no word. values: float32 [S, W].
        history: int64 [S, M], of which the first `length` [S, 1] are there.
    """
    most = words.shape[2]
    matches = (sizes > 0) & (sizes <= length.clamp(min=1))
    for back in range(1, most):
        last = history.gather(1, (length - back).clamp(min=0))  # [S, 1]
        matches &= (words[:, :, most - 1 - back] == last) | (back >= sizes)
    bias = torch.zeros_like(scores)
    bias.scatter_add_(1, words[:, :, -1], values.masked_fill(~matches, 0.0))
    return scores + bias


def only(scores: Tensor, tokens: Tensor, when: Tensor) -> Tensor:
    """Where `when` [S, 1]: score 0 for `tokens` [S, V] bool, and nothing else."""
    return torch.where(when, torch.full_like(scores, REMOVED).masked_fill(tokens, 0.0), scores)


def remove_invalid(scores: Tensor, when: Tensor) -> Tensor:
    """Where `when` [S, 1]: 0 for NaN, and the largest finite numbers for infinities."""
    limits = torch.finfo(scores.dtype)
    return torch.where(when, torch.nan_to_num(scores, nan=0.0, posinf=limits.max, neginf=limits.min), scores)


def top_k(scores: Tensor, k: Tensor, most: int) -> Tensor:
    """Keep scores no smaller than the k-th largest, ties included; k int64 [S, 1], at most `most`; 0: off."""
    largest = scores.topk(min(most, scores.shape[1])).values  # [S, most]
    last = largest.gather(1, (k.clamp(max=largest.shape[1]) - 1).clamp(min=0))
    return forbid(scores, (scores < last) & (k > 0))


def top_p(scores: Tensor, rest: Tensor) -> Tensor:
    """Remove the least likely tokens that have `rest` = 1 - top_p of the mass together (arXiv 1904.09751); -1: off."""
    ordered, index = scores.sort()
    remove = ordered.softmax(-1).cumsum(-1) <= rest
    remove[:, -1].fill_(False)
    return forbid(scores, remove.scatter(1, index, remove))


def min_p(scores: Tensor, least: Tensor) -> Tensor:
    """Remove tokens with less than `least` times the largest probability (arXiv 2407.01082); 0: off."""
    probabilities = scores.softmax(-1)
    largest, index = probabilities.max(-1, keepdim=True)
    return forbid(scores, (probabilities < least * largest).scatter(1, index, False))


def typical_p(scores: Tensor, mass: Tensor) -> Tensor:
    """Keep the tokens of the most typical surprise that have `mass` together (arXiv 2202.00666); 2: off."""
    log_p = scores.log_softmax(-1)
    entropy = -(log_p * log_p.exp()).nansum(-1, keepdim=True)
    ordered, index = (-log_p - entropy).abs().sort()
    enough = (scores.gather(1, index).softmax(-1).cumsum(-1) < mass).sum(1, keepdim=True)
    remove = ordered > ordered.gather(1, enough.clamp(max=scores.shape[1] - 1))
    remove[:, 0].fill_(False)
    return forbid(scores, remove.scatter(1, index, remove) & (mass < 1))


def epsilon_cutoff(scores: Tensor, epsilon: Tensor) -> Tensor:
    """Remove tokens less likely than `epsilon` but for the likeliest (arXiv 2210.15191); 0: off."""
    return forbid(scores, (scores.softmax(-1) < epsilon) & (scores < scores.amax(-1, keepdim=True)))


def eta_cutoff(scores: Tensor, epsilon: Tensor) -> Tensor:
    """`epsilon_cutoff` with a bound that falls with the entropy (the same paper); 0: off."""
    log_p = scores.log_softmax(-1)
    probabilities = log_p.exp()
    entropy = -(probabilities * log_p.clamp(min=torch.finfo(torch.float32).min)).sum(-1, keepdim=True)
    bound = torch.minimum(epsilon, epsilon.sqrt() * torch.exp(-entropy))
    return forbid(scores, (scores.softmax(-1) < bound) & (scores < scores.amax(-1, keepdim=True)))
