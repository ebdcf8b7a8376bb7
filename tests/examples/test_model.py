"""The committed models are trained, share a tokenizer, and are small enough to commit."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

EXAMPLES = Path(__file__).parents[2] / "examples"
VOCABULARY = 4096

# Written for this test, so not in the corpus.
SNIPPET = '''"""Count the words of text files."""

import argparse
import sys
from collections import Counter


class WordCounter:
    """Collects how often each word occurs."""

    def __init__(self, ignore_case=False):
        self.ignore_case = ignore_case
        self.counts = Counter()

    def feed(self, line):
        for word in line.split():
            if self.ignore_case:
                word = word.lower()
            self.counts[word] += 1

    def most_common(self, n=None):
        """Return a list of the n most common words and their counts."""
        return self.counts.most_common(n)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="*", help="files to read")
    args = parser.parse_args(argv)
    counter = WordCounter()
    for name in args.files:
        with open(name, encoding="utf-8") as f:
            for line in f:
                counter.feed(line)
    for word, count in counter.most_common(10):
        print(word, count)


if __name__ == "__main__":
    sys.exit(main())
'''


@torch.no_grad()
def loss(model: torch.nn.Module, folder: Path) -> float:
    """Mean negative log-likelihood of SNIPPET, nats a token."""
    ids = AutoTokenizer.from_pretrained(folder)(SNIPPET, return_tensors="pt").input_ids
    return model(input_ids=ids, labels=ids).loss.item()


@pytest.mark.parametrize(("name", "highest"), [("model", 2.3), ("draft", 2.9)])
def test_is_trained(name: str, highest: float) -> None:
    folder = EXAMPLES / name
    trained = loss(AutoModelForCausalLM.from_pretrained(folder), folder)
    untrained = loss(AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)), folder)
    print(f"{name}: {trained:.3f} nats a token, {untrained:.3f} untrained")
    assert untrained > 0.9 * math.log(VOCABULARY)
    assert trained < highest


@pytest.mark.parametrize(("name", "megabytes"), [("model", 8), ("draft", 2)])
def test_size_and_form(name: str, megabytes: int) -> None:
    folder = EXAMPLES / name
    assert sum(path.stat().st_size for path in folder.iterdir()) <= megabytes * 10**6
    model = AutoModelForCausalLM.from_pretrained(folder)
    config = model.config
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert config.num_key_value_heads < config.num_attention_heads
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.num_parameters() == json.loads((folder / "training.json").read_text())["parameters"]


def test_same_tokenizer() -> None:
    large, small = (AutoTokenizer.from_pretrained(EXAMPLES / name) for name in ("model", "draft"))
    assert len(large) == VOCABULARY
    assert large.get_vocab() == small.get_vocab()
    ids = large(SNIPPET).input_ids
    assert ids == small(SNIPPET).input_ids
    assert ids[0] == large.bos_token_id
    assert large.decode(ids, skip_special_tokens=True) == SNIPPET
    assert len(ids) < len(SNIPPET) / 3  # it was trained on such text


def test_tokenizer_takes_any_text() -> None:
    tokenizer = AutoTokenizer.from_pretrained(EXAMPLES / "model")
    text = "\t naïve — 日本語 \x00 🐍\r\n"
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text
