"""A power of two goes from the queries into attention's scale; nothing else does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import zoo
from small_graphs import Small, aten

from regraft.compiler.capture import capture
from regraft.compiler.pipeline import Context, Settings
from regraft.kernels.attention import attention
from regraft.passes.attention_scale import attention_scale
from regraft.passes.pipeline import compile_program

CONTEXT = Context(Settings(torch.device("cpu")), None)


def _graph(factor: float, read_again: bool = False) -> tuple[Small, Any]:
    small = Small()
    q, k, v = (small.input(n, torch.randn(2, 5, 2, 8)) for n in "qkv")
    scaled = small.call(aten.mul.Tensor, q, factor)
    turned = small.call(aten.transpose.int, scaled, 1, 2)
    keys, values = (small.call(aten.transpose.int, t, 1, 2) for t in (k, v))
    y = small.call(attention.overload, turned, keys, values, None, None, None, None, 1.0, -1, 0)
    program = small.program(y, *([scaled] if read_again else []))
    return small, program


def test_a_power_of_two_is_folded_bit_for_bit() -> None:
    small, program = _graph(0.125)
    before = small.run()
    assert len(attention_scale(program, CONTEXT).rewrites) == 1
    assert not list(program.graph.find_nodes(op="call_function", target=aten.mul.Tensor))
    assert torch.equal(before[0], small.run()[0])


@pytest.mark.parametrize(("factor", "read_again"), [(0.1, False), (-0.5, False), (0.0, False), (0.5, True)])
def test_what_would_round_or_is_read_elsewhere_stays(factor: float, read_again: bool) -> None:
    _, program = _graph(factor, read_again)
    assert not attention_scale(program, CONTEXT).rewrites


def test_queries_that_are_also_keys_stay() -> None:
    small = Small()
    h = small.input("h", torch.randn(2, 2, 5, 8))
    scaled = small.call(aten.mul.Tensor, h, 0.5)
    y = small.call(attention.overload, scaled, scaled, scaled, None, None, None, None, 1.0, -1, 0)
    assert not attention_scale(small.program(y), CONTEXT).rewrites


def test_whisper() -> None:
    model, inputs = zoo.build("whisper")
    program = capture(model, inputs, {}, cache=False)
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    result = compile_program(
        program,
        Settings(
            torch.device("cpu"),
            weights=lambda i: i.value if i.value is not None else state[i.target],
            inputs=program.example,
            model=model,
        ),
    )
    (found,) = (p for p in result.passes if p.name == "attention_scale")
    assert found.rewrites
