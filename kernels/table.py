"""Which ops there are, and for each the kernels that provide it, best first."""

from __future__ import annotations

import importlib.util
from collections import defaultdict
from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

import torch

from .activation import activation, glu
from .attention import attention
from .layer_norm import add_layer_norm, layer_norm
from .linear_act import gate_up, linear_act
from .moe import moe_experts
from .norm_products import JOINT
from .op import Kernel, Op, Signature
from .paged_attention import paged_attention
from .qkv_rope import qkv_rope
from .rms_norm import add_rms_norm, rms_norm
from .rope import norm_rope, rope
from .softmax import softmax
from .varlen_attention import varlen_attention

OPS: Final[Mapping[str, Op]] = MappingProxyType(
    {
        op.name: op
        for op in (
            rms_norm,
            add_rms_norm,
            layer_norm,
            add_layer_norm,
            softmax,
            rope,
            norm_rope,
            attention,
            varlen_attention,
            paged_attention,
            activation,
            glu,
            linear_act,
            gate_up,
            qkv_rope,
            moe_experts,
            *JOINT.values(),
        )
    }
)
"""Every op by name."""


def op_of(target: object) -> Op | None:
    """The op that a graph node's target calls, or `None` for anything that is not one of ours."""
    if isinstance(target, torch._ops.OpOverload) and target.namespace == "regraft":
        return OPS.get(target._schema.name.removeprefix("regraft::"))
    return None


def _providers() -> Mapping[str, tuple[Kernel, ...]]:
    found: dict[str, list[Kernel]] = defaultdict(list)
    if importlib.util.find_spec("triton") is not None:
        from . import (
            activation_triton,
            attention_gluon,
            attention_torch,
            attention_triton,
            layer_norm_triton,
            linear_act_torch,
            linear_act_triton,
            linear_act_wgmma,
            moe_torch,
            moe_triton,
            moe_wgmma,
            norm_gemv_triton,
            paged_attention_contiguous,
            paged_attention_triton,
            qkv_rope_slab,
            qkv_rope_stream,
            qkv_rope_strip,
            qkv_rope_triton,
            qkv_rope_wgmma,
            rms_norm_triton,
            rope_triton,
            skinny_triton,
            slab_gluon,
            softmax_ring,
            softmax_triton,
            stream_gluon,
            strip_gluon,
            varlen_attention_triton,
        )

        for module in (
            rms_norm_triton,
            layer_norm_triton,
            softmax_triton,
            softmax_ring,
            rope_triton,
            attention_triton,
            varlen_attention_triton,
            attention_gluon,
            attention_torch,
            paged_attention_triton,
            paged_attention_contiguous,
            activation_triton,
            linear_act_torch,  # what nobody measured is left to the vendor's library
            linear_act_triton,
            skinny_triton,
            linear_act_wgmma,
            stream_gluon,
            strip_gluon,
            slab_gluon,
            qkv_rope_triton,  # the vendor's product first here too
            qkv_rope_wgmma,
            qkv_rope_stream,
            qkv_rope_strip,
            qkv_rope_slab,
            moe_triton,
            moe_wgmma,
            moe_torch,
            norm_gemv_triton,
        ):
            for kernel in module.KERNELS:
                found[kernel.op.name].append(kernel)
    return MappingProxyType({name: tuple(kernels) for name, kernels in found.items()})


PROVIDERS: Final[Mapping[str, tuple[Kernel, ...]]] = _providers()
"""By op name, best first; empty where the package triton cannot be installed."""


def select(op: Op, signature: Signature) -> tuple[Kernel | None, dict[str, str]]:
    """The first kernel that supports the signature, and why each one before it does not.

    `None` stands for the op's reference.
    """
    refused: dict[str, str] = {}
    for kernel in PROVIDERS.get(op.name, ()):
        reason = kernel.supports(signature)
        if reason is None:
            return kernel, refused
        refused[kernel.provider] = reason
    return None, refused
