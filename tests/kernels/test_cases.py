"""The benchmark's cases: every op has some, the peers compute what the op does, and the parts are parts of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernel_checks import as_tuple

from regraft.kernels import cases_attention, cases_paged, cases_varlen, tuning
from regraft.kernels.attention import attention
from regraft.kernels.case import Case, some_rows
from regraft.kernels.cases import cases
from regraft.kernels.cases_moe import _grouped, _some_tokens, _transformers
from regraft.kernels.features import features_of
from regraft.kernels.moe import moe_experts
from regraft.kernels.paged_attention import paged_attention
from regraft.kernels.table import OPS, PROVIDERS
from regraft.kernels.varlen_attention import varlen_attention

ATTENTION = {"attention", "varlen_attention", "paged_attention"}
CASES = [case for of_op in cases().values() for case in of_op]


def test_every_op_has_cases() -> None:
    assert set(cases()) == set(OPS)


def identifier(case: Case) -> str:
    return f"{case.op.name}: {case.name}"


def test_names_are_unique() -> None:
    assert len({identifier(case) for case in CASES}) == len(CASES)


def test_arguments_fit_their_ops_and_have_a_cost() -> None:
    for case in CASES:
        arguments = case.arguments(torch.device("meta"))
        case.op.signature(**arguments)
        flops, moved = case.cost()
        whole = [t for t in arguments.values() if isinstance(t, torch.Tensor) and 0 not in t.stride()]
        smallest = max(t.nbytes for t in whole) if case.op.name != "moe_experts" else 0
        assert flops > 0 and moved > smallest and case.peers, identifier(case)
        for small, _ in case.parts(arguments):
            case.op.signature(**small)


@pytest.mark.parametrize("name", sorted(set(cases()) - ATTENTION - {"moe_experts", "qkv_rope", "norm_qkv_rope"}))
def test_peers_compute_the_same(name: str) -> None:
    case = cases(torch.float32)[name][0]
    arguments = case.arguments(torch.device("meta"))
    small = {n: shrink(t) if isinstance(t, torch.Tensor) else t for n, t in arguments.items()}
    expected = as_tuple(case.op.reference(**small))
    for peer in case.peers.values():
        for a, b in zip(as_tuple(peer(small)()), expected, strict=True):
            assert torch.allclose(a, b, rtol=1e-4, atol=1e-4)
    for part, pick in case.parts(small):
        for a, b in zip(as_tuple(case.op.reference(**part)), expected, strict=True):
            assert torch.allclose(a.reshape(pick(b).shape), pick(b), rtol=1e-4, atol=1e-4)


def shrink(tensor: torch.Tensor) -> torch.Tensor:
    """Random numbers of the same number of dimensions, sizes cut so that equal ones stay equal."""
    return torch.randn([size if size < 33 else 32 + size % 7 * 2 for size in tensor.shape]) * 0.5


def test_rows_come_from_beginning_middle_and_end() -> None:
    x = torch.arange(400.0)[:, None].expand(-1, 3)
    parts = some_rows("x")({"x": x})
    assert [part["x"][0, 0].item() for part, _ in parts] == [0, 184, 368]
    assert all(torch.equal(pick(x), part["x"]) for part, pick in parts)


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"causal": False},
        {"window": 7},
        {"softcap": 3.0},
        {"sinks": True},
        {"alibi": True},
        {"queries": 1},
    ],
    ids=str,
)
def test_attention_peers_and_parts(more: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cases_attention, "compiled", lambda function: function)
    cases_attention._flex_of.cache_clear()
    sizes = {"batch": 2, "heads": 4, "kv_heads": 2, "queries": 40, "keys": 40, "width": 16}
    shape = cases_attention._Shape(**{**sizes, **more})
    arguments = cases_attention._arguments(shape, torch.float32, torch.device("cpu"))
    expected = attention.reference(**arguments)
    if shape.softcap:
        scores = arguments["q"] @ arguments["k"].repeat_interleave(2, 1).mT * arguments["scale"]
        assert 0.2 < (scores.abs() > shape.softcap).float().mean() < 0.5, "the cap is reached"
    if shape.plain:
        peer = cases_attention._sdpa(shape, cases_attention.SDPBackend.MATH)
        assert torch.allclose(peer(arguments)(), expected, rtol=1e-4, atol=1e-5)
    if shape.queries > 1 and shape.causal:
        assert torch.allclose(cases_attention._flex(shape, arguments)(), expected, rtol=1e-4, atol=1e-5)
    parts = cases_attention._parts(arguments)
    assert len(parts) == (2 if shape.queries == 1 else 6)
    for part, pick in parts:
        assert torch.allclose(attention.reference(**part), pick(expected), rtol=1e-4, atol=1e-5)


def test_packed_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cases_attention, "compiled", lambda function: function)
    cases_varlen._flex_of.cache_clear()
    size = (3, 9, 4, 2, 16)
    arguments = cases_varlen._arguments(size, torch.float32, torch.device("cpu"))
    expected = varlen_attention.reference(**arguments)
    for peer in cases_varlen._PEERS.values():
        assert torch.allclose(peer(size, arguments)(), expected, rtol=1e-4, atol=1e-5)
    for part, pick in cases_varlen._parts(size, arguments):
        assert torch.allclose(varlen_attention.reference(**part), pick(expected), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("queries", [1, 20])
def test_pages(queries: int) -> None:
    size = (3, queries, 48, 4, 2, 16)
    arguments = cases_paged._arguments(size, torch.float32, torch.device("cpu"))
    expected = paged_attention.reference(**arguments)
    for peer in (cases_paged._contiguous, cases_paged._gathered):
        assert torch.allclose(peer(size, arguments)(), expected, rtol=1e-4, atol=1e-5)
    for part, pick in cases_paged._parts(size, arguments):
        assert torch.allclose(paged_attention.reference(**part), pick(expected), rtol=1e-4, atol=1e-5)


def test_experts_peer_and_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    def grouped_mm(x: torch.Tensor, w: torch.Tensor, offs: torch.Tensor) -> torch.Tensor:
        begins = [0, *offs.tolist()[:-1]]
        return torch.cat([x[i:j] @ w[e] for e, (i, j) in enumerate(zip(begins, offs.tolist(), strict=True))])

    monkeypatch.setattr(torch, "_grouped_mm", grouped_mm)
    scores, index = torch.rand(50, 6).topk(2, dim=-1)
    arguments = {"hidden": torch.randn(50, 8), "top_k_index": index, "top_k_weights": scores, "kind": "silu"}
    arguments |= {"up": torch.randn(6, 20, 8), "down": torch.randn(6, 8, 10)}
    expected = moe_experts.reference(**arguments)
    assert torch.allclose(_grouped(**arguments), expected, rtol=1e-4, atol=1e-4)
    for implementation in ("eager", "batched_mm"):
        assert torch.allclose(_transformers(implementation, arguments)(), expected, rtol=1e-4, atol=1e-4)
    for part, pick in _some_tokens(arguments):
        assert torch.allclose(moe_experts.reference(**part), pick(expected), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("file", [path.stem for path in tuning.DIRECTORY.glob("*.json")])
def test_choices_name_features_and_providers_that_exist(file: str) -> None:
    for op, entries in tuning.providers(file).items():
        arguments = cases()[op][0].arguments(torch.device("meta"))
        features = features_of(op, [arguments.get(a.name, a.default_value) for a in OPS[op].overload._schema.arguments])
        for entry in entries:
            entry.matches(dict.fromkeys(features, 0))
            assert {name for name, _, _ in entry.where} <= features.keys(), entry
            assert entry.provider in {kernel.provider for kernel in PROVIDERS[op]}, entry
