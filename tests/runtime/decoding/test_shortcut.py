"""A call that differs from an earlier one in its prompts alone is not prepared again, and says the same."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from generate_pair import FAST, IDS, MASK, Pair
from transformers import GenerationConfig, GenerationMixin

from regraft.runtime.errors import RegraftWarning


@pytest.fixture(scope="module")
def pair() -> Pair:
    return Pair("llama")


@pytest.fixture
def prepared(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grows with each call that transformers prepares."""
    calls: list[str] = []
    original = GenerationMixin._prepare_generation_config

    def noted(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(type(self).__name__)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(GenerationMixin, "_prepare_generation_config", noted)
    return calls


def both(pair: Pair, seed: int = 0, **arguments: Any) -> None:
    """The twins say the same; a sample is another, but that of a call which is prepared."""
    first = pair.plain
    if arguments.get("do_sample"):
        first, recipes = pair.model, dict(pair.model.generate.decoding._recipes)
        pair.model.generate.decoding._recipes.clear()
    results = []
    for model in (first, pair.model):
        torch.manual_seed(seed)
        results.append(model.generate(**arguments))
        if arguments.get("do_sample"):
            pair.model.generate.decoding._recipes.update(recipes)
    assert torch.equal(*results)


SETTINGS: list[dict[str, Any]] = [
    {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0},
    {"max_new_tokens": 7, "min_new_tokens": 4, "eos_token_id": list(range(3, 40)), "pad_token_id": 0},
    {"max_new_tokens": 4, "do_sample": True, "top_k": 9, "temperature": 0.7, "pad_token_id": 0},
    {"max_new_tokens": 6, "repetition_penalty": 1.7, "no_repeat_ngram_size": 2, "pad_token_id": 0},
    {"generation_config": GenerationConfig(max_new_tokens=3, eos_token_id=9, pad_token_id=0)},
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_other_prompts_are_not_prepared_again(pair: Pair, prepared: list[str], settings: dict[str, Any]) -> None:
    arguments: dict[str, Any] = {"input_ids": IDS, "attention_mask": MASK, **settings}
    pair.model.generate(**arguments)
    for seed, columns in enumerate((slice(None), slice(2, None), slice(4, None))):
        prepared.clear()
        both(pair, seed, **{**arguments, "input_ids": IDS[:, columns], "attention_mask": MASK[:, columns]})
        both(pair, seed, **{**arguments, "input_ids": IDS[1:2, columns], "attention_mask": MASK[1:2, columns]})
        assert len(prepared) == 2  # for the other twin


def test_without_a_mask_padding_is_told_as_transformers_does(pair: Pair, prepared: list[str]) -> None:
    arguments: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    both(pair, input_ids=IDS[1:2], **arguments)
    prepared.clear()
    both(pair, input_ids=IDS[1:2, 2:], **arguments)
    assert len(prepared) == 1
    both(pair, input_ids=IDS, **arguments)  # with padding among the tokens
    assert len(prepared) == 3


def test_prompts_that_end_with_padding_are_prepared(pair: Pair, prepared: list[str]) -> None:
    """Where it is the end of a sequence too, transformers warns and goes on."""
    arguments: dict[str, Any] = {"max_new_tokens": 3, "pad_token_id": 14, "eos_token_id": 14}
    for ids, calls in ((IDS[1:], 2), (IDS[1:], 1), (IDS[:2], 2)):
        prepared.clear()
        both(pair, input_ids=ids, **arguments)
        assert len(prepared) == calls


def test_what_changes_between_calls_is_seen(pair: Pair, prepared: list[str]) -> None:
    arguments: dict[str, Any] = {"input_ids": IDS, "attention_mask": MASK, "max_new_tokens": 4, "pad_token_id": 0}
    config = pair.model.generation_config
    pair.model.generate(**arguments)
    prepared.clear()
    config.min_new_tokens = 2
    try:
        pair.model.generate(**arguments)
        assert len(prepared) == 1
    finally:
        config.min_new_tokens = None
    pair.model.config.temperature = 0.5
    try:
        with pytest.raises(ValueError, match="modified the pretrained model configuration"):
            pair.model.generate(**arguments)
    finally:
        del pair.model.config.temperature
    prepared.clear()
    pair.model.generate(**arguments, max_length=None)
    pair.model.generate(**arguments, max_length=None)
    assert len(prepared) == 1
    pair.model.train()
    try:
        pair.model.generate(**arguments)
    finally:
        pair.model.eval()
    assert len(prepared) == 2


@pytest.mark.parametrize(
    "settings",
    [
        {"max_length": 12},
        {"max_new_tokens": 4, "forced_eos_token_id": 9},
        {"max_new_tokens": 4, "min_length": 9, "eos_token_id": 5},
        {"max_new_tokens": 4, "num_return_sequences": 2, "do_sample": True},
    ],
)
def test_settings_that_count_from_elsewhere_are_prepared_each_time(
    pair: Pair, prepared: list[str], settings: dict[str, Any]
) -> None:
    for columns in (slice(None), slice(3, None)):
        prepared.clear()
        both(pair, input_ids=IDS[:, columns], attention_mask=MASK[:, columns], pad_token_id=0, **settings)
        assert len(prepared) == 2


def test_what_is_set_on_the_model_later_prepares_calls(pair: Pair) -> None:
    arguments: dict[str, Any] = {"input_ids": IDS, "attention_mask": MASK, "max_new_tokens": 4, "pad_token_id": 0}
    both(pair, **arguments)

    def shortened(config: GenerationConfig | None, **given: Any) -> Any:
        made, rest = GenerationMixin._prepare_generation_config(pair.model, config, **given)
        made.max_new_tokens = 2
        return made, rest

    pair.model._prepare_generation_config = shortened
    try:
        assert pair.model.generate(**arguments).shape[1] == IDS.shape[1] + 2
    finally:
        del pair.model._prepare_generation_config
    both(pair, **arguments)


class OneToken(GenerationConfig):
    """Says nothing else than its base class, and does something else."""

    def update(self, *args: Any, **kwargs: Any) -> Any:
        rest = super().update(*args, **kwargs)
        self.max_new_tokens = 1
        return rest


def test_a_config_of_another_class_is_another(pair: Pair) -> None:
    for kind in (GenerationConfig, OneToken):
        config = kind(max_new_tokens=4, pad_token_id=0)
        both(pair, input_ids=IDS, attention_mask=MASK, generation_config=config)


def test_a_sample_that_no_page_can_hold_is_that_of_the_seed(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments: dict[str, Any] = {"max_new_tokens": 4, "do_sample": True, "pad_token_id": 0}
    pair.model.generate(IDS[:, 2:], attention_mask=MASK[:, 2:], **arguments)
    monkeypatch.setattr(pair.engine, "longest", 10)
    results = []
    for model in (pair.plain, pair.model):
        torch.manual_seed(3)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RegraftWarning)
            results.append(model.generate(IDS, attention_mask=MASK, **arguments))
    assert torch.equal(*results)


def test_calls_are_counted(pair: Pair) -> None:
    for _ in range(2):
        pair.check(FAST, input_ids=IDS, attention_mask=MASK, max_new_tokens=2, pad_token_id=0, do_sample=False)
