"""Linear layers with few rows: the kernels for them as good as PyTorch over odd sizes and every epilogue."""

from __future__ import annotations

import pytest
import torch
from kernel_checks import as_tuple, assert_close, in_dtypes, layout, on_devices, oracle

from regraft.kernels import skinny_triton, tuning
from regraft.kernels.activation import ACTIVATIONS
from regraft.kernels.linear_act import gate_up, linear_act
from regraft.kernels.op import Op

SIZES = [(1, 1, 8), (1, 77, 136), (2, 33, 264), (5, 70, 1096), (9, 19, 64), (16, 130, 328), (33, 20, 520), (64, 66, 72)]
"""Rows, columns, depth: 16 bytes divide the rows of the matrices."""

KERNELS = {kernel.op.name: kernel for kernel in skinny_triton.KERNELS}


def check(op: Op, *args: object) -> None:
    kernel = KERNELS[op.name]
    assert kernel.supports(op.signature(*args)) is None
    actual, reference = kernel.run(*args), op.reference(*args)
    assert_close(actual, reference, as_tuple(oracle(op, *args))[0])
    assert layout(actual) == layout(reference)


def linear(rows: int, columns: int, depth: int, dtype: torch.dtype, device: str) -> tuple[torch.Tensor, ...]:
    x = torch.randn(rows, depth, device=device).to(dtype)
    weight = (torch.randn(columns, depth, device=device) / depth**0.5).to(dtype)
    return x, weight, torch.randn(columns, device=device).to(dtype)


@on_devices
@in_dtypes
@pytest.mark.parametrize(("rows", "columns", "depth"), SIZES)
def test_against_pytorch(rows: int, columns: int, depth: int, dtype: torch.dtype, device: str) -> None:
    x, weight, bias = linear(rows, 2 * columns, depth, dtype, device)
    check(linear_act, x, weight, bias, "gelu")
    check(linear_act, x, weight[:columns], None, "identity")
    check(gate_up, x, weight, bias, "silu")
    check(gate_up, x, weight, None, "gelu_tanh")


@on_devices
@pytest.mark.parametrize("rows", [1, 3])
def test_every_activation(rows: int, device: str) -> None:
    x, weight, bias = linear(rows, 24, 64, torch.float16, device)
    for kind in ACTIVATIONS:
        check(linear_act, x, weight, bias, kind)


@on_devices
@in_dtypes
def test_views(dtype: torch.dtype, device: str) -> None:
    for rows in (1, 30):
        x, weight, bias = linear(rows, 36, 24, dtype, device)
        check(linear_act, x, weight.t().contiguous().t(), bias, "gelu_new")  # as Conv1D stores it
        check(gate_up, x, weight[::2], None, "silu")
        check(linear_act, x.view(1, rows, 24), weight, bias[:, None].expand(36, 2)[:, 0], "relu")
        wide = torch.randn(rows, 3, 50, device=device).to(dtype)
        check(linear_act, wide[:, 0, 8:32], weight, None, "silu")
        check(linear_act, wide[:, 0, 7:31], weight, None, "silu")
    check(linear_act, x[0], weight, bias, "tanh")
    assert KERNELS["linear_act"].run(x[:0], weight, bias, "tanh").shape == (0, 36)


@on_devices
@pytest.mark.parametrize("split", [1, 2, 4])
@pytest.mark.parametrize("parts", [1, 2, 4])
def test_shared_depth(split: int, parts: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs and warps that share the depth add their parts in one order: the result has the same bits each time."""
    blocks = (("BLOCK_N", 16), ("BLOCK_K", 64), ("PARTS", parts), ("SPLIT_K", split))
    config = tuning.Config(blocks, 4, 3)
    monkeypatch.setattr(skinny_triton, "choose", lambda *_: config)
    for depth in (16, 64, 200, 520):
        x, weight, bias = linear(5, 46, depth, torch.float16, device)
        check(linear_act, x, weight, bias, "gelu")
        check(gate_up, x, weight, bias, "silu")
        first = KERNELS["gate_up"].run(x, weight, bias, "silu")
        assert torch.equal(first, KERNELS["gate_up"].run(x, weight, bias, "silu"))


@on_devices
def test_more_rows_than_made_for(device: str) -> None:
    """Sizes may be unknown when kernels are selected, so any number of rows is computed."""
    x, weight, bias = linear(70, 40, 64, torch.float16, device)
    actual = KERNELS["linear_act"].run(x, weight, bias, "silu")
    assert_close(actual, linear_act.reference(x, weight, bias, "silu"), oracle(linear_act, x, weight, bias, "silu")[0])


@on_devices
def test_refuses(device: str) -> None:
    x, weight, bias = linear(3, 5, 8, torch.float32, device)
    supports = KERNELS["linear_act"].supports

    def reason(*args: object) -> str:
        return supports(linear_act.signature(*args)) or ""

    assert "65 rows" in reason(x[0].expand(5, 13, 8), weight, bias, "relu")
    assert "dtypes differ" in reason(x, weight.half(), bias, "relu")
    assert "not a linear layer" in reason(x[:, :4], weight, bias, "relu")
    assert "not one number" in reason(x, weight, bias[:1], "relu")
    assert "relu9" in reason(x, weight, bias, "relu9")
    assert "odd" in (KERNELS["gate_up"].supports(gate_up.signature(x, weight, bias, "relu")) or "")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 2, 8, 16, 32, 64])
def test_each_configuration_on_the_gpu(rows: int, dtype: torch.dtype) -> None:
    for columns, depth in [(768, 768), (4096, 1032), (2050, 8200), (6144, 2048), (14336, 1024)]:
        x, weight, bias = linear(rows, columns, depth, dtype, "cuda")
        check(linear_act, x, weight, bias, "gelu_tanh")
        check(gate_up, x, weight, bias, "silu")
