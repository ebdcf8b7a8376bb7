"""The compiler as the runtime uses it: capture, then the pipeline of passes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..compiler.capture import capture
from ..compiler.program import Input, Program
from ..compiler.rule import GroupRule, Rule
from ..passes.pipeline import PASS_NAMES, Compiled, Settings, compile_program
from .call import Call
from .options import Options

__all__ = ["PASS_NAMES", "Pipeline", "is_rule"]


def is_rule(value: object) -> bool:
    """Whether a user's object is one the pipeline can run."""
    return isinstance(value, (Rule, GroupRule))


class Pipeline:
    """The stages every optimized model goes through."""

    def capture(self, module: nn.Module, call: Call, forward: Callable[..., Any] | None) -> Program:
        """Raises CaptureError."""
        return capture(module, call.tensors, call.static, cache=call.cache, forward=forward)

    def compile(
        self,
        program: Program,
        options: Options,
        weights: Callable[[Input], torch.Tensor],
        *,
        verify: str,
        deny: frozenset[tuple[str, str]],
        kernels: bool,
        module: nn.Module,
        device: torch.device,
        keep_text: bool = False,
        form: str = "forward",
        page_dtype: torch.dtype | None = None,
        positions: int | None = None,
    ) -> Compiled:
        """All passes that the options leave enabled; `program` stays as it was.

        Raises CacheError where it cannot have this form: `paged`, whose keys and values lie in pages (of `page_dtype`
        if not of their own; for sequences of up to `positions` tokens), or `encoded`, the keys and values of an
        encoder's states.
        """
        off = {name for name, node in deny if node == "*"} | (set() if kernels else {"lower"})
        settings = Settings(
            device=device,
            verify=verify,
            enabled={name: options.passes.get(name, True) and name not in off for name in PASS_NAMES},
            rules=options.rules,
            deny=deny,
            weights=None if options.dry_run else weights,
            inputs=program.example,
            model=module,
            keep_text=keep_text,
            page_dtype=page_dtype,
            positions=positions,
        )
        return compile_program(program, settings, form=form)
