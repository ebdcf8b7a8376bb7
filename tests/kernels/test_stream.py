"""Weights that stream through shared memory: as good as PyTorch over odd sizes, epilogues, streams and graphs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from kernel_checks import (
    as_tuple,
    assert_close,
    assert_same_in_graphs_beside_a_stream,
    check_same_bits,
    layout,
    on_hopper,
    oracle,
)

from regraft.kernels import choice, counters, qkv_rope_stream, stream_gluon
from regraft.kernels.linear_act import gate_up, linear_act
from regraft.kernels.op import Op, TensorSpec
from regraft.kernels.qkv_rope import qkv_rope

KERNELS = {kernel.op.name: kernel for kernel in stream_gluon.KERNELS}
QKV = qkv_rope_stream.KERNELS[0]


def check(op: Op, *args: object) -> None:
    check_same_bits(KERNELS[op.name], *args)


def linear(rows: int, columns: int, depth: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    x = torch.randn(rows, depth, device="cuda").to(dtype)
    weight = (torch.randn(columns, depth, device="cuda") / depth**0.5).to(dtype)
    return x, weight, torch.randn(columns, device="cuda").to(dtype)


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("rows", [1, 2, 7, 8, 9, 33, 64])
@pytest.mark.parametrize(("columns", "depth"), [(1, 8), (77, 136), (1000, 264), (4096, 1032), (300, 9000)])
def test_against_pytorch(rows: int, columns: int, depth: int) -> None:
    x, weight, bias = linear(rows, 2 * columns, depth, torch.bfloat16)
    check(linear_act, x, weight, bias, "gelu")
    check(linear_act, x, weight[:columns], None, "identity")
    check(gate_up, x, weight, bias, "silu")


@pytest.mark.gpu
@on_hopper
def test_views_and_fp16() -> None:
    for rows in (1, 30):
        x, weight, bias = linear(rows, 200, 72, torch.float16)
        wide = torch.randn(rows, 3, 152, device="cuda").half()
        check(linear_act, x.view(1, rows, 72), weight, bias[:, None].expand(200, 2)[:, 0], "relu")
        check(gate_up, x, weight[::2], None, "silu")
        check(gate_up, wide[:, 0, 8:80], weight, bias, "gelu_tanh")
        # left to the kernels beside it: rows that no 16 bytes divide, rows that overlap, a weight by columns
        check(linear_act, wide[:, 0, 7:79], weight, None, "silu")
        check(linear_act, x[:1].expand(rows, 72), weight, None, "silu")
        check(linear_act, x, weight.t().contiguous().t(), bias, "tanh")
    check(linear_act, x[0], weight, bias, "mish")
    x, weight, bias = linear(70, 200, 72, torch.float16)
    actual = KERNELS["linear_act"].run(x, weight, bias, "silu")
    assert_close(actual, linear_act.reference(x, weight, bias, "silu"), oracle(linear_act, x, weight, bias, "silu")[0])
    assert KERNELS["linear_act"].run(x[:0], weight, bias, "tanh").shape == (0, 200)


@pytest.mark.gpu
@on_hopper
def test_streams_and_graphs_have_counters_of_their_own() -> None:
    """Of dependent products."""
    run = choice.bind(linear_act, [KERNELS["linear_act"]])
    weights = [linear(8, 2048, 2048, torch.bfloat16)[1] for _ in range(4)]
    inputs = [linear(8, 8, 2048, torch.bfloat16)[0] for _ in range(3)]

    def chain(x: torch.Tensor) -> torch.Tensor:
        for weight in weights * 8:
            x = run(x, weight, None, "identity")
        return x

    assert_same_in_graphs_beside_a_stream(chain, inputs)


def turned(
    x: torch.Tensor,
    columns: int,
    head: int,
    *,
    heads: tuple[int, int] = (3, 1),
    bias: bool = False,
    norm: bool = False,
    rotary: int | None = None,
    kind: str = "half",
    tables: torch.dtype = torch.bfloat16,
) -> tuple[object, ...]:
    """Arguments of `qkv_rope`: q and k heads, then columns that are not turned."""
    _, weight, shift = linear(1, columns, x.shape[-1], x.dtype)
    angle = torch.rand(*x.shape[:-1], (rotary or head) // 2, device="cuda") * 6
    cos, sin = (torch.cat((t, t), -1).to(tables) for t in (angle.cos(), angle.sin()))
    gains = [torch.rand(head, device="cuda").to(x.dtype) if norm else None for _ in range(2)]
    rest = (*heads, head, norm, 1e-6, 1.0 if norm else 0.0, torch.float32 if norm else None, kind, None)
    return x, weight, shift if bias else None, cos, sin, *gains, *rest


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("rows", [1, 5, 8, 16, 27, 64])
@pytest.mark.parametrize(
    ("depth", "columns", "how"),
    [
        (1024, 32 * 128, {"heads": (16, 8), "norm": True}),
        (136, 4 * 128 + 40, {"bias": True}),
        (520, 6 * 128, {"norm": True, "bias": True, "tables": torch.float32}),
        (4096, 48 * 128, {"heads": (32, 8)}),
        (72, 150 * 128, {"heads": (140, 5)}),  # more heads than multiprocessors
        (264, 6 * 128, {"rotary": 32}),  # heads that the kernel behind the product turns
        (264, 6 * 128, {"kind": "interleaved"}),
    ],
)
def test_projection_of_heads(rows: int, depth: int, columns: int, how: dict[str, Any]) -> None:
    args = turned(torch.randn(rows, depth, device="cuda").bfloat16(), columns, 128, **how)
    assert QKV.supports(qkv_rope.signature(*args)) is None
    actual, reference = QKV.run(*args), qkv_rope.reference(*args)
    assert_close(actual, reference, as_tuple(oracle(qkv_rope, *args))[0])
    assert layout(actual) == layout(reference)
    assert torch.equal(actual, QKV.run(*args))  # parts are added in one order


@pytest.mark.gpu
@on_hopper
def test_projection_of_other_heads() -> None:
    x = torch.randn(3, 5, 136, device="cuda").half()
    for head in (64, 80, 128):
        given = list(turned(x, 6 * head, head, bias=True, tables=torch.float16))
        for lead in ((3, 5), (1, 5), (1, 1)):  # tables of each row, of each position, of one
            given[3:5] = [t[: lead[0], : lead[1]] for t in given[3:5]]
            assert_close(QKV.run(*given), qkv_rope.reference(*given), as_tuple(oracle(qkv_rope, *given))[0])
    assert QKV.run(x[:0], *given[1:]).shape == (0, 5, 6 * 128)
    given[2] = torch.randn(6 * 128, 2, device="cuda").half()[:, 1]
    assert_close(QKV.run(*given), qkv_rope.reference(*given), as_tuple(oracle(qkv_rope, *given))[0])


def test_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    def spec(*shape: int | None, dtype: torch.dtype = torch.bfloat16) -> TensorSpec:
        return TensorSpec(shape, dtype, torch.device("cuda"))

    monkeypatch.setattr("regraft.kernels.launch.compute_capability", lambda device: (9, 0))
    monkeypatch.setattr("regraft.kernels.linear_act_wgmma.compute_capability", lambda device: (9, 0))
    monkeypatch.setattr("regraft.kernels.launch.INTERPRETED", False)
    monkeypatch.setattr("regraft.kernels.linear_act_wgmma.INTERPRETED", False)

    def reason(x: TensorSpec, weight: TensorSpec, name: str = "linear_act") -> str | None:
        return KERNELS[name].supports({"x": x, "weight": weight, "bias": None, "kind": "silu"})

    assert reason(spec(8, 64), spec(32, 64)) is None
    assert reason(spec(1, None, 64), spec(32, 64)) is None  # more rows are left to other kernels
    assert "65 rows" in (reason(spec(5, 13, 64), spec(32, 64)) or "")
    assert "16 bits" in (reason(spec(8, 64, dtype=torch.float32), spec(32, 64, dtype=torch.float32)) or "")
    assert "16 bytes" in (reason(spec(8, 60), spec(32, 60)) or "")
    assert "odd" in (reason(spec(8, 64), spec(33, 64), "gate_up") or "")
    monkeypatch.setattr("regraft.kernels.linear_act_wgmma.compute_capability", lambda device: (8, 0))
    assert "Hopper" in (reason(spec(8, 64), spec(32, 64)) or "")


def zeros_on_host(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Counters lie on the host; returns what is kept for good."""
    kept: list[torch.Tensor] = []
    monkeypatch.setattr(counters, "_kept", kept)
    monkeypatch.setattr(counters, "_zeros", lambda count, device: torch.zeros(count, dtype=torch.int32))
    return kept


