"""A rule of your own: an op that you wrote, put where the model spells it out.

    python examples/own_rule.py

Gemma 2 caps its logits, `tanh(logits / cap) * cap`: three passes over the largest tensor of the model. An op of our own
does it in one, and ten lines tell regraft where to put it; regraft has a rule for it, too, which is switched off here.
`regraft.self_test` tries the rule without a model: it builds the pattern as a graph on random tensors, applies the rule
and compares. On a model it is verified like any rule.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from transformers import AutoModelForCausalLM, Gemma2Config

import regraft


@triton.jit
def softcap_kernel(x_ptr, y_ptr, cap, size, BLOCK: tl.constexpr):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    x = tl.load(x_ptr + offsets, mask=offsets < size, other=0.0).to(tl.float32) / cap
    tanh = 2.0 * tl.sigmoid(2.0 * x) - 1.0
    tl.store(y_ptr + offsets, (tanh * cap).to(y_ptr.dtype.element_ty), mask=offsets < size)


@torch.library.custom_op("example::softcap", mutates_args=())
def softcap(x: torch.Tensor, cap: float) -> torch.Tensor:
    """`tanh(x / cap) * cap` for x of any shape."""
    if not x.is_cuda or x.dtype == torch.float64:
        return torch.tanh(x / cap) * cap
    x = x.contiguous()
    y = torch.empty_like(x)
    softcap_kernel[(triton.cdiv(x.numel(), 1024),)](x, y, cap, x.numel(), BLOCK=1024)
    return y


@softcap.register_fake
def _(x: torch.Tensor, cap: float) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


class OwnSoftcap(regraft.Rule):
    """tanh(x / cap) * cap -> softcap(x, cap)"""

    name = "own_softcap"
    label = "div + tanh + mul -> softcap"

    def pattern(self, p: Any, x: Any, cap: Any) -> Any:
        return p.mul(p.tanh(p.div(x, cap)), cap)  # `cap` twice: both must be the same number

    def check(self, m: Any) -> regraft.Reject | None:
        return None if isinstance(m.cap, int | float) else regraft.Reject("the cap is a tensor", m.cap)

    def emit(self, m: Any, g: Any) -> Any:
        return g.call(torch.ops.example.softcap.default, m.x, float(m.cap))


class WrongSoftcap(OwnSoftcap):
    """The same with a mistake in it: the cap is halved."""

    name = "wrong_softcap"

    def emit(self, m: Any, g: Any) -> Any:
        return g.call(torch.ops.example.softcap.default, m.x, float(m.cap) / 2)


def sample(draw: int) -> dict[str, Any]:
    """A value for each variable of the pattern; the sizes differ from draw to draw."""
    return {"x": 3 * torch.randn(2, 5 + 2 * draw), "cap": 2.0 + draw}


def small_gemma() -> Any:
    """A random Gemma 2 of two layers, its logits large enough to be capped."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 112, "num_hidden_layers": 2, "head_dim": 16, "vocab_size": 512}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    model = AutoModelForCausalLM.from_config(Gemma2Config(**sizes, **heads, final_logit_softcapping=2.0)).eval()
    model.get_input_embeddings().weight.data *= 20
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


def main() -> None:
    # the pattern is executable: without a model, the rule is tried on it with random numbers
    regraft.self_test(OwnSoftcap(), lambda draw: {"x": torch.randn(3, 5 + 2 * draw), "cap": 1.5})
    tested = regraft.self_test(OwnSoftcap(), sample)
    print(f"own_softcap: {tested.fired} graphs in fp64 and {tested.fired_with_casts} in bf16 compute the same")
    try:
        regraft.self_test(WrongSoftcap(), sample)
    except regraft.SelfTestError as error:
        print(error)
    known = {"softcap": False}
    ids = torch.randint(5, 500, (2, 11))
    for rule in (OwnSoftcap(), WrongSoftcap()):
        model = small_gemma()
        tokens = {"input_ids": ids.to(model.device), "use_cache": False}
        with torch.no_grad():
            expected = model(**tokens).logits
        model = regraft.optimize(model, rules=[rule], passes=known, example_inputs=tokens, verbose=False)
        error = float((model(**tokens).logits - expected).abs().max())
        taken = [f"{g.label} (x{g.count})" for g in model.report.rewrites if g.rule == rule.name]
        refused = [f"{r.rule} at {r.module or 'the model'}: {r.reason}" for r in model.report.reverted]
        print(f"{rule.name}: fused {taken or 'nothing'}, reverted {refused or 'nothing'}, error {error:.1e}")
        assert error < 1e-4, "whatever the rule, the model's output is the original's"
        assert bool(taken) == (type(rule) is OwnSoftcap)
        assert bool(refused) == (type(rule) is WrongSoftcap)


if __name__ == "__main__":
    main()
