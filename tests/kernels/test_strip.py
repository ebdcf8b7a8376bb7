"""Strips of a weight multiplied by up to 32 rows: as good as PyTorch over sizes, epilogues and rotations."""

from __future__ import annotations

import pytest
import torch
from kernel_checks import assert_same_in_graphs_beside_a_stream, check_same_bits, normal, on_hopper

from regraft.kernels import choice, qkv_rope_strip, strip_gluon
from regraft.kernels.linear_act import gate_up, linear_act
from regraft.kernels.op import Op, TensorSpec
from regraft.kernels.qkv_rope import qkv_rope

KERNELS = {kernel.op.name: kernel for kernel in (*strip_gluon.KERNELS, *qkv_rope_strip.KERNELS)}

HEADS = [(64, 2048), (128, 4096), (80, 320), (48, 1024), (128, 3584)]
"""Columns of a head, and of x."""


def check(op: Op, *args: object) -> None:
    check_same_bits(KERNELS[op.name], *args)


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("rows", [1, 2, 7, 8, 9, 16])
@pytest.mark.parametrize(
    ("columns", "depth"),
    [
        (1, 64),  # less than a strip
        (77, 192),
        (1000, 512),
        (26000, 64),  # four strips in a stage, more than stages
        (8 * 132 * 3 + 3, 960),  # two strips in a stage, and programs with three of them
        (14000, 576),
        (5000, 1024),
        (2120, 1024),
        (4100, 1536),
        (100, 2048),  # two strips in a stage, and half of the programs
        (1500, 2048),  # as many stages as a program has strips
        (6400, 2048),  # more strips than stages
        (3000, 2304),  # columns behind the last
        (6400, 3584),
        (9000, 4096),
        (700, 2560),  # a strip for each program
        (1500, 3520),  # pieces, of which the second has fewer columns
        (500, 3648),
    ],
)
def test_against_pytorch(rows: int, columns: int, depth: int) -> None:
    x, weight, bias = normal(rows, depth), normal(2 * columns, depth) / depth**0.5, normal(2 * columns)
    check(linear_act, x, weight, bias, "gelu")
    check(linear_act, x, weight[:columns], None, "identity")
    check(gate_up, x, weight, bias, "silu")
    check(gate_up, x, weight, None, "gelu_tanh")


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("rows", [17, 24, 32])
@pytest.mark.parametrize(
    ("columns", "depth"),
    [
        (1, 64),
        (77, 192),
        (1000, 512),  # no more strips than programs: four in a stage
        (26000, 64),
        (1200, 960),  # one in a stage, so that all programs have some
        (14000, 576),
        (5000, 1024),
        (4100, 1536),
        (9000, 1536),  # three groups of columns, x through the ring
        (100, 2048),
        (1500, 1984),  # columns behind the last
        (20000, 2048),  # x through the ring
    ],
)
def test_more_rows_against_pytorch(rows: int, columns: int, depth: int) -> None:
    x, weight, bias = normal(rows, depth), normal(2 * columns, depth) / depth**0.5, normal(2 * columns)
    check(linear_act, x, weight, bias, "gelu")
    check(linear_act, x, weight[:columns], None, "identity")
    check(gate_up, x, weight, bias, "silu")


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("rows", [1, 6, 16, 31])
def test_views_and_fp16(rows: int) -> None:
    half = torch.float16
    x, weight, bias = normal(rows, 320, dtype=half), normal(200, 320, dtype=half) / 18, normal(200, dtype=half)
    wide = normal(rows, 3, 648, dtype=half)
    check(linear_act, x.view(1, rows, 320), weight, bias[:, None].expand(200, 2)[:, 0], "relu")
    check(gate_up, x, weight[::2], None, "silu")
    check(gate_up, wide[:, 0, 8:328], weight, bias, "gelu_tanh")
    # left to the kernels beside it: rows that no 16 bytes divide, rows that overlap, a weight by columns
    check(linear_act, wide[:, 0, 7:327], weight, None, "silu")
    check(linear_act, x[:1].expand(rows, 320), weight, None, "silu")
    check(linear_act, x, weight.t().contiguous().t(), bias, "tanh")
    check(linear_act, x[0], weight, bias, "mish")
    assert KERNELS["linear_act"].run(x[:0], weight, bias, "tanh").shape == (0, 200)


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize(
    ("rows", "head", "depth"),
    [
        *((rows, *head) for rows in [(1, 1), (2, 3), (16, 1)] for head in HEADS),
        ((3, 7), 64, 2048),
        ((32, 1), 128, 1024),
        ((5, 4), 80, 320),
    ],
)
def test_heads_are_rotated(rows: tuple[int, int], head: int, depth: int) -> None:
    x, weight, bias = normal(*rows, depth), normal(19 * head, depth) / depth**0.5, normal(19 * head)
    angle = torch.rand(*rows, head // 2, device="cuda") * 6
    cos, sin = (torch.cat((t, t), -1).bfloat16() for t in (angle.cos(), angle.sin()))
    gain = normal(head)
    plain = (False, 0.0, 0.0, None, "half", None)
    check(qkv_rope, x, weight, None, cos, sin, None, None, 11, 3, head, *plain)
    check(qkv_rope, x, weight, bias, cos[:1], sin[:1], None, None, 11, 3, head, *plain)
    check(qkv_rope, x, weight, bias, cos[:1, :1].float(), sin[:1, :1].float(), None, None, 16, 2, head, *plain)
    # turned behind the product
    check(qkv_rope, x, weight, None, cos, sin, gain, gain, 11, 3, head, True, 1e-6, 0.0, torch.bfloat16, "half", None)
    check(qkv_rope, x, weight, bias, cos, sin, None, None, 11, 3, head, False, 0.0, 0.0, None, "interleaved", None)
    check(qkv_rope, x, weight[: 18 * head + 8], None, cos, sin, None, None, 11, 3, head, *plain)


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("size", [2048, 4096])  # all of a program's weights in the ring, x through its last stages
def test_weights_are_read_before_the_wait_in_graphs_beside_a_stream(size: int) -> None:
    """Of dependent products."""
    run = choice.bind(linear_act, [KERNELS["linear_act"]])
    weights = [normal(size, size) / size**0.5 for _ in range(4)]
    inputs = [normal(8, size) for _ in range(3)]

    def chain(x: torch.Tensor) -> torch.Tensor:
        for weight in weights * 8:
            x = run(x, weight, None, "identity")
        return x

    assert_same_in_graphs_beside_a_stream(chain, inputs)


@pytest.mark.parametrize("groups", range(1, 9))
def test_what_is_copied_covers_the_columns(groups: int) -> None:
    size = strip_gluon._copied(groups)
    copies = -(-groups // size)
    assert groups <= copies * size <= 1.2 * groups
    strip = copies * size * strip_gluon.GROUP * strip_gluon.STRIP * 2
    assert strip <= strip_gluon.STAGE
    assert strip_gluon.RING // strip >= 3  # stages


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("rows", [1, 7, 16, 17])
def test_plans_have_room_for_weights_beside_x(rows: int, parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strip_gluon, "multiprocessors", lambda device: 132)
    for depth in (64, 960, 1024, 1536, 2048) + ((2560, 3520, 4096) if rows <= 16 else ()):
        for strips in (1, 40, 66, 133, 200, 400, 1000, 4000):
            x, weight = (torch.empty(n, depth, dtype=torch.bfloat16) for n in (rows, 8))
            (programs,), (copied, _), plan = strip_gluon._plan(x, weight, strips, parts, 4)
            assert 1 <= programs <= min(132, strips)
            assert rows <= 16 or programs >= min(0.9 * 132, strips / 4)
            assert plan["EIGHTS"] * 8 >= rows
            without_x = plan["STAGES"] - (plan["PIECES"] if plan["COPY_X"] else 0)
            assert without_x >= 1
            assert plan["LATE"] <= without_x
            copies = -(-plan["GROUPS"] * strip_gluon.WARPS // copied.block_shape[0]) // plan["PIECES"]
            inside = parts if plan["EACH"] > 1 else 1
            stage = 2 * copies * inside * copied.block_shape[0] * copied.block_shape[1] * 64
            assert plan["STAGES"] * stage <= strip_gluon.RING
            columns = copies * plan["PIECES"] * copied.block_shape[0] * 64
            assert columns >= depth
            assert stage * plan["PIECES"] == 16 * columns * plan["EACH"]


def test_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    def spec(*shape: int | None, dtype: torch.dtype = torch.bfloat16) -> TensorSpec:
        return TensorSpec(shape, dtype, torch.device("cuda"))

    for module in ("launch", "linear_act_wgmma"):
        monkeypatch.setattr(f"regraft.kernels.{module}.compute_capability", lambda device: (9, 0))
        monkeypatch.setattr(f"regraft.kernels.{module}.INTERPRETED", False)

    def reason(x: TensorSpec, weight: TensorSpec, name: str = "linear_act") -> str | None:
        return KERNELS[name].supports({"x": x, "weight": weight, "bias": None, "kind": "silu"})

    assert reason(spec(16, 4096), spec(32, 4096)) is None
    assert reason(spec(1, None, 64), spec(32, 64)) is None  # more rows are left to other kernels
    assert reason(spec(32, 2048), spec(32, 2048)) is None
    assert "33 rows" in (reason(spec(33, 64), spec(32, 64)) or "")
    assert "64 does not divide" in (reason(spec(8, 96), spec(32, 96)) or "")
    assert "takes 4096 columns" in (reason(spec(8, 4160), spec(32, 4160)) or "")
    assert "takes 2048 columns" in (reason(spec(17, 2112), spec(32, 2112)) or "")
    assert "16 bits" in (reason(spec(8, 64, dtype=torch.float32), spec(32, 64, dtype=torch.float32)) or "")
    assert "odd" in (reason(spec(8, 64), spec(33, 64), "gate_up") or "")
    monkeypatch.setattr("regraft.kernels.linear_act_wgmma.compute_capability", lambda device: (8, 0))
    assert "Hopper" in (reason(spec(8, 64), spec(32, 64)) or "")
