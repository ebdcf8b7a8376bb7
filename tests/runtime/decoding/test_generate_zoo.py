"""Greedy tokens and beams of every decoder in float32 on the CPU are those of HuggingFace eager: ragged prompts, padded
on the left, over the real engine. What no engine serves generates by HuggingFace's loop, with its reason."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import transformers as tf
import zoo
from runtime_models import tiny_llama, tokens
from transformers.generation.streamers import BaseStreamer

import regraft
from regraft.runtime import dispatch
from regraft.runtime.decoding.settings import Settings
from regraft.runtime.errors import RegraftWarning

NEW = 8
"""With the prompt beyond the windows of 6 and 16 positions of the models that have them."""
PAGES, FAST, HUGGINGFACE = "HuggingFace's loop over pages", "the fast loop", "HuggingFace's loop"
NOT_SERVED = {
    "mamba2": "holds more than keys and values",
    "llama4_text": "chunked",
    "llama_dynamic": "depend on how long",
    "phi3_longrope": "depend on how long",
}


@pytest.fixture(scope="module", autouse=True)
def no_graphs() -> Iterator[None]:
    """Only the flat programs are compiled: graphs of forwards take their time, and have their own tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "MAX_SIGNATURES", 0)
        yield


def ragged() -> dict[str, Any]:
    ids = torch.randint(3, zoo.VOCAB, (3, 9))
    mask = torch.ones_like(ids)
    mask[0, :4], mask[2, :1] = 0, 0
    return {"input_ids": ids * mask, "attention_mask": mask, "pad_token_id": zoo.PAD}


@pytest.mark.parametrize("name", zoo.DECODERS)
def test_tokens_are_huggingfaces(name: str) -> None:
    model, _ = zoo.build(name)
    prompt = ragged()
    calls: list[dict[str, Any]] = [
        {"max_new_tokens": NEW, "repetition_penalty": 1.2},
        {"max_new_tokens": NEW, "num_beams": 3, "num_return_sequences": 2},
    ]
    expected = [model.generate(**prompt, **call) for call in calls]
    model = regraft.optimize(model, verbose=False, decoding={"max_seq_len": 64, "max_batch_size": 9})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", RegraftWarning)
        actual = [model.generate(**prompt, **call) for call in calls]
    for a, e, call in zip(actual, expected, calls, strict=True):
        assert torch.equal(a, e), call
    if name in NOT_SERVED:
        assert any(NOT_SERVED[name] in str(w.message) for w in caught)
        assert model.report.record.generated == {HUGGINGFACE: 2}
    else:
        assert model.report.record.generated == {FAST: 1, PAGES: 1}
        engine = model.generate.decoding.engine().engine
        engine.executor.tables.check([])  # no page is held


def test_padding_that_moves_positions_is_for_huggingface() -> None:
    """A decoder that counts its positions past the mask: padded prompts are not what they are alone."""
    torch.manual_seed(0)
    config = tf.TrOCRConfig(
        vocab_size=zoo.VOCAB, d_model=48, decoder_layers=1, decoder_attention_heads=4, decoder_ffn_dim=64
    )
    model = tf.TrOCRForCausalLM(config).eval()
    with torch.no_grad():
        model.model.decoder.embed_positions.weight.mul_(30)
    calls: list[dict[str, Any]] = [{}, {"num_beams": 3}, {}]
    prompt = ragged()
    expected = [model.generate(**prompt, **call, max_new_tokens=NEW) for call in calls]
    whole = {"input_ids": torch.randint(3, zoo.VOCAB, (3, 9)), "pad_token_id": zoo.PAD, "max_new_tokens": NEW}
    without = model.generate(**whole)
    model = regraft.optimize(model, verbose=False, decoding={"max_seq_len": 64, "max_batch_size": 9})
    assert torch.equal(model.generate(**whole), without)
    with pytest.warns(RegraftWarning, match="padding, over which this model counts its positions"):
        actual = [model.generate(**prompt, **call, max_new_tokens=NEW) for call in calls]
    assert all(map(torch.equal, actual, expected))
    assert model.report.record.generated == {FAST: 1, HUGGINGFACE: 3}


