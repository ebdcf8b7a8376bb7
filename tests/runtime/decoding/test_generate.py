"""`generate` beneath HuggingFace's: the same results, whichever loop serves, and what no engine serves is named.

The engine here is the simplest one that can be right (`stateless_engine.py`); what is tested is everything around it.
"""

from __future__ import annotations

import copy
import inspect
import pickle
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers as tf
import zoo
from generate_pair import FAST, HUGGINGFACE, IDS, MASK, PAGES, PROMPT, Pair
from stateless_engine import make
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers.generation.streamers import BaseStreamer

import regraft
from regraft.runtime import dispatch
from regraft.runtime.errors import RegraftWarning


@pytest.fixture(scope="module")
def pair() -> Pair:
    return Pair("llama")


@pytest.fixture(autouse=True)
def no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", RegraftWarning)
        warnings.filterwarnings("ignore", "(LlamaForCausalLM|OwnSample): .*a signature beyond", RegraftWarning)
        yield


@pytest.fixture(scope="module", autouse=True)
def no_graphs() -> Iterator[None]:
    """The original serves every forward: graphs are not what is tested, and take their time to make."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "MAX_SIGNATURES", 0)
        yield


@pytest.mark.parametrize(
    "settings",
    [
        {"max_new_tokens": 9},
        {"max_length": 9},
        {"max_new_tokens": 1},
        {"max_new_tokens": 15, "eos_token_id": list(range(20, 80))},
        {"max_new_tokens": 15, "eos_token_id": list(range(20, 80)), "min_new_tokens": 5},
        {"max_new_tokens": 9, "repetition_penalty": 1.5},
        {"max_new_tokens": 9, "no_repeat_ngram_size": 1},
        {"max_new_tokens": 9, "bad_words_ids": [[3], [11, 12], [101]], "suppress_tokens": list(range(40, 90))},
        {"max_new_tokens": 6, "forced_eos_token_id": 17, "begin_suppress_tokens": list(range(3, 100))},
        {"max_new_tokens": 9, "return_dict_in_generate": True},
        {"max_new_tokens": 4, "num_return_sequences": 1, "generation_config": tf.GenerationConfig(eos_token_id=2)},
    ],
    ids=lambda s: " ".join(s),
)
def test_greedy_by_the_engine_alone(pair: Pair, settings: dict[str, Any]) -> None:
    pair.check(FAST, **PROMPT, **settings)


def test_without_a_mask_and_without_a_prompt(pair: Pair) -> None:
    pair.check(FAST, inputs=IDS[1:2], max_new_tokens=5)
    pair.check(FAST, inputs=IDS, max_new_tokens=5, pad_token_id=0)  # the mask is inferred
    pair.check(FAST, max_new_tokens=5)


def test_dtypes_of_prompts_and_masks(pair: Pair) -> None:
    """Whatever HuggingFace takes; tokens come back as int64."""
    for mask in (MASK.bool(), MASK.float()):
        pair.check(FAST, input_ids=IDS, attention_mask=mask, max_new_tokens=4, pad_token_id=0)
    pair.check(PAGES, input_ids=IDS, attention_mask=MASK.float(), max_new_tokens=4, pad_token_id=0, num_beams=2)
    pair.check(FAST, input_ids=IDS.int(), attention_mask=MASK, max_new_tokens=4, pad_token_id=0)


@pytest.mark.parametrize(
    "settings",
    [
        {"num_beams": 3, "num_return_sequences": 2},
        {"num_beams": 4, "eos_token_id": [7, 30, 31, 32], "length_penalty": 0.5, "early_stopping": True},
        {"num_beams": 2, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
        {"num_beams": 2, "do_sample": True, "top_k": 20, "temperature": 2.0},
    ],
    ids=lambda s: " ".join(s),
)
def test_beams_over_pages(pair: Pair, settings: dict[str, Any]) -> None:
    pair.check(PAGES, seed=3, **PROMPT, max_new_tokens=8, **settings)


def test_scores_and_logits_of_each_step(pair: Pair) -> None:
    wanted = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    for beams in (1, 2):
        extra: dict[str, Any] = {"repetition_penalty": 1.2, "num_beams": beams}
        actual, expected = pair.check(PAGES, **PROMPT, max_new_tokens=5, **wanted, **extra)
        for name in ("scores", "logits"):
            for a, e in zip(getattr(actual, name), getattr(expected, name), strict=True):
                torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-4)
        assert actual.past_key_values is None


class Bump(tf.LogitsProcessor):
    """A processor of the user's own."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores[:, (input_ids[:, -1] + 1) % 131] += 2.0
        return scores


