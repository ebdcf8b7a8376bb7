"""The cost of nodes in closed form, against counts done by hand and PyTorch's own FLOP counter."""

from __future__ import annotations

import dataclasses

import pytest
import sympy
import torch
from torch import fx, nn
from torch._subclasses import FakeTensorMode
from torch.export import Dim
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from regraft.compiler.cost import graph_cost, node_cost, node_us, over_layers, roofline, subgraph_us, total
from regraft.compiler.device import DEVICES, H200, Device, cpu_device, device_for, device_named, device_of_properties
from regraft.compiler.shapes import evaluate, hints_of
from regraft.kernels.cost import Cost


def graph_of(model: nn.Module, *args: torch.Tensor, dynamic: dict | None = None) -> fx.Graph:
    shapes = (dynamic,) + (None,) * (len(args) - 1) if dynamic else None
    return torch.export.export(model, args, dynamic_shapes=shapes, strict=False).run_decompositions({}).graph


def nodes_named(graph: fx.Graph, name: str) -> list[fx.Node]:
    return [n for n in graph.nodes if n.op == "call_function" and getattr(n.target, "_opname", "") == name]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(24, 40)
        self.conv = nn.Conv1d(24, 12, 3, groups=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.up(x)
        return self.conv(x.transpose(1, 2)).sum() + F.relu(h).sum()


def test_linear_in_closed_form_over_dynamic_sizes() -> None:
    graph = graph_of(Block(), torch.randn(3, 7, 24), dynamic={0: Dim("b", min=1), 1: Dim("s", min=4)})
    (linear,) = nodes_named(graph, "linear")
    cost = node_cost(linear)
    (b, s) = sorted(hints_of(graph), key=lambda symbol: hints_of(graph)[symbol])
    assert sympy.expand(cost.flops - (2 * b * s * 24 * 40 + b * s * 40)) == 0
    assert sympy.expand(cost.bytes - 4 * (b * s * 24 + 24 * 40 + 40 + b * s * 40)) == 0


def test_matrix_flops_agree_with_pytorch_flop_counter() -> None:
    class Products(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 6, 3, stride=2, groups=2, bias=False)
            self.back = nn.ConvTranspose1d(4, 6, 3, bias=False)
            self.linear = nn.Linear(16, 10, bias=False)

        def forward(self, x: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, ...]:
            attended = F.scaled_dot_product_attention(q, k, k)
            return self.conv(x), self.back(x[:, :, 0]), self.linear(q), torch.matmul(q, k.transpose(-1, -2)), attended

    model = Products()
    args = (torch.randn(2, 4, 9, 11), torch.randn(2, 3, 5, 16), torch.randn(2, 3, 13, 16))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(*args)
    graph = graph_of(model, *args)
    matrix = ("conv2d", "convolution", "conv_transpose1d", "linear", "matmul")
    counted = total(node_cost(n) for name in matrix for n in nodes_named(graph, name))
    assert evaluate(counted.flops, {}) == counter.get_total_flops()
    (sdpa,) = nodes_named(graph, "scaled_dot_product_attention")  # PyTorch's counter leaves out its CPU kernel
    assert node_cost(sdpa).flops == 2 * 3 * 5 * 13 * (2 * 16 + 2 * 16)
    assert node_cost(sdpa).bytes == 4 * 2 * 3 * 16 * (5 + 13 + 13 + 5)


def test_views_are_free_and_copies_are_not() -> None:
    class Views(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            turned = x.transpose(1, 2)
            halves = turned.split(2, dim=1)
            return halves[0].reshape(-1) + halves[1].to(torch.bfloat16).clone().reshape(-1)

    graph = graph_of(Views(), torch.randn(2, 3, 4))
    for name in ("transpose", "split", "split_with_sizes", "view", "unbind"):
        for node in nodes_named(graph, name):
            assert node_cost(node) == Cost(sympy.S.Zero, sympy.S.Zero), name
    casts = [n for n in graph.nodes if getattr(n.target, "_opname", "") in ("_to_copy", "to")]
    assert [node_cost(n).bytes for n in casts if n.meta["val"].dtype == torch.bfloat16] == [12 * (4 + 2)]


def test_broadcast_operands_are_read_once() -> None:
    class Broadcast(nn.Module):
        def forward(self, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
            return x * w.expand(10, 6)

    graph = graph_of(Broadcast(), torch.randn(10, 6), torch.randn(1, 6))
    (mul,) = nodes_named(graph, "mul")
    assert node_cost(mul).bytes == 4 * (60 + 6 + 60)


def test_embedding_reads_rows_not_the_table() -> None:
    graph = graph_of(nn.Embedding(50_000, 16), torch.randint(0, 9, (2, 3)))
    (lookup,) = nodes_named(graph, "embedding")
    assert node_cost(lookup).bytes == 2 * 6 * 16 * 4 + 6 * 8


def test_own_ops_use_their_own_cost() -> None:
    from regraft.kernels.rms_norm import rms_norm

    class Norm(nn.Module):
        def forward(self, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
            return torch.ops.regraft.rms_norm(x, w, 1e-6)

    args = (torch.randn(5, 32), torch.randn(32))
    graph = graph_of(Norm(), *args)
    (norm,) = nodes_named(graph, "rms_norm")
    assert node_cost(norm) == rms_norm.cost(*args, 1e-6)
    assert node_cost(norm).bytes == 4 * (160 + 32 + 160)


def test_roofline_is_the_larger_of_traffic_and_arithmetic() -> None:
    device = dataclasses.replace(H200, launch_us=1.5)
    moved = Cost(sympy.Integer(1), sympy.Integer(4_300_000))
    computed = Cost(sympy.Integer(790_000_000), sympy.Integer(1))
    assert roofline(moved, device, torch.bfloat16) == pytest.approx(1.0 + 1.5)
    assert roofline(computed, device, torch.bfloat16) == pytest.approx(1.0 + 1.5)
    assert roofline(computed, device, torch.float32) > 10
    assert roofline(Cost(), device, torch.bfloat16) == 0.0


def test_graph_totals_group_and_add_up() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x = layer(x)
            return x

    graph = graph_of(Twice(), torch.randn(4, 8))
    cost = graph_cost(graph, H200, {})
    by_op = {share.name: share.count for share in cost.by_op}
    assert by_op == {"aten.linear": 3, "aten.relu": 3}
    assert [(share.name, share.count) for share in cost.by_module] == [("layers.*.*", 6)]
    assert cost.us == pytest.approx(sum(s.us for s in cost.by_op)) == pytest.approx(sum(s.us for s in cost.by_module))
    assert cost.us == pytest.approx(subgraph_us(graph.nodes, H200, {}))
    one = nodes_named(graph, "linear")[0]
    assert node_us(one, H200, {}) * 3 == pytest.approx(next(s.us for s in cost.by_op if s.name == "aten.linear"))


def test_over_layers() -> None:
    assert over_layers("model.layers.31.mlp.experts.7.up") == "model.layers.*.mlp.experts.*.up"


def test_devices() -> None:
    assert device_named("NVIDIA H200") is H200 and device_named("no such card") is None
    assert len({d.name for d in DEVICES}) == len(DEVICES)
    assert H200.flops_of(torch.bfloat16) == 790e12 and H200.bytes_per_s == 4.3e12
    assert H200.flops_of(torch.int64) == H200.flops_of(torch.float32)
    assert device_for("cpu") == cpu_device(torch.get_num_threads())
    with pytest.raises(ValueError, match="xpu"):
        device_for("xpu")
    with pytest.raises(ValueError, match="positive"):
        Device("nothing", {torch.float32: 1.0}, 0.0, 1.0, 0, 0, "measured")


def test_an_unknown_gpu_from_its_properties_is_near_its_datasheet() -> None:
    made = device_of_properties("A100", (8, 0), 108, 1.41e9, 2.04e12, 163 << 10, 40 << 20)
    listed = device_named("NVIDIA A100-SXM4-80GB")
    assert listed is not None
    assert made.flops_of(torch.bfloat16) == pytest.approx(listed.flops_of(torch.bfloat16), rel=0.1)
    assert made.bytes_per_s == pytest.approx(listed.bytes_per_s, rel=0.1)


def test_sizes_that_the_graph_computes() -> None:
    """Whether a reshape copies cannot be said of strides that nobody knows: it is taken to."""
    environment = ShapeEnv()
    with FakeTensorMode(shape_env=environment):
        size = environment.create_unbacked_symint()
        x, flat = torch.empty_strided((8, size), (2 * size, 2)), torch.empty(8 * size)
    graph = fx.Graph()
    given = graph.placeholder("x")
    node = graph.call_function(torch.ops.aten.reshape.default, (given, [-1]))
    given.meta, node.meta = {"val": x}, {"val": flat}
    assert evaluate(node_cost(node).bytes, {size.node.expr: 5}, 1) == 2 * 8 * 5 * 4
