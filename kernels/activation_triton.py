# mypy: disallow-untyped-defs=False
"""Activations and the gated linear unit in Triton; `activate` is the epilogue of other kernels too.

All in fp32 with one rounding at the end, where the reference of a written-out spelling rounds after each step.
"""

from __future__ import annotations

from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import activation as ops
from .launch import collapse, empty_like, launch, on_device, refuse_different_shapes, refuse_tensors
from .op import Kernel, Signature
from .rms_norm_triton import row_offsets
from .tuning import RowMemory, choose


@triton.jit
def tanh(x):
    """By exp, and near zero by Cephes' polynomial (tanhf.c), where exp would cancel."""
    z = x * x
    p = ((-5.70498872745e-3 * z + 2.06390887954e-2) * z - 5.37397155531e-2) * z + 1.33314422036e-1
    small = (p * z - 3.33332819422e-1) * z * x + x
    large = 1.0 - 2.0 / (tl.exp(2.0 * tl.abs(x)) + 1.0)
    return tl.where(tl.abs(x) < 0.625, small, tl.where(x < 0, -large, large))


@triton.jit
def _softplus(x):
    """log(1 + exp(x)), and x above 20 as in ATen; log1p by Goldberg's correction of log(1 + e)."""
    e = tl.exp(tl.minimum(x, 20.0))
    u = 1.0 + e
    log1p = tl.where(u == 1.0, e, tl.log(u) * (e / tl.where(u == 1.0, 1.0, u - 1.0)))
    return tl.where(x > 20.0, x, tl.where(x == x, log1p, x))


@triton.jit
def _gelu(x, FAST: tl.constexpr):
    """0.5 x erfc(-x / sqrt(2)). FAST: erfc by Abramowitz and Stegun's 7.1.26, 1.5e-7 off, at half the cost of erf.

    There gelu(-x) is what gelu(x) is below x, so that nothing cancels.
    """
    if not FAST:
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    z = tl.minimum(tl.abs(x), 15.0)  # exp(-112) is 0 in fp32; infinity times that would be NaN
    t = 1.0 / (1.0 + 0.23164188 * z)  # 0.3275911 / sqrt(2)
    p = (((1.061405429 * t - 1.453152027) * t + 1.421413741) * t - 0.284496736) * t + 0.254829592
    tail = 0.5 * z * (p * t * tl.exp(-0.5 * z * z))
    return tl.where(x < 0, -tail, x - tail)


@triton.constexpr_function
def cap_of(kind):
    """`activation.cap_of` when a kernel is compiled; Triton lets it call no other function."""
    return float(kind[8:]) if kind[:8] == "softcap:" else 0.0


@triton.jit
def activate(x, KIND: tl.constexpr, FAST: tl.constexpr = False):
    """`activation(x, KIND)` of fp32 x; a NaN stays a NaN. FAST is right to 2e-7, enough for results of 16 bits."""
    CAP: tl.constexpr = cap_of(KIND)
    if CAP > 0.0:
        y = CAP - 2.0 * CAP / (tl.exp(x * (2.0 / CAP)) + 1.0) if FAST else CAP * tanh(x / CAP)
    elif KIND == "relu":
        y = tl.where(x < 0, 0.0, x)
    elif KIND == "relu2":
        y = tl.where(x < 0, 0.0, x * x)
    elif KIND == "relu6":
        y = tl.where(x < 0, 0.0, tl.where(x > 6, 6.0, x))
    elif KIND == "leaky_relu":
        y = tl.where(x < 0, 0.01 * x, x)
    elif KIND == "sigmoid":
        y = 1.0 / (1.0 + tl.exp(-x))
    elif KIND == "tanh":
        y = tanh(x)
    elif KIND == "silu":
        y = x / (1.0 + tl.exp(-x))
    elif KIND == "mish":
        # tanh(log(1 + e)) = (e^2 + 2e) / (e^2 + 2e + 2)
        e = tl.exp(tl.minimum(x, 20.0))
        n = e * (e + 2.0)
        y = tl.where(x > 20.0, x, x * (n / (n + 2.0)))
    elif KIND == "hardswish":
        shifted = x + 3.0
        y = x * tl.where(shifted < 0, 0.0, tl.where(shifted > 6, 6.0, shifted)) / 6.0
    elif KIND == "softplus":
        y = _softplus(x)
    elif KIND == "sqrtsoftplus":
        y = tl.sqrt(_softplus(x))
    elif KIND == "laplace":
        y = 0.5 * (1.0 + tl.erf((x - 0.707107) / 0.39894257487763823))
    elif KIND == "gelu" or KIND == "gelu_python":
        y = _gelu(x, FAST)
    elif KIND == "gelu_10":
        g = _gelu(x, FAST)
        y = tl.where(g > 10.0, 10.0, g)
    elif KIND == "gelu_tanh" or KIND == "gelu_new" or KIND == "gelu_fast" or KIND == "gelu_fast8":
        # 0.5 (1 + tanh(u)) = 1 / (1 + exp(-2u))
        y = x / (1.0 + tl.exp(-1.5957691216057308 * x * (1.0 + 0.044715 * x * x)))
    elif KIND == "quick_gelu":
        y = x / (1.0 + tl.exp(-1.702 * x))
    else:
        tl.static_assert(KIND == "identity", "unknown activation")
        y = x
    return y


