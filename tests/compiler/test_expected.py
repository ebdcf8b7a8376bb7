"""What a model should have, against what was found: no false alarm, and no shortfall that goes unseen."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
import zoo
from torch import nn

from regraft.compiler.capture import capture
from regraft.compiler.expected import Expectation, equal_layers, expectations, layer_count
from regraft.compiler.program import Program
from regraft.passes.pipeline import PASS_NAMES, Settings, compile_program

LAYERS = 2
_captured: dict[str, tuple[Any, Program]] = {}


def found(name: str, *disabled: str, told: bool = False) -> dict[str, Expectation]:
    """Expectations after the passes but those; `told`: it is known that they were switched off."""
    if name not in _captured:
        model, inputs = zoo.build(name, layers=LAYERS)
        _captured[name] = (model, capture(model.eval(), inputs, cache=False))
    model, program = _captured[name]
    enabled = {p: p not in disabled for p in PASS_NAMES}
    compiled = compile_program(program, Settings(torch.device("cpu"), verify="off", enabled=enabled))
    made = expectations(compiled.program, model.config, model, disabled if told else ())
    return {e.what: e for e in made}


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("llama", {"attention": LAYERS, "norm": 2 * LAYERS + 1, "rope": 2 * LAYERS, "qkv": LAYERS, "gate_up": LAYERS}),
        ("bert", {"attention": LAYERS, "norm": 2 * LAYERS + 1, "qkv": LAYERS}),
    ],
)
def test_counts_follow_the_layers_and_nothing_is_missed(name: str, counts: dict[str, int]) -> None:
    made = found(name)
    assert {k: e.expected for k, e in made.items()} == counts
    assert all(e.met and e.found == e.expected for e in made.values())


@pytest.mark.parametrize(
    ("disabled", "what", "left"),
    [
        (["rms_norm"], "norm", 2 * LAYERS + 1),
        (["rope"], "rope", 2 * LAYERS),
        (["qkv"], "qkv", LAYERS),
        (["gate_up", "qkv"], "gate_up", LAYERS),  # else the rule for siblings takes them
    ],
)
def test_what_a_pass_left_behind_is_seen(disabled: list[str], what: str, left: int) -> None:
    e = found("llama", *disabled)[what]
    assert not e.met and len(e.missing) == left and e.expected - e.found == left
    assert all("layers." in m or "model.norm" in m for m in e.missing)
    if what in ("norm", "rope"):
        assert "modeling_llama.py:" in e.missing[0]
    assert what not in found("llama", *disabled, told=True), "what was switched off is not expected"


class Attending(nn.Module):
    """Attention as formulas, which a rule may or may not recognise."""

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        scores = torch.matmul(q, k.transpose(-1, -2)) / 4.0
        return torch.matmul(torch.softmax(scores, -1), v)


class Routing(nn.Module):
    """A softmax that is no attention: a router's."""

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        weights = torch.softmax(torch.matmul(q, k.transpose(-1, -2)), -1)
        return weights.topk(2, -1).values.sum(-1, keepdim=True) * v


def program_of(model: nn.Module) -> Program:
    q = torch.randn(2, 4, 9, 16)
    exported = torch.export.export(model, (q, q, q), strict=False).run_decompositions({})
    return Program(torch.fx.GraphModule(torch.nn.Module(), exported.graph), [], lambda flat: flat)


def test_eager_attention_left_as_it_was_is_seen_and_a_router_is_not_attention() -> None:
    (e,) = expectations(program_of(Attending()))
    assert (e.what, e.expected, e.found) == ("attention", 1, 0) and "test_expected.py" in e.missing[0]
    assert expectations(program_of(Routing())) == ()


def test_a_layer_without_attention_among_equal_ones_is_seen() -> None:
    found("llama")
    model, program = _captured["llama"]
    compiled = compile_program(program, Settings(torch.device("cpu"), verify="off")).program
    for node in compiled.graph.nodes:  # the last layer's attention is told to be of no layer
        if "regraft.attention" in str(node.target) or getattr(node.target, "__name__", "") == "attention":
            last = node
    last.meta["module"] = "elsewhere"
    e = next(e for e in expectations(compiled, model.config, model) if e.what == "attention")
    assert not e.met and f"attention in {LAYERS - 1} of {LAYERS} equal layers" in e.missing[0]


def test_the_config_promises_attentions_that_the_graph_does_not_show() -> None:
    found("llama")
    model, _ = _captured["llama"]
    config = transformers.LlamaConfig(num_hidden_layers=LAYERS, num_attention_heads=8)
    empty = program_of(Routing())
    (e,) = expectations(empty, config, model)
    assert (e.expected, e.found, e.met) == (LAYERS, 0, False) and "promises" in e.missing[0]
    config.layer_types = ["full_attention", "linear_attention"]
    (e,) = expectations(empty, config, model)
    assert e.expected == 1
    assert expectations(empty, transformers.Mamba2Config(num_hidden_layers=LAYERS), model) == ()


def test_layer_counts_add_up_over_towers() -> None:
    assert layer_count(transformers.LlamaConfig(num_hidden_layers=5)) == 5
    assert layer_count(transformers.GPT2Config(n_layer=7)) == 7
    assert layer_count(transformers.WhisperConfig(encoder_layers=2, decoder_layers=3)) == 5
    assert layer_count(transformers.T5Config(num_layers=2, num_decoder_layers=4)) == 6
    clip = transformers.CLIPConfig(
        text_config={"num_hidden_layers": 2}, vision_config={"num_hidden_layers": 3, "image_size": 32, "patch_size": 8}
    )
    assert layer_count(clip) == 5
    assert layer_count(None) == 0 and layer_count(object()) == 0


def test_equal_layers_are_told_apart_by_structure() -> None:
    def block(width: int) -> nn.Module:
        return nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, 8))

    model = nn.Module()
    model.layers = nn.ModuleList([block(16), block(16), block(32), block(16)])
    groups = sorted(equal_layers(model).values(), key=len)
    assert groups == [["layers.2"], ["layers.0", "layers.1", "layers.3"]]
