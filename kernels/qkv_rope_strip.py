"""The q, k and v projection of up to 32 rows on Hopper at the speed of the memory, with norm and rotation.

Heads without a norm that are rotated whole are turned by the programs of the product, others in place behind it.
"""

from __future__ import annotations

from typing import Final

from . import qkv_rope as ops
from . import strip_gluon
from .linear_act_wgmma import refuse_operands
from .op import Kernel, Signature
from .qkv_rope_triton import refuse_qkv, turned_behind

qkv_rope: Final = turned_behind(
    lambda x, weight, bias: strip_gluon.linear_act(x, weight, bias, "identity"),
    strip_gluon.turns,
    strip_gluon.linear_rope,
)


def _supports(signature: Signature) -> str | None:
    return refuse_qkv(signature) or refuse_operands(signature) or strip_gluon.refuse(signature)


KERNELS: Final = (Kernel(ops.qkv_rope, "strip", qkv_rope, _supports, early=("weight",)),)
