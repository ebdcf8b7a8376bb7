"""`regraft.optimize` as a user calls it, with the whole pipeline, on small models."""

from __future__ import annotations

import json
import logging
import re
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from runtime_models import Real, medium_llama, optimized, tiny_llama, tokens

import regraft
from regraft.runtime.dispatch import Dispatch
from regraft.runtime.report import Report

TRAINED = Path(__file__).parents[2] / "examples" / "model"


@pytest.fixture(scope="module")
def model() -> Any:
    return regraft.optimize(tiny_llama(2), verbose=False)


def test_same_object_with_a_report(model: Any) -> None:
    assert isinstance(model, transformers.LlamaForCausalLM) and isinstance(model.report, Report)
    mask = torch.ones_like(tokens())
    found = model(tokens(), attention_mask=mask).logits
    torch.testing.assert_close(found, tiny_llama(2)(tokens()).logits.detach(), rtol=1e-5, atol=1e-6)
    data = json.loads(model.report.to_json())
    assert data["calls"] == {"graph": 1, "original": 0}
    counts = {r["rule"]: r["count"] for r in data["rewrites"] if r["stage"] == "FUSE"}
    assert counts["qkv"] == 2 and counts["gate_up"] == 2
    assert data["certificate"]["passed"] and data["near_misses"] is not None
    assert "LlamaForCausalLM" in str(model.report)


def test_several_ends_of_a_text_in_the_config() -> None:
    """As Llama 3.1 has them: they are no words of an example, and end a text each."""
    plain = tiny_llama(1, eos_token_id=[2, 5, 7], pad_token_id=-1)
    expected = plain.generate(tokens(), max_new_tokens=12, pad_token_id=0)
    model = regraft.optimize(plain, verbose=False)
    (entry,) = model.report.signatures
    assert entry.served and not {2, 5, 7} & set(entry.captured.example["input_ids"].flatten().tolist())
    assert [m.case for m in model.report.certificate.measured] == [
        "as given",
        "padded left",
        "padded right",
        "second shape",
    ]
    assert torch.equal(model.generate(tokens(), max_new_tokens=12, pad_token_id=0), expected)


def test_a_config_that_says_sizes_in_its_own_way() -> None:
    """No example can be made of it: the first call decides, and optimize says why."""

    class Tower(torch.nn.Module):
        main_input_name = "pixel_values"

        def __init__(self) -> None:
            super().__init__()
            self.config = SimpleNamespace(image_size=(4, 4, 4), num_channels=2)
            self.linear = torch.nn.Linear(4, 4)

        def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.gelu(self.linear(pixel_values))

    plain = Tower().eval()
    x = torch.randn(2, 2, 4, 4, 4)
    expected = plain(x).detach()
    model = regraft.optimize(plain, verbose=False)
    (note,) = model.report.notes
    assert "no example inputs could be made (its config says it in a way of its own, ValueError: " in note.message
    assert (model(x) - expected).abs().max() <= 4 * torch.finfo(torch.float32).eps * expected.abs().max()
    assert model.report.calls == {"graph": 1, "original": 0}


def test_unknown_options_name_the_closest() -> None:
    with pytest.raises(regraft.OptionError, match="no option 'verfy', did you mean 'verify'"):
        regraft.optimize(tiny_llama(), verfy="fast")
    with pytest.raises(regraft.OptionError, match="did you mean 'rope'"):
        regraft.optimize(tiny_llama(), passes={"rop": False})
    with pytest.raises(TypeError, match=r"not a torch\.nn\.Module"):
        regraft.optimize("some/model")


def test_passes_are_switched_off() -> None:
    report = regraft.optimize(tiny_llama(), passes=["-qkv", "-gate_up"], dry_run=True, verbose=False)
    rules = {g.rule for g in report.rewrites}
    assert "rms_norm" in rules and not rules & {"qkv", "gate_up"}


