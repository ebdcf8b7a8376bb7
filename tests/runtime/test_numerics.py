"""Under REGRAFT_LOGS=numerics the node that first makes a NaN or an infinity is named, once."""

from __future__ import annotations

import logging

import pytest
import torch
import zoo

import regraft
from regraft.runtime import numerics, topics


def test_the_first_bad_node_is_named_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "regraft.numerics")
    model, inputs = zoo.build("llama")
    expected = model(**inputs).logits
    model = regraft.optimize(model, example_inputs=inputs, verbose=False)
    caplog.clear()
    found = model(**inputs).logits
    torch.testing.assert_close(found, expected)
    assert not caplog.records
    with torch.no_grad():
        model.model.norm.weight.fill_(3e38)  # what is above 1.13 overflows
    for _ in range(2):
        model(**inputs)
    messages = [r.getMessage() for r in caplog.records if "is made by" in r.getMessage()]
    assert len(messages) == 1 and "norm" in messages[0]


def test_programs_are_not_looked_at_otherwise(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)  # of every logger, as programs do that show their own messages
    caplog.set_level(logging.INFO, "regraft")
    assert not numerics.wanted()
    caplog.set_level(logging.WARNING, "regraft.numerics")
    assert not numerics.wanted()


@pytest.mark.parametrize("wanted", ["numerics", "fusions,numerics", "all"])
def test_who_asks_is_told(wanted: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("regraft", *(f"regraft.{topic}" for topic in topics.TOPICS)):
        caplog.set_level(logging.NOTSET, name)  # as it is found again after the test
    monkeypatch.setattr(logging.getLogger("regraft"), "handlers", [logging.NullHandler()])
    topics.listen({"REGRAFT_LOGS": wanted})
    assert numerics.wanted()


def test_masks_are_no_alarm(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "regraft.numerics")

    def program(x: torch.Tensor) -> torch.Tensor:
        return torch.log(x.masked_fill(x > 1, -torch.inf).exp())

    checked = numerics.Checked(torch.fx.symbolic_trace(program))
    assert checked.run(torch.tensor([1.0, 2.0])).exp().round().tolist() == [3.0, 0.0]
    assert not caplog.records
    checked.run(torch.tensor([1.0, torch.nan]))
    assert [r.getMessage().split()[:5] for r in caplog.records] == [["NaN", "or", "infinity", "comes", "in"]]