def test_windows_of_the_cache_alone() -> None:
    """A window in the config that the model's masks do not have: HuggingFace's cache forgets what they see."""
    model = tiny_llama(2, sliding_window=8)
    ids = tokens(2, 6)
    calls: list[dict[str, Any]] = [{"max_new_tokens": n, "min_new_tokens": n} for n in (2, NEW, 2)]
    calls += [{**calls[1], "num_beams": 2}]
    expected = [model.generate(ids, **call) for call in calls]
    assert not torch.equal(model.generate(ids, use_cache=False, **calls[1]), expected[1]), "nothing was forgotten"
    model = regraft.optimize(model, verbose=False)
    with pytest.warns(RegraftWarning, match="more tokens than the 8 that its cache keeps"):
        actual = [model.generate(ids, **call) for call in calls]
    assert all(map(torch.equal, actual, expected))
    assert model.report.record.generated == {FAST: 2, HUGGINGFACE: 2}


def test_scores_over_pages() -> None:
    """What only HuggingFace's loop can do, with the model's work in pages."""
    model, _ = zoo.build("llama")
    prompt = ragged()
    call = {"max_new_tokens": 6, "return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    expected = model.generate(**prompt, **call)
    model = regraft.optimize(model, verbose=False)
    actual = model.generate(**prompt, **call)
    assert torch.equal(actual.sequences, expected.sequences)
    for name in ("scores", "logits"):
        for a, e in zip(actual[name], expected[name], strict=True):
            torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-4)
    assert len({t.data_ptr() for t in actual.logits}) == len(actual.logits)  # kept, not overwritten by later steps


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_more_prompts_than_rows(name: str) -> None:
    """Prompts wait for their turn; a sampled one has the tokens that it has alone."""
    model, _ = zoo.build(name)
    lengths = [3, 30, 1, 12, 25, 7, 18, 2, 9]
    ids = torch.zeros(9, 30, dtype=torch.long)
    for row, length in enumerate(lengths):
        ids[row, 30 - length :] = torch.randint(3, zoo.VOCAB, (length,))
    prompt = {"input_ids": ids, "attention_mask": (ids > 0).long(), "pad_token_id": 0, "max_new_tokens": 12}
    expected = model.generate(**prompt)
    limits = {"max_batch_size": 2, "max_seq_len": 48, "token_budget": 16}
    model = regraft.optimize(model, verbose=False, decoding=limits)
    assert torch.equal(model.generate(**prompt), expected)
    drawn: dict[str, Any] = {"do_sample": True, "temperature": 1.5, "top_p": 0.9}
    torch.manual_seed(5)
    together = model.generate(**prompt, **drawn)
    torch.manual_seed(5)
    alone = model.generate(ids[:1, -3:], max_new_tokens=12, **drawn)
    assert torch.equal(together[0, 30:], alone[0, 3:])


def test_what_never_fits_is_said_before_anything_runs() -> None:
    model, _ = zoo.build("llama")
    model = regraft.optimize(model, verbose=False, decoding={"max_seq_len": 16})
    with pytest.raises(regraft.InputError, match=r"max_new_tokens=20 needs 25 positions.*16 \(max_seq_len\)"):
        model.generate(**ragged(), max_new_tokens=20)
    assert model.generate(**ragged(), max_new_tokens=5).shape == (3, 14)
    refused = {"max_len": 3}, {"block_size": 5}, 7, {"kv_dtype": torch.int16}
    for wrong, said in zip(refused, ("max_seq_len", "block_size=5", "a mapping", "torch.int8"), strict=True):
        with pytest.raises(regraft.OptionError, match=said):
            regraft.optimize(zoo.build("llama")[0], decoding=wrong)


def test_pages_of_int8() -> None:
    """Half the memory of bf16 for some loss: the first tokens are the same."""
    model, _ = zoo.build("llama")
    prompt = ragged()
    expected = model.generate(**prompt, max_new_tokens=2)
    model = regraft.optimize(model, verbose=False, decoding={"kv_dtype": torch.int8})
    assert torch.equal(model.generate(**prompt, max_new_tokens=2), expected)
    assert {layer.dtype for layer in model.generate.decoding.engine().flat.layers} == {torch.int8}


