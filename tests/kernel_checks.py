"""How kernels are judged: their error against fp64 beside that of the reference in the same precision."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from regraft.kernels.launch import INTERPRETED
from regraft.kernels.op import Kernel, Op
from regraft.kernels.table import PROVIDERS

DEVICES = ["cpu"] if INTERPRETED else [pytest.param("cuda", marks=pytest.mark.gpu)]
"""Where kernels run: on the CPU in Triton's interpreter (TRITON_INTERPRET=1), otherwise on a GPU."""

DTYPES = [torch.float32, torch.float16] if INTERPRETED else [torch.float32, torch.float16, torch.bfloat16]
"""The interpreter truncates to bfloat16 instead of rounding."""

on_devices = pytest.mark.parametrize("device", DEVICES)
in_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))

on_hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9, reason="needs a Hopper GPU"
)


def to_double(value: Any) -> Any:
    """The argument for the fp64 oracle: floating-point tensors widened, roundings switched off."""
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.double()
    return None if isinstance(value, torch.dtype) else value


def oracle(op: Op, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
    """The op's reference in fp64, on the same numbers, without any rounding."""
    doubled = {name: to_double(value) for name, value in kwargs.items()}
    return as_tuple(op.reference(*map(to_double, args), **doubled))


def as_tuple(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def assert_close(actual: Tensor, reference: Tensor, exact: Tensor, ulps: float = 4.0) -> None:
    """Error of `actual` at most twice the largest error of `reference`, plus a few ulp of each element."""
    assert actual.shape == reference.shape
    assert actual.dtype == reference.dtype
    exact = exact.double()
    ulp = torch.finfo(actual.dtype).eps * (exact.abs() + torch.finfo(actual.dtype).tiny)
    bound = 2 * (reference.double() - exact).abs().max() + ulps * ulp
    error = (actual.double() - exact).abs()
    worst = (error / bound).argmax()
    assert bool((error <= bound).all()), (
        f"error {error.flatten()[worst]:.3e} against a bound of {bound.flatten()[worst]:.3e}; "
        f"the reference's largest is {(reference.double() - exact).abs().max():.3e}"
    )


def check_kernel(op: Op, *args: Any, provider: str = "triton", ulps: float = 4.0, **kwargs: Any) -> None:
    """Runs the provider's kernel on these arguments and compares every output: numbers, dtype, strides.

    Outputs may be contiguous where the reference's have the strides of a permuted input.
    """
    kernel = next(k for k in PROVIDERS[op.name] if k.provider == provider)
    assert kernel.supports(op.signature(*args, **kwargs)) is None
    actual = as_tuple(kernel.run(*args, **kwargs))
    reference = as_tuple(op.reference(*args, **kwargs))
    for a, r, e in zip(actual, reference, oracle(op, *args, **kwargs), strict=True):
        assert_close(a, r, e, ulps)
        assert layout(a) == layout(r) or a.is_contiguous()


def check_same_bits(kernel: Kernel, *args: Any) -> None:
    """A kernel as good as its op's reference, with the same bits each time."""
    op = kernel.op
    assert kernel.supports(op.signature(*args)) is None
    actual, reference = kernel.run(*args), op.reference(*args)
    assert_close(actual, reference, as_tuple(oracle(op, *args))[0])
    assert layout(actual) == layout(reference)
    assert torch.equal(actual, kernel.run(*args))


def normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Random numbers on the GPU."""
    return torch.randn(shape, device="cuda").to(dtype)


def assert_same_in_graphs_beside_a_stream(function: Callable[[Tensor], Any], inputs: Sequence[Tensor]) -> None:
    """Two CUDA graphs and a stream without one, all at once, give what the function gives alone for three inputs.

    It returns a tensor or a tuple of them.
    """
    alone = [as_tuple(function(x)) for x in inputs]
    streams = [torch.cuda.Stream() for _ in inputs]
    graphs, results = [], []
    for x in inputs[:2]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results.append(as_tuple(function(x)))
        graphs.append(graph)
    torch.cuda.synchronize()
    for _ in range(5):
        for graph, stream in zip(graphs, streams[:2], strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
        with torch.cuda.stream(streams[2]):
            eager = as_tuple(function(inputs[2]))
        torch.cuda.synchronize()
        for found, expected in zip([*results, eager], alone, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def layout(tensor: Tensor) -> list[int]:
    """The strides that matter: those of dimensions with more than one element."""
    return [step for size, step in zip(tensor.shape, tensor.stride(), strict=True) if size > 1]


def refusal(op: Op, *args: Any, **kwargs: Any) -> str:
    """Why the Triton kernel refuses these arguments; fails where it does not."""
    kernel = next(k for k in PROVIDERS[op.name] if k.provider == "triton")
    reason = kernel.supports(op.signature(*args, **kwargs))
    assert reason is not None
    return reason


def differing_share(a: Tensor, b: Tensor) -> float:
    """The share of elements that are not the same bits."""
    return (a != b).double().mean().item()
