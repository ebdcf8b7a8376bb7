"""Packed weights follow the parameters they were made from, however those change, and can be given back."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import zoo
from kernel_checks import assert_close
from runtime_models import Real, optimized, tiny_llama, tokens
from torch import fx, nn

import regraft
from regraft.compiler.program import Recipe
from regraft.runtime import weights as runtime_weights
from regraft.runtime.optimize import restore
from regraft.runtime.weight_layout import Room
from regraft.runtime.weights import Change, Weights

QKV = [f"model.layers.0.self_attn.{n}_proj.weight" for n in "qkv"]


def concatenation(*sources: str) -> Recipe:
    graph = fx.Graph()
    parts = [graph.placeholder(f"x{i}") for i in range(len(sources))]
    graph.output(graph.call_function(torch.ops.aten.cat.default, (parts,)))
    return Recipe(fx.GraphModule(nn.Module(), graph), sources, concatenation=True)


def doubled(source: str) -> Recipe:
    graph = fx.Graph()
    graph.output(graph.call_function(torch.ops.aten.mul.Tensor, (graph.placeholder("x"), 2)))
    return Recipe(fx.GraphModule(nn.Module(), graph), (source,))


def parameters(model: nn.Module, names: list[str]) -> list[nn.Parameter]:
    return [model.get_parameter(n) for n in names]


def packed(model: nn.Module, *recipes: Recipe) -> Weights:
    weights = Weights(model)
    weights.pack(recipes)
    return weights


def value(weights: Weights) -> torch.Tensor:
    (pack,) = weights.packs.values()
    return pack.value


def settle(weights: Weights) -> Change:
    change = weights.changes()
    if change is Change.VALUES:
        weights.repack()
    assert change is Change.FORM or weights.changes() is Change.NONE
    return change


def test_sources_become_views_and_stay_the_same_parameters() -> None:
    model = tiny_llama()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    objects = parameters(model, QKV)
    weights = packed(model, concatenation(*QKV))
    assert [id(p) for p in parameters(model, QKV)] == [id(p) for p in objects]
    storage = value(weights).untyped_storage().data_ptr()
    assert all(p.untyped_storage().data_ptr() == storage and p.requires_grad for p in objects)
    assert torch.equal(value(weights), torch.cat([before[n] for n in QKV]))
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert weights.changes() is Change.NONE
    assert weights.packed_bytes() == (value(weights).nbytes, 0)


def test_in_place_changes_need_no_repacking() -> None:
    model = tiny_llama()
    weights = packed(model, concatenation(*QKV))
    with torch.no_grad():
        model.get_parameter(QKV[1]).add_(1)
    model.get_parameter(QKV[2]).data.mul_(3)
    assert weights.changes() is Change.NONE
    assert torch.equal(value(weights), torch.cat([p.detach() for p in parameters(model, QKV)]))


@pytest.mark.parametrize("assign", [False, True])
def test_load_state_dict(assign: bool) -> None:
    model, other = tiny_llama(), tiny_llama(seed=3)
    weights = packed(model, concatenation(*QKV))
    model.load_state_dict(other.state_dict(), assign=assign)
    settle(weights)
    assert torch.equal(value(weights), torch.cat([p.detach() for p in parameters(other, QKV)]))
    assert parameters(model, QKV)[2].untyped_storage().data_ptr() == value(weights).untyped_storage().data_ptr()


def assign_data(model: nn.Module) -> None:
    model.get_parameter(QKV[1]).data = torch.randn_like(model.get_parameter(QKV[1]))


def replace_parameter(model: Any) -> None:
    attention = model.model.layers[0].self_attn
    attention.k_proj.weight = nn.Parameter(torch.randn_like(attention.k_proj.weight))


def exchange(model: nn.Module) -> None:
    key, value = parameters(model, QKV[1:])
    key.data, value.data = value.data, key.data


@pytest.mark.parametrize("change", [assign_data, replace_parameter, exchange])
def test_other_storage_is_noticed_and_becomes_a_view_again(change: Any) -> None:
    model = tiny_llama()
    weights = packed(model, concatenation(*QKV))
    assert weights.unmoved()
    change(model)
    assert not weights.unmoved()
    expected = torch.cat([p.detach().clone() for p in parameters(model, QKV)])
    assert settle(weights) is Change.VALUES
    assert torch.equal(value(weights), expected)
    storage = value(weights).untyped_storage().data_ptr()
    assert all(p.untyped_storage().data_ptr() == storage for p in parameters(model, QKV))


def test_copies_watch_the_versions_of_their_sources() -> None:
    model = tiny_llama()
    weights = packed(model, doubled(QKV[0]))
    with torch.no_grad():
        model.get_parameter(QKV[0]).add_(1)
    assert weights.unmoved() and settle(weights) is Change.VALUES
    assert torch.equal(value(weights), 2 * model.get_parameter(QKV[0]).detach())
    replaced = nn.Parameter(torch.randn_like(model.get_parameter(QKV[0])))
    model.model.layers[0].self_attn.q_proj.weight = replaced
    assert settle(weights) is Change.VALUES
    assert torch.equal(value(weights), 2 * replaced.detach())


@pytest.mark.parametrize("counted", [False, True])
def test_copies_follow_what_was_written_through_data(counted: bool) -> None:
    """Also where something else was written that PyTorch counts, and before anybody looked."""
    model = tiny_llama()
    weights = packed(model, doubled(QKV[0]), doubled(QKV[1]))
    for _ in range(2):
        model.get_parameter(QKV[0]).data.mul_(3)
        if counted:
            with torch.no_grad():
                model.get_parameter(QKV[1]).mul_(1.5)
        settle(weights)
        writes = weights.writes
        assert weights.look_inside() is Change.VALUES and weights.writes != writes
        assert settle(weights) is Change.VALUES
        for pack, name in zip(weights.packs.values(), QKV):
            assert torch.equal(pack.value, 2 * model.get_parameter(name).detach())
        version = weights.version
        assert weights.look_inside() is Change.NONE and weights.changes() is Change.NONE and weights.version == version


def test_another_form_at_the_same_place_is_another_version() -> None:
    model: Any = tiny_llama()
    weights = packed(model, concatenation(*QKV))
    version, out = weights.version, model.model.layers[0].self_attn.o_proj
    out.weight = nn.Parameter(out.weight.data.t())
    assert settle(weights) is Change.VALUES and weights.version != version


def test_buffers_that_the_model_exchanges_itself_are_no_change() -> None:
    """Beyond 16 positions the original puts other frequencies into a buffer, and the first ones back below."""
    plain, _ = zoo.build("phi3_longrope", layers=1)
    exact = copy.deepcopy(plain).double()
    model = regraft.optimize(copy.deepcopy(plain), verify="off", verbose=False)
    short, long = torch.randint(3, zoo.VOCAB, (1, 7)), torch.randint(3, zoo.VOCAB, (1, 30))
    model(short)
    captured = len(model.report.signatures)
    for ids in (long, short, long):
        model.forward.original(ids)  # as steps behind a prompt do
        for again in (short, long):
            assert_close(model(again).logits, plain(again).logits.detach(), exact(again).logits.detach())
    assert len(model.report.signatures) == captured


def halve(model: Any) -> None:
    model.to(torch.bfloat16)


def retype_one(model: Any) -> None:
    model.lm_head.weight.data = model.lm_head.weight.data.double()


def resize(model: Any) -> None:
    model.resize_token_embeddings(140)


def swap_module(model: Any) -> None:
    model.model.layers[0].mlp.act_fn = nn.GELU()


def override(model: Any) -> None:
    mlp = model.model.layers[0].mlp
    mlp.forward = lambda x: x


def tie(model: Any) -> None:
    model.lm_head.weight = model.model.embed_tokens.weight


def add_module(model: Any) -> None:
    model.model.layers[0].adapter = nn.Linear(2, 2)


@pytest.mark.parametrize("change", [halve, retype_one, resize, swap_module, override, tie, add_module])
def test_another_form_needs_another_graph(change: Any) -> None:
    model = tiny_llama()
    weights = packed(model, concatenation(*QKV))
    change(model)
    assert weights.changes() is Change.FORM
    weights.look_again()
    assert weights.changes() is Change.NONE and not weights.packs


def test_a_tied_weight_stays_where_its_copy_was_made_from(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small weights move while others are packed on a GPU; a source must not, whichever of its names comes up."""
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[2].weight = model[0].weight

    monkeypatch.setattr(runtime_weights, "movable", lambda tensor: True)
    monkeypatch.setattr(runtime_weights, "release_unused", lambda: None)
    monkeypatch.setattr(runtime_weights, "Room", lambda *given: Room((), torch.device("cpu")))
    weights = Weights(model)
    before = [model[i].weight.data_ptr() for i in range(2)]
    weights._devices = [torch.device("cuda")]
    weights.pack([doubled("0.weight")])
    assert [model[i].weight.data_ptr() == before[i] for i in range(2)] == [True, False]
    assert weights.changes() is Change.NONE
    weights._devices = [torch.device("cuda")]
    weights.pack([doubled("1.weight")])
    assert weights.changes() is Change.NONE


