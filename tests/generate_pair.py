"""A model and its optimized twin, whose `generate` must say the same."""

from __future__ import annotations

import copy
from typing import Any

import torch
import zoo
from stateless_engine import StatelessEngine, make

import regraft
from regraft.runtime.decoding.install import install, remove

IDS = torch.tensor([[0, 0, 0, 11, 12, 13, 14], [5, 6, 7, 8, 9, 10, 11], [0, 20, 21, 22, 23, 24, 25]])
MASK = (IDS != 0).long()
PROMPT: dict[str, Any] = {"input_ids": IDS, "attention_mask": MASK, "pad_token_id": 0}
PAGES, FAST, HUGGINGFACE = "HuggingFace's loop over pages", "the fast loop", "HuggingFace's loop"


class Pair:
    """A model, and its twin that is optimized."""

    def __init__(self, name: str) -> None:
        self.plain, _ = zoo.build(name, layers=1)
        self.model = regraft.optimize(copy.deepcopy(self.plain), verify="off", verbose=False)
        remove(self.model)
        install(self.model, self.model.forward, make)

    @property
    def engine(self) -> StatelessEngine:
        return self.model.generate.decoding.engine()

    def check(self, way: str, *, seed: int | None = None, **arguments: Any) -> Any:
        """Both give the same, the optimized one by this way; returns what it gave."""
        results = []
        before = dict(self.model.report.record.generated)
        for model in (self.plain, self.model):
            if seed is not None:
                torch.manual_seed(seed)
            results.append(model.generate(**arguments))
        after = self.model.report.record.generated
        assert {k: n - before.get(k, 0) for k, n in after.items() if n != before.get(k, 0)} == {way: 1}
        assert not self.engine.open
        expected, actual = results
        assert type(actual) is type(expected)
        tokens = [r if isinstance(r, torch.Tensor) else r.sequences for r in results]
        assert torch.equal(*tokens)
        assert tokens[0].dtype == tokens[1].dtype
        if way == FAST:  # another call with these settings takes the shortcut, where there is one
            if seed is not None:
                torch.manual_seed(seed)
            again = self.model.generate(**arguments)
            assert type(again) is type(expected)
            assert torch.equal(again if isinstance(again, torch.Tensor) else again.sequences, tokens[0])
        return actual, expected
