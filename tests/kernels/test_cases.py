"""The benchmark's cases: every op has some, and the peer computes what the op does."""

from __future__ import annotations

import pytest
import torch
from kernel_checks import as_tuple

from regraft.kernels import cases as module
from regraft.kernels.cases import Case, cases
from regraft.kernels.table import OPS, select

CASES = [case for of_op in cases().values() for case in of_op]


def test_every_op_has_cases() -> None:
    assert set(cases()) == set(OPS) - {"moe_experts"}


def identifier(case: Case) -> str:
    return f"{case.op.name}: {case.name}"


def test_names_are_unique() -> None:
    assert len({identifier(case) for case in CASES}) == len(CASES)


@pytest.mark.parametrize("case", CASES, ids=identifier)
def test_arguments_fit_the_op_and_have_a_cost(case: Case) -> None:
    arguments = case.arguments(torch.device("meta"))
    case.op.signature(**arguments)
    flops, moved = case.cost()
    assert flops > 0
    assert moved > max(t.numel() * t.element_size() for t in arguments.values() if isinstance(t, torch.Tensor))


@pytest.mark.parametrize("name", sorted(cases()))
def test_peer_computes_the_same(name: str) -> None:
    case = cases(torch.float32)[name][0]
    arguments = case.arguments(torch.device("meta"))
    small = {n: shrink(t) if isinstance(t, torch.Tensor) else t for n, t in arguments.items()}
    for a, b in zip(as_tuple(case.peer(**small)), as_tuple(case.op.reference(**small)), strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-4)


def shrink(tensor: torch.Tensor) -> torch.Tensor:
    """Random numbers of the same number of dimensions, sizes cut so that equal ones stay equal."""
    return torch.randn([size if size < 33 else 32 + size % 7 * 2 for size in tensor.shape]) * 0.5


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=identifier)
def test_kernel_takes_the_case(case: Case) -> None:
    """At full size: the kernel agrees with the peer to a few percent of the largest element, in bfloat16."""
    arguments = case.arguments(torch.device("cuda"))
    kernel, refused = select(case.op, case.op.signature(**arguments))
    assert kernel is not None, refused
    for a, b in zip(as_tuple(kernel.run(**arguments)), as_tuple(case.peer(**arguments)), strict=True):
        assert (a.float() - b.float()).abs().max() <= 0.03 * b.float().abs().max()


def test_windowed_peer_is_the_op() -> None:
    q, k, v = torch.randn(3, 1, 2, 9, 16).unbind(0)
    expected = module.attention.reference(q, k, v, scale=0.25, left=3, right=0)
    assert torch.allclose(module._sdpa(q, k, v, 0.25, 3, 0), expected, rtol=1e-4, atol=1e-5)
