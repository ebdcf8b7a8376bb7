"""`generate_batch`: transformers' names, order and results, each prompt's tokens those it has alone."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers as tf
import zoo
from transformers.generation.continuous_batching import ContinuousMixin, RequestStatus

import regraft
from regraft.runtime import dispatch
from regraft.runtime.errors import RegraftWarning

LENGTHS = [3, 30, 1, 12, 25, 7, 18, 2, 9]
EOS = list(range(3, 20))


@pytest.fixture(scope="module")
def models() -> Iterator[tuple[Any, Any]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "MAX_SIGNATURES", 0)
        plain, _ = zoo.build("llama")
        limits = {"max_batch_size": 3, "max_seq_len": 64, "token_budget": 16}
        yield plain, regraft.optimize(zoo.build("llama")[0], verbose=False, decoding=limits)


def prompts() -> list[list[int]]:
    return [torch.randint(3, zoo.VOCAB, (n,)).tolist() for n in LENGTHS]


def alone(model: Any, prompt: list[int], **settings: Any) -> list[int]:
    return model.generate(torch.tensor([prompt]), **settings)[0, len(prompt) :].tolist()


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"max_new_tokens": 12},
        {"max_new_tokens": 12, "eos_token_id": EOS, "min_new_tokens": 4, "repetition_penalty": 1.3},
        {"max_length": 40, "eos_token_id": EOS, "min_length": 20, "begin_suppress_tokens": list(range(60))},
    ],
    ids=lambda s: " ".join(s),
)
def test_every_prompt_as_if_alone(models: tuple[Any, Any], settings: dict[str, Any]) -> None:
    plain, model = models
    given = prompts()
    results = model.generate_batch(given, tf.GenerationConfig(**{"eos_token_id": 2, **settings}))
    assert list(results) == [f"req_{i}" for i in range(len(given))]
    for prompt, (name, result) in zip(given, results.items(), strict=True):
        assert (result.request_id, result.prompt_ids, result.error) == (name, prompt, None)
        assert result.status is RequestStatus.FINISHED and result.is_finished()
        assert result.generated_tokens == alone(plain, prompt, **{"eos_token_id": 2, **settings})
        assert result.created_time <= result.lifespan[0] <= result.lifespan[1]
        assert result.timestamps is None


@pytest.mark.parametrize("most", [4.0, 4.5])
def test_lengths_that_are_floats(models: tuple[Any, Any], most: float) -> None:
    """As HuggingFace takes them: the first length that is no smaller."""
    plain, model = models
    (prompt, *_) = prompts()
    expected = alone(plain, prompt, max_new_tokens=most)
    for _ in range(2):
        assert alone(model, prompt, max_new_tokens=most) == expected
    scores = {"return_dict_in_generate": True, "output_scores": True}  # over pages
    assert len(model.generate(torch.tensor([prompt]), max_new_tokens=most, **scores).scores) == len(expected)
    assert model.generate_batch([prompt], max_new_tokens=most)["req_0"].generated_tokens == expected


def test_arguments_of_their_own(models: tuple[Any, Any], capsys: pytest.CaptureFixture[str]) -> None:
    """Timestamps, progress, `max_new_tokens` beside a config, returned sequences, seeds."""
    _, model = models
    given = prompts()[:4]
    results = model.generate_batch(given, max_new_tokens=5, record_timestamps=True, progress_bar=True, warmup=False)
    assert "Solving 4 requests" in capsys.readouterr().err
    for result in results.values():
        assert len(result.generated_tokens) == len(result.timestamps) == 5
        assert result.timestamps == sorted(result.timestamps)
    drawn = tf.GenerationConfig(do_sample=True, temperature=2.0, num_return_sequences=2, max_new_tokens=8)
    torch.manual_seed(1)
    first = model.generate_batch(given, drawn)
    torch.manual_seed(1)
    again = model.generate_batch(given, drawn)
    assert list(first)[:3] == ["req_0", "req_0__child#0", "req_1"] and len(first) == 8
    tokens = [r.generated_tokens for r in first.values()]
    assert tokens == [r.generated_tokens for r in again.values()]
    assert len(set(map(tuple, tokens))) == 8
    assert model.generate_batch([]) == {}
    assert model.report.record.generated["generate_batch"] >= 3


def test_what_cannot_be_is_said_before_anything_runs(models: tuple[Any, Any]) -> None:
    _, model = models
    with pytest.raises(regraft.InputError, match="at least one is needed"):
        model.generate_batch([[5, 6], []], max_new_tokens=3)
    with pytest.raises(regraft.InputError, match=r"needs 100 positions.*64 \(max_seq_len\)"):
        model.generate_batch([[5] * 10, [5] * 3], max_new_tokens=90)
    for wrong in ([5.0, 6.0], "ab", 5):
        with pytest.raises(regraft.InputError, match=r"inputs\[1\]=.*: expected a list of token ids"):
            model.generate_batch([[5], wrong], max_new_tokens=3)
    with pytest.raises(TypeError, match="no argument 'colour'"):
        model.generate_batch([[5] * 10], colour=3)


def test_what_the_engine_cannot_do_is_named_and_huggingfaces(
    models: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, model = models
    calls = []

    def original(self: Any, *args: Any, **kwargs: Any) -> str:
        calls.append((args, kwargs))
        return "HuggingFace's"

    monkeypatch.setattr(ContinuousMixin, "generate_batch", original)
    config = tf.GenerationConfig(num_beams=3)
    with pytest.warns(RegraftWarning, match="generate_batch: beam search: served by HuggingFace's generate_batch"):
        assert model.generate_batch([[5, 6]], config, max_new_tokens=3) == "HuggingFace's"
    assert calls == [(([[5, 6]], config, None, False, False, False, True), {"max_new_tokens": 3})]
    with pytest.warns(RegraftWarning, match="the logits processor ExponentialDecayLengthPenalty"):
        model.generate_batch([[5, 6]], tf.GenerationConfig(exponential_decay_length_penalty=(3, 1.1), eos_token_id=2))
    with warnings.catch_warnings():
        warnings.simplefilter("error", RegraftWarning)
        model.generate_batch([[5, 6]], config)
    hook = model.register_forward_hook(lambda module, arguments, output: None)
    with pytest.warns(RegraftWarning, match="a hook on the model itself"):
        model.generate_batch([[5, 6]], max_new_tokens=3)
    hook.remove()
    assert len(calls) == 4


def test_huggingfaces_engine_runs_the_original(models: tuple[Any, Any]) -> None:
    """Its calls hold a cache of its own beside tensors without elements, which only the original can judge."""
    _, model = models
    small = tf.ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=32, block_size=8)
    config = tf.GenerationConfig(max_new_tokens=4, eos_token_id=[2])
    given = [[5, 6, 7], [9, 10, 11, 12, 13]]
    hook = model.register_forward_hook(lambda module, arguments, output: None)
    try:
        found = model.generate_batch(given, config, small)
    finally:
        hook.remove()
    assert model.report.record.generated["HuggingFace's generate_batch"]
    assert [r.generated_tokens for r in found.values()] == [alone(model, p, max_new_tokens=4) for p in given]


def test_generate_with_a_paged_cache_comes_here(models: tuple[Any, Any]) -> None:
    plain, model = models
    ids = torch.tensor(prompts()[3:4])
    found = model.generate(ids, cache_implementation="paged", max_new_tokens=5, attention_mask=torch.ones_like(ids))
    assert found.flatten().tolist() == plain.generate(ids, max_new_tokens=5).flatten().tolist()


def test_signature_and_documentation_are_huggingfaces(models: tuple[Any, Any]) -> None:
    plain, model = models
    assert inspect.signature(model.generate_batch) == inspect.signature(plain.generate_batch)
    assert model.generate_batch.__doc__ == plain.generate_batch.__doc__
