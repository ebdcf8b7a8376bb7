"""A graph that is not the model is found out, repaired where a rewrite is to blame, and never served otherwise."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
import zoo
from kernel_checks import assert_close
from runtime_models import Identity, Real, exactly, optimized, tiny_llama, tokens

import regraft
from regraft.compiler.capture import capture
from regraft.compiler.records import PassResult, Rewrite
from regraft.compiler.rule import Rule, Stage
from regraft.runtime.cases import make_cases
from regraft.runtime.certificate import Certificate, named_outputs
from regraft.runtime.oracle import run_oracle, run_reference
from regraft.runtime.repair import Attempt, largest_working, repair, sites_of

aten = torch.ops.aten


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens(), attention_mask=torch.ones_like(tokens())).logits


# -- the oracle --------------------------------------------------------------------------------------------------------


def test_oracle_is_the_model_one_precision_up() -> None:
    model = tiny_llama(2).to(torch.bfloat16)
    raised = run_oracle(model, model.forward, {"input_ids": tokens()}, torch.float32).logits
    assert raised.dtype is torch.float32
    exact = tiny_llama(2)
    exact.load_state_dict(model.state_dict())
    exact.model.rotary_emb.inv_freq = model.model.rotary_emb.inv_freq.float()
    exact.set_attn_implementation("eager")
    torch.testing.assert_close(raised, exact(tokens()).logits.detach(), rtol=1e-5, atol=1e-6)
    assert all(p.dtype is torch.bfloat16 for p in model.parameters())


class _KeepsItsTable(torch.nn.Module):
    """Its forward brings a buffer to the dtype of the activations, and keeps more than it had."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(8, 8)
        self.table = torch.nn.Buffer(torch.randn(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.linear(x)
        self.table = self.table.to(y.dtype)
        self.last = y
        return y + self.table


def test_oracle_leaves_no_raised_tensor_in_the_model() -> None:
    model, x = _KeepsItsTable().eval(), torch.randn(3, 8)
    table = model.table
    assert run_oracle(model, model.forward, {"x": x}, torch.float64).dtype is torch.float64
    assert model.table is table
    assert not hasattr(model, "last")


def test_reference_runs_eager_attention_and_puts_the_config_back() -> None:
    config = transformers.Gemma2Config(
        vocab_size=131, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, head_dim=8,
        num_key_value_heads=2, attn_logit_softcapping=0.02, query_pre_attn_scalar=1,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.Gemma2ForCausalLM(config).eval()
    model.set_attn_implementation("sdpa")  # which leaves the softcap out
    found = run_reference(model, model.forward, {"input_ids": tokens()}).logits
    assert model.config._attn_implementation == "sdpa"
    configured = run_reference(model, model.forward, {"input_ids": tokens()}, eager=False).logits
    model.set_attn_implementation("eager")
    assert torch.equal(found, model(tokens()).logits)
    assert not torch.allclose(found, configured, atol=1e-4)


# -- cases -------------------------------------------------------------------------------------------------------------


def test_cases_pad_both_sides_and_change_the_shape() -> None:
    cases = make_cases({"input_ids": tokens(), "attention_mask": torch.ones_like(tokens())}, pad_token=0)
    assert [c.name for c in cases] == ["as given", "padded left", "padded right", "second shape"]
    left, right = cases[1].tensors["attention_mask"], cases[2].tensors["attention_mask"]
    assert left[0, 0] == 0 and left[0, -1] == 1 and right[0, -1] == 0 and right[0, 0] == 1
    assert cases[1].tensors["input_ids"][0, 0] == 0
    assert cases[3].tensors["input_ids"].shape == (1, tokens().shape[1] - 3)


def test_only_real_rows_count() -> None:
    cases = make_cases({"input_ids": tokens(), "attention_mask": torch.ones_like(tokens())})
    rows = cases[1].tensors["attention_mask"].bool()
    output, keys = torch.randn(2, 9, 5), torch.randn(2, 3, 9, 8)
    assert torch.equal(cases[1].real("logits", output), output[rows])
    assert torch.equal(cases[1].real("past_key_values.0.keys", keys), keys.transpose(1, 2)[rows])
    assert torch.equal(cases[2].real("logits", output[:, -1:]), output[:, -1:][rows_kept(cases[2])])
    assert cases[1].real("pooled", torch.randn(2, 5)).shape == (2, 5)
    several = torch.randn(4, *rows.shape, 5)  # streams beside each other
    assert torch.equal(cases[1].real("hidden_states.1", several), several[:, rows])


def rows_kept(case: Any) -> torch.Tensor:
    return case.tensors["attention_mask"][:, -1:].bool()


def test_outputs_have_names() -> None:
    cache = transformers.DynamicCache()
    cache.update(torch.zeros(1, 2, 3, 4), torch.ones(1, 2, 3, 4), 0)
    found = named_outputs({"logits": torch.zeros(2), "past_key_values": cache, "hidden_states": (torch.zeros(1),)})
    assert sorted(found) == ["hidden_states.0", "logits", "past_key_values.0.keys", "past_key_values.0.values"]


# -- graphs that are not the model -------------------------------------------------------------------------------------


class Spoiled(Identity):
    """Captures rightly and compiles to something else."""

    def __init__(self, target: Any, factor: float) -> None:
        super().__init__()
        self.target, self.factor = target, factor

    def compile(self, program: Any, options: Any, weights: Any, **settings: Any) -> Any:
        graph = torch.fx.Graph()
        graph.output(graph.graph_copy(program.graph, copied := {}))
        gm = torch.fx.GraphModule(program.gm, graph)
        for node in list(graph.nodes):
            if node.target is self.target:
                with graph.inserting_after(node):
                    scaled = graph.call_function(aten.mul.Tensor, (node, self.factor))
                node.replace_all_uses_with(scaled)
                scaled.args = (node, self.factor)
        assert copied
        gm.recompile()
        return super().compile(replace(program, gm=gm), options, weights)


@pytest.mark.parametrize("factor", [1.001, 0.0, float("nan"), float("inf")])
def test_a_wrong_graph_is_never_served(factor: float) -> None:
    model = optimized(tiny_llama(), Spoiled(aten.silu.default, factor))
    (entry,) = model.forward.record.signatures
    assert not entry.served and "differs from the original" in entry.reason
    with pytest.warns(UserWarning, match="differs from the original"):
        found = logits(model)
    assert torch.equal(found, logits(tiny_llama()))
    assert model.forward.record.calls == {"graph": 0, "original": 1}


class _Chaotic(torch.nn.Module):
    """Whose result is another one in every precision, and one that is not."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = self.linear(x)
        return y, torch.sin(3e8 * y)


def test_a_certificate_says_where_it_shows_little() -> None:
    torch.manual_seed(0)
    inputs = {"x": torch.randn(2, 9, 8)}
    model = regraft.optimize(_Chaotic().eval(), example_inputs=inputs, verbose=False)
    certificate = model.report.signatures[0].certificate
    assert certificate is not None and certificate.passed
    assert certificate.doubts and all(doubt.startswith("1 (") for doubt in certificate.doubts)
    assert "Doubtful" in str(model.report) and "the graph is within 0.0e+00 of it" in str(model.report)
    assert "shows little of 1 (" in model.report.to_html()


def test_a_right_graph_is_certified_on_every_case() -> None:
    model = optimized(tiny_llama())
    (entry,) = model.forward.record.signatures
    certificate = entry.certificate
    assert certificate.passed and certificate.oracle == "the original's code in float64"
    assert [m.case for m in certificate.measured] == ["as given", "padded left", "padded right", "second shape"]
    for measured in certificate.measured:
        assert 0 < measured.error <= measured.bound < 1e-5
        assert measured.greedy == 1.0 and measured.kl < 1e-9


def test_a_capture_that_lost_something_is_found_although_no_rewrite_is_to_blame() -> None:
    class Lossy(Identity):
        """Captures the model without its last norm's weight."""

        def capture(self, module: Any, call: Any, forward: Any) -> Any:
            weight = module.model.norm.weight
            kept, weight.data = weight.data, torch.ones_like(weight)
            program = capture(module, call.tensors, call.static, cache=call.cache)
            for node, meaning in program.placeholder_inputs().items():
                if meaning.target == "model.norm.weight":
                    (product,) = node.users
                    other = next(a for a in product.args if a is not node)
                    product.replace_all_uses_with(other)
            program.gm.recompile()
            weight.data = kept
            return program

    model = tiny_llama()
    torch.nn.init.uniform_(model.model.norm.weight)
    optimized(model, Lossy())
    (entry,) = model.forward.record.signatures
    assert not entry.served and "the captured graph differs" in entry.reason


class Elsewhere(Rule):
    """silu(x) -> silu(x) in the first layer, where it is verified, and 1.01 silu(x) in the others."""

    stage = Stage.RAISE
    factor = 1.01

    def pattern(self, p: Any, x: Any) -> Any:
        return p.silu(x)

    def emit(self, m: Any, g: Any) -> Any:
        module = str(m.anchor.meta.get("nn_module_stack"))
        exact = g.sigmoid(m.x)
        return g.mul(m.x, exact) if "layers.0" in module else g.mul(g.mul(m.x, exact), self.factor)


def test_a_rule_that_is_wrong_where_no_site_was_checked() -> None:
    model = optimized(tiny_llama(3), Real(), rules=(Elsewhere(),))
    (entry,) = model.forward.record.signatures
    assert entry.served and entry.certificate.passed
    reverted = [r for p in entry.passes for r in p.reverted] + entry.reverted
    assert {r.rule for r in reverted} == {"elsewhere"}
    torch.testing.assert_close(logits(model), logits(tiny_llama(3)), rtol=1e-5, atol=1e-6)
    assert model.forward.record.calls == {"graph": 1, "original": 0}


class Unverified(Real):
    """The pipeline without its own checks, so that only the certificate stands between a rule and the user."""

    def compile(self, *args: Any, **settings: Any) -> Any:
        return super().compile(*args, **{**settings, "verify": "off"})


def test_bisection_names_the_rule_and_keeps_the_others() -> None:
    model = optimized(tiny_llama(2), Unverified(), rules=(Elsewhere(),))
    (entry,) = model.forward.record.signatures
    assert entry.served and entry.certificate.passed
    assert {(r.rule, r.module) for r in entry.reverted} == {("elsewhere", "model.layers.1.mlp.act_fn")}
    kept = {r.rule for p in entry.passes for r in p.rewrites}
    assert {"rms_norm", "qkv"} <= kept
    torch.testing.assert_close(logits(model), logits(tiny_llama(2)), rtol=1e-5, atol=1e-6)


# -- the search --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [{0}, {3, 4}, {0, 1, 2, 3, 4, 5, 6}, {6}])
def test_largest_working_leaves_out_exactly_what_is_wrong(bad: set[int]) -> None:
    items = list(range(7))
    assert largest_working(items, lambda kept: not bad & set(kept)) == [i for i in items if i not in bad]


def test_largest_working_stops_at_its_limit() -> None:
    asked: list[Any] = []
    largest_working(range(64), lambda kept: bool(asked.append(kept)), limit=5)
    assert len(asked) == 5


def rewrite_of(rule: str, node: str) -> Rewrite:
    return Rewrite(rule, f"module.{node}", "", rule, (node,), ())


def test_kernels_are_suspected_before_rules() -> None:
    passes = [PassResult("norm", "RAISE", [rewrite_of("norm", "a")])]
    tried: list[tuple[str, int, bool]] = []

    def attempt(verify: str, deny: frozenset[tuple[str, str]], kernels: bool) -> Attempt[str]:
        tried.append((verify, len(deny), kernels))
        return Attempt("", passes, Certificate(not kernels))

    final, reverted = repair(attempt, "logits are off")
    assert final.certificate.passed and tried == [("full", 0, True), ("full", 0, False)]
    assert [r.rule for r in reverted] == ["lower"] and "logits are off" in reverted[0].reason


def test_repair_reverts_the_wrong_site_of_a_rule() -> None:
    rewrites = [rewrite_of("norm", n) for n in "abcd"] + [rewrite_of("rope", n) for n in "xy"]
    passes = [PassResult("norm", "RAISE", rewrites)]

    def attempt(verify: str, deny: frozenset[tuple[str, str]], kernels: bool) -> Attempt[str]:
        present = [r for r in rewrites if not ({(r.rule, "*")} | sites_of(r)) & deny]
        wrong = any(r.module == "module.c" for r in present)
        return Attempt("", passes, Certificate(not wrong))

    final, reverted = repair(attempt, "logits are off")
    assert final.certificate.passed
    assert [(r.rule, r.module) for r in reverted] == [("norm", "module.c")]


def test_a_configured_attention_that_computes_something_else_is_told() -> None:
    """transformers' sdpa drops Gemma 2's softcap: the graph follows the eager code; a warning and the report say so."""
    model, _ = zoo.build("gemma2")
    for layer in model.model.layers:
        layer.self_attn.attn_logit_softcapping = 0.05
    with pytest.warns(regraft.RegraftWarning, match="does not compute what its eager attention does") as warned:
        model = regraft.optimize(model, verbose=False)
        model(tokens())  # another signature, of which the same is to be said
    assert len(warned) == 1
    assert len(model.report.signatures) == 2
    notes = [n.message for n in model.report.notes]
    assert sum("does not compute what its eager attention does" in n for n in notes) == 1, notes


def deberta(kind: Any) -> Any:
    """Rows of padding attend to nothing: DeBERTa's mask hides them as queries, too."""
    config = transformers.DebertaV2Config(
        vocab_size=131, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        relative_attention=True, position_buckets=8, pos_att_type=["p2c", "c2p"], pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = kind(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


class _Mean(torch.nn.Module):
    """The mean of all rows, padding included."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = deberta(transformers.DebertaV2Model)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.inner(input_ids, attention_mask).last_hidden_state.mean(1)


def test_a_first_token_that_is_padding_says_nothing_about_a_graph() -> None:
    """With padding on the left DeBERTa's classifiers read a row that attends to nothing: attention was not fused."""
    model = regraft.optimize(deberta(transformers.DebertaV2ForSequenceClassification), verbose=False)
    (signature,) = model.report.signatures
    assert not model.report.reverted
    assert {e.what: (e.found, e.expected) for e in signature.expected}["attention"] == (1, 1)
    assert "padded left: logits is made of padding" in signature.certificate.skipped


def test_rows_of_padding_that_an_output_mixes_are_kept() -> None:
    inputs = {"input_ids": tokens(), "attention_mask": torch.ones(2, 9, dtype=torch.long)}
    model = _Mean().eval()
    padded = {**inputs, "attention_mask": inputs["attention_mask"].clone()}
    padded["attention_mask"][0, 6:] = 0
    own, exact = model(**padded), exactly(model, **padded)
    model = regraft.optimize(model, verbose=False, example_inputs=inputs)
    assert [r.rule for r in model.report.reverted] == ["eager_attention"]
    assert_close(model(**padded), own, exact)


class _TellsWeights(torch.nn.Module):
    """Returns more under its eager attention than as it is configured, as models that return attention weights do."""

    def __init__(self, odd: bool) -> None:
        super().__init__()
        self.linear, self.odd = torch.nn.Linear(8, 8), odd
        self.config = SimpleNamespace(_attn_implementation_internal="sdpa", _attn_implementation="sdpa")

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        y = torch.tanh(self.linear(x))
        told = self.config._attn_implementation_internal == "eager"
        if self.odd:  # whatever its attention is, and only the graph has none
            told = not torch.compiler.is_compiling()
        return {"y": y, "weights": y.softmax(-1)} if told else {"y": y}


@pytest.mark.parametrize("odd", [False, True])
def test_outputs_that_only_eager_attention_has(odd: bool) -> None:
    model, x = _TellsWeights(odd).eval(), torch.randn(3, 8)
    expected = model(x)
    model = regraft.optimize(model, example_inputs={"x": x}, verbose=False)
    (entry,) = model.report.signatures
    assert entry.served is not odd
    assert not odd or "the outputs differ from the original's (as given): weights" in entry.reason
    found = model(x)
    assert found.keys() == expected.keys()
    exact = torch.tanh(model.linear.weight.double() @ x.double().t() + model.linear.bias.double()[:, None]).t()
    assert_close(found["y"].detach(), expected["y"].detach(), exact.detach())