def test_a_parameter_is_a_view_of_one_buffer_only() -> None:
    model = tiny_llama()
    weights = Weights(model)
    weights.pack([concatenation(*QKV), concatenation(*QKV), concatenation(*QKV[:2])])
    first, second = weights.packs.values()
    assert first.views and not second.views
    with torch.no_grad():
        model.get_parameter(QKV[0]).zero_()
    settle(weights)
    copied = list(weights.packs.values())[1].value
    assert torch.equal(copied, torch.cat([p.detach() for p in parameters(model, QKV[:2])]))
    assert weights.packed_bytes()[1] == copied.nbytes


def test_restore_gives_independent_contiguous_parameters() -> None:
    model = tiny_llama()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    weights = packed(model, concatenation(*QKV))
    buffer = value(weights)
    weights.restore()
    found = parameters(model, QKV)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert all(p.is_contiguous() and p.untyped_storage().nbytes() == p.nbytes for p in found)
    assert len({p.untyped_storage().data_ptr() for p in found} | {buffer.untyped_storage().data_ptr()}) == 4


def test_packing_in_inference_mode_leaves_weights_that_can_be_trained_and_watched() -> None:
    model = tiny_llama()
    with torch.inference_mode():
        weights = packed(model, concatenation(*QKV), doubled("lm_head.weight"))
        sizes = weights.packed_bytes()
        weights.keep([])
        weights.pack([concatenation(*QKV), doubled("lm_head.weight")])
    assert weights.packed_bytes() == sizes and min(sizes) > 0
    assert not any(t.is_inference() for t in (*model.parameters(), *(p.value for p in weights.packs.values())))
    with torch.no_grad():
        model.lm_head.weight.mul_(3)
    assert settle(weights) is Change.VALUES
    with torch.inference_mode():
        weights.restore()
    model(tokens(), labels=tokens()).loss.backward()


