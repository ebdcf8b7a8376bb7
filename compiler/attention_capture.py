"""Attention as one op: what transformers' attention registry calls while a model is captured.

The registry hands over q, k, v, a mask and whatever keywords the model has. Which keywords change the result is not a
list kept here but a check: the op is compared with the module's own eager attention under the same keywords, in fp64,
on random q, k and v, once with small scores and once with scores large enough that a cap bites. A module whose
attention the op does not reproduce keeps its own, and a note says so.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels import attention as _attention  # noqa: F401  (registers regraft::attention)
from .errors import first_lines
from .program import Note

Attend = Callable[..., tuple[Tensor, Tensor | None]]

_SCORE_SIZES = (1.0, 40.0)
"""Standard deviations of the scores under which the op is compared: typical ones, and ones that reach a softcap."""
_LONGEST = 48
"""Rows and keys of the comparison."""
_MANY_SCORES = 1 << 28
"""Above it, a concrete run computes the scores head by head."""
_TOLERANCE = 1e-4
"""The comparison runs in fp64, but many models do the softmax in fp32 whatever they are given; a keyword that was
dropped changes the result by far more."""


def op_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, **keywords: Any) -> Tensor:
    """The arguments of an attention function of transformers, given to `regraft::attention`.

    q `[B, H, Q, D]`, k and v `[B, Hkv, K, D]`; a boolean mask is visibility, a float one is added to the scores;
    `causal` where there is no mask and the call means one. Returns `[B, Q, H, Dv]`.
    """
    bias = keywords.get("position_bias")
    if mask is not None and mask.dtype != torch.bool:
        bias = mask if bias is None else bias + mask
        mask = None
    scale = keywords.get("scaling")
    softcap = keywords.get("softcap")
    return torch.ops.regraft.attention(
        q,
        k,
        v,
        mask,
        bias,
        None,
        keywords.get("s_aux"),
        float(scale) if scale is not None else q.shape[-1] ** -0.5,
        -1,
        0 if causal else -1,
        float(softcap) if softcap is not None else 0.0,
    )


def attention_in_parts(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, **keywords: Any) -> Tensor:
    """As `op_attention`, for one kv head after the other where all scores would take much memory: a long example."""
    heads, kv_heads = q.shape[1], k.shape[1]
    if q.shape[0] * heads * q.shape[2] * k.shape[2] <= _MANY_SCORES:
        return op_attention(q, k, v, mask, causal, **keywords)
    group = heads // kv_heads

    def of(head: int, tensor: Any, dim: int) -> Any:
        shared = not isinstance(tensor, Tensor) or tensor.dim() <= dim or tensor.shape[dim] != heads
        return tensor if shared else tensor.narrow(dim, head * group, group)

    parts = []
    for head in range(kv_heads):
        bias, sinks = of(head, keywords.get("position_bias"), 1), of(head, keywords.get("s_aux"), 0)
        one = (of(head, q, 1), k[:, head : head + 1], v[:, head : head + 1], of(head, mask, 1))
        parts.append(op_attention(*one, causal, **{**keywords, "position_bias": bias, "s_aux": sinks}))
    return torch.cat(parts, dim=2)


def is_causal(module: nn.Module, keywords: dict[str, Any]) -> bool:
    """Whether a call without a mask is causal: the keyword, else the module's attribute, else yes."""
    given = keywords.get("is_causal")
    return bool(given if given is not None else getattr(module, "is_causal", True))


def causal_mask(q: Tensor, k: Tensor) -> Tensor:
    """`[1, 1, Q, K]` bool: what `is_causal` of torch's sdpa means."""
    return torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()[None, None]


def eager_of(module: nn.Module) -> Attend | None:
    """`eager_attention_forward` of the file that defines the module's class."""
    function = getattr(sys.modules.get(type(module).__module__), "eager_attention_forward", None)
    return function if callable(function) else None


