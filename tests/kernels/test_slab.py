"""Slabs of a weight multiplied by up to 64 rows: as good as PyTorch over sizes and epilogues."""

from __future__ import annotations

import pytest
import torch
from kernel_checks import assert_same_in_graphs_beside_a_stream, check_same_bits, normal, on_hopper

from regraft.kernels import choice, qkv_rope_slab, slab_gluon, stream_gluon
from regraft.kernels.linear_act import gate_up, linear_act
from regraft.kernels.op import Op, TensorSpec
from regraft.kernels.qkv_rope import qkv_rope

KERNELS = {kernel.op.name: kernel for kernel in (*slab_gluon.KERNELS, *qkv_rope_slab.KERNELS)}


def check(op: Op, *args: object) -> None:
    check_same_bits(KERNELS[op.name], *args)


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("rows", [1, 8, 9, 16, 17, 31, 32, 33, 47, 64])
@pytest.mark.parametrize(
    ("columns", "depth"),
    [
        (8, 64),  # less than a slab
        (40, 72),  # one step, columns behind the last
        (1000, 520),
        (2048, 5120),  # two programs share the columns
        (2056, 5128),
        (4096, 4096),
        (6144, 6144),  # pieces of 64 and 32 rows
        (4608, 3584),  # 64 and 16; gated 32 and 8, and the last slab ends in the first piece
        (10240, 2560),  # 64 and 16
        (13000, 264),  # 128; gated 64, 32 and 8
        (14784, 520),  # 112, which would be three; gated 64, 32 and 16
        (16888, 136),  # 128; gated as many as there may be
        (28672, 1024),  # 128, 64 and 32
        (28680, 1024),  # of the last slab nothing but the first rows
        (4616, 3592),  # the same in clusters
        (536, 4104),
        (4232, 14336),  # many columns for each of two
        (31000, 64),  # 240 rows, which would be four pieces
        (33792, 192),  # as many as there may be
        (40000, 64),  # more: left to the kernel beside it
    ],
)
def test_against_pytorch(rows: int, columns: int, depth: int) -> None:
    x, weight, bias = normal(rows, depth), normal(2 * columns, depth) / depth**0.5, normal(2 * columns)
    check(linear_act, x, weight[:columns], bias[:columns], "gelu")
    check(linear_act, x, weight[:columns], None, "identity")
    check(gate_up, x, weight, bias, "silu")
    check(gate_up, x, weight, None, "gelu_tanh")


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("rows", [3, 24, 33, 64])
def test_views_and_fp16(rows: int) -> None:
    half = torch.float16
    x, weight, bias = normal(rows, 320, dtype=half), normal(208, 320, dtype=half) / 18, normal(208, dtype=half)
    wide = normal(rows, 3, 648, dtype=half)
    check(linear_act, x.view(1, rows, 320), weight, bias.repeat_interleave(2)[::2], "relu")
    check(gate_up, x, weight[::2][:96], None, "silu")
    deep = normal(1600, 4104, dtype=half) / 64
    check(linear_act, normal(rows, 4104, dtype=half), deep[::2], bias[:1].expand(800), "silu")  # in clusters
    check(gate_up, wide[:, 0, 8:328], weight, bias, "gelu_tanh")
    check(linear_act, torch.full_like(x, 60000.0), weight.abs(), None, "identity")  # infinite, as PyTorch's
    # left to the kernels beside it: rows that no 16 bytes divide, results whose rows no 16 bytes divide
    check(linear_act, wide[:, 0, 7:327], weight, None, "silu")
    check(linear_act, x[:1].expand(rows, 320), weight, None, "silu")
    check(linear_act, x, weight.t().contiguous().t(), bias, "tanh")
    check(linear_act, x, weight[:77], bias[:77], "tanh")
    check(gate_up, x, weight[:200], None, "silu")
    check(linear_act, x[0], weight, bias, "mish")
    assert KERNELS["linear_act"].run(x[:0], weight, bias, "tanh").shape == (0, 208)


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("rows", [(1, 3), (2, 9), (1, 33), (4, 16)])
@pytest.mark.parametrize(
    ("heads", "head", "depth"),
    [
        (5, 16, 72),  # one piece of 8 rows of each half, columns behind the last
        (19, 80, 320),  # the same, five to a head
        (19, 64, 2048),
        (48, 64, 2048),  # 16 rows
        (48, 128, 1536),  # 32
        (37, 128, 520),  # the last multiprocessors have none
        (125, 128, 512),  # 64
        (97, 96, 264),  # three of 16
        (96, 128, 256),
        (37, 112, 128),  # two of 8; the last slab has one
        (59, 96, 128),  # three of 16, of which it has two
        (400, 40, 64),  # half a head has 20 rows: behind the product
        (300, 128, 64),  # more than the kernel takes: the same
    ],
)
def test_heads(rows: tuple[int, int], heads: int, head: int, depth: int) -> None:
    """Rotated in the product, or with a norm behind it."""
    x, weight, bias = normal(*rows, depth), normal(heads * head, depth) / depth**0.5, normal(heads * head)
    angle = torch.rand(*rows, head // 2, device="cuda") * 6
    cos, sin = (torch.cat((t, t), -1) for t in (angle.cos(), angle.sin()))
    q, k = heads // 2, heads // 4
    gain, plain = normal(head), (False, 0.0, 0.0, None, "half", None)
    low = cos.bfloat16(), sin.bfloat16()
    check(qkv_rope, x, weight, bias, low[0][:1], low[1][:1], None, None, q, k, head, *plain)
    check(qkv_rope, x, weight, None, cos, sin, None, None, q, heads - q, head, *plain)
    check(qkv_rope, x, weight, None, *low, gain, gain, q, k, head, True, 1e-6, 0.0, torch.bfloat16, "half", None)


@pytest.mark.gpu
@on_hopper
def test_views_of_heads_and_fp16() -> None:
    half = torch.float16
    x, weight, bias = normal(2, 7, 648, dtype=half), normal(20 * 64, 320, dtype=half) / 18, normal(10 * 64, dtype=half)
    angle = torch.rand(1, 7, 32, device="cuda") * 6
    cos, sin = (torch.cat((t, t), -1).to(half) for t in (angle.cos(), angle.sin()))
    wide = torch.cat((cos, sin), -1)
    plain = (False, 0.0, 0.0, None, "half", None)
    for given in ((x[..., 8:328], weight[::2]), (x[..., :320].transpose(0, 1), weight[: 10 * 64])):
        check(qkv_rope, *given, bias[:1].expand(640), cos[:, :1], sin[:, :1], None, None, 6, 2, 64, *plain)
    check(qkv_rope, x[..., :320], weight[::2], bias, wide[..., :64], wide[..., 64:], None, None, 6, 2, 64, *plain)
    # behind the product: pairs side by side, half of a head, tables whose columns are apart
    one = x[..., :320].contiguous()
    check(qkv_rope, one, weight, None, cos, sin, None, None, 6, 2, 64, *plain[:4], "interleaved", None)
    check(qkv_rope, one, weight, None, cos, sin, None, None, 6, 2, 128, *plain)
    apart = (t.repeat_interleave(2, -1)[..., ::2] for t in (cos, sin))
    check(qkv_rope, one, weight, None, *apart, None, None, 6, 2, 64, *plain)


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize(("rows", "size"), [(64, 1024), (33, 2048), (20, 5120)])
def test_weights_are_read_before_the_wait_in_graphs_beside_a_stream(rows: int, size: int) -> None:
    """Of dependent products, in clusters and not."""
    run = choice.bind(linear_act, [KERNELS["linear_act"]])
    weights = [normal(size, size) / size**0.5 for _ in range(4)]
    inputs = [normal(rows, size) for _ in range(3)]

    def chain(x: torch.Tensor) -> torch.Tensor:
        for weight in weights * 8:
            x = run(x, weight, None, "identity")
        return x

    assert_same_in_graphs_beside_a_stream(chain, inputs)


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("programs", [1, 7, 78, 132])
def test_slabs_cover_the_weight(programs: int, parts: int) -> None:
    for n in (8, 120, 1000, 4096, 4104, 6144, 10240, 18944, 28672, 33792, 128256):
        for depth in (64, 1024, 4096, 14336):
            plan = slab_gluon._plan(n, depth, parts, programs)
            if plan is None:
                assert parts * n > slab_gluon.MOST * programs * 0.9
                continue
            (grid,) = plan.grid(n)
            assert grid <= programs
            assert grid // plan.split * plan.rows >= n
            assert sum(slab_gluon._sizes(plan.rows)) == plan.rows
            assert len(slab_gluon._sizes(plan.rows)) <= slab_gluon.PIECES
            for rows in (1, 8, 9, 16, 17, 32, 33, 64):
                x_desc, steps, options = plan.options(torch.empty(rows, depth, dtype=torch.bfloat16))
                boxes, box, _ = x_desc.block_shape
                assert box * boxes >= rows
                assert boxes == 1 or rows >= box  # the second box holds rows of x alone
                assert box * boxes <= 64
                assert 1 <= options["EARLY"] < options["STAGES"]
                ring = options["STAGES"] * 2 * plan.columns * (64 + parts * plan.rows)
                assert ring <= stream_gluon.RING
                assert steps * plan.split * plan.columns >= depth
                assert 64 * 4 * parts * plan.rows <= ring  # what is left for the other program


@pytest.mark.parametrize("programs", [132, 78, 1])
@pytest.mark.parametrize("half", [8, 24, 32, 40, 48, 56, 64, 128])
def test_slabs_cover_heads(programs: int, half: int) -> None:
    """Each row of the first halves once, in pieces within a head."""
    for heads in (1, 3, 12, 36, 37, 48, 80, 125, 200):
        plan = slab_gluon._plan_heads(heads * 2 * half, half, programs)
        if plan is None:
            assert heads * half > programs * 16  # at least two pieces of 8 rows for each
            continue
        (grid,) = plan.grid(heads * half)
        assert grid <= programs
        assert grid * plan.rows >= heads * half
        assert len(set(plan.pieces)) == 1
        assert half % plan.pieces[0] == 0
        assert len(plan.pieces) <= slab_gluon.PIECES
        _, _, options = plan.options(torch.empty(64, 1024, dtype=torch.bfloat16))
        assert 1 <= options["EARLY"] < options["STAGES"]
        assert options["STAGES"] * 2 * plan.columns * (64 + 2 * plan.rows) <= stream_gluon.RING


def test_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    def spec(*shape: int | None, dtype: torch.dtype = torch.bfloat16) -> TensorSpec:
        return TensorSpec(shape, dtype, torch.device("cuda"))

    for module in ("launch", "linear_act_wgmma"):
        monkeypatch.setattr(f"regraft.kernels.{module}.compute_capability", lambda device: (9, 0))
        monkeypatch.setattr(f"regraft.kernels.{module}.INTERPRETED", False)

    def reason(x: TensorSpec, weight: TensorSpec, name: str = "linear_act") -> str | None:
        return KERNELS[name].supports({"x": x, "weight": weight, "bias": None, "kind": "silu"})

    assert reason(spec(64, 4096), spec(32, 4096)) is None
    assert reason(spec(1, None, 64), spec(32, 64)) is None  # more rows are left to other kernels
    assert "65 rows" in (reason(spec(65, 64), spec(32, 64)) or "")
    assert "16 bits" in (reason(spec(8, 64, dtype=torch.float32), spec(32, 64, dtype=torch.float32)) or "")
    assert "odd" in (reason(spec(8, 64), spec(33, 64), "gate_up") or "")
    monkeypatch.setattr("regraft.kernels.linear_act_wgmma.compute_capability", lambda device: (8, 0))
    assert "Hopper" in (reason(spec(8, 64), spec(32, 64)) or "")
