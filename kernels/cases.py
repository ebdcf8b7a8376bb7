"""What to measure: for each op named cases with sizes of models in use, and its peers there."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from .case import Case
from .cases_attention import attentions
from .cases_joint import joints
from .cases_linear import gate_ups, linears
from .cases_moe import experts
from .cases_paged import paged_attentions
from .cases_qkv import qkv_ropes
from .cases_rows import elementwise, norms, ropes, softmaxes
from .cases_varlen import varlen_attentions


def cases(dtype: torch.dtype = torch.bfloat16) -> Mapping[str, tuple[Case, ...]]:
    """The cases by op name, with tensors of this dtype."""
    found: dict[str, tuple[Case, ...]] = {}
    attention = (attentions, varlen_attentions, paged_attentions)
    for make in (norms, softmaxes, ropes, *attention, elementwise, linears, gate_ups, qkv_ropes, joints, experts):
        for case in make(dtype):
            found[case.op.name] = (*found.get(case.op.name, ()), case)
    return found