class Until(tf.StoppingCriteria):
    """A criterion of the user's own: each row ends at another length."""

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.tensor([input_ids.shape[1] >= 10 + row for row in range(input_ids.shape[0])])


def test_processors_and_criteria_of_the_users_own() -> None:
    """Said once each, with the name."""
    pair = Pair("llama")
    given: dict[str, Any] = {"logits_processor": tf.LogitsProcessorList([Bump()])}
    with pytest.warns(RegraftWarning, match="the logits processor Bump runs outside"):
        pair.check(PAGES, **PROMPT, max_new_tokens=8, **given)
    pair.check(PAGES, **PROMPT, max_new_tokens=8, **given)
    given = {"stopping_criteria": tf.StoppingCriteriaList([Until()]), "eos_token_id": 2}
    with pytest.warns(RegraftWarning, match="the stopping criterion Until runs outside"):
        pair.check(PAGES, **PROMPT, max_new_tokens=8, **given)


def test_stop_strings(pair: Pair) -> None:
    """HuggingFace's loop hands their tokenizer on to the model, which has no use for it."""
    words = {**{f"w{i}": i for i in range(zoo.VOCAB - 1)}, "abcdef": zoo.VOCAB - 1}
    tokenizer = tf.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, unk_token="w0")))
    whole = pair.plain.generate(**PROMPT, max_new_tokens=9, eos_token_id=None)
    strings = [f"w{whole[0, 9]}", f"w{whole[2, 12]}"]
    stopping: dict[str, Any] = {"stop_strings": strings, "tokenizer": tokenizer, "max_new_tokens": 9}
    actual, _ = pair.check(PAGES, **PROMPT, **stopping)
    assert (actual[0, 10:] == 0).all()
    pair.check(PAGES, **PROMPT, **stopping, num_beams=2)


def test_a_processor_that_the_user_gives_and_the_engine_knows(pair: Pair) -> None:
    given = tf.LogitsProcessorList([tf.NoRepeatNGramLogitsProcessor(1)])
    pair.check(FAST, **PROMPT, max_new_tokens=8, logits_processor=given)


class Collect(BaseStreamer):
    def __init__(self) -> None:
        self.seen: list[Any] = []

    def put(self, value: torch.Tensor) -> None:
        self.seen.append(value.tolist())

    def end(self) -> None:
        self.seen.append("end")


@pytest.mark.parametrize("rows", [1, 3])
def test_streamers_get_the_same_in_the_same_order(pair: Pair, rows: int) -> None:
    seen = []
    for model in (pair.plain, pair.model):
        streamer = Collect()
        arguments = {k: v[-rows:] if isinstance(v, torch.Tensor) else v for k, v in PROMPT.items()}
        model.generate(**arguments, max_new_tokens=6, eos_token_id=99, streamer=streamer)
        seen.append(streamer.seen)
    assert seen[0] == seen[1]
    assert seen[1][-1] == "end"