def additive(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A boolean mask as the float mask that eager attention adds; float masks pass."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    zero = torch.zeros((), dtype=dtype, device=mask.device)
    return torch.where(mask, zero, torch.full_like(zero, torch.finfo(dtype).min))


class AttentionCapture:
    """The attention function of one capture: checks on the first, concrete run, then emits ops.

    `alone` holds the modules that keep their own attention, with the reason.
    """

    def __init__(self, names: dict[nn.Module, str], loaded_with: Callable[[nn.Module], str | None]) -> None:
        self.names = names
        self.loaded_with = loaded_with
        self.checking = False
        self.alone: dict[nn.Module, str] = {}
        self.notes: list[Note] = []
        self.calls = 0
        self.masked_calls = 0
        self.asked: set[int] = set()
        """Configs of the modules that called, by identity."""
        self._checked: dict[tuple[Any, ...], str | None] = {}

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        **keywords: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """What transformers calls as `attention_interface(self, q, k, v, mask, scaling=..., ...)`."""
        q, k, v = query, key, value
        self.calls += 1
        self.masked_calls += attention_mask is not None
        self.asked.add(id(getattr(module, "config", None)))
        if self.checking and module not in self.alone:
            reason = self._examine(module, q, k, v, attention_mask, keywords)
            if reason is not None:
                self.alone[module] = reason
                self.notes.append(Note(self.names.get(module, ""), f"attention left as it was: {reason}"))
        if module in self.alone:
            return self._own(module, q, k, v, attention_mask, keywords)
        causal = self._causal(module, attention_mask, keywords)
        attend = attention_in_parts if self.checking else op_attention
        return attend(q, k, v, attention_mask, causal, **keywords), None

    def _causal(self, module: nn.Module, mask: Tensor | None, keywords: dict[str, Any]) -> bool:
        """A call without a mask sees everything in eager attention, and is causal in the others if the module is."""
        return mask is None and self.loaded_with(module) not in (None, "eager") and is_causal(module, keywords)

    def _own(
        self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, keywords: dict[str, Any]
    ) -> tuple[Tensor, Tensor | None]:
        eager = eager_of(module)
        if self._causal(module, mask, keywords):
            mask = causal_mask(q, k)
        if eager is None:
            from transformers.integrations.sdpa_attention import sdpa_attention_forward

            out: tuple[Tensor, Tensor | None] = sdpa_attention_forward(module, q, k, v, mask, **keywords)
            return out
        out = eager(module, q, k, v, additive(mask, q.dtype), **keywords)
        return out[0], None

    def _examine(
        self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, keywords: dict[str, Any]
    ) -> str | None:
        """Why the op may not stand for this call, or `None`."""
        if q.dim() != 4 or k.dim() != 4 or v.dim() != 4:
            return f"q has {q.dim()} dimensions, not 4"
        if q.shape[1] % k.shape[1] != 0 or k.shape[1] != v.shape[1]:
            return f"{q.shape[1]} query heads over {k.shape[1]} key and {v.shape[1]} value heads"
        key = (type(module), *_kind(q, k, v, mask), *((n, _kind(x)) for n, x in sorted(keywords.items())))
        if key not in self._checked or any(isinstance(x, Tensor) for x in keywords.values()):
            abstract = q.is_meta or isinstance(q, torch._subclasses.FakeTensor)
            self._checked[key] = (
                _unknown_keyword(keywords) if abstract else self._compare(module, q, k, v, mask, keywords)
            )
        return self._checked[key]

    def _compare(
        self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, keywords: dict[str, Any]
    ) -> str | None:
        eager = eager_of(module)
        if eager is None:
            return "its file has no eager_attention_forward to compare with"
        q, k, v, mask, keywords = _cropped(q, k, v, mask, keywords)
        keywords = {name: _lively(value) for name, value in keywords.items()}
        mask = mask.double() if mask is not None and mask.is_floating_point() else mask
        causal = self._causal(module, mask, keywords)
        shown = causal_mask(q, k) if causal else mask
        rows = _visible_rows(shown)
        sdpa_drops = ""
        for size in _SCORE_SIZES:
            generator = torch.Generator(device="cpu").manual_seed(0)
            scale = keywords.get("scaling")
            scale = float(scale) if scale is not None else q.shape[-1] ** -0.5
            spread = (size / (abs(scale) * q.shape[-1] ** 0.5)) ** 0.5 if scale else 1.0
            qs, ks, vs = (
                torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.device) * s
                for t, s in ((q, spread), (k, spread), (v, 1.0))
            )
            try:
                wanted = eager(module, qs, ks, vs, additive(shown, torch.float64), **keywords)[0].double()
            except (RuntimeError, TypeError, AttributeError, IndexError) as error:
                return f"its eager attention cannot be run apart ({first_lines(error, 120)})"
            try:
                found = op_attention(qs, ks, vs, mask, causal, **keywords)
            except (RuntimeError, TypeError, ValueError) as error:
                return f"regraft::attention refuses its arguments ({first_lines(error, 120)})"
            if found.shape != wanted.shape:
                return f"its eager attention returns {tuple(wanted.shape)}, the op {tuple(found.shape)}"
            off = _difference(found, wanted, rows)
            if off > _TOLERANCE:
                given = ", ".join(sorted(n for n, x in keywords.items() if x is not None and x is not False))
                return f"the op differs from its eager attention by {off:.1e} under the keywords {given}"
            if self.loaded_with(module) == "sdpa":
                sdpa_drops = sdpa_drops or _sdpa_difference(module, qs, ks, vs, mask, keywords, wanted, rows)
        if sdpa_drops:
            message = f"transformers' sdpa, with which the model was loaded, {sdpa_drops}; regraft keeps it"
            self.notes.append(Note(self.names.get(module, ""), message))
        return None


