"""The sizes of a call by which the measured tables choose, by op."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final

from torch import Tensor

from .norm_products import JOINT, NORM

Features = dict[str, int]


def _rows(x: Tensor) -> int:
    return math.prod(x.shape[:-1])


def _row_op(args: Sequence[Any]) -> Features:
    """rows, D = last dimension, bytes of an element."""
    x = args[0]
    return {"rows": _rows(x), "D": x.shape[-1], "bytes": x.element_size()}


def _attention(args: Sequence[Any]) -> Features:
    """B, H, BH = both, G (query heads for each kv head), Q, K, D, DV, bytes, kv = MiB of keys and values.

    The rest are 0 or 1.
    """
    q, k, v, mask, bias, key_mask, sinks, _, left, right, softcap = args[:11]
    return {
        "B": q.shape[0],
        "H": q.shape[1],
        "BH": q.shape[0] * q.shape[1],
        "G": q.shape[1] // k.shape[1],
        "Q": q.shape[2],
        "K": k.shape[2],
        "D": q.shape[3],
        "DV": v.shape[3],
        "bytes": q.element_size(),
        "kv": math.prod(k.shape[:3]) * (k.shape[3] + v.shape[3]) * k.element_size() >> 20,
        "causal": int(right == 0),
        "shifted": int(right == 0 and q.shape[2] != k.shape[2]),
        "window": int(left >= 0),
        "softcap": int(softcap != 0.0),
        "mask": int(mask is not None),
        "bias": int(bias is not None),
        "keys": int(key_mask is not None),
        "sinks": int(sinks is not None),
    }


def _varlen_attention(args: Sequence[Any]) -> Features:
    """T rows of q, R of a sequence on average (rounded down), H, G, D, DV, bytes; paged and window are 0 or 1."""
    q, k, v, ends, _, _, _, table = args[:8]
    return {
        "T": q.shape[0],
        "R": q.shape[0] // max(ends.shape[0] - 1, 1),
        "H": q.shape[1],
        "G": q.shape[1] // k.shape[-2],
        "D": q.shape[2],
        "DV": v.shape[-1],
        "bytes": q.element_size(),
        "paged": int(table is not None),
        "window": int(args[10] >= 0),
    }


def _paged_attention(args: Sequence[Any]) -> Features:
    """T rows of q, S sequences, H, G, D, DV, bytes; window and fresh are 0 or 1."""
    q, k, v = args[:3]
    return {
        "T": q.shape[0],
        "S": args[7].shape[0],
        "H": q.shape[1],
        "G": q.shape[1] // k.shape[1],
        "D": q.shape[2],
        "DV": v.shape[2],
        "bytes": q.element_size(),
        "window": int(args[15] >= 0),
        "fresh": int(args[17]),
    }


def _linear(args: Sequence[Any]) -> Features:
    """M rows of x, weight N x K (both halves of a gated one), bytes; bias 0 or 1.

    whole: 1 where a row of N numbers takes a multiple of 16 bytes.
    """
    x, weight, bias = args[:3]
    n, k = weight.shape
    size = x.element_size()
    whole = int(n * size % 16 == 0)
    return {"M": _rows(x), "N": n, "K": k, "bytes": size, "bias": int(bias is not None), "whole": whole}


def _linear_act(args: Sequence[Any]) -> Features:
    """And act: 1 with an activation, which is then a kernel less."""
    return {**_linear(args), "act": int(args[3] != "identity")}


def _qkv_rope(args: Sequence[Any]) -> Features:
    """And D: columns of a head where heads are rotated whole, in two halves; otherwise 0. norm: 0 or 1.

    piece: the largest power of two up to 64 that divides half of such heads, where there are no other columns.
    """
    linear = _linear(args)
    cos, head, norm, layout = args[3], args[9], args[10], args[14]
    half = head // 2 if cos.shape[-1] == head and layout == "half" else 0
    piece = min(half & -half, 64) if half and linear["N"] % head == 0 else 0
    return {**linear, "D": 2 * half, "norm": int(norm), "piece": piece}


def _experts(args: Sequence[Any]) -> Features:
    """T tokens, D = width, E experts, R = rows of an expert on average (rounded up), bytes."""
    x, index, experts = args[0], args[1], args[3].shape[0]
    rows = -(-index.numel() // experts)
    return {"T": _rows(x), "D": x.shape[-1], "E": experts, "R": rows, "bytes": x.element_size()}


def _behind_norm(args: Sequence[Any]) -> Features:
    """As the product behind the norm."""
    return _linear((args[0], *args[NORM:]))


_BY_OP: Final[Mapping[str, Callable[[Sequence[Any]], Features]]] = MappingProxyType(
    {
        "attention": _attention,
        "varlen_attention": _varlen_attention,
        "paged_attention": _paged_attention,
        "linear_act": _linear_act,
        "gate_up": _linear,
        "qkv_rope": _qkv_rope,
        "moe_experts": _experts,
        **dict.fromkeys((op.name for op in JOINT.values()), _behind_norm),
    }
)


def features_of(op: str, args: Sequence[Any]) -> Features:
    """The features of a call of that op, all its arguments given by position; row ops have rows, D and bytes."""
    return _BY_OP.get(op, _row_op)(args)
