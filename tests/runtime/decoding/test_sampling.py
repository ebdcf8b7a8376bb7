"""Scores are those of HuggingFace's processors, bit for bit; tokens are drawn from their softmax."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as tf
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.generation import logits_process as hf

from regraft.runtime.decoding.noise import gumbel, philox
from regraft.runtime.decoding.params import SamplingParams
from regraft.runtime.decoding.processors import Untranslated, translate
from regraft.runtime.decoding.sampling import Sampler

VOCAB = 97
EOS = torch.tensor([2, 5])
PROMPT = [[7, 8, 9, 7, 8, 11], [0, 0, 3, 9, 9, 9], [4, 5, 6, 4, 5, 6]]
"""As HuggingFace sees it; the second has two tokens of padding."""

PROCESSORS: dict[str, list[Any]] = {
    "nothing": [],
    "penalty": [hf.RepetitionPenaltyLogitsProcessor(1.3)],
    "penalty without prompt": [hf.RepetitionPenaltyLogitsProcessor(1.3, prompt_ignore_length=6)],
    "ngram 1": [hf.NoRepeatNGramLogitsProcessor(1)],
    "ngram 3": [hf.NoRepeatNGramLogitsProcessor(3)],
    "ngram 7": [hf.NoRepeatNGramLogitsProcessor(7)],
    "bias": [hf.SequenceBiasLogitsProcessor({(7, 8, 11): 5.0, (9,): -3.0, (9, 9): 4.0, (3, 9): 1.0})],
    "bad words": [hf.NoBadWordsLogitsProcessor([[8], [5, 6], [9, 9, 9, 12], list(range(20))], EOS)],
    "min length": [hf.MinLengthLogitsProcessor(8, EOS)],
    "min new": [hf.MinNewTokensLengthLogitsProcessor(6, 2, EOS)],
    "both": [hf.MinLengthLogitsProcessor(7, EOS), hf.MinNewTokensLengthLogitsProcessor(6, 3, EOS)],
    "forced eos": [hf.ForcedEOSTokenLogitsProcessor(8, EOS)],
    "invalid": [hf.InfNanRemoveLogitsProcessor()],
    "suppress": [hf.SuppressTokensLogitsProcessor([1, 5, 90])],
    "begin": [hf.SuppressTokensAtBeginLogitsProcessor([1, 5, 90], 6)],
    "temperature": [hf.TemperatureLogitsWarper(0.7)],
    "top_k": [hf.TopKLogitsWarper(10)],
    "top_k of all": [hf.TopKLogitsWarper(1000)],
    "top_p": [hf.TopPLogitsWarper(0.8)],
    "top_p 0": [hf.TopPLogitsWarper(0.0)],
    "min_p": [hf.MinPLogitsWarper(0.1)],
    "typical": [hf.TypicalLogitsWarper(0.6)],
    "epsilon": [hf.EpsilonLogitsWarper(0.02)],
    "eta": [hf.EtaLogitsWarper(0.05)],
    "usual": [hf.TemperatureLogitsWarper(1.5), hf.TopKLogitsWarper(50), hf.TopPLogitsWarper(0.9)],
    "many": [
        hf.RepetitionPenaltyLogitsProcessor(1.1),
        hf.NoRepeatNGramLogitsProcessor(2),
        hf.NoBadWordsLogitsProcessor([[8]], EOS),
        hf.TemperatureLogitsWarper(2.0),
        hf.TopKLogitsWarper(60),
        hf.TopPLogitsWarper(0.95),
        hf.MinPLogitsWarper(0.01),
        hf.TypicalLogitsWarper(0.9),
        hf.EpsilonLogitsWarper(0.001),
        hf.EtaLogitsWarper(0.001),
        hf.LogitNormalization(),
    ],
}


@dataclass
class Row:
    """What the sampler reads of a sequence."""

    tokens: list[int]
    request: Any
    produced: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.prompt_length = len(self.tokens)
        self.tokens = [*self.tokens, *self.produced]


def row(tokens: list[int], params: SamplingParams | None, produced: list[int] | None = None) -> Any:
    padding = next(i for i, t in enumerate(tokens) if t)
    if params is not None:
        params = replace(params, padding=tuple(tokens[:padding]))
    return Row(tokens[padding:], SimpleNamespace(params=params, max_new_tokens=20), produced or [])


@pytest.mark.parametrize("name", PROCESSORS)
def test_scores_are_those_of_the_processors(name: str) -> None:
    """Over several steps, with history; other rows of the same batch have other settings, or none."""
    processors = tf.LogitsProcessorList(PROCESSORS[name])
    params = translate(processors, do_sample=False)
    sampler = Sampler(VOCAB, "cpu", rows=1)
    sampler.assign(3, row([1, 2], None))
    for i, tokens in enumerate(PROMPT):
        sampler.assign(i, row(tokens, params))
    other = SamplingParams(temperature=0.3, top_k=3, repetition_penalty=1.7, no_repeat_ngram_size=2, suppress=(4,))
    sampler.assign(4, row([5, 5, 5], other))
    ids, active = torch.tensor(PROMPT), torch.tensor([True, True, True, True, False])
    for step in range(4):
        logits = 3 * torch.randn(5, VOCAB)
        logits[1, 4:9] = logits[1, 4]
        if name == "invalid":
            logits[0, :3] = torch.tensor([float("nan"), float("inf"), float("-inf")])
        expected = processors(ids, logits[:3])
        actual = sampler.scores(logits)
        torch.testing.assert_close(actual[:3], expected, rtol=0, atol=0, equal_nan=True)
        if name != "many":  # there the row that has no settings is normalised too
            assert torch.equal(actual[3], logits[3])
        tokens = sampler(logits, active)
        assert torch.equal(tokens[:3], expected.argmax(-1)), step
        ids = torch.cat([ids, tokens[:3, None]], 1)


def test_forced_bos() -> None:
    processors = tf.LogitsProcessorList([hf.ForcedBOSTokenLogitsProcessor(13)])
    sampler = Sampler(VOCAB, "cpu")
    sampler.assign(0, row([1], translate(processors, do_sample=False)))
    logits = torch.randn(1, VOCAB)
    assert torch.equal(sampler.scores(logits), processors(torch.tensor([[1]]), logits))
    sampler(logits, torch.tensor([True]))
    assert torch.equal(sampler.scores(logits), logits)


def test_a_row_goes_on_after_it_was_moved() -> None:
    """Assigned again elsewhere, with what it produced, it has the tokens it would have had; so has its neighbour."""
    params = SamplingParams(
        do_sample=True, temperature=2.0, top_p=0.9, repetition_penalty=1.4, no_repeat_ngram_size=2, seed=7
    )
    logits = torch.randn(12, 1, VOCAB)
    whole, moved = Sampler(VOCAB, "cpu"), Sampler(VOCAB, "cpu")
    whole.assign(0, row(PROMPT[0], params))
    moved.assign(0, row(PROMPT[0], params))
    one, tokens = torch.tensor([True]), []
    for i in range(12):
        tokens.append(int(whole(logits[i], one)))
        if i == 5:
            moved.assign(0, row([4, 4], SamplingParams(suppress=(1, 2), bad_words=(((3,), float("-inf")),))))
            moved.assign(9, row(PROMPT[0], params, produced=tokens[:5]))
        at = 0 if i < 5 else 9
        batch = torch.randn(at + 1, VOCAB)
        batch[at] = logits[i]
        assert int(moved(batch, torch.ones(at + 1, dtype=torch.bool))[at]) == tokens[-1]


def test_rows_that_do_not_take_their_token_keep_their_state() -> None:
    params = SamplingParams(do_sample=True, repetition_penalty=1.2, no_repeat_ngram_size=2, seed=3)
    sampler, logits = Sampler(VOCAB, "cpu"), torch.randn(2, VOCAB)
    for i in range(2):
        sampler.assign(i, row(PROMPT[0], params))
    first = sampler(logits[:1].expand(2, VOCAB), torch.tensor([True, False]))
    again = sampler(logits[:1].expand(2, VOCAB), torch.tensor([True, True]))
    assert first[0] == first[1] == again[1]


def test_a_row_without_settings_leaves_none_behind() -> None:
    """Whatever a row held before, and whatever the others hold."""
    sampler, logits = Sampler(VOCAB, "cpu"), torch.randn(2, VOCAB)
    for name, processors in PROCESSORS.items():
        if name in ("many", "invalid"):
            continue
        sampler.assign(0, row(PROMPT[0], translate(processors, do_sample=True)))
        sampler.assign(1, row(PROMPT[0], translate(processors, do_sample=False)))
        sampler.assign(0, row(PROMPT[1], SamplingParams()))
        assert torch.equal(sampler.scores(logits)[0], logits[0]), name
    sampler.assign(1, None)
    assert sampler.graph_key == Sampler(VOCAB, "cpu").graph_key


def test_settings_of_a_row_do_not_outlive_its_sequence() -> None:
    """Nothing was in use when the row was given to another one; then something is, in the row beside it."""
    sampler, logits = Sampler(VOCAB, "cpu"), torch.randn(2, VOCAB)
    active, best = torch.tensor([True, True]), logits.argmax(-1)
    bias = (((int(best[0] + 1) % VOCAB,), 100.0),)
    forbidden = SamplingParams(suppress=(int(best[0]),), sequence_bias=bias, bad_words=(((3,), float("-inf")),))
    harmless = SamplingParams(suppress=(int(logits[1].argmin()),), sequence_bias=(((int(best[1]),), 1.0),))
    sampler.assign(0, row([5], forbidden))
    assert sampler(logits, active)[0] == bias[0][0][0]
    sampler.assign(0, None)
    sampler.assign(0, row([5], None))
    sampler.assign(1, row([5], harmless))
    assert torch.equal(sampler(logits, active), best)


def test_words_beyond_the_vocabulary_are_refused() -> None:
    """On a GPU they would end the process; nothing of them stays."""
    sampler, logits = Sampler(VOCAB, "cpu"), torch.randn(1, VOCAB)
    for params in (SamplingParams(sequence_bias=(((VOCAB,), 1.0),)), SamplingParams(bad_words=(((3, VOCAB), -1.0),))):
        with pytest.raises(ValueError, match=rf"vocabulary has {VOCAB} tokens; \[{VOCAB}\] are beyond"):
            sampler.assign(0, row([5], params))
        assert torch.equal(sampler(logits, torch.tensor([True])), logits.argmax(-1))


def test_the_key_tells_what_is_captured() -> None:
    sampler = Sampler(VOCAB, "cpu")
    sampler.assign(0, row(PROMPT[0], SamplingParams(do_sample=True, top_k=5, temperature=0.5)))
    key = sampler.graph_key
    sampler.assign(0, row(PROMPT[2], SamplingParams(do_sample=True, top_k=50, temperature=0.7, seed=8)))
    assert sampler.graph_key == key
    sampler.assign(1, row(PROMPT[0], SamplingParams(do_sample=True, top_p=0.5)))
    assert sampler.graph_key != key


def test_greedy_takes_the_first_of_equal_scores() -> None:
    logits = torch.zeros(2, VOCAB, dtype=torch.bfloat16)
    logits[1, 40:50] = 3
    plain, with_settings = Sampler(VOCAB, "cpu"), Sampler(VOCAB, "cpu")
    with_settings.assign(0, row([9], SamplingParams(suppress=(0,))))
    with_settings.assign(1, row([9], SamplingParams(suppress=(0,))))
    both = torch.tensor([True, True])
    assert plain(logits, both).tolist() == [0, 40]
    assert with_settings(logits, both).tolist() == [1, 40]


def test_philox_is_philox() -> None:
    """Known answer of Random123 for philox4x32-10 with zero key and counter."""
    assert philox(torch.tensor([0]), torch.tensor([0]), 1).item() == 0x6627E8D5


def test_noise_is_exponential() -> None:
    """The mean and variance of Gumbel noise, and its largest of many, to the accuracy of as many samples."""
    noise = gumbel(philox(torch.tensor([1, 2]), torch.tensor([0, 0]), 200_000)).double().flatten()
    assert abs(noise.mean() - 0.5772156649) < 5 * (1.6449 / noise.numel()) ** 0.5
    assert abs(noise.var() - 1.644934) < 0.03
    assert 9 < noise.max() < 23 and torch.isfinite(noise).all()
    assert torch.isfinite(gumbel(torch.tensor([0, 2**32 - 1]))).all()


SAMPLED = ("nothing", "temperature", "top_k", "top_p", "min_p", "typical", "epsilon", "eta", "usual")


@pytest.mark.parametrize("name", SAMPLED)
def test_tokens_are_drawn_from_the_distribution(name: str) -> None:
    """Chi-square against HuggingFace's probabilities, over rows with seeds of their own and over steps of one row."""
    processors = tf.LogitsProcessorList(PROCESSORS[name])
    params = translate(processors, do_sample=True)
    rows, steps, vocab = 500, 20, 31
    logits = 2 * torch.randn(1, vocab)
    probabilities = processors(torch.tensor([[1]]), logits).double().softmax(-1)[0]
    sampler = Sampler(vocab, "cpu")
    for i in range(rows):
        sampler.assign(i, row([1], replace(params, seed=i)))
    counts = torch.zeros(vocab, dtype=torch.float64)
    for _ in range(steps):
        tokens = sampler(logits.expand(rows, vocab), torch.ones(rows, dtype=torch.bool))
        counts += torch.bincount(tokens, minlength=vocab)
    expected = rows * steps * probabilities
    assert counts[expected == 0].sum() == 0
    common = expected > 5
    pooled = torch.cat([expected[common], expected[~common].sum()[None]])
    found = torch.cat([counts[common], counts[~common].sum()[None]])
    keep = pooled > 0
    chi = ((found - pooled)[keep] ** 2 / pooled[keep]).sum().item()
    degrees = int(keep.sum()) - 1
    assert chi < degrees + 4.5 * (2 * degrees) ** 0.5 + 8, (chi, degrees)


