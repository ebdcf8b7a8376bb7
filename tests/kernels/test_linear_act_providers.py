"""Linear layers by PyTorch's product and on Hopper's matrix units: as good as PyTorch over odd sizes and epilogues."""

from __future__ import annotations

import pytest
import torch
from kernel_checks import as_tuple, assert_close, in_dtypes, layout, on_devices, on_hopper, oracle

from regraft.kernels import choice, linear_act_torch, linear_act_wgmma, tuning
from regraft.kernels.features import features_of
from regraft.kernels.linear_act import gate_up, linear_act
from regraft.kernels.op import Kernel, Op
from regraft.kernels.table import PROVIDERS
from regraft.kernels.tuning import Config

CUBLAS = {kernel.op.name: kernel for kernel in linear_act_torch.KERNELS}
WGMMA = {kernel.op.name: kernel for kernel in linear_act_wgmma.KERNELS}


def linear(rows: int, columns: int, depth: int, dtype: torch.dtype, device: str) -> tuple[torch.Tensor, ...]:
    x = torch.randn(rows, depth, device=device).to(dtype)
    weight = (torch.randn(columns, depth, device=device) / depth**0.5).to(dtype)
    return x, weight, torch.randn(columns, device=device).to(dtype)


def check(kernels: dict[str, Kernel], op: Op, *args: object) -> None:
    kernel = kernels[op.name]
    assert kernel.supports(op.signature(*args)) is None
    actual, reference = kernel.run(*args), op.reference(*args)
    assert_close(actual, reference, as_tuple(oracle(op, *args))[0])
    assert layout(actual) == layout(reference)


