"""The parity certificate: is the whole rewritten forward as good as the original's?

Original (with its own eager attention) and graph are measured against the model's own code one precision up. The graph
passes when its error is at most twice the original's plus a few ulp, in every output, over the real rows of every case.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from typing import Any, Final

import torch
from torch import nn

from ..compiler.verify import FEW, Distance, bound_for, distance, higher, magnitude
from .ahead import compile_ahead
from .cases import PADDED_LEFT, Case, make_cases
from .checks import device_of, dtype_of
from .oracle import run_oracle, run_reference
from .random_state import alike

log = logging.getLogger("regraft.certificate")

FAR: Final = 0.1
"""Root mean square of the original's error, as a share of the output, from which an output shows little."""


@dataclass(frozen=True)
class Measured:
    """One case. Errors are against the oracle, over real rows, of the output that is worst."""

    case: str
    output: str
    """The output with the largest share of its bound."""
    error: float
    """max |graph - oracle|"""
    error_mean: float
    """Root mean square of the same."""
    error_original: float
    """max |original - oracle|"""
    bound: float
    passed: bool
    kl: float | None = None
    """Mean KL divergence of the graph's next-token distribution from the original's, in nats."""
    greedy: float | None = None
    """Share of rows whose most likely token is the original's."""


@dataclass(frozen=True)
class Certificate:
    """All cases of one signature."""

    passed: bool
    measured: tuple[Measured, ...] = ()
    skipped: tuple[str, ...] = ()
    """Cases the original itself cannot run, with the reason."""
    oracle: str = ""
    reason: str = ""
    """What failed, in words."""
    doubts: tuple[str, ...] = ()
    """Outputs for which passing shows little, since the original itself is far from the oracle: a choice among nearly
    equal candidates, say, falls otherwise one precision up. How near the graph is to the original is said instead."""

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


@dataclass
class _Truth:
    """What a case should give: the original's outputs, and the oracle's, by name."""

    case: Case
    original: dict[str, torch.Tensor]
    oracle: dict[str, torch.Tensor]


