"""Flat programs of tiny models, without the forward's own graph, which takes as long again to make."""

from __future__ import annotations

from typing import Any

import torch
import zoo

from regraft.runtime.build import Builder, Unserved
from regraft.runtime.decoding.flat import make
from regraft.runtime.decoding.program import FlatProgram
from regraft.runtime.optimize import new_record
from regraft.runtime.options import make_options
from regraft.runtime.stages import PASS_NAMES, Pipeline, is_rule
from regraft.runtime.weights import Weights


def builder_of(model: Any, **options: Any) -> Builder:
    """What `optimize` builds graphs with."""
    chosen = make_options(PASS_NAMES, is_rule=is_rule, **options)
    forward = type(model).forward.__get__(model)
    return Builder(model, Weights(model), chosen, new_record(model, chosen), forward, False, Pipeline())


def flat_of(model: Any, **options: Any) -> FlatProgram:
    """The flat program of a model that must be served."""
    found = make(builder_of(model, **options))
    assert not isinstance(found, Unserved), found.reason
    return found


def tiny(name: str, layers: int = 2, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A model of the zoo with other arguments."""
    entry = zoo.ENTRIES[name]
    torch.manual_seed(0)
    arguments = {**entry.arguments, **dict.fromkeys(entry.layers, layers), **changes}
    model = entry.auto.from_config(entry.config(**arguments), dtype=dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model
