"""Experts as one op: what transformers' experts registry calls while a model is captured.

How a module gates is found out, not known: parameters of `regraft::moe_experts` are tried against the module's own
`_apply_gate` on random numbers large enough that every clamp shows, then the op is compared with the module's eager
experts on the run at hand. Experts that no parameters reproduce keep transformers' grouped matrix products.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels.activation import ACTIVATIONS
from ..kernels.moe import gate as gate_reference
from .errors import first_lines
from .program import Note


@dataclass(frozen=True)
class Gate:
    """The parameters of `regraft::moe_experts` that say how a module's experts are activated."""

    kind: str
    gated: bool
    interleaved: bool = False
    limit: float = 0.0
    limit_after: bool = False
    alpha: float = 0.0
    up_offset: float = 0.0


class ExpertsCapture:
    """The experts function of one capture; `alone` holds modules that the op cannot stand for, with the reason."""

    def __init__(self, names: dict[nn.Module, str]) -> None:
        self.names = names
        self.checking = False
        self.alone: dict[nn.Module, str] = {}
        self.notes: list[Note] = []
        self._gates: dict[nn.Module, Gate] = {}
        for module in names:
            if hasattr(module, "_apply_gate") and hasattr(module, "is_transposed"):
                found = find_gate(module)
                if found is None:
                    self._leave(module, "its gate is none that regraft::moe_experts can express")
                else:
                    self._gates[module] = found

    def __call__(self, module: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """What transformers calls in place of `Experts.forward`: hidden `[T, H]`, index and weights `[T, K]`."""
        found = self._gates.get(module)
        if self.checking and found is not None and module not in self.alone and not _abstract(hidden_states):
            reason = _compare(module, found, hidden_states, top_k_index, top_k_weights)
            if reason is not None:
                self._leave(module, reason)
        if found is None or module in self.alone:
            from transformers.integrations.moe import grouped_mm_experts_forward

            own: Tensor = grouped_mm_experts_forward(module, hidden_states, top_k_index, top_k_weights)
            return own
        return _run(module, found, hidden_states, top_k_index, top_k_weights)

    def _leave(self, module: nn.Module, reason: str) -> None:
        self.alone[module] = reason
        self.notes.append(Note(self.names.get(module, ""), f"experts left as they were: {reason}"))


def find_gate(module: Any) -> Gate | None:
    """The parameters under which the op's gate equals the module's own to the last bit or two, or `None`."""
    x = torch.linspace(-40, 40, 4096, dtype=torch.float64)[torch.randperm(4096, generator=_seeded())].reshape(32, 128)
    if not getattr(module, "has_gate", True):
        kind = _activation_kind(getattr(module, "act_fn", None), x)
        return Gate(kind, gated=False) if kind is not None else None
    own: Callable[[Tensor], Tensor] = module._apply_gate
    try:
        wanted = own(x)
    except (RuntimeError, TypeError, AttributeError):
        return None
    constants = sorted({0.0, *(float(v) for v in _numbers(module))})
    kinds = [k for k in (_activation_kind(getattr(module, "act_fn", None), x),) if k is not None] or ["silu"]
    for interleaved, limit, after, alpha, offset, kind in itertools.product(
        (False, True), constants, (False, True), constants, (0.0, 1.0), dict.fromkeys([*kinds, "silu"])
    ):
        if limit < 0 or (after and not limit):
            continue
        candidate = Gate(kind, True, interleaved, limit, after, alpha, offset)
        parameters = {k: v for k, v in asdict(candidate).items() if k != "gated"}
        if torch.allclose(gate_reference(x, **parameters), wanted, rtol=1e-6, atol=1e-9):
            return candidate
    return None


def _numbers(module: nn.Module) -> list[float]:
    """Plain numbers among the module's attributes (a clamp's limit, a sigmoid's factor)."""
    return [
        v for v in vars(module).values() if isinstance(v, float | int) and not isinstance(v, bool) and 0 < abs(v) < 1e4
    ][:12]


def _activation_kind(function: Any, x: Tensor) -> str | None:
    if not callable(function):
        return None
    try:
        wanted = function(x)
    except (RuntimeError, TypeError):
        return None
    return next((k for k, f in ACTIVATIONS.items() if torch.allclose(f(x), wanted, rtol=1e-6, atol=1e-9)), None)


def _run(module: Any, found: Gate, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    name = "gate_up_proj" if found.gated else "up_proj"
    biased = bool(module.has_bias)
    out: Tensor = torch.ops.regraft.moe_experts(
        hidden,
        index,
        weights,
        getattr(module, name),
        module.down_proj,
        getattr(module, f"{name}_bias") if biased else None,
        module.down_proj_bias if biased else None,
        transposed=bool(module.is_transposed),
        **asdict(found),
    )
    return out


def _compare(module: nn.Module, found: Gate, hidden: Tensor, index: Tensor, weights: Tensor) -> str | None:
    """Why the op may not stand for the module's eager experts on this input, or `None`."""
    eager = getattr(type(module).forward, "__wrapped__", None)
    if eager is None:
        return "it has no eager forward to compare with"
    try:
        wanted, got = eager(module, hidden, index, weights), _run(module, found, hidden, index, weights)
    except (RuntimeError, TypeError, AttributeError, IndexError) as error:
        return first_lines(error, 150)
    if wanted.shape != got.shape:
        return f"its eager experts return {tuple(wanted.shape)}, the op {tuple(got.shape)}"
    bound = 64 * torch.finfo(hidden.dtype).eps
    difference = ((wanted.double() - got.double()).abs().max() / wanted.double().abs().max().clamp_min(1e-30)).item()
    return None if difference <= bound else f"the op differs from its eager experts by {difference:.1e}"


def _abstract(tensor: Tensor) -> bool:
    return tensor.is_meta or isinstance(tensor, torch._subclasses.FakeTensor)


def _seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)