def test_a_wrong_distribution_is_noticed() -> None:
    """Guards the guard: noise for one temperature fails the comparison with another by far."""
    vocab, rows = 31, 10_000
    logits = 2 * torch.randn(1, vocab)
    noise = gumbel(philox(torch.arange(rows), torch.zeros(rows, dtype=torch.int64), vocab))
    counts = torch.bincount((logits + noise).argmax(-1), minlength=vocab).double()
    expected = rows * (logits[0].double() / 1.2).softmax(-1)
    common = expected > 5
    chi = ((counts - expected)[common] ** 2 / expected[common]).sum().item()
    assert chi > 200


def test_seeds_and_batches() -> None:
    """Tokens depend on the row's seed and step, not on the batch; another seed gives others."""

    def drawn(seeds: list[int]) -> list[list[int]]:
        sampler = Sampler(VOCAB, "cpu")
        for i, seed in enumerate(seeds):
            sampler.assign(i, row([1, 2], SamplingParams(do_sample=True, seed=seed)))
        active = torch.ones(len(seeds), dtype=torch.bool)
        flat = torch.zeros(len(seeds), VOCAB)
        return torch.stack([sampler(flat, active) for _ in range(30)], 1).tolist()

    first = drawn([11, 2**62, 13])
    assert drawn([2**62])[0] == first[1]
    assert len({tuple(tokens) for tokens in first}) == 3
    assert all(len(set(tokens)) > 15 for tokens in first)


