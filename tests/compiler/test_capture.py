"""A captured program computes what the model's own eager forward computes: at the captured shape, at other shapes,
padded or not, with and without a cache; and capturing leaves no trace on the model."""

from __future__ import annotations

import inspect
import logging
import time
from typing import Any

import pytest
import torch
import transformers as tf
import zoo
from capture_checks import assert_no_worse, assert_same, eager, oracle, run, tensors_in
from torch import Tensor, nn

from regraft.compiler.capture import capture
from regraft.compiler.errors import CaptureError
from regraft.compiler.program import InputKind, Program

SHAPES = ((2, 9, "none"), (1, 1, "none"), (3, 17, "left"), (2, 11, "right"))
"""Batch, length, side of the padding; 17 is beyond the limits of the models whose RoPE changes at 16."""
NO_CACHE = ("mamba2",)


def with_mask(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    ids = inputs.get("input_ids")
    return inputs if ids is None else {**inputs, "attention_mask": torch.ones_like(ids)}


def resized(inputs: dict[str, Tensor], batch: int, length: int, side: str) -> dict[str, Tensor]:
    """Other values for the same arguments; token lengths become `length`, float inputs keep all but the batch."""
    generator = torch.Generator().manual_seed(100 * batch + length)
    out = {}
    for name, tensor in inputs.items():
        if tensor.is_floating_point():
            value = torch.randn((batch, *tensor.shape[1:]), generator=generator)
            out[name] = value.to(tensor.dtype)
        elif name == "attention_mask":
            out[name] = padding(batch, length, side)
        else:
            out[name] = torch.randint(3, zoo.VOCAB, (batch, length), generator=generator)
    return out


def padding(batch: int, length: int, side: str) -> Tensor:
    mask = torch.ones(batch, length, dtype=torch.long)
    count = length // 3
    if side == "left":
        mask[0, :count] = 0
    elif side == "right":
        mask[0, length - count :] = 0
    return mask


def real_rows(inputs: dict[str, Tensor], output: Tensor) -> Tensor | None:
    mask = inputs.get("attention_mask")
    return mask.bool() if mask is not None and output.shape[:2] == mask.shape else None


def compare(program: Program, model: nn.Module, inputs: dict[str, Tensor], static: dict[str, Any]) -> None:
    """All tensors that the forward returns, caches among them."""
    found, own = run(program, model, inputs), eager(model, inputs, static)
    assert type(found) is type(own)
    if isinstance(own, dict):
        assert list(found) == list(own)
    pairs = list(zip(tensors_in(found), tensors_in(own), strict=True))
    assert pairs
    padded = "attention_mask" in inputs and not bool(inputs["attention_mask"].all())
    for a, b in pairs:
        assert a.isfinite().all()
        rows = real_rows(inputs, b)
        if padded and rows is None:
            rows = _cache_rows(inputs["attention_mask"], b)
            if rows is None:  # no telling which of its rows are real
                continue
            a, b = a.transpose(1, 2), b.transpose(1, 2)
        assert_same(a, b, rows)


def _cache_rows(mask: Tensor, kept: Tensor) -> Tensor | None:
    """Real positions of keys `[B, H, S, D]`; a sliding layer keeps the last ones."""
    if kept.dim() != 4 or kept.shape[0] != mask.shape[0] or kept.shape[2] > mask.shape[1]:
        return None
    return mask[:, mask.shape[1] - kept.shape[2] :].bool()


@pytest.mark.parametrize("name", zoo.NAMES)
def test_equals_eager(name: str) -> None:
    model, inputs = zoo.build(name)
    inputs = with_mask(inputs)
    cache = name not in NO_CACHE
    static = {} if cache else {"use_cache": False}
    program = capture(model, inputs, {}, cache=cache)
    served = 0
    for batch, length, side in SHAPES:
        if side != "none" and "attention_mask" not in inputs:
            side = "none"
        if name == "clip" and side == "right":  # its text row is that of the largest token, which may be padding
            continue
        these = inputs if (batch, length) == (2, 9) else resized(inputs, batch, length, side)
        if program.limits.violation(these) is not None and name == "mamba2":
            continue  # its chunks make one graph for each remainder
        compare(program, model, these, static)
        served += 1
    assert served >= 3 or name in ("clip", "mamba2")


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss", "bert", "t5"])
def test_bfloat16(name: str) -> None:
    model, inputs = zoo.build(name, torch.bfloat16)
    inputs = with_mask(inputs)
    program = capture(model, inputs, {}, cache=False)
    static = {"use_cache": False} if name != "bert" else {}
    these = resized(inputs, 3, 17, "left")
    found, own, exact = run(program, model, these), eager(model, these, static), oracle(model, these, static)
    assert found[0].dtype == torch.bfloat16
    assert_no_worse(found[0], own[0], exact[0], real_rows(these, own[0]))


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2", "opt"])
def test_without_a_mask(name: str) -> None:
    model, inputs = zoo.build(name)
    program = capture(model, inputs, {}, cache=True)
    for batch, length in ((2, 9), (1, 1), (3, 17)):
        compare(program, model, resized(inputs, batch, length, "none"), {})


@pytest.mark.parametrize("name", ["llama", "gpt2", "roberta"])
def test_position_ids(name: str) -> None:
    model, inputs = zoo.build(name)
    positions = torch.arange(9).expand(2, -1) // 2 + 3
    given = {"input_ids": inputs["input_ids"], "position_ids": positions}
    program = capture(model, given, {}, cache=False)
    static = {} if name == "roberta" else {"use_cache": False}
    for offset in (0, 5):
        these = {
            "input_ids": torch.randint(3, zoo.VOCAB, (3, 8)),
            "position_ids": torch.arange(8).expand(3, -1) + offset,
        }
        compare(program, model, these, static)
    packed = {"input_ids": torch.randint(3, zoo.VOCAB, (1, 6)), "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]])}
    compare(program, model, packed, static)


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_inputs_embeds(name: str) -> None:
    model, inputs = zoo.build(name)
    embeds = model.get_input_embeddings()(inputs["input_ids"]).detach()
    program = capture(model, {"inputs_embeds": embeds}, {}, cache=True)
    compare(program, model, {"inputs_embeds": torch.randn(3, 6, 64)}, {})


def test_static_arguments() -> None:
    model, inputs = zoo.build("llama")
    program = capture(model, inputs, {"logits_to_keep": 1}, cache=False)
    found = run(program, model, {"input_ids": torch.randint(3, zoo.VOCAB, (3, 6))})
    assert found.logits.shape == (3, 1, zoo.VOCAB)
    tuples = capture(model, inputs, {"return_dict": False, "output_hidden_states": True}, cache=True)
    these = {"input_ids": torch.randint(3, zoo.VOCAB, (1, 5))}
    compare(tuples, model, these, {"return_dict": False, "output_hidden_states": True})
    assert type(run(tuples, model, these)) is tuple


def test_token_type_ids() -> None:
    model, inputs = zoo.build("bert")
    given = {**inputs, "token_type_ids": torch.zeros_like(inputs["input_ids"])}
    program = capture(model, given, {}, cache=False)
    these = {**resized(inputs, 3, 5, "left"), "token_type_ids": torch.tensor([[0, 0, 1, 1, 1]]).expand(3, -1)}
    compare(program, model, these, {})


def test_no_size_of_one_is_remembered() -> None:
    model, _ = zoo.build("llama")
    ids = torch.randint(3, zoo.VOCAB, (1, 1))
    program = capture(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, {}, cache=True)
    for batch, length in ((1, 1), (4, 1), (1, 13), (3, 6)):
        compare(program, model, with_mask({"input_ids": torch.randint(3, zoo.VOCAB, (batch, length))}), {})


def test_cache_continues() -> None:
    """The rebuilt cache is one that the original model decodes on: same class, same layers, same next logits."""
    for name in ("mistral", "gpt2", "bart"):
        model, inputs = zoo.build(name)
        program = capture(model, inputs, {}, cache=True)
        found, own = run(program, model, inputs), eager(model, inputs, {})
        assert type(found.past_key_values) is type(own.past_key_values)
        more = torch.randint(3, zoo.VOCAB, (2, 1))
        key = "decoder_input_ids" if "decoder_input_ids" in inputs else "input_ids"
        rest = {k: v for k, v in inputs.items() if k != key}
        with torch.no_grad():
            a = model(**rest, **{key: more}, past_key_values=found.past_key_values).logits
            b = model(**rest, **{key: more}, past_key_values=own.past_key_values).logits
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_the_model_is_left_as_it_was() -> None:
    model, inputs = zoo.build("phi3_longrope")
    before = {n: (t.data_ptr(), t.clone()) for n, t in model.state_dict(keep_vars=True).items()}
    buffers = {n: b.data_ptr() for n, b in model.named_buffers()}
    attributes = {n: dict(m.__dict__) for n, m in model.named_modules()}
    implementation = model.config._attn_implementation
    capture(model, inputs, {}, cache=True)
    assert model.config._attn_implementation == implementation
    assert "regraft" not in tf.AttentionInterface._global_mapping
    for name, (address, value) in before.items():
        now = model.state_dict(keep_vars=True)[name]
        assert now.data_ptr() == address and torch.equal(now, value)
    assert {n: b.data_ptr() for n, b in model.named_buffers()} == buffers
    for name, module in model.named_modules():
        assert module.__dict__.keys() == attributes[name].keys()


def test_weights_are_those_of_the_model_and_tied_ones_are_one_input() -> None:
    model, inputs = zoo.build("gpt2")
    program = capture(model, inputs, {}, cache=False)
    targets = [made.target for made in program.inputs if made.kind is InputKind.PARAMETER]
    assert len(targets) == len(set(targets)) == len(list(model.parameters()))
    assert all(made.value is None for made in program.inputs if made.kind is InputKind.PARAMETER)
    assert all("val" in node.meta for node in program.graph.nodes if node.op not in ("output",))


def test_attention_and_experts_are_one_node_a_layer() -> None:
    for name, layers in (("llama", 1), ("llama", 3), ("gpt_oss", 2), ("t5", 2)):
        model, inputs = zoo.build(name, layers=layers)
        program = capture(model, inputs, {}, cache=False)
        targets = [node.target for node in program.graph.nodes]
        each = 3 if name == "t5" else 1  # encoder, decoder, cross
        assert targets.count(torch.ops.regraft.attention.default) == each * layers
        assert targets.count(torch.ops.regraft.moe_experts.default) == (layers if name == "gpt_oss" else 0)


def test_learned_positions_bound_the_length() -> None:
    for name, longest in (("gpt2", 256), ("bert", 128), ("roberta", 127), ("opt", 128)):
        model, inputs = zoo.build(name)
        program = capture(model, inputs, {}, cache=False)
        too_long = {n: torch.ones(1, longest + 1, dtype=torch.long) for n in inputs}
        fits = {n: torch.ones(1, longest, dtype=torch.long) for n in inputs}
        assert program.limits.violation(fits) is None and program.limits.too_long(fits) is None
        assert "position" in str(program.limits.too_long(too_long))
        assert str(longest) in str(program.limits.violation(too_long))
    model, inputs = zoo.build("t5")  # relative buckets saturate: any length
    program = capture(model, inputs, {}, cache=False)
    assert all(high is None for _, high in program.limits.ranges.values())


def test_limits_name_what_does_not_fit() -> None:
    model, inputs = zoo.build("llama")
    program = capture(model, with_mask(inputs), {}, cache=False)
    ids = torch.ones(2, 5, dtype=torch.long)
    assert "attention_mask" in str(program.limits.violation({"input_ids": ids, "attention_mask": ids[:, :4]}))
    assert "attention_mask" in str(program.limits.violation({"input_ids": ids, "attention_mask": ids[:1]}))
    assert "float32" in str(program.limits.violation({"input_ids": ids, "attention_mask": ids.float()}))
    assert "input_ids" in str(program.limits.violation({"input_ids": ids}))


def test_gemma2_keeps_its_softcap_and_says_that_sdpa_dropped_it() -> None:
    model, inputs = zoo.build("gemma2")
    assert model.config._attn_implementation == "sdpa"
    program = capture(model, inputs, {}, cache=False)
    assert any("drops softcap" in note.message for note in program.notes)
    caps = [n.args[10] for n in program.graph.nodes if n.target is torch.ops.regraft.attention.default]
    assert caps == [2.0, 2.0]


class _Shouting(nn.Module):
    """A keyword that the op does not know, which changes the result."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.config = model.config

    def forward(self, input_ids: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids, use_cache=False, temper=3.0).logits
        return logits


def test_a_keyword_that_changes_the_result_is_not_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    module = tf.models.llama.modeling_llama
    own = module.eager_attention_forward

    def tempered(m: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float, **kw: Any) -> Any:
        return own(m, q, k, v, mask, scaling=scaling / kw.pop("temper", 1.0), **kw)

    model, inputs = zoo.build("llama")
    program = capture(_Shouting(model).eval(), inputs, {}, cache=False)  # nobody reads it: the op stands
    assert torch.ops.regraft.attention.default in [n.target for n in program.graph.nodes]
    monkeypatch.setattr(module, "eager_attention_forward", tempered)
    wrapped = _Shouting(model).eval()
    program = capture(wrapped, inputs, {}, cache=False)
    assert torch.ops.regraft.attention.default not in [n.target for n in program.graph.nodes]
    assert any("temper" in note.message and "self_attn" in note.module for note in program.notes)
    assert_same(run(program, wrapped, inputs), eager(wrapped, inputs, {}))


class _Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if bool((x.sum() > 0).item()):
            return x + 1
        return x - 1


def test_what_no_graph_can_hold_is_an_error_with_the_line() -> None:
    with pytest.raises(CaptureError) as caught:
        capture(_Branching().eval(), {"x": torch.ones(2, 3)}, {}, cache=False)
    assert "if bool((x.sum() > 0).item())" in caught.value.source
    assert "test_capture.py" in caught.value.source


class _RowByRow(nn.Module):
    """Its code fixes the batch: a loop over it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.linear(row) for row in x])


