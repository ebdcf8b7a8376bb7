"""Masks become windows and slopes, tokens' rows are selected early, and a step costs no more calls than a forward."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as tf
from flat_models import builder_of, flat_of, tiny
from torch import Tensor, fx, nn

from regraft.compiler.capture import capture
from regraft.compiler.program import InputKind
from regraft.kernels.op import TensorSpec
from regraft.kernels.paged_attention import paged_attention
from regraft.passes.pipeline import Settings, compile_program
from regraft.runtime.build import Unserved
from regraft.runtime.decoding.flat import make


def calls(graph: fx.Graph) -> int:
    return sum(n.op == "call_function" for n in graph.nodes)


@pytest.mark.parametrize("window", [3, 64, 700, 5000])
def test_windows_of_any_length(window: int) -> None:
    """5000 is beyond what is sampled."""
    flat = flat_of(tiny("mistral", sliding_window=window))
    assert flat.groups == (window - 1,)


@pytest.mark.parametrize("size", [6, 8192])
def test_chunks_are_named(size: int) -> None:
    """Whether they are sampled, or found with a smaller number in the place of a large one."""
    found = make(builder_of(tiny("llama4_text", attention_chunk_size=size)))
    assert isinstance(found, Unserved)
    assert "no causal window (chunked)" in found.reason


def test_slopes_are_those_of_the_paper() -> None:
    """Press et al.: head h of a power of two H has slope 2^(-8 (h + 1) / H)."""
    flat = flat_of(tiny("bloom", n_head=8))
    (slopes,) = [i.value for i in flat.program.inputs if i.target.startswith("slopes.")]
    torch.testing.assert_close(slopes, 2.0 ** -torch.arange(1.0, 9.0))


def test_rotations_that_change_beyond_a_length_serve_up_to_it() -> None:
    scaled: dict[str, Any] = {"max_position_embeddings": 96}
    flat = flat_of(tiny("llama_dynamic", **scaled))
    assert flat.program.longest is not None
    assert flat.max_positions == 96
    assert "how long other sequences are" in flat.program.longest[1]


def test_a_step_costs_no_more_calls_than_a_forward() -> None:
    """Views of q, k and v cost as many calls as the forward's own, and masks none: host time is counted by calls."""
    counts = {}
    for layers in (1, 3):
        model = tiny("llama", layers)
        builder = builder_of(model)
        flat = make(builder)
        assert not isinstance(flat, Unserved)
        tokens = torch.arange(3, 12).view(1, 9)
        program = capture(model, {"input_ids": tokens}, {}, cache=False)
        settings = Settings(torch.device("cpu"), verify="off", weights=builder.weights.value, model=model)
        forward = compile_program(program, settings).program
        counts[layers] = calls(flat.program.graph), calls(forward.graph)
    a_layer = [(counts[3][i] - counts[1][i]) / 2 for i in (0, 1)]
    assert a_layer[0] <= a_layer[1]
    assert counts[1][0] <= counts[1][1] + 4
    nothing_left = {"arange", "cumsum", "le", "gt", "__and__"}
    assert not [n for n in flat.program.graph.nodes if getattr(n.target, "_opname", "") in nothing_left]


def test_the_kernel_takes_what_is_known_before_a_call() -> None:
    """Numbers of tokens, sequences and pages, and the size of a page, are open."""
    flat = flat_of(tiny("gemma2"))
    assert {n.target for n in flat.program.graph.nodes} >= {paged_attention.reference}
    node = next(n for n in flat.program.graph.nodes if n.target is paged_attention.reference)
    args = fx.map_arg(node.args, lambda n: n.meta["val"])
    signature = paged_attention.signature(*args)
    assert [s.shape[0] for s in signature.values() if isinstance(s, TensorSpec)] == [None] * 9
    assert signature["k_pages"].shape[1] is None
    refuse_sizes = pytest.importorskip("regraft.kernels.paged_attention_triton")._refuse_sizes
    assert refuse_sizes(signature) is None


class Plain(nn.Module):
    """A causal model that knows nothing of transformers' arguments: capped logits, scaled, of every token."""

    def __init__(self, causal: bool = True, reads_pad: bool = False, mixes: bool = False, blind: bool = False) -> None:
        super().__init__()
        self.causal, self.reads_pad, self.mixes, self.blind = causal, reads_pad, mixes, blind
        self.config = SimpleNamespace(is_encoder_decoder=False, to_dict=dict)
        self.embedding, self.positions = nn.Embedding(40, 16), nn.Embedding(64, 16)
        self.qkv, self.out, self.head = nn.Linear(16, 48), nn.Linear(16, 16), nn.Linear(16, 40)

    def forward(self, input_ids: Tensor, position_ids: Tensor | None = None, use_cache: bool = False) -> Any:
        batch, length = input_ids.shape
        if position_ids is None:
            position_ids = torch.arange(length)[None].expand(batch, length)
        x = self.embedding(input_ids) + self.positions(position_ids)
        given = self.positions.weight[:1, None].expand(batch, length, 16) if self.blind else x
        q, k, v = (t.view(batch, length, 4, 4).transpose(1, 2) for t in self.qkv(given).chunk(3, dim=-1))
        mask = torch.ones(length, length, dtype=torch.bool)
        mask = (mask.tril() if self.causal else mask)[None, None]
        if self.reads_pad:
            mask = mask & (input_ids != 1)[:, None, None]
        y = nn.functional.scaled_dot_product_attention(q, k, v, mask)
        x = x + self.out(y.transpose(1, 2).reshape(batch, length, 16))
        if self.mixes:
            x = x + 0.001 * x.cumsum(1)
        return tf.modeling_outputs.CausalLMOutput(logits=20.0 * torch.tanh(self.head(x).float() / 20.0))


def test_rows_are_selected_before_the_last_linear_layer() -> None:
    torch.manual_seed(0)
    flat = flat_of(Plain().eval())
    targets = [i.target for i in flat.program.inputs if i.kind is InputKind.STEP]
    assert "rows" in targets and flat.max_positions == 64
    nodes = list(flat.program.graph.nodes)
    picked = next(n for n in nodes if n.target is torch.ops.aten.index_select.default)
    behind = nodes[nodes.index(picked) :]
    assert any(n.meta["val"].shape[-1] == 40 for n in behind if isinstance(n.meta.get("val"), Tensor))
    assert picked.meta["val"].shape[-1] == 16  # not of the vocabulary


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ({"causal": False}, "bidirectional"),
        ({"reads_pad": True}, "no causal window"),
        ({"mixes": True}, "mix in another way"),
        ({"blind": True}, "nothing from tokens"),  # its attention could begin before its lengths are there
    ],
)
def test_what_no_pages_can_serve_is_refused(how: dict[str, bool], reason: str) -> None:
    torch.manual_seed(0)
    found = make(builder_of(Plain(**how).eval()))
    assert isinstance(found, Unserved)
    assert reason in found.reason
