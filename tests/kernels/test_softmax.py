"""Softmax: the definition in fp64, and the Triton kernels as good as PyTorch."""

from __future__ import annotations

import math

import pytest
import torch
from kernel_checks import assert_same_in_graphs_beside_a_stream, check_kernel, in_dtypes, on_devices, on_hopper, refusal

from regraft.kernels import choice, counters, softmax_ring, softmax_triton
from regraft.kernels.op import TensorSpec
from regraft.kernels.softmax import softmax
from regraft.kernels.table import PROVIDERS


def test_reference_is_the_definition() -> None:
    x = torch.randn(3, 7, dtype=torch.float64) * 5
    for row, out in zip(x.tolist(), softmax(x).tolist(), strict=True):
        total = math.fsum(math.exp(v) for v in row)
        assert out == pytest.approx([math.exp(v) / total for v in row], rel=1e-12)
    half = x.bfloat16()
    assert torch.equal(softmax(half, torch.float32, torch.float16), torch.softmax(half.float(), -1).half())


@on_devices
@in_dtypes
@pytest.mark.parametrize("shape", [(3, 5, 77), (4, 1), (9, 1024), (2, 2500), (130,), (0, 4)], ids=str)
def test_triton_softmax(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    x = (torch.randn(shape, device=device) * 4).to(dtype)
    if x.numel():
        check_kernel(softmax, x)
        check_kernel(softmax, x, torch.float32, dtype)
        check_kernel(softmax, x, torch.float32)
    else:
        assert PROVIDERS["softmax"][0].run(x).shape == shape


@on_devices
@in_dtypes
def test_rows_that_are_read_in_pieces(dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(softmax_triton, "WHOLE", 256)
    x = (torch.randn(2, 3, 1001, device=device) * 4).to(dtype)
    x[0, 0, :400] = -torch.inf  # lanes that see nothing finite in their first pieces
    x[1, 2, 777] = 30.0
    check_kernel(softmax, x, torch.float32, dtype)
    check_kernel(softmax, x.transpose(0, 1))


@on_devices
@in_dtypes
def test_triton_views(dtype: torch.dtype, device: str) -> None:
    x = torch.randn(2, 5, 3, 4, 24, device=device).to(dtype)
    check_kernel(softmax, x[:, :, 1].transpose(1, 2))
    check_kernel(softmax, x.permute(3, 0, 2, 1, 4)[:, :, :2])  # needs a copy
    check_kernel(softmax, torch.randn(24, 7, device=device).to(dtype).t())


@on_devices
@pytest.mark.parametrize("whole", [256, 16384])
def test_infinities_and_nan_are_as_in_pytorch(device: str, whole: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(softmax_triton, "WHOLE", whole)
    x = torch.randn(5, 600, device=device)
    x[0] = -torch.inf
    x[1, 17] = torch.inf
    x[2, 555] = torch.nan
    x[3, 1:] = -torch.inf
    found = PROVIDERS["softmax"][0].run(x)
    assert torch.allclose(found, softmax.reference(x), equal_nan=True)


@on_devices
def test_triton_refuses(device: str) -> None:
    x = torch.randn(2, 8, device=device)
    assert "float64" in refusal(softmax, x.double())
    assert "rounded" in refusal(softmax, x, torch.float16)
    assert "no dimensions" in refusal(softmax, x[0, 0])


RING = softmax_ring.KERNELS[0]


@pytest.mark.gpu
@on_hopper
@in_dtypes
@pytest.mark.parametrize("shape", [(1500, 16640), (1200, 6152), (3, 5, 50304), (67, 128256), (2, 260008)], ids=str)
def test_rows_that_stay_in_shared_memory(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """More rows than there are programs, and fewer; a row for one program, or shared by up to 64."""
    x = (torch.randn(shape, device="cuda") * 4).to(dtype)
    x[..., 0, : shape[-1] // 2] = -torch.inf  # pieces, and whole parts, with nothing finite
    x[..., 1, shape[-1] - 1] = 30.0
    assert how(x) is not None
    check_kernel(softmax, x, torch.float32, dtype, provider="ring")
    check_kernel(softmax, x * 0.5, provider="ring")  # what one launch leaves is nothing to the next
    assert not counters.counters(1, x.device).any()


def how(x: torch.Tensor) -> softmax_ring.Split | None:
    programs = softmax_ring.multiprocessors(x.device) * softmax_ring.RESIDENT
    return softmax_ring.split(math.prod(x.shape[:-1]), x.shape[-1] * x.element_size(), programs)


@pytest.mark.gpu
@on_hopper
def test_wide_rows_of_16_bits_and_a_result_of_32() -> None:
    x = (torch.randn(300, 50304, device="cuda") * 4).bfloat16()
    check_kernel(softmax, x, torch.float32, provider="ring")
    check_kernel(softmax, x.float(), None, torch.bfloat16, provider="ring")
    check_kernel(softmax, x.half(), torch.float32, torch.bfloat16, provider="ring")


@pytest.mark.gpu
@on_hopper
def test_views_of_wide_rows() -> None:
    x = (torch.randn(6, 4, 40000, device="cuda") * 4).bfloat16()
    check_kernel(softmax, x[:, 1, 8:33008], provider="ring")  # a step between rows
    check_kernel(softmax, x[0, 0], provider="ring")
    # left to the kernel beside it: two steps, rows that 16 bytes do not divide, narrow ones, overlapping ones
    for view in (x[::2, :3], x[..., 1:33001], x[..., :4], x[:1].expand(3, 4, 40000), x[0, :, ::2]):
        check_kernel(softmax, view, provider="ring")
    assert RING.run(x[:0]).shape == (0, 4, 40000)


@pytest.mark.gpu
@on_hopper
@in_dtypes
@pytest.mark.parametrize("width", [20000, 140000])
def test_infinities_and_nan_in_wide_rows(width: int, dtype: torch.dtype) -> None:
    x = torch.randn(6, width, device="cuda").to(dtype)
    x[0] = -torch.inf
    x[1, 17] = torch.inf
    x[2, 555] = torch.nan
    x[3, 1:] = -torch.inf
    x[4] = torch.finfo(dtype).min
    x[5, 100:200] = torch.finfo(dtype).max
    assert how(x) is not None
    for _ in range(2):
        assert torch.allclose(RING.run(x), softmax.reference(x), rtol=2**-7, equal_nan=True)
    assert not counters.counters(1, x.device).any()


@pytest.mark.gpu
@on_hopper
def test_wide_rows_in_graphs_beside_a_stream() -> None:
    """Programs that share a row meet on a board of their launch."""
    run = choice.bind(softmax, [RING])
    inputs = [torch.randn(rows, 128256, device="cuda").bfloat16() for rows in (200, 3, 90)]
    assert_same_in_graphs_beside_a_stream(lambda x: tuple(run(x) for _ in range(3)), inputs)
    assert not counters.counters(1, inputs[0].device).any()  # what it found, it left


@pytest.mark.parametrize("rows", [1, 7, 1024, 100000])
@pytest.mark.parametrize("size", [12304, 32784, 65536, 2 * 50304, 2 * 128256, 2 * 151936, 4 * 262144])
def test_split(rows: int, size: int) -> None:
    """The parts make up the row, none is empty, and a part and the pieces ahead have room in the ring."""
    found = softmax_ring.split(rows, size, 1056)
    assert found is not None
    assert found.parts * found.size >= size > (found.parts - 1) * found.size
    assert found.pieces * softmax_ring.PIECE >= found.size > (found.pieces - 1) * softmax_ring.PIECE
    assert (
        1 <= found.ahead < found.pieces <= softmax_ring.SLOTS - found.ahead and found.parts <= softmax_ring.MOST_PARTS
    )
    assert 1 <= found.groups <= rows and found.groups * found.parts <= 1056


def test_ring_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("launch", "softmax_ring"):
        monkeypatch.setattr(f"regraft.kernels.{module}.INTERPRETED", False)
        monkeypatch.setattr(f"regraft.kernels.{module}.compute_capability", lambda device: (9, 0))

    def reason(dtype: torch.dtype, mid: torch.dtype | None = None) -> str | None:
        x = TensorSpec((None, 128256), dtype, torch.device("cuda"))
        return RING.supports({"x": x, "compute_dtype": mid, "out_dtype": None})

    assert reason(torch.bfloat16) is None
    assert "float64" in (reason(torch.float64) or "")
    assert reason(torch.float32) is None and reason(torch.bfloat16, torch.float32) is None
    monkeypatch.setattr("regraft.kernels.softmax_ring.compute_capability", lambda device: (8, 0))
    assert "Hopper" in (reason(torch.bfloat16) or "")