def test_a_size_of_one_that_the_code_fixes_stays_one() -> None:
    model, x = _RowByRow().eval(), torch.randn(1, 5, 8)
    program = capture(model, {"x": x}, cache=False)
    assert program.limits.violation({"x": x}) is None
    torch.testing.assert_close(run(program, model, {"x": x}), model(x).detach())


class _ReturnsAnObject(nn.Module):
    """Returns something that no graph can make, after a long time to trace."""

    traced = 0

    def forward(self, x: Tensor) -> Any:
        self.traced += torch.compiler.is_exporting()
        return {"y": [torch.tanh(x)], "state": object()}


def test_what_no_graph_can_return_is_said_before_it_is_traced() -> None:
    model = _ReturnsAnObject().eval()
    with pytest.raises(CaptureError, match="its forward returns a object, of which no graph can make another"):
        capture(model, {"x": torch.randn(2, 3)}, cache=False)
    assert model.traced == 0


class _Beside(nn.Module):
    """Tokens, and of each which of some pictures' tiles it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(32, 8)

    def forward(self, input_ids: Tensor, seen: Tensor) -> Tensor:
        weight = seen.flatten(2).float().sum(-1, keepdim=True)
        return torch.tanh(self.embedding(input_ids) * weight)


def test_a_mask_that_goes_by_the_tokens_has_their_length() -> None:
    """Of rank 4, its second dimension may be anything: here it is that of the tokens, which varies."""
    model = _Beside().eval()

    def given(batch: int, length: int) -> dict[str, Tensor]:
        return {"input_ids": torch.randint(32, (batch, length)), "seen": torch.randint(2, (batch, length, 3, 4))}

    program = capture(model, given(2, 7), cache=False)
    for other in (given(2, 7), given(5, 11), given(1, 1)):
        assert program.limits.violation(other) is None
        torch.testing.assert_close(run(program, model, other), model(**other).detach())


class _Mono(nn.Module):
    """Takes one channel, and says so."""

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] != 1:
            raise ValueError(f"audio must be mono, not {x.shape[1]} channels")
        return torch.tanh(x)


def test_masks_that_only_the_models_own_attention_reads_are_its_own() -> None:
    """GIT's picture asks transformers' registry for its attention, its text adds the mask: it was handed a boolean."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = tf.GitConfig(
        **sizes, vocab_size=131, max_position_embeddings=32, vision_config={**sizes, "image_size": 16, "patch_size": 8}
    )
    torch.manual_seed(0)
    model = tf.GitForCausalLM(config).eval()
    static = {"use_cache": False}
    tensors = {"input_ids": torch.randint(3, 131, (2, 7)), "pixel_values": torch.randn(2, 3, 16, 16)}
    loaded = config._attn_implementation, config.vision_config._attn_implementation
    program = capture(model, tensors, {}, cache=False)
    assert (config._attn_implementation, config.vision_config._attn_implementation) == loaded
    assert_same(run(program, model, tensors).logits, eager(model, tensors, static).logits)
    assert sum(n.target is torch.ops.regraft.attention.default for n in program.graph.nodes) == 1