class Judge:
    """Holds the original's answers for one signature, so that several candidates can be measured against them."""

    def __init__(
        self,
        module: nn.Module,
        forward: Callable[..., Any],
        tensors: Mapping[str, torch.Tensor],
        static: Mapping[str, Any],
        *,
        violation: Callable[[Mapping[str, torch.Tensor]], str | None],
        raised: Callable[[Mapping[str, torch.Tensor], torch.dtype], Any],
        eager: bool = True,
    ) -> None:
        """`raised` is the second best oracle: the captured graph one precision up, where the code cannot run there.

        `eager` measures against the model's own eager attention, otherwise against the one it is configured with.
        """
        self._module, self._forward, self._static, self._eager = module, forward, static, eager
        self.dtype, self._device = dtype_of(module), device_of(module)
        target = higher(self.dtype)
        self.oracle = f"the original's code in {str(target).removeprefix('torch.')}"
        self.skipped: list[str] = []
        self._truths: list[_Truth] = []
        config = getattr(module, "config", None)
        pad = getattr(config, "pad_token_id", None)
        pad = pad if isinstance(pad, int) and pad >= 0 else None
        cases = make_cases(tensors, bool(getattr(config, "is_encoder_decoder", False)), pad)
        for case in cases:
            reason = violation(case.tensors)
            if reason is not None:
                self.skipped.append(f"{case.name}: {reason}")
                continue
            inputs = {**case.tensors, **static}
            try:
                with alike(self._device):
                    original = named_outputs(run_reference(module, forward, inputs, eager=eager))
            except Exception as error:  # whatever a model's code raises on a variant that it was not made for
                if case.name == "as given":
                    raise
                self.skipped.append(f"{case.name}: the original refuses it ({type(error).__name__})")
                continue
            try:
                with alike(self._device):
                    oracle = named_outputs(run_oracle(module, forward, inputs, target, eager=eager))
            except Exception as error:  # noqa: BLE001 - a model's code may refuse another dtype in any way it likes
                log.info("the original's code does not run in %s (%s)", target, error)
                self.oracle = f"the captured graph in {str(target).removeprefix('torch.')}"
                with alike(self._device):
                    oracle = named_outputs(raised(case.tensors, target))
            self._truths.append(_Truth(case, original, oracle))
        self._noise = self._noise_of_few()

    def _noise_of_few(self) -> dict[str, float]:
        """The original's largest error over all cases, for outputs of a handful of numbers: one case alone is luck."""
        noise: dict[str, float] = {}
        for truth in self._truths:
            for name in truth.original.keys() & truth.oracle.keys():
                original = truth.original[name]
                old, best = (truth.case.real(name, t) for t in (original, truth.oracle[name]))
                if old.numel() < FEW:
                    noise[name] = max(noise.get(name, 0.0), distance(old, best).largest)
        return noise

    @cached_property
    def _as_configured(self) -> frozenset[str]:
        """What the forward returns with the attention it is configured with: eager code may return weights, too."""
        inputs = {**self._truths[0].case.tensors, **self._static}
        with alike(self._device):
            return frozenset(named_outputs(run_reference(self._module, self._forward, inputs, eager=False)))

    @torch.no_grad()
    def configured_differs(self) -> str | None:
        """How the attention the model is configured with departs from its own eager code, or None.

        Seen on the first case: its error against the oracle beyond what the eager code's own rounding explains.
        """
        truth = self._truths[0]
        inputs = {**truth.case.tensors, **self._static}
        with alike(self._device):
            configured = named_outputs(run_reference(self._module, self._forward, inputs, eager=False))
        for name, eager in truth.original.items():
            if name not in configured or configured[name].shape != eager.shape:
                continue
            other, old, best = (truth.case.real(name, t) for t in (configured[name], eager, truth.oracle[name]))
            error = distance(other, best)
            bound = bound_for(distance(old, best), best, self.dtype)
            if error.largest > 4 * bound.largest:
                return f"{name} differs by {error.largest:.2e}, where rounding explains {bound.largest:.2e}"
        return None

    @torch.no_grad()
    def measure(self, run: Callable[[Mapping[str, torch.Tensor]], Any]) -> Certificate:
        """Compare a candidate on every case; stops at the first that fails."""
        measured: list[Measured] = []
        doubts: list[str] = []
        with alike(self._device):  # draws none of the caller's random numbers
            compile_ahead(self._device, [partial(run, truth.case.tensors) for truth in self._truths])
        for truth in self._truths:
            with alike(self._device):
                found = named_outputs(run(truth.case.tensors))
            result = self._compare(truth, found, doubts)
            if isinstance(result, str):
                return Certificate(False, tuple(measured), tuple(self.skipped), self.oracle, result)
            if result is None:
                continue
            measured.append(result)
            if not result.passed:
                reason = (
                    f"{result.output} is off by {result.error:.2e} ({truth.case.name}), the original by "
                    f"{result.error_original:.2e}, allowed are {result.bound:.2e}"
                )
                return Certificate(False, tuple(measured), tuple(self.skipped), self.oracle, reason)
        return Certificate(True, tuple(measured), tuple(self.skipped), self.oracle, doubts=tuple(doubts))

    def _compare(self, truth: _Truth, found: Mapping[str, torch.Tensor], doubts: list[str]) -> Measured | str | None:
        """The worst output of a case, what is wrong with them in words, or None where padding made them all."""
        names = [n for n in truth.original if n in found and n in truth.oracle]
        differ = sorted(found.keys() ^ truth.original.keys() | found.keys() - set(names))
        if differ and not (found.keys() == set(names) == self._as_configured):
            return f"the outputs differ from the original's ({truth.case.name}): {', '.join(differ[:4])}"
        worst: tuple[float, Measured] | None = None
        kl = greedy = None
        for name in names:
            graph, original, oracle = found[name], truth.original[name], truth.oracle[name]
            if graph.shape != original.shape or graph.dtype != original.dtype:
                return (
                    f"{name} is {graph.dtype} {list(graph.shape)} instead of {original.dtype} {list(original.shape)} "
                    f"({truth.case.name})"
                )
            new, old, best = (truth.case.real(name, t) for t in (graph, original, oracle))
            error, error_original = distance(new, best), distance(old, best)
            noise = Distance(max(error_original.largest, self._noise.get(name, 0.0)), error_original.rms)
            bound = bound_for(noise, best, self.dtype)
            passed = error.within(bound, new.numel())
            if not passed and self._made_of_padding(truth, name):
                continue
            if error_original.rms > FAR * magnitude(best).rms:
                near = distance(new, old).largest
                doubts.append(
                    f"{name} ({truth.case.name}): the original errs by {error_original.largest:.1e} itself, "
                    f"the graph is within {near:.1e} of it"
                )
            if name == "logits" and original.ndim >= 2 and original.shape[-1] > 1 and new.numel():
                kl, greedy = _next_token(new, old)
            result = Measured(
                truth.case.name, name, error.largest, error.rms, error_original.largest, bound.largest, passed
            )
            taken = _share(error, bound if new.numel() >= FEW else Distance(bound.largest, bound.largest))
            if worst is None or taken > worst[0]:
                worst = (taken, result)
        if worst is None:
            return None if names else "the forward returns no tensor to compare"
        return Measured(**{**asdict(worst[1]), "kl": kl, "greedy": greedy})

    @torch.no_grad()
    def _made_of_padding(self, truth: _Truth, name: str) -> bool:
        """Whether what has no row a token is made of padding on the left, as where the first token stands for all.

        The original then gives something else for the sequence without its padding. What mixes all rows, padding
        included, is still found out with padding on the right.
        """
        case, padded = truth.case, truth.original[name]
        inputs = case.alone() if case.name == PADDED_LEFT else None
        if inputs is None or case.real(name, padded) is not padded:
            return False
        inputs |= self._static
        told = f"{case.name}: {name} is made of padding"
        if told not in self.skipped:
            try:
                with alike(self._device):
                    reference = run_reference(self._module, self._forward, inputs, eager=self._eager)
            except Exception:  # noqa: BLE001 - lengths that a model's code does not take
                return False
            alone, best = named_outputs(reference).get(name), truth.oracle[name][:1]
            if alone is None or alone.shape != best.shape:
                return False
            bound = bound_for(distance(padded[:1], best), best, self.dtype)
            if distance(alone, best).largest <= 4 * bound.largest:
                return False
            self.skipped.append(told)
        return True


