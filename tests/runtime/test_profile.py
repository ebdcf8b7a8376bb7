"""`profile`: kernels are given to the nodes that launched them, and what bounds them follows from their cost."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from runtime_models import tiny_llama

from regraft.runtime.cli import main
from regraft.runtime.profile import Line, Phase, kernels_by_node, table_of
from regraft.runtime.profile_model import STEPS, profile_model


def annotation(name: str, ts: float, dur: float) -> dict[str, object]:
    return {"cat": "user_annotation", "name": name, "ts": ts, "dur": dur}


def test_a_kernel_belongs_to_the_node_that_launched_it() -> None:
    events = [
        annotation("regraft::linear", 10.0, 5.0),
        annotation("regraft::norm", 20.0, 5.0),
        annotation("other", 0.0, 100.0),
        *(
            {"cat": "cuda_runtime", "name": "launch", "ts": t, "dur": 1.0, "args": {"correlation": c}}
            for t, c in ((12, 1), (21, 2), (23, 3), (17, 4))
        ),
        *(
            {"cat": "kernel", "name": n, "ts": 500.0, "dur": d, "args": {"correlation": c, "grid": [2, 3, 1]}}
            for n, d, c in (
                ("gemm", 7.0, 1),
                ("norm", 2.0, 2),
                ("tail", 1.0, 3),
                ("between", 9.0, 4),
                ("lost", 9.0, 99),
            )
        ),
    ]
    found = kernels_by_node(events, True)
    assert {node: [(k.name, k.us, k.blocks) for k in each] for node, each in found.items()} == {
        "linear": [("gemm", 7.0, 6)],
        "norm": [("norm", 2.0, 6), ("tail", 1.0, 6)],
    }


def line(bound: str, us: float) -> Line:
    return Line("regraft.rms_norm", "model.layers.*.norm", ("k",), 2, us, 1e6, 1e6, us / 2, bound)


def test_a_phase_is_bound_by_what_takes_most_of_it() -> None:
    assert Phase("p", 110.0, (line("compute", 60.0), line("bandwidth", 40.0))).bound == "compute"
    assert Phase("p", 300.0, (line("compute", 60.0), line("bandwidth", 40.0))).bound == "launch"
    assert "bound by launch" in table_of(Phase("p", 300.0, (line("compute", 60.0),)))[0]
    assert table_of(Phase("p", 9.0, (replace(line("occupancy", 9.0), blocks=64, occupancy=12.4),)))[1].endswith(
        "occupancy (64 blocks, 12 %)"
    )
    assert table_of(Phase("p", 300.0, (line("compute", 60.0),) * 3), most=2)[-1] == "  1 more, 60.0 us together"


def test_every_op_of_a_model_is_in_its_profile(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_llama()
    layers = model.config.num_hidden_layers
    phase, decode = profile_model(model, 2, 7, trace=tmp_path / "trace.json")
    count = {n.op: n.count for n in phase.lines if "layers" in n.module and n.op.startswith("regraft.")}
    assert count["regraft.attention"] == layers and count["regraft.gate_up"] == layers
    tokens, width = 2 * 7, model.config.hidden_size
    up = next(n for n in phase.lines if n.op == "regraft.gate_up")
    assert up.flops >= layers * 2 * tokens * width * 2 * model.config.intermediate_size
    assert all(n.us > 0 and n.roof_us > 0 for n in phase.lines if n.op.startswith("regraft."))
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    (read,) = (n for n in decode.lines if n.op == "regraft.paged_attention")
    config = model.config
    width = config.hidden_size // config.num_attention_heads
    # wall time was measured with 9 steps before the one that is profiled: 17 keys and values in each layer and row
    seen = layers * 2 * 17 * 2 * config.num_key_value_heads * width * 4
    assert decode.name == "decode 2 x 1 behind 7" and seen <= read.bytes <= 2 * seen
    assert (tmp_path / "trace_decode.json").exists()
    assert "forward" not in vars(model) and "generate" not in vars(model)
    config = tmp_path / "config.json"
    config.write_text(json.dumps({**model.config.to_dict(), "architectures": ["LlamaForCausalLM"]}))
    assert main(["profile", str(config), "--length", "5", "--device", "cpu", "--json", str(tmp_path / "p.json")]) == 0
    assert json.loads((tmp_path / "p.json").read_text())[0]["lines"][0]["us"] > 0
    assert "forward 1x5" in capsys.readouterr().out


def test_decoding_is_profiled_behind_what_fits() -> None:
    """A sequence may have 256 tokens: prompts of 300 are cut; a batch that no cache holds is said."""
    model = tiny_llama()
    forward, decode = profile_model(model, 2, 300)
    assert forward.name == "forward 2x300"
    assert decode.name == f"decode 2 x 1 behind {256 - STEPS + 1}" and decode.wall_us > 0 and decode.lines
    _, decode = profile_model(model, 65, 3)
    assert "expected 1 to 64 sequences" in decode.missing
    assert table_of(decode) == [f"decode 65 x 1 behind 3: not measured, {decode.missing}"]


@pytest.mark.gpu
def test_kernels_on_a_gpu_fill_the_call() -> None:
    model = tiny_llama().to("cuda", torch.bfloat16)
    phase, _ = profile_model(model, 2, 512)
    assert 0 < phase.device_us < 20 * phase.wall_us
    ops = {n.op for n in phase.lines}
    assert {"regraft.attention", "regraft.gate_up"} <= ops
    assert all(n.kernels and n.kernels != ("cpu",) for n in phase.lines)