def test_a_size_of_one_that_the_code_insists_on_stays_one() -> None:
    x = torch.randn(1, 1, 8)
    program = capture(_Mono().eval(), {"x": x}, cache=False)
    assert program.limits.violation({"x": x}) is None
    assert torch.equal(run(program, _Mono(), {"x": x}), torch.tanh(x))
    with pytest.raises(CaptureError, match=r"its forward fails as it is captured .*mono, not 2 channels"):
        capture(_Mono().eval(), {"x": x.expand(1, 2, 8)}, cache=False)


def test_training_mode_and_states_that_are_no_keys_and_values_are_refused() -> None:
    model, inputs = zoo.build("llama")
    with pytest.raises(CaptureError, match="training mode"):
        capture(model.train(), inputs, {}, cache=False)
    model, inputs = zoo.build("mamba2")
    with pytest.raises(CaptureError, match="holds more than keys and values"):
        capture(model, inputs, {}, cache=True)


def test_meta_weights_are_captured_without_allocating_any() -> None:
    config = zoo.config("llama")
    config.hidden_size, config.intermediate_size, config.num_attention_heads = 8192, 28672, 64
    with torch.device("meta"):
        model = tf.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    started = time.process_time()
    program = capture(model, {"input_ids": torch.ones(1, 4, dtype=torch.long)}, {}, cache=True)
    assert time.process_time() - started < 60
    assert all(t.is_meta for t in model.parameters())
    assert [n.target for n in program.graph.nodes].count(torch.ops.regraft.attention.default) == 2


