"""`moe_experts` against transformers' own experts, every gate that transformers has, and against a loop over tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from regraft.compiler.experts_capture import ExpertsCapture, find_gate
from regraft.kernels.moe import gate, moe_experts

EXPERTS, TOKENS, TOP = 5, 13, 2


def routing(experts: int = EXPERTS) -> tuple[Tensor, Tensor]:
    scores = torch.randn(TOKENS, experts).softmax(-1)
    weights, index = scores.topk(TOP, dim=-1)
    return index, weights


def experts_of(config: Any) -> nn.Module:
    """The first experts module of a tiny model, randomised."""
    model = tf.AutoModelForCausalLM.from_config(config).eval()
    module = next(m for m in model.modules() if hasattr(m, "_apply_gate"))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.5)
    return module


_SIZES = {
    "hidden_size": 24,
    "intermediate_size": 20,
    "moe_intermediate_size": 20,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 31,
    "num_experts_per_tok": TOP,
    "head_dim": 12,
}
CONFIGS = {
    "mixtral": tf.MixtralConfig(**_SIZES, num_local_experts=EXPERTS),
    "qwen3_moe": tf.Qwen3MoeConfig(**_SIZES, num_experts=EXPERTS),
    "gpt_oss": tf.GptOssConfig(**_SIZES, num_local_experts=EXPERTS),
}


@pytest.mark.parametrize("name", list(CONFIGS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bit_equal_to_the_eager_experts(name: str, dtype: torch.dtype) -> None:
    module = experts_of(CONFIGS[name]).to(dtype)
    hidden = (3 * torch.randn(TOKENS, 24)).to(dtype)
    index, weights = routing()
    weights = weights.to(dtype)
    captured = ExpertsCapture({module: "experts"})
    assert not captured.alone
    with torch.no_grad():
        assert torch.equal(
            captured(module, hidden, index, weights), type(module).forward.__wrapped__(module, hidden, index, weights)
        )


def test_the_gate_of_gpt_oss_is_found() -> None:
    found = find_gate(experts_of(CONFIGS["gpt_oss"]))
    assert found is not None
    assert (found.interleaved, found.limit, found.alpha, found.up_offset) == (True, 7.0, 1.702, 1.0)


class _Strange(nn.Module):
    has_gate, has_bias, is_transposed = True, False, False

    def __init__(self) -> None:
        super().__init__()
        self.num_experts = EXPERTS
        self.gate_up_proj = nn.Parameter(torch.randn(EXPERTS, 40, 24))
        self.down_proj = nn.Parameter(torch.randn(EXPERTS, 24, 20))

    def _apply_gate(self, x: Tensor) -> Tensor:
        g, up = x.chunk(2, dim=-1)
        return torch.sin(g) * up


def test_a_gate_that_the_op_cannot_express_is_left_alone() -> None:
    module = _Strange()
    captured = ExpertsCapture({module: "layers.0.experts"})
    assert module in captured.alone and captured.notes[0].module == "layers.0.experts"
    hidden, (index, weights) = torch.randn(TOKENS, 24), routing()
    wanted = torch.zeros(TOKENS, 24)
    for t in range(TOKENS):
        for k in range(TOP):
            e = int(index[t, k])
            wanted[t] += weights[t, k] * (module.down_proj[e] @ module._apply_gate(module.gate_up_proj[e] @ hidden[t]))
    with torch.no_grad():
        torch.testing.assert_close(captured(module, hidden, index, weights), wanted, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("limit_after", [False, True])
def test_against_a_loop_over_tokens(transposed: bool, limit_after: bool) -> None:
    hidden, (index, weights) = torch.randn(TOKENS, 6, dtype=torch.float64), routing()
    weights = weights.double()
    index[0, 0] = EXPERTS  # not an expert: adds nothing
    up, down = torch.randn(EXPERTS, 14, 6, dtype=torch.float64), torch.randn(EXPERTS, 6, 7, dtype=torch.float64)
    up_bias, down_bias = torch.randn(EXPERTS, 14, dtype=torch.float64), torch.randn(EXPERTS, 6, dtype=torch.float64)
    wanted = torch.zeros_like(hidden)
    for t in range(TOKENS):
        for k in range(TOP):
            e = int(index[t, k])
            if e < EXPERTS:
                inner = gate(up[e] @ hidden[t] + up_bias[e], "gelu", limit=0.7, limit_after=limit_after)
                wanted[t] += weights[t, k] * (down[e] @ inner + down_bias[e])
    stored = (up.mT.contiguous(), down.mT.contiguous()) if transposed else (up, down)
    found = moe_experts(
        hidden, index, weights, *stored, up_bias, down_bias, "gelu", True, transposed, False, 0.7, limit_after
    )
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    assert found.data_ptr() != hidden.data_ptr()


def test_fake_tensors_and_cost() -> None:
    with FakeTensorMode():
        hidden, index, weights = torch.empty(TOKENS, 6), torch.zeros(TOKENS, TOP, dtype=torch.long), torch.ones(13, 2)
        up, down = torch.empty(EXPERTS, 14, 6), torch.empty(EXPERTS, 6, 7)
        assert moe_experts(hidden, index, weights, up, down).shape == (TOKENS, 6)
        cost = moe_experts.cost(hidden, index, weights, up, down)
    assert cost.flops == TOKENS * TOP * 2 * (14 * 6 + 6 * 7)
    assert cost.bytes > 4 * EXPERTS * (14 * 6 + 6 * 7)
