"""What a decoder reads of its encoder's states, as a program of its own: they are computed once, not in every step.

k = linear(encoder_states, w_k)    v = linear(encoder_states, w_v)      of every attention to them
    ->    (k_0, v_0, k_1, v_1, ...)    each [N, Hkv, D]
"""

from __future__ import annotations

import time

import torch

from ..compiler.cross import STATES, forget_input, is_cross
from ..compiler.opset import arguments
from ..compiler.pipeline import Context
from ..compiler.program import InputKind, Program
from ..compiler.records import PassResult
from ..compiler.rule import Stage
from .cache import heads_inside, layer_of


def encode(program: Program, context: Context) -> PassResult:
    """Leave of a decoder only these keys and values, in place; `program.layers` says what they are."""
    started = time.perf_counter()
    graph = program.graph
    result = PassResult("encode", Stage.CACHE.name, nodes_before=len(graph.nodes))
    nodes = [n for n in graph.nodes if n.target is torch.ops.regraft.attention.default and is_cross(program, n)]
    sides = []
    for node in nodes:
        given = arguments(node)
        with node.meta["val"].fake_mode, graph.inserting_before(node):
            sides += [heads_inside(graph, given["k"]), heads_inside(graph, given["v"])]
    output = next(n for n in graph.nodes if n.op == "output")
    output.args = (tuple(sides),)
    program.rebuild = tuple
    program.layers = tuple(map(layer_of, nodes))
    graph.eliminate_dead_code()
    for keyword in [i.target for i in program.inputs if i.kind is InputKind.USER and i.target != STATES]:
        forget_input(program, keyword, STATES)
    graph.lint()
    program.gm.recompile()
    result.nodes_after = len(graph.nodes)
    result.time_s = time.perf_counter() - started
    return result
