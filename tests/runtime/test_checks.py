"""Models and inputs that cannot be optimized are refused with what to do, and nothing is left half done."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from runtime_models import Identity, optimized, tiny_llama, tokens
from torch import nn

from regraft.compiler.errors import CaptureError
from regraft.runtime.checks import check_model
from regraft.runtime.errors import InputError, UnsupportedModelError


def untouched(model: nn.Module) -> bool:
    return "forward" not in model.__dict__ and "report" not in model.__dict__


@pytest.mark.parametrize("what", ["meta-llama/Llama-3.1-8B", {"a": 1}, None, transformers.LlamaForCausalLM])
def test_not_a_module(what: Any) -> None:
    with pytest.raises(TypeError, match=r"not a torch\.nn\.Module"):
        check_model(what)


def quantisation_config(model: Any) -> None:
    model.config.quantization_config = {"quant_method": "awq"}


def quantised_flag(model: Any) -> None:
    model.is_quantized = True


def integer_weight(model: Any) -> None:
    linear = model.model.layers[0].mlp.up_proj
    linear.weight = nn.Parameter(linear.weight.to(torch.int8), requires_grad=False)


def float8_weight(model: Any) -> None:
    linear = model.model.layers[0].mlp.up_proj
    linear.weight = nn.Parameter(linear.weight.to(torch.float8_e4m3fn), requires_grad=False)


def packed_weight(model: Any) -> None:
    model.model.layers[0].mlp.up_proj.register_buffer("qweight", torch.zeros(8, 8, dtype=torch.int32))


def meta_weights(model: Any) -> None:
    model.to("meta")


def mixed_dtypes(model: Any) -> None:
    model.lm_head.to(torch.bfloat16)


def mixed_devices(model: Any) -> None:
    model.lm_head.to("meta")


def device_map(model: Any) -> None:
    model.hf_device_map = {"model.embed_tokens": 0, "model.layers": 1}


def offloaded(model: Any) -> None:
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    add_hook_to_module(model.model.layers[0].mlp, AlignDevicesHook("cpu", offload=True, weights_map={}))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (quantisation_config, "quantised .awq"),
        (quantised_flag, "is quantised"),
        (integer_weight, r"up_proj\.weight is torch\.int8: quantised"),
        (float8_weight, r"up_proj\.weight is torch\.float8_e4m3fn: quantised"),
        (packed_weight, "holds qweight"),
        (meta_weights, "meta device.*dry_run=True"),
        (mixed_dtypes, r"mixed dtypes .*lm_head\.weight is torch\.bfloat16"),
        (mixed_devices, r"several devices .*lm_head\.weight on meta"),
        (device_map, "split over 0, 1 by its device_map"),
        (offloaded, r"model\.layers\.0\.mlp is offloaded"),
    ],
)
def test_models_that_are_refused(spoil: Any, message: str) -> None:
    model = tiny_llama()
    spoil(model)
    with pytest.raises(UnsupportedModelError, match=message):
        optimized(model)
    assert untouched(model)


def test_adapters_are_refused_until_merged() -> None:
    import peft

    config = peft.LoraConfig(target_modules=["q_proj"], r=2)
    model = peft.get_peft_model(tiny_llama(), config)
    for adapted in (model, model.base_model.model):
        with pytest.raises(UnsupportedModelError, match="merge_and_unload"):
            optimized(adapted)
    merged = optimized(model.merge_and_unload())
    merged(tokens(), attention_mask=torch.ones_like(tokens()))
    assert merged.forward.record.calls == {"graph": 1, "original": 0}


def test_optimizing_twice() -> None:
    model = optimized(tiny_llama())
    forward = model.forward
    with pytest.raises(UnsupportedModelError, match=r"already optimized; call regraft\.restore"):
        optimized(model)
    with pytest.raises(UnsupportedModelError, match="child inside this Module is already optimized"):
        optimized(type("Module", (nn.Module,), {})().apply(lambda m: m.add_module("child", model)))
    assert model.forward is forward


def test_a_module_kept_in_fp32_by_the_model_itself_is_no_mixture() -> None:
    model = tiny_llama().to(torch.bfloat16)
    model.lm_head.to(torch.float32)
    model._keep_in_fp32_modules = ["lm_head"]
    assert check_model(model) is model


@pytest.mark.parametrize(
    ("examples", "message"),
    [
        ({"input_id": tokens()}, "no argument 'input_id', did you mean 'input_ids'"),
        ({"input_ids": torch.zeros(0, 4, dtype=torch.long)}, r"input_ids has shape \[0, 4\]"),
        ({"input_ids": tokens(), "attention_mask": torch.ones(2, 3)}, r"attention_mask has shape \[2, 3\]"),
        ({"input_ids": tokens().float()}, "itself refuses them"),
        ({"input_ids": tokens(), "labels": tokens()}, "labels cannot be served"),
    ],
)
def test_wrong_example_inputs(examples: dict[str, Any], message: str) -> None:
    model = NoKeywords().eval() if "input_id" in examples else tiny_llama()
    with pytest.raises(InputError, match=message):
        optimized(model, example_inputs=examples)
    assert untouched(model)


class NoKeywords(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(131, 4)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.table(input_ids)


class Failing(Identity):
    def capture(self, module: Any, call: Any, forward: Any) -> Any:
        raise CaptureError("model.layers.0", "it depends on data", "modeling_x.py:7 if x.sum() > 0:")


def test_a_model_that_cannot_be_captured_keeps_its_forward() -> None:
    model = optimized(tiny_llama(), Failing())
    with pytest.warns(UserWarning, match=r"it depends on data at modeling_x\.py:7"):
        out = model(tokens(), attention_mask=torch.ones_like(tokens()))
    assert torch.equal(out.logits, tiny_llama()(tokens()).logits)
    (entry,) = model.forward.record.signatures
    assert not entry.served and "model.layers.0" in entry.reason


@pytest.mark.parametrize("options", [{"strict": True}, {"on_error": "raise"}])
def test_or_raises_where_that_is_asked_for(options: dict[str, Any]) -> None:
    model = tiny_llama()
    with pytest.raises(CaptureError, match="it depends on data"):
        optimized(model, Failing(), **options)
    assert untouched(model)


def test_an_error_midway_leaves_no_views() -> None:
    class Interrupted(Identity):
        def compile(self, program: Any, *args: Any, **settings: Any) -> Any:
            raise KeyboardInterrupt

    model = tiny_llama()
    pointers = [p.data_ptr() for p in model.parameters()]
    with pytest.raises(KeyboardInterrupt):
        optimized(model, Interrupted())
    assert untouched(model) and [p.data_ptr() for p in model.parameters()] == pointers


def test_training_flags_are_put_back() -> None:
    model = tiny_llama()
    model.train()
    model.model.norm.eval()
    flags = [m.training for m in model.modules()]
    optimized(model)
    assert [m.training for m in model.modules()] == flags


def test_namespace_is_not_a_model() -> None:
    with pytest.raises(TypeError):
        check_model(SimpleNamespace(forward=lambda: None))