# -- through the optimized model ---------------------------------------------------------------------------------------


def served(model: Any) -> torch.Tensor:
    """Logits by the graph; an error where the original served the call."""
    before = dict(model.forward.record.calls)
    out = model(tokens(), attention_mask=torch.ones_like(tokens())).logits
    assert model.forward.record.calls == {"graph": before["graph"] + 1, "original": before["original"]}
    return out


def expected(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.forward.original(tokens(), attention_mask=torch.ones_like(tokens())).logits


def load(model: Any) -> None:
    model.load_state_dict(tiny_llama(seed=3).state_dict())


def optimizer_step(model: Any) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.forward.original(tokens(), labels=tokens()).loss.backward()
    optimizer.step()


@pytest.mark.parametrize("change", [assign_data, replace_parameter, load, swap_module, tie, optimizer_step])
def test_the_optimized_model_follows(change: Any) -> None:
    model = optimized(tiny_llama(), Real())
    before = served(model)
    change(model)
    after = served(model)
    torch.testing.assert_close(after, expected(model), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(after, before, atol=1e-3)


def test_another_dtype_is_captured_again() -> None:
    model = optimized(tiny_llama(), Real())
    model.to(torch.bfloat16)
    out = served(model)
    assert out.dtype is torch.bfloat16
    torch.testing.assert_close(out, expected(model), rtol=0, atol=0.02)


def test_deepcopy_packs_for_itself() -> None:
    model = optimized(tiny_llama(), Real())
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.get_parameter(QKV[0]).mul_(-1)
    torch.testing.assert_close(served(other), expected(other), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(served(model), expected(model), rtol=1e-5, atol=1e-6)
    storages = [m.get_parameter(QKV[0]).untyped_storage() for m in (model, other)]
    assert storages[0].data_ptr() != storages[1].data_ptr()


def test_save_pretrained_writes_the_original_layout(tmp_path: Path) -> None:
    model = optimized(tiny_llama(), Real())
    reference = tiny_llama()
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.architectures == ["LlamaForCausalLM"]
    assert type(loaded) is transformers.LlamaForCausalLM
    assert all(torch.equal(t, reference.state_dict()[n]) for n, t in loaded.state_dict().items())


def test_restored_model_equals_the_one_before() -> None:
    model, reference = tiny_llama(), tiny_llama().state_dict()
    optimized(model, Real())
    assert model.forward.record.memory["packed_views"] > 0
    restore(model)
    assert all(torch.equal(t, reference[n]) for n, t in model.state_dict().items())
    assert all(p.untyped_storage().nbytes() == p.nbytes for p in model.parameters())


def test_functional_call_leaves_the_weights_alone() -> None:
    model, other = optimized(tiny_llama(), Real()), tiny_llama(seed=5)
    found = torch.func.functional_call(model, dict(other.named_parameters()), (tokens(),)).logits
    torch.testing.assert_close(found.detach(), tiny_llama(seed=5)(tokens()).logits.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model(tokens()).logits, tiny_llama()(tokens()).logits.detach(), rtol=1e-4, atol=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), tiny_llama().parameters(), strict=True))


def test_values_set_aside_are_not_overwritten() -> None:
    """Averaged weights are tried out by exchanging `.data`, and exchanged back."""
    model = tiny_llama()
    weights = packed(model, concatenation(*QKV))
    (query, *_) = parameters(model, QKV)
    before, aside = query.detach().clone(), query.data
    query.data = torch.zeros_like(before)
    assert settle(weights) is Change.VALUES and not bool(value(weights)[: len(before)].any())
    query.data = aside
    assert settle(weights) is Change.VALUES
    assert torch.equal(query, before) and torch.equal(value(weights)[: len(before)], before)


def test_a_parametrized_weight_is_followed_and_given_back() -> None:
    class Double(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * 2

    model, reference = optimized(tiny_llama(), Real()), tiny_llama()
    for each in (model, reference):
        nn.utils.parametrize.register_parametrization(each.model.layers[0].mlp.up_proj, "weight", Double())
    expected = reference(tokens()).logits.detach()
    torch.testing.assert_close(model(tokens()).logits.detach(), expected, rtol=1e-4, atol=1e-5)
    restore(model)
    assert torch.equal(model(tokens()).logits, expected)