def test_counters_of_captured_launches_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = zeros_on_host(monkeypatch)
    pool = counters._Pool(torch.device("cpu"))
    pool.extend(64)
    pool.rest = pool.rest[:64]
    first, second = pool.take(5, True), pool.take(3, False)
    assert first.data_ptr() + 32 * 4 == second.data_ptr()  # a plan for aligned addresses serves both
    assert pool.take(1, True) is kept[-1] and len(kept) == 2  # none are left: memory of the graph
    pool.take(4, False)  # others instead; the first ones, whose addresses a graph has, stay
    assert first.data_ptr() in [t.data_ptr() for t in kept]


def test_counters_of_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has its own, which grow; there are always many for a capture, which cannot clear any beforehand."""
    kept = zeros_on_host(monkeypatch)
    monkeypatch.setattr(counters, "_pools", {})
    current, capturing, device = [1], [False], torch.device("cuda", 0)
    monkeypatch.setattr(
        torch.cuda, "current_stream", lambda device: SimpleNamespace(device_index=0, cuda_stream=current[0])
    )
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    first = counters.counters(7, device)
    assert counters.counters(5, device) is first
    current[0] = 2
    assert counters.counters(7, device).data_ptr() != first.data_ptr()
    for _ in range(4):  # graphs, each of what ran before, take more than were there at first
        capturing[0] = False
        counters.counters(7, device)
        capturing[0] = True
        taken = [counters.counters(counters.AHEAD // 4, device) for _ in range(4)]
        assert len({t.data_ptr() for t in taken}) == 4
    assert [len(t) for t in kept] == [counters.SIZE] * 2
    capturing[0] = False
    assert len(counters.counters(counters.SIZE + 1, device)) > counters.SIZE
    assert counters.counters(3, torch.device("cpu")).tolist() == [0, 0, 0]