@triton.jit(do_not_specialize=["N1", "N2", "COL_BLOCKS"])
def _activation_kernel(
    x_ptr,
    u_ptr,
    y_ptr,
    N1,
    N2,
    N,
    COL_BLOCKS,
    stride_x0,
    stride_x1,
    stride_x2,
    stride_xn,
    stride_u0,
    stride_u1,
    stride_u2,
    stride_un,
    stride_y0,
    stride_y1,
    stride_y2,
    stride_yn,
    KIND: tl.constexpr,
    FAST: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    pid = tl.program_id(0)
    row = pid // COL_BLOCKS
    cols = (pid % COL_BLOCKS).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    inside = cols < N
    x_row = x_ptr + row_offsets(row, N1, N2, stride_x0, stride_x1, stride_x2)
    y = activate(tl.load(x_row + cols * stride_xn, mask=inside, other=0.0).to(tl.float32), KIND, FAST)
    if GATED:
        u_row = u_ptr + row_offsets(row, N1, N2, stride_u0, stride_u1, stride_u2)
        y *= tl.load(u_row + cols * stride_un, mask=inside, other=0.0).to(tl.float32)
    y_row = y_ptr + row_offsets(row, N1, N2, stride_y0, stride_y1, stride_y2)
    tl.store(y_row + cols * stride_yn, y.to(y_ptr.dtype.element_ty), mask=inside)


def _run(x: Tensor, up: Tensor | None, kind: str) -> Tensor:
    if up is not None and up.shape != x.shape:  # sizes that were not known when the kernel was chosen
        x, up = torch.broadcast_tensors(x, up)
    y = empty_like(x) if up is None else empty_like(x, dtype=torch.promote_types(x.dtype, up.dtype))
    if x.numel() == 0:
        return y
    u = x if up is None else up
    # dimensions in the order in which they lie in memory: permuted heads merge to rows again
    order = sorted(range(x.dim()), key=lambda dim: (-x.stride()[dim], dim))
    shape = [x.shape[dim] for dim in order]
    flat = collapse(shape, [[t.stride()[dim] for dim in order] for t in (x, u, y)], 4)
    if flat is None:  # more than four dimensions that cannot be merged: work on copies
        return y.copy_(_run(x.contiguous(), None if up is None else up.contiguous(), kind))
    (n0, n1, n2, n), strides = flat
    features = {"N": n, "R": n0 * n1 * n2, "bytes": x.element_size(), "gated": int(up is not None)}
    config = choose("activation", features, RowMemory(0), x.device)
    col_blocks = triton.cdiv(n, config["BLOCK_N"])
    with on_device(x):
        launch(
            _activation_kernel,
            (n0 * n1 * n2 * col_blocks,),
            x,
            u,
            y,
            n1,
            n2,
            n,
            col_blocks,
            *(step for steps in strides for step in steps),
            KIND=kind,
            FAST=y.element_size() == 2,
            GATED=up is not None,
            **config.launch,
        )
    return y


def refuse_kind(signature: Signature) -> str | None:
    """Why there is no epilogue for this activation, or `None`."""
    return None if ops.is_known(signature["kind"]) else f"activation {signature['kind']!r} is not known"


def _supports(signature: Signature) -> str | None:
    return refuse_tensors(signature, ("x",)) or refuse_kind(signature)


def _supports_glu(signature: Signature) -> str | None:
    return (
        refuse_tensors(signature, ("gate", "up"))
        or refuse_different_shapes(signature, "gate", "up")
        or refuse_kind(signature)
    )


def activation(x: Tensor, kind: str) -> Tensor:
    """As the op `activation`."""
    return _run(x, None, kind)


def glu(gate: Tensor, up: Tensor, kind: str) -> Tensor:
    """As the op `glu`."""
    return _run(gate, up, kind)


KERNELS: Final = (
    Kernel(ops.activation, "triton", activation, _supports),
    Kernel(ops.glu, "triton", glu, _supports_glu),
)