def test_beyond_the_length_of_the_model_as_huggingface() -> None:
    """Where only the model's config bounds a sequence, HuggingFace goes on; padding does not count."""
    model, _ = zoo.build("llama")
    model.config.max_position_embeddings = 16
    prompt = ragged()
    inside = {name: torch.nn.functional.pad(prompt[name], (4, 0)) for name in ("input_ids", "attention_mask")}
    calls = [
        {**prompt, "max_new_tokens": 9},
        {**prompt, "max_new_tokens": 9, "num_beams": 2},
        {**inside, "max_new_tokens": 7},
    ]
    expected = [model.generate(**call) for call in calls]
    model = regraft.optimize(model, verbose=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", RegraftWarning)
        for call, e in zip(calls, expected, strict=True):
            assert torch.equal(model.generate(**call), e)
    assert sum("more tokens than the 16 that the model is made for" in str(w.message) for w in caught) == 1
    assert model.report.record.generated == {HUGGINGFACE: 2, FAST: 1}


def test_adapters_are_switched_between_calls() -> None:
    """PEFT's, put into the optimized model afterwards: off, merged and taken out again, each with its own tokens."""
    import peft

    wanted = peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=4, init_lora_weights=False)
    plain = peft.get_peft_model(zoo.build("llama")[0], wanted).eval()
    model = regraft.optimize(zoo.build("llama")[0], verbose=False)
    adapted = peft.get_peft_model(model, wanted).eval()
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.mul_(2)  # so that the adapter matters to the tokens
    adapted.load_state_dict(plain.state_dict())
    prompt = ragged()
    found = []

    def same() -> None:
        expected = plain.generate(**prompt, max_new_tokens=NEW)
        assert torch.equal(adapted.generate(**prompt, max_new_tokens=NEW), expected)
        found.append(expected)

    with pytest.warns(RegraftWarning, match=r"generate: PEFT adapters in the model .*q_proj.*HuggingFace's loop"):
        same()
    with plain.disable_adapter(), adapted.disable_adapter():
        same()
    assert not torch.equal(*found)
    for which in (plain, adapted):
        which.merge_adapter()
    same()
    assert model.report.record.generated == {HUGGINGFACE: 3}
    assert torch.equal(adapted.merge_and_unload().generate(**prompt, max_new_tokens=NEW), found[-1])
    assert model.report.record.generated == {HUGGINGFACE: 3, FAST: 1}


class Interrupts(BaseStreamer):
    """Ctrl-C while the third token is streamed."""

    def __init__(self) -> None:
        self.left = 4

    def put(self, value: torch.Tensor) -> None:
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt

    def end(self) -> None:
        raise AssertionError("it was interrupted")


def test_threads_and_interrupts() -> None:
    """Calls of several threads do not mix, whichever way they go; an interrupt leaves no page behind."""
    model, _ = zoo.build("llama")
    prompt = ragged()
    calls: list[dict[str, Any]] = [
        {"max_new_tokens": 10},
        {"max_new_tokens": 10, "repetition_penalty": 1.5, "no_repeat_ngram_size": 2},
        {"max_new_tokens": 10, "num_beams": 2},
        {"max_new_tokens": 10, "num_beams": 3, "eos_token_id": list(range(3, 30))},
    ]
    expected = [model.generate(**prompt, **call) for call in calls]
    model = regraft.optimize(model, verbose=False, decoding={"max_seq_len": 64, "max_batch_size": 9})
    model.generate(**prompt, max_new_tokens=1)
    with ThreadPoolExecutor(4) as pool:
        futures = [pool.submit(model.generate, **prompt, **call) for call in calls * 3]
        for i, future in enumerate(futures):
            assert torch.equal(future.result(), expected[i % len(calls)]), calls[i % len(calls)]
    tables = model.generate.decoding.engine().engine.executor.tables
    tables.check([])
    with pytest.raises(KeyboardInterrupt):
        model.generate(prompt["input_ids"][1:2], max_new_tokens=40, streamer=Interrupts())
    tables.check([])
    assert torch.equal(model.generate(**prompt, **calls[0]), expected[0])


def test_an_interrupt_while_settings_are_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """None of them is in use afterwards, neither those that were written nor those on the way."""
    model = regraft.optimize(zoo.build("llama")[0], verbose=False, decoding={"max_seq_len": 64, "max_batch_size": 9})
    write, written = Settings._write, []

    def interrupted(settings: Settings, row: int, *arguments: Any) -> None:
        if row == 2:
            raise KeyboardInterrupt
        write(settings, row, *arguments)
        written.append(settings)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Settings, "_write", interrupted)
        model.generate(**ragged(), max_new_tokens=NEW, bad_words_ids=[[7]])
    assert len(written) == 2
    assert not written[0].features
