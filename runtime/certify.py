"""Which forward of a model a graph is measured against: its own eager attention, else the one it is configured with.

transformers' fused attention may leave out what the model's eager one computes (softcap), so eager is the truth. Where
a model's eager and configured attention disagree and the captured graph is the configured one, that one is the truth
for this model: it is what the caller gets today.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from ..compiler.program import Input, InputKind, Note, Program
from ..compiler.verify import Upcast
from .certificate import Certificate, Judge
from .errors import ParityError

log = logging.getLogger("regraft")

Run = Callable[[Mapping[str, torch.Tensor]], Any]


class Certifier:
    """Certifies candidates for one captured program; the original is asked only once."""

    def __init__(
        self,
        module: nn.Module,
        forward: Callable[..., Any],
        program: Program,
        given: Mapping[str, Any],
        weights: Callable[[Input], torch.Tensor],
    ) -> None:
        self._module, self._forward, self._program, self._given, self._weights = (
            module,
            forward,
            program,
            given,
            weights,
        )
        self._judge: Judge | None = None
        self._judge_is_eager = True

    def measure(self, run: Run) -> Certificate:
        """The certificate of a candidate."""
        if self._judge is None:
            self._judge = self._make_judge(eager=True)
        return self._judge.measure(run)

    def disagreement(self) -> Note | None:
        """A note where the attention the model is configured with computes something else than its own eager code.

        The graph then follows the eager code, which is what the model's authors wrote; the certificate is against it.
        """
        configured = self._configured()
        if self._judge is None or not self._judge_is_eager or not configured:
            return None
        difference = self._judge.configured_differs()
        if difference is None:
            return None
        message = f"{configured[0]}, which the model is configured with, does not compute what its eager attention does"
        log.info("%s: %s", message, difference)  # other numbers for each signature: the note is one
        return Note("", f"{message}; the graph follows the eager attention")

    def _configured(self) -> list[str]:
        names = {getattr(getattr(m, "config", None), "_attn_implementation", None) for m in self._module.modules()}
        return sorted(n for n in names if isinstance(n, str) and n != "eager")

    def check_capture(self, run: Run) -> Note | None:
        """Measure the captured graph itself, before it is asked which rewrite broke it.

        Returns a note where it follows the configured attention and not the eager one; candidates are measured against
        that from now on.

        Raises:
            ParityError: the captured graph is neither.
        """
        captured = self.measure(run)
        if captured.passed:
            return None
        configured = self._configured()
        if configured:
            other = self._make_judge(eager=False)
            if other.measure(run).passed:
                self._judge, self._judge_is_eager = other, False
                message = (
                    f"the model's eager attention is not what {configured[0]}, which it is configured with, computes"
                )
                log.info("%s: %s", message, captured.reason)
                return Note("", f"{message}; the graph follows {configured[0]}")
        raise ParityError(f"the captured graph differs from the original: {captured.reason}")

    def _make_judge(self, *, eager: bool) -> Judge:
        return Judge(
            self._module,
            self._forward,
            self._program.example,
            self._given,
            violation=lambda tensors: self._program.limits.violation(dict(tensors)),
            raised=self._raised,
            eager=eager,
        )

    def _raised(self, tensors: Mapping[str, torch.Tensor], target: torch.dtype) -> Any:
        """The captured graph, every floating value in `target`."""
        program = self._program
        values = [tensors[i.target] if i.kind is InputKind.USER else self._weights(i).detach() for i in program.inputs]
        return program.rebuild(Upcast(program.gm, target).run(*values))
