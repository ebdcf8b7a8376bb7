"""The example of a rule of one's own: the right rule is taken, the wrong one caught, without a model and on one."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "own_rule.py"


def test_the_right_rule_is_taken_and_the_wrong_one_reverted(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    out = capsys.readouterr().out
    assert "own_softcap: fused ['div + tanh + mul -> softcap (x1)'], reverted nothing" in out
    assert "wrong_softcap: fused nothing, reverted ['wrong_softcap" in out
    assert "own_softcap: 3 graphs in fp64 and 3 in bf16 compute the same" in out
    assert "rule wrong_softcap changes the result by" in out
