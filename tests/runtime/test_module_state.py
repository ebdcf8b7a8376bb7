"""Forwards that keep something in their modules: no graph serves those whose next call reads it, and looking at a model
changes nothing of it."""

from __future__ import annotations

import copy
import inspect
import warnings
from typing import Any

import pytest
import torch
from torch import nn

import regraft
from regraft.runtime.errors import RegraftWarning


class Streaming(nn.Module):
    """Adds what it gave before, kept in a plain attribute."""

    def __init__(self, state: torch.Tensor | None = None) -> None:
        super().__init__()
        self.linear, self.state = nn.Linear(4, 4), state

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.tanh(self.linear(x)) + (0 if self.state is None else self.state)
        self.state = y
        return y


class InPlace(nn.Module):
    """The same in a buffer that it writes to."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.state = nn.Linear(4, 4), nn.Buffer(torch.zeros(3, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.state.copy_(torch.tanh(self.linear(x)) + self.state)
        return self.state + 0


class Counting(nn.Module):
    """Counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.calls = nn.Linear(4, 4), 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return torch.tanh(self.linear(x)) / self.calls


class Begins(Streaming):
    """Begins anew in each call, and leaves what the next could go on from."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.state = torch.tanh(self.linear(x))
        return self.state * 2


class Tables(nn.Module):
    """Makes a table when it is first needed, keeps it by length, and notes how long it is."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.longest, self.tables = nn.Linear(4, 4), 0, dict[int, torch.Tensor]()
        self.register_buffer("table", None, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.table is None:
            self.table, self.longest = torch.arange(4.0), 4
            self.tables[4] = self.table
        return torch.tanh(self.linear(x)) * self.table


class Narrows(nn.Module):
    """Chooses for good where its input is short, as Swin does with its windows and BigBird with its attention."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.window, self.kind = nn.Linear(4, 4), 8, "sparse"
        self.inner: nn.Module = nn.GELU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[1] <= self.window:
            self.window, self.kind, self.inner = 1, "full", nn.SiLU()
        y: torch.Tensor = self.inner(self.linear(x)) * self.window
        return y if self.kind == "sparse" else y - 1


def three_calls(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", RegraftWarning)
        return [model(x) for _ in range(3)]


@pytest.mark.parametrize(
    ("make", "kept"),
    [
        (Streaming, "state"),
        (lambda: Streaming(torch.ones(3, 4)), "state"),
        (lambda: nn.Sequential(nn.GELU(), Streaming()), "1.state"),
        (InPlace, "state"),
        (Counting, "calls"),
        (Begins, "state"),
    ],
)
def test_a_state_is_no_graph(make: Any, kept: str) -> None:
    torch.manual_seed(0)
    plain, x = make().eval(), torch.randn(3, 4)
    expected = three_calls(copy.deepcopy(plain), x)
    name = next(iter(inspect.signature(plain.forward).parameters))
    model = regraft.optimize(plain, example_inputs={name: x}, verbose=False)
    (entry,) = model.report.signatures
    assert f"its forward keeps {kept} for its next call, which no graph does" in entry.reason
    found = three_calls(model, x)
    assert all(map(torch.equal, found, expected)), "looking at the model moved its state on"


def test_tables_are_none() -> None:
    torch.manual_seed(0)
    plain, x = Tables().eval(), torch.randn(3, 4)
    expected = three_calls(copy.deepcopy(plain), x)
    model = regraft.optimize(plain, example_inputs={"x": x}, verbose=False)
    assert model.report.signatures[0].served
    for a, b in zip(three_calls(model, x), expected, strict=True):
        assert (a - b).abs().max() <= 4 * torch.finfo(torch.float32).eps * b.abs().max()
    assert model.report.calls == {"graph": 3, "original": 0}


def test_what_an_example_chose_is_not_chosen_for_later_calls() -> None:
    torch.manual_seed(0)
    plain, short, long = Narrows().eval(), torch.randn(2, 5, 4), torch.randn(2, 30, 4)
    expected = [copy.deepcopy(plain)(x) for x in (long, short)]
    model = regraft.optimize(copy.deepcopy(plain), example_inputs={"x": short}, verbose=False)
    inner = model.inner
    assert model.report.signatures[0].served
    for x, wanted in zip((long, short, long), [*expected, expected[0]], strict=True):
        torch.testing.assert_close(model(x), wanted.detach())
        assert (model.window, model.kind, model.inner) == (8, "sparse", inner)
    assert model.report.calls == {"graph": 3, "original": 0}
    restored = regraft.restore(model)
    torch.testing.assert_close(restored(long), expected[0])
