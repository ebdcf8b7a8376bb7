"""The optimized object behaves as the original: outputs, class and signature; and it says what it does not serve."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import io
import pickle
import threading
import warnings
from typing import Any

import pytest
import torch
import transformers
import zoo
from runtime_models import Identity, Real, optimized, tiny_llama, tokens

from regraft.runtime.dispatch import Dispatch
from regraft.runtime.errors import InputError, RegraftWarning
from regraft.runtime.optimize import restore

TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}
"""Two orders of the same fp32 sums over 64 features."""


@pytest.fixture(scope="module")
def model() -> transformers.LlamaForCausalLM:
    model = optimized(tiny_llama())
    with torch.no_grad():
        model(tokens())
    return model


def counted(model: torch.nn.Module) -> dict[str, int]:
    return dict(model.forward.record.calls)


def test_model_called_as_users_do(model: transformers.LlamaForCausalLM) -> None:
    before = counted(model)
    out = model(tokens())
    expected = model.forward.original(tokens())
    torch.testing.assert_close(out.logits, expected.logits.detach(), **TOLERANCE)
    assert type(out) is type(expected)
    assert not out.logits.requires_grad
    assert type(out.past_key_values) is transformers.DynamicCache
    for layer, wanted in zip(out.past_key_values.layers, expected.past_key_values.layers, strict=True):
        torch.testing.assert_close(layer.keys, wanted.keys.detach(), **TOLERANCE)
        torch.testing.assert_close(layer.values, wanted.values.detach(), **TOLERANCE)
    assert counted(model) == {"graph": before["graph"] + 1, "original": before["original"]}


@pytest.mark.parametrize("shape", [(1, 1), (3, 17), (1, 40)])
def test_new_shapes_need_no_capture(model: transformers.LlamaForCausalLM, shape: tuple[int, int]) -> None:
    captured = len(model.forward.stages.captured)
    out = model(tokens(*shape))
    torch.testing.assert_close(out.logits, model.forward.original(tokens(*shape)).logits.detach(), **TOLERANCE)
    assert len(model.forward.stages.captured) == captured


def test_padding_on_either_side(model: transformers.LlamaForCausalLM) -> None:
    for row, columns in ((0, slice(0, 3)), (1, slice(-2, None))):
        mask = torch.ones_like(tokens())
        mask[row, columns] = 0
        out = model(tokens(), attention_mask=mask).logits[mask.bool()]
        expected = model.forward.original(tokens(), attention_mask=mask).logits[mask.bool()]
        torch.testing.assert_close(out, expected.detach(), **TOLERANCE)


def test_object_is_still_the_users_model(model: transformers.LlamaForCausalLM) -> None:
    assert isinstance(model, transformers.LlamaForCausalLM)
    assert isinstance(model, transformers.PreTrainedModel)
    assert inspect.signature(model.forward) == inspect.signature(model.forward.original)
    assert model.forward.__doc__ == type(model).forward.__doc__
    assert model.state_dict().keys() == tiny_llama().state_dict().keys()
    assert model.dtype is torch.float32 and model.device.type == "cpu"
    assert "graphs" in repr(model.forward)


def test_generate_without_cache_never_leaves_the_graph() -> None:
    model, original = optimized(tiny_llama()), tiny_llama()
    settings = {"max_new_tokens": 6, "do_sample": False, "use_cache": False}
    mask = torch.ones_like(tokens())
    assert torch.equal(
        model.generate(tokens(), attention_mask=mask, **settings),
        original.generate(tokens(), attention_mask=mask, **settings),
    )
    assert counted(model) == {"graph": 6, "original": 0}


def test_huggingfaces_loop_with_a_cache_prefills_by_the_graph(model: transformers.LlamaForCausalLM) -> None:
    before = counted(model)
    loop = transformers.GenerationMixin.generate
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        out = loop(model, tokens(), max_new_tokens=5, do_sample=False)
        loop(model, tokens(), max_new_tokens=3, do_sample=False)
    assert torch.equal(out, tiny_llama().generate(tokens(), max_new_tokens=5, do_sample=False))
    after = counted(model)
    assert (after["graph"] - before["graph"], after["original"] - before["original"]) == (2, 6)
    said = [w for w in caught if issubclass(w.category, RegraftWarning)]
    assert len(said) == 1 and "past_key_values" in str(said[0].message)


def test_an_empty_cache_of_the_caller_is_filled(model: transformers.LlamaForCausalLM) -> None:
    mine = transformers.DynamicCache(config=model.config)
    out = model(tokens(), past_key_values=mine)
    assert out.past_key_values is mine
    assert mine.get_seq_length() == tokens().shape[1]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"labels": tokens()}, "labels"),
        ({"output_attentions": True}, "output_attentions"),
        ({"inputs_embeds": torch.randn(2, 9, 64, requires_grad=True), "input_ids": None}, "inputs_embeds"),
        ({"past_key_values": ((torch.zeros(2, 2, 3, 8),) * 2,)}, "past_key_values"),
    ],
)
def test_what_no_graph_serves_is_named_once(model: transformers.LlamaForCausalLM, arguments: dict, named: str) -> None:
    arguments = {"input_ids": tokens(), **arguments}
    model.forward._said.clear()
    before = counted(model)

    def call() -> None:
        try:
            model(**arguments)
        except (AttributeError, ValueError, TypeError):
            assert named == "past_key_values"  # transformers itself refuses the old tuples

    with pytest.warns(RegraftWarning, match=named):
        call()
    with warnings.catch_warnings():
        warnings.simplefilter("error", RegraftWarning)
        call()
    assert counted(model) == {"graph": before["graph"], "original": before["original"] + 2}


def test_labels_give_the_originals_loss(model: transformers.LlamaForCausalLM) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RegraftWarning)
        loss = model(tokens(), labels=tokens()).loss
    assert loss.requires_grad
    torch.testing.assert_close(loss, tiny_llama()(tokens(), labels=tokens()).loss)


def test_training_goes_to_the_original_and_learns() -> None:
    model = optimized(tiny_llama())
    model.train()
    with pytest.warns(RegraftWarning, match="training mode"):
        model(tokens()).logits.sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    model.eval()
    before = counted(model)
    model(tokens(), attention_mask=torch.ones_like(tokens()))
    assert counted(model)["graph"] == before["graph"] + 1


def test_hooks_on_submodules_are_not_bypassed() -> None:
    model = optimized(tiny_llama())
    seen: list[int] = []
    mask = torch.ones_like(tokens())
    handle = model.model.layers[0].mlp.register_forward_hook(lambda *_: seen.append(1))
    with pytest.warns(RegraftWarning, match=r"model\.layers\.0\.mlp"):
        model(tokens(), attention_mask=mask)
    assert seen == [1]
    handle.remove()
    model(tokens(), attention_mask=mask)
    assert seen == [1] and counted(model) == {"graph": 1, "original": 1}


def test_hidden_states_are_served_although_transformers_hooks_them() -> None:
    model = optimized(tiny_llama(2))
    out = model(tokens(), output_hidden_states=True)
    expected = model.forward.original(tokens(), output_hidden_states=True)
    assert len(out.hidden_states) == 3
    for found, wanted in zip(out.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(found, wanted.detach(), **TOLERANCE)
    model(tokens(), output_hidden_states=True)
    assert counted(model) == {"graph": 2, "original": 0}


def test_config_changes_are_followed() -> None:
    model = optimized(tiny_llama())
    model.config.use_cache = False
    assert model(tokens()).past_key_values is None
    model.config.use_cache = True
    assert model(tokens()).past_key_values is not None
    assert isinstance(model(tokens(), return_dict=False), tuple)
    assert counted(model)["original"] == 0


def test_flags_of_the_config_are_followed() -> None:
    model, inputs = zoo.build("mixtral")
    model = optimized(model)
    assert "router_logits" not in model(**inputs)
    model.config.output_router_logits = True
    assert "router_logits" in model(**inputs)


def test_torch_export_takes_the_original(model: transformers.LlamaForCausalLM) -> None:
    exported = torch.export.export(model, (), {"input_ids": tokens(), "use_cache": False})
    expected = model(tokens(), use_cache=False).logits
    torch.testing.assert_close(exported.module()(input_ids=tokens(), use_cache=False).logits, expected)


def test_deepcopy_is_right_and_independent(model: transformers.LlamaForCausalLM) -> None:
    other = copy.deepcopy(model)
    assert isinstance(other.forward, Dispatch) and other.forward.module is other
    with torch.no_grad():
        other.lm_head.weight.mul_(2)
    expected = model.forward.original(tokens()).logits.detach()
    torch.testing.assert_close(other(tokens()).logits, 2 * expected, **TOLERANCE)
    torch.testing.assert_close(model(tokens()).logits, expected, **TOLERANCE)
    assert other.forward.record is not model.forward.record


def test_pickle_and_torch_save() -> None:
    model = optimized(tiny_llama())
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    expected = model(tokens()).logits
    for other in (torch.load(buffer, weights_only=False), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(other(tokens()).logits, expected, **TOLERANCE)
        assert other.forward.module is other


def test_two_optimized_models_live_side_by_side(model: transformers.LlamaForCausalLM) -> None:
    other = optimized(tiny_llama(seed=5))
    mask = torch.ones_like(tokens())
    mine, others = model(tokens(), attention_mask=mask).logits, other(tokens(), attention_mask=mask).logits
    torch.testing.assert_close(mine, tiny_llama()(tokens()).logits.detach(), **TOLERANCE)
    torch.testing.assert_close(others, tiny_llama(seed=5)(tokens()).logits.detach(), **TOLERANCE)


def test_threads_capture_once() -> None:
    model = optimized(tiny_llama())
    expected = tiny_llama()(tokens()).logits.detach()
    start, results = threading.Barrier(4), []

    def work() -> None:
        start.wait()
        results.append(model(tokens(), use_cache=False).logits)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    for result in results:
        torch.testing.assert_close(result, expected, **TOLERANCE)
    assert len(model.forward.stages.captured) == 2  # the first signature, and this one once
    assert counted(model) == {"graph": 4, "original": 0}


def test_threads_are_served_while_one_captures() -> None:
    """The tracer stands in for parameters and for every module's call: others wait for it."""
    model = optimized(tiny_llama())
    expected = model(tokens()).logits
    wrong: list[object] = []
    stop = threading.Event()

    def serve() -> None:
        try:
            while not stop.is_set():
                if not torch.equal(model(tokens()).logits, expected):
                    wrong.append("another result")
        except Exception as error:  # noqa: BLE001 - whatever the tracer does to a stranger
            wrong.append(error)

    threads = [threading.Thread(target=serve) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        for arguments in ({"use_cache": False}, {"output_hidden_states": True}, {"logits_to_keep": 2}):
            model(tokens(), **arguments)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert wrong == []
    assert counted(model)["original"] == 0


def test_too_long_for_learned_positions() -> None:
    config = transformers.GPT2Config(
        vocab_size=131, n_embd=32, n_layer=1, n_head=2, n_positions=16, bos_token_id=1, eos_token_id=2
    )
    model = optimized(transformers.GPT2LMHeadModel(config).eval())
    mask = torch.ones(1, 16, dtype=torch.long)
    model(tokens(1, 16), attention_mask=mask)
    with pytest.raises(InputError, match=r"input_ids is 17.*16"):
        model(tokens(1, 17), attention_mask=torch.ones(1, 17, dtype=torch.long))


def test_inputs_that_no_graph_takes_are_for_the_original_to_judge() -> None:
    """What it takes is its own affair, with a warning; what it refuses, too, is said in our words."""
    plain, model = tiny_llama(), optimized(tiny_llama())
    short = torch.ones(2, 5, dtype=torch.long)
    with torch.no_grad(), pytest.warns(RegraftWarning, match="an attention_mask of another shape than input_ids"):
        found = model(tokens(), attention_mask=short).logits
    assert torch.equal(found, plain(tokens(), attention_mask=short).logits)
    with warnings.catch_warnings(), pytest.raises(InputError, match=r"input_ids has shape \[0, 9\]: an empty batch"):
        warnings.simplefilter("ignore", RegraftWarning)
        model(torch.zeros(0, 9, dtype=torch.long))
    assert counted(model) == {"graph": 0, "original": 2}
    linear = optimized(torch.nn.Linear(4, 3).eval(), example_inputs={"input": torch.randn(2, 4)})
    with torch.no_grad(), pytest.warns(RegraftWarning, match="an empty input is served by the original"):
        assert linear(torch.zeros(0, 4)).shape == (0, 3)


def test_a_module_that_is_no_transformers_model() -> None:
    class Plain(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = torch.nn.Linear(8, 16), torch.nn.Linear(16, 3)

        def forward(self, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
            return self.second(torch.relu(self.first(x))) * scale

    module = optimized(Plain().eval(), example_inputs={"x": torch.randn(4, 8)})
    x = torch.randn(7, 8)
    torch.testing.assert_close(module(x), module.forward.original(x).detach())
    torch.testing.assert_close(module(x, scale=3.0), module.forward.original(x, 3.0).detach())
    assert counted(module) == {"graph": 2, "original": 0}


def test_restore_gives_the_original_forward() -> None:
    model = tiny_llama()
    reference = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimized(model, Identity())
    assert restore(model) is model
    assert "forward" not in model.__dict__
    assert all(torch.equal(tensor, reference[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(ValueError, match="not optimized"):
        restore(model)


def test_containers_of_tensors_are_served() -> None:
    class Pair(torch.nn.Module):
        def forward(self, both: tuple[torch.Tensor, torch.Tensor], more: dict, sizes: list) -> torch.Tensor:
            return both[0] @ both[1] * more["scale"] + sizes[1]

    def arguments(rows: int) -> dict:
        return {
            "both": (torch.randn(rows, 4), torch.randn(4, 3)),
            "more": {"scale": torch.randn(3)},
            "sizes": [1, 2],
        }

    module = optimized(Pair().eval(), example_inputs=arguments(5))
    for rows in (5, 8):
        given = arguments(rows)
        torch.testing.assert_close(module(**given), module.forward.original(**given))
    assert counted(module) == {"graph": 2, "original": 0}


def test_an_encoder_runs_once_and_the_decoder_by_the_graph() -> None:
    config = transformers.T5Config(
        vocab_size=131, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, pad_token_id=0, eos_token_id=2,
        decoder_start_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    original = transformers.T5ForConditionalGeneration(config).eval()
    model = optimized(copy.deepcopy(original))
    settings = {"max_new_tokens": 3, "do_sample": False, "use_cache": False}
    assert torch.equal(model.generate(tokens(), **settings), original.generate(tokens(), **settings))
    assert counted(model)["original"] == 0


def test_a_value_of_another_type_is_another_signature() -> None:
    class Scaled(torch.nn.Module):
        def forward(self, x: torch.Tensor, by: float = 2.0) -> torch.Tensor:
            return x * by if isinstance(by, bool) else x / by

    module = optimized(Scaled().eval(), example_inputs={"x": torch.randn(3, 2)})
    x = torch.randn(4, 2)
    for by in (True, 1, 4, 4.0, 2.0):
        torch.testing.assert_close(module(x, by=by), module.forward.original(x, by=by))


class _RowByRow(torch.nn.Module):
    """Its code fixes the batch: a loop over it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(8, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([self.linear(row) for row in x])


class _OtherSizes(Identity):
    """Captures for a batch twice as large as the one it is asked for."""

    def capture(self, module: Any, call: Any, forward: Any) -> Any:
        doubled = dataclasses.replace(call, tensors={n: torch.cat([t, t]) for n, t in call.tensors.items()})
        return super().capture(module, doubled, forward)


def test_a_fresh_graph_that_does_not_take_the_sizes_of_its_call_does_not_serve_it() -> None:
    model = optimized(_RowByRow().eval(), _OtherSizes())
    x = torch.randn(3, 5, 8)
    with pytest.warns(RegraftWarning, match="dimension 0 of x is 3, captured with 6"):
        torch.testing.assert_close(model(x), model.forward.original(x))
    with torch.no_grad():
        torch.testing.assert_close(model(torch.cat([x, x])), model.forward.original(torch.cat([x, x])))
    assert counted(model) == {"graph": 1, "original": 1}


class _Scan(torch.nn.Module):
    """Its code fixes the length: a loop over the tokens, unrolled in a graph."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(131, 8)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        state = torch.zeros(8)
        for token in self.embed(input_ids).unbind(1):
            state = torch.tanh(state + token)
        return state


def test_a_length_whose_unrolled_graph_would_take_minutes_is_left_to_the_original() -> None:
    model = optimized(_Scan().eval())
    with torch.no_grad():
        model(tokens(2, 4))
        (served,) = model.forward.graphs
        seconds, served.seconds = served.seconds, 1.0
        assert seconds > 0
        model(tokens(2, 5))
        assert counted(model) == {"graph": 2, "original": 0}
        with pytest.warns(RegraftWarning, match="a length that the model's code fixes"):
            out = model(tokens(2, 400))
    torch.testing.assert_close(out, model.forward.original(tokens(2, 400)).detach())
    assert counted(model) == {"graph": 2, "original": 1}


def test_wrong_arguments_do_not_condemn_their_signature() -> None:
    module = torch.nn.Sequential(torch.nn.Embedding(7, 4), torch.nn.Linear(4, 3)).eval()
    module = optimized(module, example_inputs={"input": torch.arange(5)})
    right, wrong = torch.randint(0, 7, (2, 5)), torch.full((2, 5), 7)
    with pytest.raises(IndexError), pytest.warns(RegraftWarning, match="could not be captured"):
        module(wrong)
    torch.testing.assert_close(module(right), module.forward.original(right).detach())
    assert counted(module) == {"graph": 1, "original": 1}


def test_hooks_on_every_module_are_not_bypassed() -> None:
    model = optimized(tiny_llama())
    seen: list[str] = []
    handle = torch.nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(type(module).__name__))
    try:
        with pytest.warns(RegraftWarning, match="a hook on every module"):
            model(tokens(), attention_mask=torch.ones_like(tokens()))
    finally:
        handle.remove()
    assert "LlamaMLP" in seen


def test_a_mask_of_floats_marks_real_rows_too() -> None:
    model = optimized(tiny_llama(), Real())
    mask = torch.ones(2, 9)
    mask[0, :4] = 0
    expected = tiny_llama()(tokens(), attention_mask=mask).logits.detach()
    found = model(tokens(), attention_mask=mask).logits
    torch.testing.assert_close(found[mask > 0], expected[mask > 0], **TOLERANCE)
    entry = model.report.signatures[-1]
    assert "attention_mask float32[2]" in entry.arguments and entry.served and not entry.reverted


def test_adapters_added_afterwards_go_to_the_original() -> None:
    import peft

    torch.manual_seed(0)
    config = peft.LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False)
    model = optimized(tiny_llama())
    adapted = peft.get_peft_model(model, config).eval()
    with pytest.warns(RegraftWarning, match="PEFT adapters"):
        adapted(tokens())
    with adapted.disable_adapter():
        expected = tiny_llama()(tokens()).logits.detach()
        torch.testing.assert_close(adapted(tokens()).logits.detach(), expected, **TOLERANCE)
    assert counted(model)["graph"] == 0
