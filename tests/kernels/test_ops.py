"""What every op promises: fakes that tell the truth, symbolic shapes, no aliases, costs, and a table that says why."""

from __future__ import annotations

from typing import Any

import pytest
import sympy
import torch
from kernel_checks import as_tuple, layout, on_devices
from torch._subclasses import FakeTensorMode
from torch.export import Dim, export
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from regraft.kernels.activation import activation, glu
from regraft.kernels.attention import attention
from regraft.kernels.cost import Cost, nbytes, sizes
from regraft.kernels.launch import INTERPRETED, collapse
from regraft.kernels.layer_norm import add_layer_norm, layer_norm
from regraft.kernels.linear_act import gate_up, linear_act
from regraft.kernels.norm_products import JOINT, norm_gate_up, norm_linear_act, norm_qkv_rope
from regraft.kernels.op import Op, TensorSpec
from regraft.kernels.paged_attention import paged_attention
from regraft.kernels.qkv_rope import qkv_rope
from regraft.kernels.rms_norm import add_rms_norm, rms_norm
from regraft.kernels.rope import norm_rope, rope
from regraft.kernels.softmax import softmax
from regraft.kernels.table import OPS, PROVIDERS, op_of, select
from regraft.kernels.varlen_attention import varlen_attention

HALF = torch.bfloat16


def calls() -> list[tuple[Op, tuple[Any, ...]]]:
    """Each op (but the experts, which have tests of their own) on views such as a model makes."""
    qkv = torch.randn(2, 5, 3, 4, 8, dtype=HALF)
    q, k, v = (t.transpose(1, 2) for t in qkv.unbind(2))
    x, weight = torch.randn(2, 5, 8, dtype=HALF), torch.randn(8, dtype=HALF)
    cos, sin = torch.randn(2, 2, 1, 5, 6, dtype=HALF)
    square = torch.randn(6, 8, dtype=HALF)
    packed, ends = torch.randn(11, 4, 8, dtype=HALF), torch.tensor([0, 4, 4, 10], dtype=torch.int32)
    normed, plain = (True, 1e-6, 0.0, HALF, "half", None), (False, 0.0, 0.0, None, "half", None)
    rounded, qkv_weight = (1e-6, 0.0, HALF, HALF), torch.randn(24, 8, dtype=HALF)
    pages = (torch.randn(5, 4, 2, 8, dtype=HALF), torch.randn(5, 4, 2, 8, dtype=HALF))
    slots, lengths = torch.tensor([-1, 3, 4, 17, 18, 19, 12, 13, 14, 15, -1]), torch.tensor([4, 0, 7]).int()
    table = torch.tensor([[0, 1, -1], [-1, -1, -1], [4, 3, -1]]).int()
    return [
        (rms_norm, (q, weight, 1e-6, 0.0, HALF)),
        (rms_norm, (x, weight, 1e-6, 1.0)),
        (add_rms_norm, (x.transpose(0, 1), x.transpose(0, 1), None, 1e-6)),
        (layer_norm, (q, weight, weight, 1e-5)),
        (add_layer_norm, (x.transpose(0, 1), x.transpose(0, 1), weight, None, 1e-5)),
        (softmax, (q, torch.float32, HALF)),
        (softmax, (x[..., ::2],)),
        (rope, (q, cos, sin)),
        (rope, (q[..., :6], cos.float(), sin.float(), "interleaved")),
        (norm_rope, (q, weight, cos, sin, 1e-6, 1.0, None, HALF)),
        (attention, (q, k[:, :2], v[:, :2], None, None, None, torch.randn(4), 0.3, 3, 0, 5.0)),
        (attention, (q, k, v, torch.rand(2, 1, 5, 5) > 0.3, torch.randn(1, 4, 5, 5), torch.rand(2, 5) > 0.3)),
        (varlen_attention, (packed, packed[:, :2], packed[:, 2:], ends, ends, 6, 7, None, None, 0.3, 3, 0)),
        (
            paged_attention,
            (packed, packed[:, :2], packed[:, 2:], *pages, slots, ends, lengths, table, 6, None, torch.randn(4)),
        ),
        (activation, (q, "identity")),
        (activation, (x[..., ::2], "gelu_new")),
        (glu, (x[..., :4], x[..., 4:], "silu")),
        (linear_act, (x.transpose(0, 1), square, square[:, 0], "gelu")),
        (gate_up, (x, square, None, "silu")),
        (qkv_rope, (x, qkv_weight, None, cos[0], sin[0], weight, weight, 1, 1, 8, *normed)),
        (norm_linear_act, (x, x[:, :], weight, *rounded, square, square[:, 0], "gelu")),
        (norm_gate_up, (x, x[:, :], weight, *rounded, square, None, "silu")),
        (norm_qkv_rope, (x, x[:, :], None, *rounded, qkv_weight, None, cos[0], sin[0], None, None, 1, 1, 8, *plain)),
    ]