def test_sampling_is_reproduced_by_the_seed(pair: Pair) -> None:
    settings: dict[str, Any] = {"do_sample": True, "temperature": 1.5, "max_new_tokens": 12, "num_return_sequences": 2}

    def drawn(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return pair.model.generate(**PROMPT, **settings)

    ran = pair.engine.ran
    first = drawn(1)
    assert pair.engine.ran == ran + 1
    assert torch.equal(drawn(1), first)
    assert not torch.equal(drawn(2), first)
    assert len({tuple(row) for row in first[:, 7:].tolist()}) == 6
    assert torch.equal(first[:, :7], IDS.repeat_interleave(2, 0))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"use_cache": False}, "use_cache=False"),
        ({"cache_implementation": "static"}, "cache_implementation='static'"),
        ({"past_key_values": tf.DynamicCache()}, "past_key_values"),
        ({"output_hidden_states": True, "return_dict_in_generate": True}, "output_hidden_states"),
        ({"output_attentions": True, "return_dict_in_generate": True}, "output_attentions"),
        ({"prompt_lookup_num_tokens": 3, "input_ids": IDS[1:2], "attention_mask": None}, "assisted generation"),
        ({"position_ids": torch.arange(7)[None].expand(3, 7)}, "position_ids"),
        ({"attention_mask": torch.tensor([[1, 0, 0, 1, 1, 1, 1]] * 3)}, "not padding on the left"),
        ({"guidance_scale": 1.5}, "guidance_scale=1.5"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_what_is_not_served_is_named_once(pair: Pair, arguments: dict[str, Any], said: str) -> None:
    """The results are HuggingFace's all the same."""
    given = {**PROMPT, "max_new_tokens": 5, **arguments}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", RegraftWarning)
        for _ in range(2):
            if "past_key_values" in given:
                given["past_key_values"] = None if _ else tf.DynamicCache()
            result = pair.model.generate(**given)
    own = [str(w.message) for w in caught if w.category is RegraftWarning and ".generate: " in str(w.message)]
    assert [text for text in own if said in text] == own and len(own) == 1, own
    if "past_key_values" in given:
        given["past_key_values"] = None
    expected = pair.plain.generate(**given)
    sequences = [r if isinstance(r, torch.Tensor) else r.sequences for r in (result, expected)]
    assert torch.equal(*sequences)


def test_inputs_embeds(pair: Pair) -> None:
    embeds = pair.plain.get_input_embeddings()(IDS[1:2])
    with pytest.warns(RegraftWarning, match="inputs_embeds: served by HuggingFace's loop"):
        pair.check(HUGGINGFACE, inputs_embeds=embeds, max_new_tokens=5)


def test_an_assistant_model(pair: Pair) -> None:
    with pytest.warns(RegraftWarning, match="assistant_model: served by HuggingFace's loop"):
        pair.check(HUGGINGFACE, input_ids=IDS[1:2], max_new_tokens=5, assistant_model=pair.plain)


def test_prompts_without_tokens_are_huggingfaces(pair: Pair) -> None:
    """Whose error is not a good one, but that of `generate`."""
    for shape in ((1, 0), (0, 4)):
        empty = torch.zeros(shape, dtype=torch.int64)
        with pytest.raises(RuntimeError) as expected:
            pair.plain.generate(empty, max_new_tokens=2)
        with warnings.catch_warnings(), pytest.raises(RuntimeError) as actual:
            warnings.simplefilter("ignore", RegraftWarning)
            pair.model.generate(empty, max_new_tokens=2)
        assert str(actual.value) == str(expected.value)


def test_prompts_and_masks_that_do_not_fit(pair: Pair) -> None:
    """HuggingFace raises too, by an error of torch's own; a mask of one row is that of all."""
    for wrong, said in (
        ({"attention_mask": MASK[:, 1:]}, r"attention_mask of shape \[\d, 6\]: expected \[\d, 7\]"),
        ({"input_ids": IDS.float()}, "input_ids of torch.float32: expected torch.int64 or torch.int32"),
    ):
        with pytest.raises(RuntimeError):
            pair.plain.generate(**{**PROMPT, **wrong}, max_new_tokens=2)
        for beams in (1, 2):
            with pytest.raises(regraft.InputError, match=said):
                pair.model.generate(**{**PROMPT, **wrong}, max_new_tokens=2, num_beams=beams)
            assert not pair.engine.open
    pair.check(FAST, input_ids=IDS[1:], attention_mask=MASK[1:2], max_new_tokens=3)


def negated(module: Any, arguments: Any, output: Any) -> Any:
    output.logits = -output.logits
    return output


def test_hooks_on_the_model_itself_run() -> None:
    """After an earlier call too, whose settings are known."""
    pair = Pair("llama")
    before, _ = pair.check(FAST, **PROMPT, max_new_tokens=4)
    hooks = [model.register_forward_hook(negated) for model in (pair.plain, pair.model)]
    with pytest.warns(RegraftWarning, match="a hook on the model itself runs outside of the graph"):
        after, _ = pair.check(PAGES, **PROMPT, max_new_tokens=4)
    assert not torch.equal(before, after)
    for hook in hooks:
        hook.remove()
    pair.check(FAST, **PROMPT, max_new_tokens=4)


def test_a_forward_that_replaced_ours() -> None:
    plain, _ = zoo.build("llama", layers=1)
    model = regraft.optimize(copy.deepcopy(plain), verify="off", verbose=False)
    ours = model.forward
    for each in (plain, model):
        forward = each.forward
        each.forward = lambda *args, forward=forward, **kwargs: negated(None, None, forward(*args, **kwargs))
    with pytest.warns(RegraftWarning, match="another forward, set after optimize: served by HuggingFace's loop"):
        actual = model.generate(**PROMPT, max_new_tokens=4)
    assert torch.equal(actual, plain.generate(**PROMPT, max_new_tokens=4))
    model.forward = ours
    del plain.forward
    assert torch.equal(model.generate(**PROMPT, max_new_tokens=4), plain.generate(**PROMPT, max_new_tokens=4))
    assert model.report.record.generated == {HUGGINGFACE: 1, FAST: 1}


def test_training_mode_is_not_served(pair: Pair) -> None:
    pair.model.train()
    try:
        with pytest.warns(RegraftWarning, match="training mode"):
            pair.model.generate(**PROMPT, max_new_tokens=2)
    finally:
        pair.model.eval()
    pair.check(FAST, **PROMPT, max_new_tokens=2)


class Raises(tf.LogitsProcessor):
    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if input_ids.shape[1] > 9:
            raise KeyboardInterrupt
        return scores


def test_what_is_raised_in_a_callback_leaves_nothing_open(pair: Pair) -> None:
    with pytest.raises(KeyboardInterrupt), warnings.catch_warnings():
        warnings.simplefilter("ignore", RegraftWarning)
        pair.model.generate(**PROMPT, max_new_tokens=8, logits_processor=tf.LogitsProcessorList([Raises()]))
    assert not pair.engine.open
    pair.check(FAST, **PROMPT, max_new_tokens=8)
    with pytest.raises(ValueError, match="max_length"):
        pair.model.generate(**PROMPT, max_length=3)
    with pytest.raises(ValueError, match="unknown_argument"):
        pair.model.generate(**PROMPT, unknown_argument=3)
    pair.check(FAST, **PROMPT, max_new_tokens=3)


class Asks(tf.LogitsProcessor):
    """Calls the model's generate from within."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        inner = self.model.generate(input_ids[:1], max_new_tokens=1, do_sample=False)
        scores[:, inner[0, -1]] = -1e9
        return scores


def test_generate_within_generate(pair: Pair) -> None:
    results = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RegraftWarning)
        for model in (pair.plain, pair.model):
            given = tf.LogitsProcessorList([Asks(model)])
            results.append(model.generate(IDS[1:2], max_new_tokens=4, logits_processor=given))
    assert torch.equal(*results)
    assert not pair.engine.open


def test_a_cache_is_closed_with_its_call(pair: Pair) -> None:
    kept = []

    class Keeps(Until):
        def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
            frame = inspect.currentframe()
            assert frame is not None and frame.f_back is not None and frame.f_back.f_back is not None
            kept.append(frame.f_back.f_back.f_locals["model_kwargs"]["past_key_values"])
            return super().__call__(input_ids, scores)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RegraftWarning)
        pair.model.generate(
            **PROMPT, max_new_tokens=3, eos_token_id=2, stopping_criteria=tf.StoppingCriteriaList([Keeps()])
        )
    with pytest.raises(regraft.RegraftError, match="given back when generate ended"):
        pair.model(IDS[:, -1:], past_key_values=kept[0])


def test_signature_and_documentation_are_huggingfaces(pair: Pair) -> None:
    assert inspect.signature(pair.model.generate) == inspect.signature(pair.plain.generate)
    assert pair.model.generate.__doc__ == pair.plain.generate.__doc__


def test_weights_of_another_form_need_another_engine() -> None:
    pair = Pair("llama")
    first = pair.engine
    pair.check(FAST, **PROMPT, max_new_tokens=4)
    assert pair.engine is first
    pair.plain.double()
    pair.model.double()
    pair.check(FAST, **PROMPT, max_new_tokens=4)
    assert pair.engine is not first


def test_more_sequences_than_go_on_in_step(pair: Pair) -> None:
    """The engine alone takes any number; HuggingFace's loops over pages as many as there are rows."""
    many = {**PROMPT, "input_ids": IDS.repeat(5, 1), "attention_mask": MASK.repeat(5, 1), "max_new_tokens": 3}
    pair.check(FAST, **many)
    warnings.filterwarnings("ignore", ".*past_key_values with content")  # said once, if no test before this was told
    with pytest.warns(RegraftWarning, match="15 sequences in step, more than max_batch_size=12: "):
        pair.check(HUGGINGFACE, **many, logits_processor=tf.LogitsProcessorList([Bump()]))
    with pytest.warns(RegraftWarning, match="30 sequences in step"):
        pair.check(HUGGINGFACE, **many, num_beams=2)


class OwnGenerate(tf.LlamaForCausalLM):
    """Overrides generate, and calls HuggingFace's twice."""

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Twice as far."""
        again = super().generate(*args, **kwargs)
        return super().generate(again, max_new_tokens=2, pad_token_id=0)


def test_models_that_override_generate() -> None:
    """What they do stays theirs: HuggingFace's loop, the model's work in pages."""
    plain = OwnGenerate(zoo.config("llama", 1)).eval()
    model = regraft.optimize(copy.deepcopy(plain), verify="off", verbose=False)
    model.generate.decoding.make = make
    assert model.generate.__doc__ == "Twice as far."
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RegraftWarning)
        assert torch.equal(model.generate(**PROMPT, max_new_tokens=3), plain.generate(**PROMPT, max_new_tokens=3))
    assert model.report.record.generated == {PAGES: 1}
    assert not model.generate.decoding.engine().open


class OwnSample(tf.LlamaForCausalLM):
    """Overrides the loop that `generate` chooses."""

    def _sample(self, input_ids: torch.Tensor, **prepared: Any) -> Any:
        return super()._sample(input_ids, **prepared) + 1


def test_models_that_override_the_loop() -> None:
    plain = OwnSample(zoo.config("llama", 1)).eval()
    model = regraft.optimize(copy.deepcopy(plain), verify="off", verbose=False)
    model.generate.decoding.make = make
    with pytest.warns(RegraftWarning, match="a _sample of the model's own: served by HuggingFace's loop"):
        actual = model.generate(**PROMPT, max_new_tokens=3)
    assert torch.equal(actual, plain.generate(**PROMPT, max_new_tokens=3))
    assert model.report.record.generated == {HUGGINGFACE: 1}


def test_prompts_that_are_tuned() -> None:
    """PEFT puts its virtual tokens before the prompt by another `prepare_inputs_for_generation` of the instance."""
    import peft

    pair = Pair("llama")
    wanted = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    plain, tuned = (peft.get_peft_model(model, wanted).eval() for model in (pair.plain, pair.model))
    with torch.no_grad():
        for parameter in plain.prompt_encoder.parameters():
            parameter.normal_(std=3)
    tuned.prompt_encoder.load_state_dict(plain.prompt_encoder.state_dict())
    expected = plain.generate(**PROMPT, max_new_tokens=6)
    with pytest.warns(RegraftWarning, match="another prepare_inputs_for_generation .*: served by HuggingFace's loop"):
        assert torch.equal(tuned.generate(**PROMPT, max_new_tokens=6), expected)
    actual, _ = pair.check(FAST, **PROMPT, max_new_tokens=6)  # without the virtual tokens, which matter
    assert not torch.equal(actual, expected)


def test_copies_and_restore() -> None:
    pair = Pair("llama")
    pair.check(FAST, **PROMPT, max_new_tokens=4)
    for twin in (copy.deepcopy(pair.model), pickle.loads(pickle.dumps(pair.model))):
        assert twin.generate.decoding.model is twin
        assert twin._prepare_cache_for_generation.decoding is twin.generate.decoding
        assert torch.equal(twin.generate(**PROMPT, max_new_tokens=4), pair.plain.generate(**PROMPT, max_new_tokens=4))
        assert twin.generate.decoding.engine().ran == 1
        assert twin.generate.decoding.engine() is not pair.engine
    engine, before = pair.engine, pair.plain.generate(**PROMPT, max_new_tokens=4)
    ran = engine.ran
    regraft.restore(pair.model)
    for name in ("generate", "generate_batch", "_prepare_cache_for_generation"):
        assert name not in pair.model.__dict__
    assert torch.equal(pair.model.generate(**PROMPT, max_new_tokens=4), before)
    assert engine.ran == ran


def test_an_engine_that_cannot_be_made_is_named() -> None:
    pair = Pair("llama")
    pair.model.generate.decoding.make = lambda model, before: "attention that no pages can hold"
    with pytest.warns(RegraftWarning, match="attention that no pages can hold: served by HuggingFace's loop"):
        result = pair.model.generate(**PROMPT, max_new_tokens=4)
    assert torch.equal(result, pair.plain.generate(**PROMPT, max_new_tokens=4))
    assert "1 by HuggingFace's loop" in str(pair.model.report)
    assert pair.model.report.to_dict()["generated"] == {HUGGINGFACE: 1}