def test_encoder_outputs_of_another_length_than_the_decoder() -> None:
    model, inputs = zoo.build("bart")
    program = capture(model, with_mask(inputs), {}, cache=True)
    these = {**resized(with_mask(inputs), 3, 14, "left"), "decoder_input_ids": torch.randint(3, zoo.VOCAB, (3, 2))}
    assert_same(run(program, model, these).logits, eager(model, these, {}).logits)


def test_a_long_example_costs_no_more_than_a_short_one() -> None:
    """The comparison with eager attention looks at the end of a long call, not at all of it."""
    model, _ = zoo.build("gemma2", layers=1)
    ids = torch.randint(3, zoo.VOCAB, (3, 120))
    mask = torch.ones_like(ids)
    mask[1, :100] = 0
    program = capture(model, {"input_ids": ids, "attention_mask": mask}, {}, cache=False)
    assert torch.ops.regraft.attention.default in [n.target for n in program.graph.nodes]
    compare(program, model, {"input_ids": ids, "attention_mask": mask}, {"use_cache": False})


def test_notes_of_many_layers_are_one() -> None:
    model, inputs = zoo.build("gemma2", layers=3)
    program = capture(model, inputs, {}, cache=False)
    assert [n.message.endswith("(and 2 more alike)") for n in program.notes if "softcap" in n.message] == [True]


