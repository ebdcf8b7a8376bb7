"""Masks replaced because samples agreed: the runtime asks at every new size, and keeps the mask where they differ."""

from __future__ import annotations

import torch
import zoo
from kernel_checks import assert_close
from runtime_models import exactly
from torch import nn

import regraft
from regraft.runtime.guarded import all_hold


def _logits(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return model(ids, use_cache=False).logits


def test_a_mask_that_changes_beyond_the_sampled_sizes_is_kept_there() -> None:
    """A window that no config names and no sample reaches: the guard sees it at the first length beyond it."""
    model, _ = zoo.build("mistral")
    model.config.sliding_window = 40
    ids = torch.randint(3, 100, (2, 60))
    with torch.no_grad():
        expected = {n: _logits(model, ids[:, :n]) for n in (7, 60)}
    exact = {n: exactly(model, input_ids=ids[:, :n], use_cache=False).logits for n in expected}
    optimized = regraft.optimize(model, example_inputs={"input_ids": ids[:, :9], "use_cache": False})
    (served,) = optimized.forward.graphs
    assert served.run.fast.program.guards, "the mask was not replaced"
    for length, logits in expected.items():
        assert_close(_logits(optimized, ids[:, :length]), logits, exact[length])
    assert optimized.report.calls == {"graph": 2, "original": 0}


def test_a_guard_that_fails_switches_to_the_graph_with_masks() -> None:
    model, _ = zoo.build("llama")
    ids = torch.randint(3, 100, (2, 11))
    with torch.no_grad():
        expected = _logits(model, ids)
    exact = exactly(model, input_ids=ids, use_cache=False).logits
    optimized = regraft.optimize(model, example_inputs={"input_ids": ids[:, :9], "use_cache": False})
    (served,) = optimized.forward.graphs
    asked: list[tuple[int, ...]] = []

    def wrong(tensors: dict[str, torch.Tensor]) -> bool:
        asked.append(tuple(tensors["input_ids"].shape))
        return False

    served.run.fast.program.guards[:] = [wrong]
    # what the guard protects from: a causal attention made bidirectional
    for node in served.run.fast.program.graph.nodes:
        if node.op == "call_function" and getattr(node.target, "__name__", "") == "attention":
            node.update_arg(9, -1)
    served.run.fast.program.gm.recompile()
    for _ in range(2):
        assert_close(_logits(optimized, ids), expected, exact)
    assert asked == [(1, 11)], "asked once for these sizes, on one row"


def test_an_additive_mask_of_the_caller_stays() -> None:
    """The first one hides nothing, and what comes later under the same sizes does."""
    model, _ = zoo.build("llama", layers=1)
    ids = torch.randint(3, 100, (2, 6))
    open_mask = torch.zeros(2, 1, 6, 6)
    masks = [open_mask, torch.full_like(open_mask, torch.finfo(torch.float32).min).triu(1)]
    with torch.no_grad():
        expected = [model(ids, attention_mask=mask).logits for mask in masks]
    exact = [exactly(model, input_ids=ids, attention_mask=mask).logits for mask in masks]
    optimized = regraft.optimize(model, example_inputs={"input_ids": ids, "attention_mask": open_mask}, verbose=False)
    for mask, logits, best in zip(masks, expected, exact, strict=True):
        assert_close(optimized(ids, attention_mask=mask).logits, logits, best)
    assert optimized.report.calls == {"graph": 2, "original": 0} and not optimized.report.reverted


def test_guards_hold_at_sizes_that_were_never_sampled() -> None:
    model, _ = zoo.build("gemma2")
    optimized = regraft.optimize(model, example_inputs={"input_ids": torch.randint(3, 100, (2, 9)), "use_cache": False})
    (served,) = optimized.forward.graphs
    program = served.run.fast.program
    assert len(program.guards) == 2, "one for the sliding layers, one for the full ones"
    assert all_hold(program, {"input_ids": torch.randint(3, 100, (5, 97))})
