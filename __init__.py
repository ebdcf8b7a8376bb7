"""regraft: rewrites a live HuggingFace model onto fused kernels, verified on its own weights, and runs it.

    model = regraft.optimize(model)                      # one line; the same object: forward, generate, state_dict
    model = torch.compile(model, backend="regraft")      # the same passes behind torch.compile
    model = regraft.restore(model)                       # the original back, bit for bit

What happened stands in `model.report`.
"""

from __future__ import annotations

from .compiler.errors import CaptureError
from .compiler.rule import Emitter, GroupRule, Match, Reject, Rule, Stage
from .compiler.selftest import SelfTestError, self_test
from .runtime.errors import (
    InputError,
    OptionError,
    ParityError,
    RegraftError,
    RegraftWarning,
    StrictError,
    UnsupportedModelError,
)
from .runtime.optimize import optimize, restore

__version__ = "0.1.0"

__all__ = [
    "CaptureError",
    "Emitter",
    "GroupRule",
    "InputError",
    "Match",
    "OptionError",
    "ParityError",
    "RegraftError",
    "RegraftWarning",
    "Reject",
    "Rule",
    "SelfTestError",
    "Stage",
    "StrictError",
    "UnsupportedModelError",
    "optimize",
    "restore",
    "self_test",
]