@pytest.mark.parametrize("side", ["left", "right"])
def test_capturing_with_a_padded_example(side: str) -> None:
    """Rows that see no key, NaN in eager attention one precision up, decide nothing."""
    model, inputs = zoo.build("mistral")
    padded = {"input_ids": inputs["input_ids"], "attention_mask": padding(2, 9, side)}
    program = capture(model, padded, {}, cache=False)
    assert [n.target for n in program.graph.nodes].count(torch.ops.regraft.attention.default) == 2
    assert not program.notes
    compare(program, model, resized(padded, 3, 14, "left"), {"use_cache": False})


def test_code_that_runs_otherwise_where_it_is_compiled() -> None:
    """LongT5 makes a mask of ones where the caller gave none, unless a compiler asks, and relies on it in any case."""
    sizes = {"d_model": 48, "d_kv": 8, "d_ff": 64, "num_heads": 4, "num_layers": 1, "local_radius": 3}
    torch.manual_seed(0)
    config = tf.LongT5Config(vocab_size=zoo.VOCAB, **sizes, pad_token_id=0, decoder_start_token_id=0)
    model = tf.LongT5ForConditionalGeneration(config).eval()
    asks = vars(inspect.getmodule(type(model)))["is_torchdynamo_compiling"]
    inputs = {
        "input_ids": torch.randint(3, zoo.VOCAB, (2, 9)),
        "decoder_input_ids": torch.randint(3, zoo.VOCAB, (2, 7)),
    }
    program = capture(model, inputs, {}, cache=False)
    assert vars(inspect.getmodule(type(model)))["is_torchdynamo_compiling"] is asks
    these = {name: torch.randint(3, zoo.VOCAB, (3, 14)) for name in inputs}
    assert_same(run(program, model, these).logits, eager(model, these, {"use_cache": False}).logits)


def test_what_torch_logs_of_a_failed_export_is_not_shown() -> None:
    """The error says it; torch's loggers would add its tracebacks."""
    model, inputs = zoo.build("llama")
    ids = inputs["input_ids"]
    shown: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = shown.append  # type: ignore[method-assign]
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    logger.addHandler(handler)
    try:
        with pytest.raises(CaptureError, match="too few dimensions"):
            capture(model, {"input_ids": ids, "attention_mask": torch.ones(*ids.shape, ids.shape[1])}, cache=False)
        assert shown == []
        logger.error("behind it they speak again")
        assert len(shown) == 1
    finally:
        logger.removeHandler(handler)