def test_calls_cover_every_op() -> None:
    assert {op.name for op, _ in calls()} | {"moe_experts"} == set(OPS)


@pytest.mark.parametrize("index", range(len(calls())), ids=lambda i: calls()[i][0].name)
def test_fake_tells_shape_dtype_and_strides(index: int) -> None:
    op, args = calls()[index]
    with FakeTensorMode() as mode:
        fake = as_tuple(op(*(mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in args)))
    for f, real in zip(fake, as_tuple(op(*args)), strict=True):
        assert (f.shape, f.dtype, layout(f)) == (real.shape, real.dtype, layout(real))


@pytest.mark.parametrize("index", range(len(calls())), ids=lambda i: calls()[i][0].name)
def test_results_are_no_aliases_and_inputs_stay(index: int) -> None:
    op, args = calls()[index]
    before = [a.clone() if isinstance(a, torch.Tensor) else a for a in args]
    results = as_tuple(op(*args))
    inputs = {a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor)}
    assert not inputs & {r.untyped_storage().data_ptr() for r in results}
    schema = op.overload._schema.arguments
    for a, b, argument in zip(args, before, schema, strict=False):
        if argument.alias_info is None or not argument.alias_info.is_write:
            assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.mark.parametrize("index", range(len(calls())), ids=lambda i: calls()[i][0].name)
def test_cost_is_the_same_in_numbers_and_symbols(index: int) -> None:
    """The cost in symbols, with the sizes put in, is the cost on meta tensors."""
    op, args = calls()[index]
    numbers = op.cost(*(a.to("meta") if isinstance(a, torch.Tensor) else a for a in args))
    env = ShapeEnv()
    with FakeTensorMode(shape_env=env) as mode:
        fakes = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in args]
        symbolic = op.cost(*fakes)
    known = env.backed_var_to_val if hasattr(env, "backed_var_to_val") else env.var_to_val
    for field in ("flops", "bytes"):
        cost = getattr(symbolic, field)
        assert cost.free_symbols
        assert cost.subs({symbol: int(known[symbol]) for symbol in cost.free_symbols}) == getattr(numbers, field) > 0


def test_costs_of_known_shapes() -> None:
    x, weight = torch.empty(3, 5, 64, device="meta"), torch.empty(32, 64, device="meta")
    cost = linear_act.cost(x, weight, None, "identity")
    assert cost.bytes == 4 * (3 * 5 * 64 + 32 * 64 + 3 * 5 * 32)
    assert cost.flops == 2 * 15 * 64 * 32 + 8 * 15 * 32
    q, k = torch.empty(1, 4, 10, 16, device="meta"), torch.empty(1, 2, 10, 16, device="meta")
    pairs = 4 * 55  # a causal triangle a head
    assert attention.cost(q, k, k, right=0).flops == pairs * (4 * 16 + 5)
    assert nbytes(torch.empty(3, 1, device="meta").expand(3, 7), None) == 12
    total = Cost(sympy.Integer(1), sympy.Integer(2)) + Cost(sympy.Integer(3), sympy.Integer(4))
    assert total == Cost(sympy.Integer(4), sympy.Integer(6))
    assert sizes(x) == (3, 5, 64)