def test_dry_run_leaves_everything_as_it_was() -> None:
    model = tiny_llama(2)
    pointers = [p.data_ptr() for p in model.parameters()]
    report = regraft.optimize(model, dry_run=True, verbose=False)
    assert isinstance(report, Report) and report.calls == {"graph": 0, "original": 0}
    assert "forward" not in model.__dict__ and "report" not in model.__dict__
    assert [p.data_ptr() for p in model.parameters()] == pointers


def test_dry_run_on_the_meta_device_finds_the_same(model: Any) -> None:
    with torch.device("meta"):
        meta = tiny_llama(2)
    report = regraft.optimize(meta, dry_run=True, verbose=False)
    found = {(g.rule, g.count) for g in report.rewrites if g.stage in ("RAISE", "FUSE")}
    assert found >= {("rms_norm", 5), ("qkv", 2), ("gate_up", 2)}
    assert all(p.is_meta for p in meta.parameters())


def test_dry_run_of_a_large_model_allocates_nothing() -> None:
    started = time.process_time()
    model = medium_llama("meta")
    report = regraft.optimize(model, dry_run=True, verbose=False)
    assert {g.rule: g.count for g in report.rewrites}["qkv"] == 24
    assert all(p.is_meta for p in model.parameters())
    assert time.process_time() - started < 30


class WrongSilu(regraft.Rule):
    """silu(x) -> relu(x)"""

    stage = regraft.Stage.RAISE

    def pattern(self, p: Any, x: Any) -> Any:
        return p.silu(x)

    def emit(self, m: Any, g: Any) -> Any:
        return g.relu(m.x)


def test_a_wrong_rule_of_the_user_is_caught_and_named() -> None:
    model = regraft.optimize(tiny_llama(), rules=[WrongSilu()], verbose=False)
    assert {r.rule for r in model.report.reverted} == {"wrong_silu"}
    mask = torch.ones_like(tokens())
    found = model(tokens(), attention_mask=mask).logits
    torch.testing.assert_close(found, tiny_llama()(tokens()).logits.detach(), rtol=1e-5, atol=1e-6)
    with pytest.raises(regraft.StrictError, match="wrong_silu"):
        regraft.optimize(tiny_llama(), rules=[WrongSilu()], strict=True, verbose=False)


class _OnLinear(regraft.Rule):
    stage = regraft.Stage.RAISE

    def pattern(self, p: Any, x: Any, w: Any) -> Any:
        return p.linear(x, w, None)

    def emit(self, m: Any, g: Any) -> Any:
        return g.linear(m.x, m.w, None)


class FailingPattern(_OnLinear):
    def pattern(self, p: Any, x: Any) -> Any:
        raise KeyError("no such thing")


class FailingLabel(_OnLinear):
    def describe(self, m: Any) -> str:
        raise KeyError("no such thing")


class NoNode(_OnLinear):
    def emit(self, m: Any, g: Any) -> Any:
        return None


class OtherDtype(_OnLinear):
    def emit(self, m: Any, g: Any) -> Any:
        return g.call(torch.ops.aten._to_copy.default, g.linear(m.x, m.w, None), dtype=torch.float64)


class Writing(_OnLinear):
    def emit(self, m: Any, g: Any) -> Any:
        doubled = g.call(torch.ops.aten.mul_.Tensor, m.x, 2.0)
        return g.mul(g.linear(doubled, m.w, None), 0.5)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (FailingPattern(), "the rule itself raised KeyError: 'no such thing'"),
        (FailingLabel(), "the rule itself raised KeyError: 'no such thing'"),
        (NoNode(), "None, which is not a node"),
        (OtherDtype(), "torch.float64 .* instead of torch.float32"),
        (Writing(), "aten.mul_.Tensor writes to memory"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, regraft.Rule) else "",
)
def test_a_rule_that_fails_costs_nothing_but_itself(rule: regraft.Rule, message: str) -> None:
    model = optimized(tiny_llama(), Real(), rules=(rule,))
    mask = torch.ones_like(tokens())
    torch.testing.assert_close(model(tokens(), attention_mask=mask).logits, tiny_llama()(tokens()).logits.detach())
    assert model.report.calls == {"graph": 1, "original": 0}
    assert {r.rule for r in model.report.reverted} == {rule.name}
    assert all(re.search(message, r.reason) for r in model.report.reverted)