@on_devices
@in_dtypes
@pytest.mark.parametrize(("rows", "columns", "depth"), [(1, 77, 130), (5, 33, 64), (67, 70, 150)])
def test_pytorch_product(rows: int, columns: int, depth: int, dtype: torch.dtype, device: str) -> None:
    x, weight, bias = linear(rows, 2 * columns, depth, dtype, device)
    check(CUBLAS, linear_act, x, weight, bias, "gelu")
    check(CUBLAS, linear_act, x[None], weight[:columns], None, "identity")
    check(CUBLAS, gate_up, x, weight, bias, "silu")
    check(CUBLAS, gate_up, x, weight.t().contiguous().t(), None, "gelu_tanh")


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize(
    ("rows", "columns", "depth"),
    [(1, 8, 8), (130, 264, 72), (700, 1032, 520), (2100, 2560, 776), (300, 77, 64), (700, 1030, 520), (130, 20, 136)],
)
def test_wgmma(rows: int, columns: int, depth: int) -> None:
    x, weight, bias = linear(rows, 2 * columns, depth, torch.bfloat16, "cuda")
    for w in (weight, weight.t().contiguous().t()):
        check(WGMMA, linear_act, x, w, bias, "gelu")
        check(WGMMA, gate_up, x, w, None, "silu")
    check(WGMMA, linear_act, x, weight[:columns], None, "identity")
    check(WGMMA, gate_up, x.half(), weight.half(), bias.half(), "gelu_tanh")


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("helpers", [2, 4])
@pytest.mark.parametrize("width", [128, 256])
def test_each_wgmma_configuration(helpers: int, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    config = Config((("BLOCK_N", width), ("GROUP_M", 4), ("HELPERS", helpers)), 4, 3)
    monkeypatch.setattr(linear_act_wgmma, "choose", lambda *args: config)
    # several tiles a program, the last ones beyond the edges; then fewer tiles than programs
    for rows, columns, depth in ((4300, 3080, 264), (300, 520, 1032)):
        x, weight, bias = linear(rows, 2 * columns, depth, torch.bfloat16, "cuda")
        check(WGMMA, linear_act, x, weight, bias, "silu")
        check(WGMMA, gate_up, x, weight, bias, "silu")


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("columns", [1, 2, 3, 12, 50257, 30522])
def test_columns_that_8_does_not_divide(columns: int) -> None:
    """Labels and vocabularies: rows of the result begin anywhere."""
    for rows in (1, 9, 300):
        x, weight, bias = linear(rows, columns, 768, torch.bfloat16, "cuda")
        check(WGMMA, linear_act, x, weight, bias, "identity")
        check(WGMMA, linear_act, x, weight, None, "identity")
        check(WGMMA, linear_act, x, weight.t().contiguous().t(), bias, "relu")


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("kind", ["silu", "quick_gelu", "gelu", "gelu_new", "relu", "mish", "softcap:30.0"])
def test_activations_on_wgmma(kind: str) -> None:
    """Those that the kernel computes in its own way, and two of the others."""
    x, weight, bias = linear(200, 136, 64, torch.bfloat16, "cuda")
    check(WGMMA, linear_act, 2 * x, weight, bias, kind)
    unit = torch.eye(8, device="cuda", dtype=torch.bfloat16)
    large = torch.tensor([[3.0e38, 100.0, -100.0, 0.0, -3.0, 1e-30, -1e-30, -0.5]], device="cuda").bfloat16()
    check(WGMMA, linear_act, large, unit, None, kind)
    assert WGMMA["linear_act"].run(large * float("nan"), unit, None, kind).isnan().all()


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("kind", ["gelu", "gelu_tanh", "silu", "quick_gelu", "relu", "identity"])
def test_products_beyond_float16_stay_infinite(kind: str) -> None:
    """Activations by the helpers, which find the rounded product, and in the registers of the last tiles."""
    x = torch.full((4300, 64), 300.0, device="cuda", dtype=torch.float16)
    weight = torch.full((3080, 64), 4.0, device="cuda", dtype=torch.float16)
    assert WGMMA["linear_act"].run(x, weight, None, kind).isposinf().all()


@pytest.mark.gpu
@on_hopper
def test_views_on_wgmma() -> None:
    x, weight, bias = linear(150, 136, 64, torch.bfloat16, "cuda")
    check(WGMMA, linear_act, x.view(3, 50, 64).transpose(0, 1), weight, bias, "relu")
    wide = torch.randn(5, 30, 200, device="cuda").bfloat16()
    check(WGMMA, linear_act, wide[..., 8:72], weight, None, "silu")
    # what TMA cannot read is left to PyTorch's product
    check(WGMMA, linear_act, wide[..., 7:71], weight, None, "silu")
    check(WGMMA, gate_up, x, torch.cat((weight, weight))[::2], None, "silu")
    check(WGMMA, linear_act, x, weight, bias[:, None].expand(136, 2)[:, 0], "tanh")
    assert WGMMA["linear_act"].run(x[:0], weight, bias, "tanh").shape == (0, 136)


@pytest.mark.gpu
@on_hopper
def test_plans_repeat_the_launches() -> None:
    """A second call with other tensors of the same shapes goes by the plan that the first one left."""
    for kernels in (CUBLAS, WGMMA):
        for op in (linear_act, gate_up):
            bound = choice.bind(op, [kernels[op.name]])
            for _ in range(3):
                x, weight, bias = linear(300, 272, 136, torch.bfloat16, "cuda")
                expected = kernels[op.name].run(x, weight, bias, "silu")
                assert torch.equal(bound(x, weight, bias, "silu"), expected)


@pytest.mark.parametrize(("width", "helpers", "stages"), [(256, 8, 3), (64, 2, 3), (256, 2, 1)])
def test_configurations_that_the_kernel_has_not(
    width: int, helpers: int, stages: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = Config((("BLOCK_N", width), ("GROUP_M", 4), ("HELPERS", helpers)), 4, stages)
    monkeypatch.setattr(linear_act_wgmma, "choose", lambda *args: config)
    x, weight, _ = linear(16, 16, 16, torch.bfloat16, "cpu")
    with pytest.raises(LookupError, match="no configuration"):
        linear_act_wgmma.multiply(x, weight, None, torch.empty_like(x), "relu", False)


@on_devices
def test_wgmma_refuses(device: str) -> None:
    x, weight, bias = linear(9, 16, 24, torch.float32, device)
    refused = WGMMA["linear_act"].supports(linear_act.signature(x, weight, bias, "relu"))
    assert refused is not None
    assert "16 bits" in refused or "Hopper" in refused
    half = WGMMA["gate_up"].supports(gate_up.signature(x.half(), weight[:, :23].half(), None, "relu"))
    assert half is not None


def test_products_that_nobody_measured_are_the_vendors() -> None:
    """On a Hopper GPU without a table, a kernel with tiles of 128 rows would turn the heads of a single one."""
    firsts = {
        name: kernels[0].provider for name, kernels in PROVIDERS.items() if "cublas" in {k.provider for k in kernels}
    }
    assert firsts == dict.fromkeys(("linear_act", "gate_up", "qkv_rope"), "cublas")


@pytest.mark.parametrize(
    ("rows", "columns", "depth", "provider"),
    [
        (4096, 50257, 768, "wgmma"),  # cuBLAS is three to ten times slower where rows do not begin at 16 bytes
        (128, 30522, 1024, "wgmma"),
        (64, 50257, 768, "skinny"),
        (1, 2, 768, "skinny"),
        (1, 4096, 4096, "strip"),  # one row: all of a step's large products stream, or none
        (1, 4096, 14336, "stream"),
        (1, 128256, 4096, "strip"),
        (1, 2048, 2048, "skinny"),
        (8, 128256, 4096, "strip"),
        (8, 4096, 14336, "stream"),
        (16, 4096, 4096, "strip"),
        (16, 128256, 4096, "strip"),
        (16, 28672, 4096, "slab"),
        (16, 4096, 14336, "slab"),
        (16, 2560, 10240, "stream"),
        (32, 4096, 4096, "slab"),
        (16, 1024, 3072, "strip"),
        (16, 2048, 8192, "slab"),
        (32, 2048, 768, "strip"),
        (24, 128256, 2048, "skinny"),
        (33, 6144, 2048, "slab"),
        (64, 28672, 4096, "slab"),
        (64, 128256, 4096, "skinny"),  # more rows than all programs have in one slab
        (512, 77, 4096, "cublas"),  # too few tiles
        (4096, 768, 768, "cublas"),
    ],
)
def test_what_was_fastest_on_the_h200(rows: int, columns: int, depth: int, provider: str) -> None:
    x, weight = (torch.empty(*shape, dtype=torch.bfloat16) for shape in ((rows, depth), (columns, depth)))
    features = features_of("linear_act", (x, weight, None, "identity"))
    found = next(e.provider for e in tuning.providers("nvidia_h200")["linear_act"] if e.matches(features))
    assert found == provider


@pytest.mark.parametrize(
    ("rows", "columns", "depth", "head", "norm", "provider"),
    [
        (16, 6144, 4096, 128, False, "strip"),
        (32, 6144, 4096, 128, False, "slab"),  # its programs turn heads without a norm
        (32, 6144, 4096, 128, True, "stream"),
        (64, 6144, 4096, 128, True, "slab"),
        (4, 3072, 2048, 64, False, "slab"),
        (4, 4096, 2048, 128, True, "strip"),
        (8, 6144, 5120, 128, False, "stream"),
        (8, 7168, 5120, 128, False, "slab"),
        (8, 1536, 576, 64, False, "slab"),
        (8, 5120, 2560, 80, False, "strip"),  # few rows in a piece
        (24, 15360, 5120, 128, False, "slab"),
        (8, 4096, 1024, 128, True, "stream"),
        (16, 4096, 1024, 128, True, "slab"),
        (2048, 6144, 4096, 128, False, "wgmma"),
    ],
)
def test_which_heads_were_fastest_on_the_h200(
    rows: int, columns: int, depth: int, head: int, norm: bool, provider: str
) -> None:
    x, weight, table = (torch.empty(*shape).bfloat16() for shape in ((rows, depth), (columns, depth), (rows, head)))
    plain = (0.0, 0.0, None, "half", None)
    features = features_of("qkv_rope", (x, weight, None, table, table, None, None, 8, 4, head, norm, *plain))
    found = next(e.provider for e in tuning.providers("nvidia_h200")["qkv_rope"] if e.matches(features))
    assert found == provider


@pytest.mark.parametrize("file", ["default", "nvidia_h200"])
def test_every_size_has_a_configuration(file: str) -> None:
    memory = linear_act_wgmma.WgmmaMemory()
    for rows in (1, 65, 2048, 16384):
        for n in (64, 768, 28672):
            for k in (64, 1024, 14336):
                for gated, rope in ((0, 0), (1, 0), (0, 1)):
                    features = {"M": rows, "N": n, "K": k, "gated": gated, "rope": rope}
                    config = tuning.select_config("linear_wgmma", features, memory, file=file, limit=232448)
                    assert config is not None
                    assert not rope or config["BLOCK_N"] == 256  # whole heads of up to 256 columns
                for many in (1, 200, 1000):
                    features = {"M": rows, "N": n, "K": k, "gated": 1, "R": many}
                    assert tuning.select_config("moe_wgmma", features, memory, file=file, limit=232448) is not None
