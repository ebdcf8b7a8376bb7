"""Norms and the products behind them: one kernel for one row, their own for more, and the same numbers."""

from __future__ import annotations

import copy
import operator
from types import MappingProxyType
from typing import Any

import pytest
import torch
from flat_models import tiny
from kernel_checks import assert_close
from runtime_models import tiny_llama
from torch import fx, nn

import regraft
from regraft.compiler.cost import called_op
from regraft.kernels.linear_act import linear_act
from regraft.kernels.norm_products import JOINT
from regraft.kernels.op import Kernel
from regraft.kernels.rms_norm import add_rms_norm
from regraft.kernels.table import PROVIDERS
from regraft.kernels.tuning import Provided
from regraft.passes import pairs


def joint(monkeypatch: pytest.MonkeyPatch, error: float = 0.0, most: int = 1 << 20) -> list[tuple[str, int]]:
    """Joint kernels, said to pay up to `most` rows of the weight; they note their op and their rows, and err."""
    seen: list[tuple[str, int]] = []

    def kernel_of(op: Any) -> Kernel:
        def run(x: torch.Tensor, *rest: Any) -> Any:
            seen.append((op.name, x.numel() // x.shape[-1]))
            product, total = op.reference(x, *rest)
            return product + error, total

        return Kernel(op, "here", run, lambda signature: None)

    kernels = {op.name: (kernel_of(op),) for op in JOINT.values()}
    monkeypatch.setattr(pairs, "PROVIDERS", MappingProxyType(kernels))
    entries = {op.name: (Provided((("N", 0, most), ("M", 1, 1)), "here"),) for op in JOINT.values()}
    monkeypatch.setattr(pairs.tuning, "providers", lambda file: entries)
    return seen


def labels(model: Any) -> dict[str, int]:
    return {group.label: group.count for group in model.report.rewrites if group.rule == "lower"}


def test_one_row_takes_the_joint_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = joint(monkeypatch)
    ids = torch.arange(12).view(1, 12) % 7
    plain = tiny_llama(3)
    want = [plain(i).logits for i in (ids, ids[:, :1])]
    exact = [plain.double()(i).logits for i in (ids, ids[:, :1])]
    model = regraft.optimize(tiny_llama(3), verbose=False, on_error="raise")
    found = labels(model)
    assert found["norm_gate_up -> here (one row)"] == 3
    assert found["norm_qkv_rope -> here (one row)"] == 2  # the first norm has no sum in front
    assert len(seen) == 2  # one check of each signature
    assert_close(model(ids).logits, want[0], exact[0])
    assert all(rows > 1 for _, rows in seen)
    model(ids)
    checked = len(seen)
    model(ids)
    assert len(seen) == checked
    assert_close(model(ids[:, :1]).logits, want[1], exact[1])
    assert [rows for _, rows in seen[checked:]] == [1] * 5


def test_decoding_one_sequence_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = tiny("qwen3", layers=2), torch.tensor([[3, 1, 4, 1, 5]])
    want = model.generate(ids, max_new_tokens=6, do_sample=False)
    seen = joint(monkeypatch)
    model = regraft.optimize(model, verbose=False, on_error="raise")
    checked = len(seen)
    assert torch.equal(model.generate(ids, max_new_tokens=6, do_sample=False), want)
    assert sum(rows == 1 for _, rows in seen[checked:]) >= 3 * 5


def test_only_where_it_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = joint(monkeypatch, most=200)
    model = regraft.optimize(tiny_llama(2), verbose=False, on_error="raise")
    assert [label for label in labels(model) if "one row" in label] == ["norm_qkv_rope -> here (one row)"]
    assert {name for name, _ in seen} == {"norm_qkv_rope"}


def test_a_lowered_pair_is_still_known_as_its_op() -> None:
    """What a graph means one precision up is asked of the ops' references."""
    for op in JOINT.values():
        for kernel in PROVIDERS[op.name]:
            assert called_op(pairs.by_rows(kernel, lambda *_: None, lambda *_: None)) is op


def test_a_joint_kernel_that_errs_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = joint(monkeypatch, error=0.5)
    model = regraft.optimize(tiny_llama(2), verbose=False, on_error="raise")
    assert not any("one row" in label for label in labels(model))
    assert len(seen) == 2
    assert any("here kernel" in reverted.reason for done in model.report.passes for reverted in done.reverted)


def test_what_should_be_found_is_found_in_a_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    """The counts of norms, rotations and projections are those of the same model without pairs."""
    for make in (tiny_llama, lambda layers: tiny("qwen3", layers=layers)):
        apart = regraft.optimize(make(2), verbose=False, on_error="raise").report.to_dict()["expected"]
        with monkeypatch.context() as patched:
            joint(patched)
            kernels = {op.name: (Kernel(op, "here", op.reference, lambda _: None),) for op in JOINT.values()}
            patched.setattr(pairs, "PROVIDERS", MappingProxyType(kernels))
            model = regraft.optimize(make(2), verbose=False, on_error="raise")
        assert any("one row" in label for label in labels(model))
        assert model.report.to_dict()["expected"] == apart


class Norm(nn.Module):
    """As models write it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width) + 0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


class Gated(nn.Module):
    """Two gated products with a norm in between, on the rows that a mask picks or on all."""

    def __init__(self, picked: bool) -> None:
        super().__init__()
        self.picked, self.norm = picked, Norm(16)
        self.gate, self.up, self.down = nn.Linear(16, 24), nn.Linear(16, 24), nn.Linear(24, 16)

    def mlp(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.down(nn.functional.silu(self.gate(x)) * self.up(x))
        return found

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        x = x[mask] if self.picked else x * mask[..., None]
        x = x + self.mlp(x)
        return x + self.mlp(self.norm(x))


@pytest.mark.parametrize("picked", [False, True])
def test_rows_that_depend_on_data_decide_nothing(picked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls are repeated by the shapes of the arguments alone (`choice.following`), and so are the kernels they run."""
    joint(monkeypatch)
    x, mask = torch.randn(2, 5, 16), torch.tensor([[True, False, True, False, False], [True, True, False, True, False]])
    model = Gated(picked).eval()
    want, exact = model(x, mask), copy.deepcopy(model).double()(x.double(), mask)
    model = regraft.optimize(model, verbose=False, on_error="raise")
    assert_close(model(x, mask), want, exact)
    assert any("one row" in label for label in labels(model)) is not picked


def test_a_sum_that_the_product_reads_itself_keeps_the_nodes_apart() -> None:
    graph = fx.Graph()
    x, residual, weight = (graph.placeholder(name) for name in ("x", "residual", "weight"))
    norm = graph.call_function(add_rms_norm.overload, (x, residual, None, 1e-6))
    normed, total = (graph.call_function(operator.getitem, (norm, i)) for i in (0, 1))
    normed.meta["val"] = torch.empty(4, 8)
    for bias, found in ((None, norm), (total, None), (normed, None)):
        product = graph.call_function(linear_act.overload, (normed, weight, bias, "silu"))
        order = {node: index for index, node in enumerate(graph.nodes)}
        assert pairs._norm_in_front(product, order) is found
        graph.erase_node(product)


@pytest.mark.parametrize("error", [0.0, 0.5])
def test_a_large_sum_hides_no_error_of_the_product(error: float, monkeypatch: pytest.MonkeyPatch) -> None:
    joint(monkeypatch, error=error)
    model = regraft.optimize(Gated(False).eval(), verbose=False, on_error="raise")
    model(torch.randn(2, 5, 16) * 1e7, torch.ones(2, 5, dtype=torch.bool))
    assert any("one row" in label for label in labels(model)) is (error == 0.0)