def test_what_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    regraft.optimize(tiny_llama(), dry_run=True, verbose=False)
    assert capsys.readouterr().out == ""
    regraft.optimize(tiny_llama(), dry_run=True)
    out = capsys.readouterr().out
    assert "Fused q_proj + k_proj + v_proj" in out and len(out.splitlines()) < 15
    regraft.optimize(tiny_llama(), dry_run=True, verbose=True)
    assert "Expected" in capsys.readouterr().out


def test_a_forward_that_replaced_ours_is_not_lost() -> None:
    model = regraft.optimize(tiny_llama(), verbose=False)
    ours = model.forward
    model.forward = lambda *args, **kwargs: ours(*args, **kwargs)
    with pytest.raises(ValueError, match="another forward was set on this LlamaForCausalLM after optimize"):
        regraft.restore(model)
    model.forward = ours
    assert model.report.calls is not None
    regraft.restore(model)
    assert not {"forward", "generate", "report"} & set(model.__dict__)


def test_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("REGRAFT_DISABLE", "1")
    model = tiny_llama()
    assert regraft.optimize(model, verbose=False) is model and "forward" not in model.__dict__
    assert model.report.calls == {"graph": 0, "original": 0}
    assert regraft.restore(model) is model and not hasattr(model, "report")
    monkeypatch.setenv("REGRAFT_DISABLE", "0")
    monkeypatch.setenv("REGRAFT_PASSES", "-rope")
    monkeypatch.setenv("REGRAFT_DUMP_DIR", str(tmp_path))
    monkeypatch.setenv("REGRAFT_LOGS", "fusions")
    with caplog.at_level(logging.INFO, "regraft.fusions"):
        report = regraft.optimize(model, dry_run=True, verbose=False)
    assert not any(g.rule.startswith("rope") for g in report.rewrites)
    assert any("-> one linear" in r.getMessage() for r in caplog.records)
    files = sorted(p.name for p in tmp_path.rglob("*.py"))
    assert files[0] == "000_CANONICALIZE_canonicalize.py"
    norms = next(tmp_path.rglob("*_RAISE_rms_norm.py")).read_text()
    assert "# +" in norms and "regraft" in norms and "modeling_llama.py" in norms
    monkeypatch.setenv("REGRAFT_LOGS", "fusion")
    with pytest.raises(regraft.OptionError, match="did you mean 'fusions'"):
        regraft.optimize(model, dry_run=True, verbose=False)


def test_text_generation_pipeline() -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(TRAINED)
    model = transformers.AutoModelForCausalLM.from_pretrained(TRAINED, dtype=torch.float32)
    settings = {"max_new_tokens": 6, "do_sample": False, "use_cache": False, "return_full_text": False}
    expected = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer)("import os", **settings)
    regraft.optimize(model, verbose=False)
    assert isinstance(model.forward, Dispatch)
    found = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer)("import os", **settings)
    assert found == expected
    assert model.report.calls["original"] == 0 and model.report.calls["graph"] >= 6


def test_a_report_attribute_of_the_models_own_is_kept() -> None:
    class Reporting(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.report = torch.nn.Linear(4, 4), "mine"

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.first(x)

    model = regraft.optimize(Reporting().eval(), example_inputs={"x": torch.randn(3, 4)}, verbose=False)
    assert model.report == "mine" and isinstance(model.forward.report, Report)


@pytest.mark.gpu
def test_on_the_gpu_in_bf16() -> None:
    model = tiny_llama(2).to("cuda", torch.bfloat16)
    regraft.optimize(model, verbose=False, strict=True)
    ids = tokens(3, 17).cuda()
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    found = model(ids, attention_mask=mask).logits[mask.bool()]
    expected = model.forward.original(ids, attention_mask=mask).logits[mask.bool()]
    torch.testing.assert_close(found, expected.detach(), rtol=0, atol=0.03)
    assert model.report.calls == {"graph": 1, "original": 0}
