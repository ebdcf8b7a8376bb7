"""Captures that take long, or fail again and again, are given up after a while: a model that waits seems to hang."""

from __future__ import annotations

import copy
import inspect
import warnings

import pytest
import torch
from runtime_models import optimized, tokens
from torch import nn

from regraft.runtime import dispatch
from regraft.runtime.errors import RegraftWarning


class Unrolled(nn.Module):
    """A scan that its code unrolls: each length needs a graph of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(16, 8)
        self.linear = nn.Linear(8, 8)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(input_ids)
        state = x[:, 0]
        for i in range(int(x.shape[1])):
            state = torch.tanh(self.linear(state) + x[:, i])
        return state


class UnrolledBlock(Unrolled):
    """The same over states, as a block of a model gets them."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        state = hidden_states[:, 0]
        for i in range(int(hidden_states.shape[1])):
            state = torch.tanh(self.linear(state) + hidden_states[:, i])
        return state


def given(model: nn.Module, length: int) -> torch.Tensor:
    return torch.randn(2, length, 8) if isinstance(model, UnrolledBlock) else tokens(2, length) % 16


@pytest.mark.parametrize("kind", [Unrolled, UnrolledBlock])
@pytest.mark.parametrize(("seconds", "graphs"), [(1.0, 4), (12.0, 2)])
def test_lengths_that_need_a_graph_each_share_their_time(kind: type[nn.Module], seconds: float, graphs: int) -> None:
    """A loop of steps, each longer than the one before, must not wait for a graph of each."""
    torch.manual_seed(0)
    plain = kind().eval()
    (name,) = inspect.signature(plain.forward).parameters
    model = optimized(copy.deepcopy(plain), example_inputs={name: given(plain, 6)})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RegraftWarning)
        for length in range(7, 13):
            ids = given(plain, length)
            torch.testing.assert_close(model(ids), plain(ids).detach())
            for served in model.forward.graphs:
                served.seconds = seconds
    assert len(model.forward.graphs) == graphs
    said = "beyond the 4 fixed ones" if graphs == 4 else "graphs for each of them would take over 30 s"
    assert all(said in reason for reason in model.report.record.fallbacks)


class UnrolledTimes(Unrolled):
    """Each number is another signature."""

    def forward(self, input_ids: torch.Tensor, times: int = 1) -> torch.Tensor:
        return super().forward(input_ids) * times


@pytest.mark.parametrize(("step", "graphs"), [(1, 2), (0, 6)])
def test_signatures_share_the_time_of_lengths(step: int, graphs: int) -> None:
    """What fixes a length does so for other arguments, too; of a length that all have there is a graph each."""
    torch.manual_seed(0)
    plain = UnrolledTimes().eval()
    model = optimized(copy.deepcopy(plain), example_inputs={"input_ids": given(plain, 6)})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RegraftWarning)
        for times in range(1, 6):
            for served in model.forward.graphs:
                served.seconds = 12.0
            ids = given(plain, 6 + step * times)
            torch.testing.assert_close(model(ids, times=times + 1), plain(ids, times=times + 1).detach())
    assert len(model.forward.graphs) == graphs


class Guarded(nn.Module):
    """Decides by the values of its input, which no graph can."""

    def forward(self, x: torch.Tensor, times: int = 1) -> torch.Tensor:
        return x * times if float(x.sum()) > 0 else -x


@pytest.mark.parametrize(("patience", "tried"), [(1e9, 6), (0.0, dispatch.TRIED)])
def test_what_cannot_be_captured_is_not_tried_for_ever(
    patience: float, tried: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each number is another signature; the last ones fail unseen where those before took long."""
    monkeypatch.setattr(dispatch, "PATIENCE", patience)
    x = torch.rand(3, 4)
    model = optimized(Guarded().eval(), example_inputs={"x": x})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RegraftWarning)
        for times in range(2, 7):
            assert torch.equal(model(x, times=times), x * times)
    assert len(model.report.signatures) == tried
    assert model.report.calls == {"graph": 0, "original": 5}
    late = [r for r in model.report.record.fallbacks if "of another kind than 3 that could not be captured" in r]
    assert len(late) == (tried < 6)