def test_greedy_rows_beside_drawn_ones() -> None:
    sampler, logits = Sampler(VOCAB, "cpu"), torch.randn(2, VOCAB)
    sampler.assign(0, row([1], SamplingParams()))
    sampler.assign(1, row([1], SamplingParams(do_sample=True, temperature=5.0)))
    drawn = [sampler(logits, torch.tensor([True, True])).tolist() for _ in range(20)]
    assert {tokens[0] for tokens in drawn} == {int(logits[0].argmax())}
    assert len({tokens[1] for tokens in drawn}) > 5


class Custom(tf.LogitsProcessor):
    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores


@pytest.mark.parametrize(
    ("processors", "said"),
    [
        ([Custom()], "Custom"),
        ([hf.TopKLogitsWarper(5), hf.TemperatureLogitsWarper(0.5)], "TemperatureLogitsWarper behind"),
        ([hf.TopPLogitsWarper(0.5, min_tokens_to_keep=2)], "min_tokens_to_keep"),
        ([hf.TopKLogitsWarper(5, filter_value=-100.0)], "filter_value"),
        ([hf.ExponentialDecayLengthPenalty((3, 1.1), 2, 4)], "ExponentialDecayLengthPenalty"),
        ([hf.TopHLogitsWarper(0.5)], "TopHLogitsWarper"),
    ],
)
def test_what_is_not_translated_is_named(processors: list[Any], said: str) -> None:
    with pytest.raises(Untranslated, match=said):
        translate(processors, do_sample=True)


def test_params_are_checked() -> None:
    for wrong in ({"temperature": 0.0}, {"top_p": 1.5}, {"top_k": -1}, {"seed": -1}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            SamplingParams(**wrong)


class NothingFromTheHost(TorchDispatchMode):
    """Refuses what a CUDA graph cannot capture: values read, numbers brought to the device, sizes by data."""

    REFUSED = ("_local_scalar_dense", "lift_fresh", "scalar_tensor", "nonzero", "unique", "masked_select")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert not any(name.startswith(refused) for refused in self.REFUSED), str(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", PROCESSORS)
def test_a_step_can_be_captured(name: str) -> None:
    sampler, logits = Sampler(VOCAB, "cpu"), torch.randn(1, VOCAB)
    sampler.assign(0, row(PROMPT[0], translate(PROCESSORS[name], do_sample=False)))
    with NothingFromTheHost():
        sampler(logits, torch.ones(1, dtype=torch.bool))
    with pytest.raises(AssertionError, match="scalar_tensor"), NothingFromTheHost():
        torch.where(logits > 0, logits, 0.0)