class Block(torch.nn.Module):
    """One layer, written with the ops themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = torch.nn.Linear(64, 128)
        self.norm = torch.nn.Parameter(torch.ones(16))
        self.rest = (None, "half", None)

    def forward(self, x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        batch, length, _ = x.shape
        q, k, v = self.qkv(x).split((64, 32, 32), dim=-1)
        q, k, v = (t.view(batch, length, -1, 16).transpose(1, 2) for t in (q, k, v))
        angle = torch.arange(length)[None, None, :, None] * torch.ones(8)
        q = norm_rope(q, self.norm, angle.cos(), angle.sin(), 1e-6)
        k = rope(k, angle.cos(), angle.sin(), "interleaved")
        y = attention(q, k, v, bias=bias, key_mask=x[..., 0] > -9, sinks=self.norm[:4], scale=0.25, left=5, right=0)
        y, s = add_rms_norm(y.reshape(batch, length, 64), x, None, 1e-6)
        y, s = add_layer_norm(gate_up(y, self.qkv.weight, None, "silu"), s, None, None, 1e-5)
        y = torch.nn.functional.linear(y, self.qkv.weight[:, :64], self.qkv.bias)
        tables = (angle[0].cos(), angle[0].sin())
        sizes = (None, None, 4, 2, 16, False, 0.0, 0.0)
        turned = qkv_rope(x, self.qkv.weight, self.qkv.bias, *tables, *sizes, *self.rest)
        return (
            linear_act(y, self.qkv.weight.t()[:, :128], None, "gelu_new")
            + glu(softmax(s), s, "relu")
            + turned[..., 60:124]
        )


def test_references_export_with_symbolic_shapes() -> None:
    """No size is burned in: exported once, right at other sizes, 1 included."""
    block = Block()
    dynamic = {"x": {0: Dim("batch", min=1), 1: Dim("length", min=1)}, "bias": None}
    with torch.no_grad():
        bias = torch.zeros(4, 1, 1)
        program = export(block, (torch.randn(3, 7, 64), bias), dynamic_shapes=dynamic, strict=False)
        program = program.run_decompositions({})
        targets = {op_of(node.target).name for node in program.graph.nodes if op_of(node.target)}
        others = {"rms_norm", "layer_norm", "activation", "moe_experts", "varlen_attention", "paged_attention"}
        assert targets == set(OPS) - others - {op.name for op in JOINT.values()}
        for shape in [(1, 1, 64), (2, 5, 64), (1, 9, 64), (4, 1, 64)]:
            x = torch.randn(shape)
            assert torch.equal(program.module()(x, bias), block(x, bias))


def test_signature_fills_in_defaults() -> None:
    x = torch.randn(2, 8)
    signature = rms_norm.signature(x, None, eps=1e-6)
    assert signature["x"] == TensorSpec((2, 8), torch.float32, torch.device("cpu"))
    assert (signature["weight"], signature["eps"], signature["offset"], signature["mid_dtype"]) == (None, 1e-6, 0, None)
    with pytest.raises(TypeError, match="eps"):
        rms_norm.signature(x, None)
    with pytest.raises(TypeError, match="sigma"):
        rms_norm.signature(x, None, 1e-6, sigma=1)


def test_symbolic_sizes_are_none_in_a_spec() -> None:
    x = torch.randn(3, 8)
    with FakeTensorMode(shape_env=ShapeEnv()) as mode:
        assert TensorSpec.of(mode.from_tensor(x)).shape == (None, None)
        assert TensorSpec.of(mode.from_tensor(x, static_shapes=True)).shape == (3, 8)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter takes CPU tensors")
def test_on_the_cpu_every_kernel_says_why_not() -> None:
    for op, args in calls():
        kernel, refused = select(op, op.signature(*args))
        assert kernel is None
        assert any("is on cpu" in reason for reason in refused.values())


def test_every_op_has_a_triton_kernel() -> None:
    assert set(PROVIDERS) == set(OPS)
    for name, kernels in PROVIDERS.items():
        assert all(kernel.op is OPS[name] for kernel in kernels)


def test_collapse_merges_what_it_can() -> None:
    x = torch.empty(2, 3, 1, 5)
    assert collapse(x.shape, [x.stride()], 3) == ([1, 1, 30], [[0, 0, 1]])
    y = torch.empty(5, 2, 3).permute(1, 2, 0)
    assert collapse(y.shape, [y.stride()], 3) == ([1, 6, 5], [[0, 1, 6]])
    assert collapse(y.shape, [y.stride(), y.contiguous().stride()], 3) == ([1, 6, 5], [[0, 1, 6], [0, 5, 1]])
    z = torch.empty(4, 3, 2).permute(2, 1, 0)
    assert collapse(z.shape, [z.stride()], 2) is None


@on_devices
def test_triton_broadcasts_what_was_not_known(device: str) -> None:
    """Sizes unknown when the kernel was chosen may turn out to broadcast: as in the reference, never a wrong read."""
    x, y = torch.randn(3, 5, 8, device=device), torch.randn(1, 5, 8, device=device)
    for op, args in [
        (add_rms_norm, (x, y, None, 1e-6)),
        (add_rms_norm, (y, x, None, 1e-6)),
        (add_layer_norm, (y, x, None, None, 1e-5)),
        (glu, (x, y, "silu")),
        (glu, (y, x, "silu")),
    ]:
        kernel = next(k for k in PROVIDERS[op.name] if k.provider == "triton")
        for actual, expected in zip(as_tuple(kernel.run(*args)), as_tuple(op.reference(*args)), strict=True):
            assert torch.allclose(actual, expected, rtol=1e-5, atol=1e-5)
    q, k = torch.randn(2, 2, 3, 16, device=device), torch.randn(1, 2, 3, 16, device=device)
    kernel = PROVIDERS["attention"][0]
    assert torch.allclose(kernel.run(q, k, k), attention.reference(q, k, k), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="belong"):
        kernel.run(q, q, k)