def _sdpa_difference(
    module: nn.Module,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    keywords: dict[str, Any],
    wanted: Tensor,
    rows: Tensor | None,
) -> str:
    """What transformers' sdpa leaves out of this attention, in words, or an empty string."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    try:
        found = sdpa_attention_forward(module, q, k, v, mask, **keywords)[0].double()
    except (RuntimeError, TypeError):  # it refuses these arguments: nothing to say about its result
        return ""
    if _difference(found, wanted, rows) <= _TOLERANCE:
        return ""
    names = [n for n in ("softcap", "s_aux", "position_bias") if keywords.get(n) is not None]
    return f"drops {' and '.join(names)}" if names else "differs from the model's eager attention"


def _difference(found: Tensor, wanted: Tensor, rows: Tensor | None) -> float:
    """Largest difference on rows that see a key, relative to the largest wanted value; both `[B, Q, H, D]`."""
    if rows is not None:  # a row that sees nothing may be anything, not a number among others
        found, wanted = (torch.where(rows.transpose(1, 2), t, torch.zeros_like(t)) for t in (found, wanted))
    gap = (found - wanted).abs()
    worst = (gap.max() / wanted.abs().max().clamp_min(1e-30)).item()
    return float("inf") if worst != worst else worst


def _visible_rows(mask: Tensor | None) -> Tensor | None:
    """`[B, H, Q, 1]`: rows that may attend to anything."""
    if mask is None or mask.dtype != torch.bool or mask.dim() != 4:
        return None
    return mask.any(-1, keepdim=True)


def _cropped(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, keywords: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, dict[str, Any]]:
    """The last rows and keys of a long call: the check needs no more, and in fp64 it would need much memory."""

    def crop(t: Tensor) -> Tensor:
        if t.dim() != 4:
            return t
        queries = slice(-_LONGEST, None) if t.shape[2] == length else slice(None)
        keys = slice(-_LONGEST, None) if t.shape[3] == length else slice(None)
        return t[:, :, queries, keys]

    length = q.shape[2]
    if length <= _LONGEST or k.shape[2] != length:
        return q, k, v, mask, keywords
    bias = keywords.get("position_bias")
    if isinstance(bias, Tensor):
        keywords = {**keywords, "position_bias": crop(bias)}
    q, k, v = (t[:2, :, -_LONGEST:] for t in (q, k, v))
    return q, k, v, None if mask is None else crop(mask)[:2], keywords


def _lively(value: Any) -> Any:
    """A float tensor of one repeated value (a bias initialised to zero) replaced by random values, so that it shows."""
    if isinstance(value, Tensor) and value.is_floating_point():
        value = value.double()
        if value.numel() > 1 and bool((value == value.flatten()[0]).all()):
            generator = torch.Generator(device="cpu").manual_seed(1)
            return torch.randn(value.shape, generator=generator, dtype=value.dtype).to(value.device)
    return value


def _unknown_keyword(keywords: dict[str, Any]) -> str | None:
    """Where no number can be computed (meta weights), only keywords whose meaning is fixed pass."""
    known = {"position_bias", "scaling", "softcap", "s_aux", "dropout", "sliding_window"}
    for name, value in keywords.items():
        if name not in known and isinstance(value, Tensor | float) and name != "position_ids":
            return f"keyword {name} cannot be checked without weights"
    return None


def _kind(*values: Any) -> tuple[Any, ...]:
    """What of an argument decides whether one check stands for another."""
    return tuple(
        (v.dtype, v.dim(), v.shape[1] if v.dim() > 1 else 0) if isinstance(v, Tensor) else repr(v) for v in values
    )