def named_outputs(output: Any, prefix: str = "") -> dict[str, torch.Tensor]:
    """The tensors in what a forward returned, by name; those of a cache are `past_key_values.3.keys`."""
    from transformers.cache_utils import Cache, EncoderDecoderCache

    dot = prefix + "." if prefix else ""
    if isinstance(output, torch.Tensor):
        return {prefix or "output": output}
    if isinstance(output, EncoderDecoderCache):
        both = {"self": output.self_attention_cache, "cross": output.cross_attention_cache}
        return {k: v for n, part in both.items() for k, v in named_outputs(part, dot + n).items()}
    if isinstance(output, Cache):
        layers = ((i, x) for i, x in enumerate(output.layers) if isinstance(getattr(x, "keys", None), torch.Tensor))
        return {f"{dot}{i}.{part}": getattr(layer, part) for i, layer in layers for part in ("keys", "values")}
    parts: Mapping[Any, Any] = output if isinstance(output, Mapping) else {}
    if isinstance(output, (tuple, list)):
        parts = dict(enumerate(output))
    return {k: v for name, value in parts.items() for k, v in named_outputs(value, dot + str(name)).items()}


def _share(error: Distance, bound: Distance) -> float:
    """How much of the bound an error takes, whichever of largest and mean takes more."""
    pairs = ((error.largest, bound.largest), (error.rms, bound.rms))
    return max(e / b if b else (0.0 if e == 0 else float("inf")) for e, b in pairs)


def _next_token(new: torch.Tensor, old: torch.Tensor) -> tuple[float, float]:
    size = new.shape[-1]
    p = torch.log_softmax(old.reshape(-1, size).double(), -1)
    q = torch.log_softmax(new.reshape(-1, size).double(), -1)
    kl = float((p.exp() * (p - q)).sum(-1).mean())
    return max(kl, 0.0), float((p.argmax(-1) == q.argmax(-1)).double().mean())
