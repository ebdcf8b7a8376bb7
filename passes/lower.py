"""Choose a kernel for each op: the best provider that supports the call, or the op's reference.

    regraft.rms_norm(x, w, eps)    ->    kernels.rms_norm_triton.run(x, w, eps)

A provider that refuses says why. On a device where kernels run, each is compared with its reference once for every
signature before it is used; those that pass are bound together, and which of them computes a call is decided by its
sizes (`kernels/choice.py`).
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from torch import fx

from ..compiler.pipeline import Context
from ..compiler.program import InputKind, Program
from ..compiler.provenance import module_of, source_of
from ..compiler.records import Check, NearMiss, PassResult, Reverted, Rewrite
from ..compiler.rule import Stage
from ..compiler.verify import Evaluator, compare
from ..kernels import choice, tuning
from ..kernels.linear_act import linear_act
from ..kernels.op import Kernel, Op
from ..kernels.table import PROVIDERS, op_of
from . import pairs
from .ahead import Wanted, compile_ahead
from .early import at_rest, moving_of


def lower(program: Program, context: Context) -> PassResult:
    """Retarget every node that calls one of our ops, in place."""
    started = time.perf_counter()
    graph = program.graph
    result = PassResult("lower", Stage.LOWER.name, nodes_before=len(graph.nodes))
    refusals: Counter[tuple[str, str, str]] = Counter()
    places: dict[tuple[str, str, str], fx.Node] = {}
    chosen: dict[Any, tuple[Kernel, ...]] = {}
    bound: dict[Any, Any] = {}
    given = (InputKind.USER, InputKind.STEP, InputKind.PAGES)
    weights = {node for node, input in program.placeholder_inputs().items() if input.kind not in given}
    candidates = pairs.candidates(graph, weights, context.settings.device)
    _compile_ahead(graph, weights, candidates, context)
    joint = pairs.right(graph, candidates, context.evaluator, result)
    for node in list(graph.nodes):
        plain = node.target is torch.ops.aten.linear.default and _by_rows(context)
        op = linear_act if plain else op_of(node.target)
        if op is None:
            continue
        if plain:
            node.args, node.kwargs, node.target = _as_linear_act(node), {}, linear_act.overload
        signature = _signature(op, node.args, node.kwargs)
        moving = moving_of(node, op, weights)
        key = (op.name, repr(signature), moving)
        if key not in chosen:
            chosen[key] = _choose(graph, node, op, signature, moving, context, result, refusals, places)
        kernels = chosen[key]
        if kernels and kernels not in bound:
            bound[kernels] = choice.bind(op, kernels)
        node.target = bound[kernels] if kernels else op.reference
        provider = " or ".join(k.provider for k in kernels) or "reference"
        result.rewrites.append(
            Rewrite("lower", module_of(node), source_of(node), f"{op.name} -> {provider}", (node.name,), (node.name,))
        )
    pairs.join(graph, joint, result)
    for (name, provider, reason), count in refusals.items():
        node = places[name, provider, reason]
        result.misses.append(
            NearMiss("lower", module_of(node), source_of(node), f"{name} on {provider}", reason, 1, 1, count)
        )
    graph.lint()
    result.nodes_after = len(graph.nodes)
    result.time_s = time.perf_counter() - started
    return result


def _compile_ahead(
    graph: fx.Graph, weights: Collection[fx.Node], candidates: Sequence[pairs.Candidate], context: Context
) -> None:
    """Have the kernels that `_choose` and `pairs.right` are about to compare, one for each signature."""
    if context.evaluator is None:
        return
    wanted: dict[Any, Wanted] = {}
    for pair, key in candidates:
        wanted.setdefault(key, (pair.kernel, pair.args, {}))
    for node in graph.nodes:
        plain = node.target is torch.ops.aten.linear.default and _by_rows(context)
        op = linear_act if plain else op_of(node.target)
        if op is None:
            continue
        args, kwargs = (_as_linear_act(node), {}) if plain else (node.args, node.kwargs)
        signature, moving = _signature(op, args, kwargs), moving_of(node, op, weights)
        for kernel, reason in _providers(op, signature, moving):
            if reason is None:
                wanted.setdefault((kernel, repr(signature)), (kernel, args, kwargs))
    compile_ahead(list(wanted.values()), context.evaluator, context.settings.device)


def _as_linear_act(node: fx.Node) -> tuple[Any, ...]:
    """Arguments of `linear_act` for a plain linear layer."""
    x, weight, bias = (*node.args, None)[:3]
    return x, weight, node.kwargs.get("bias", bias), "identity"


def _signature(op: Op, args: Sequence[Any], kwargs: Any) -> dict[str, Any]:
    args, kwargs = fx.node.map_arg((tuple(args), dict(kwargs)), lambda n: n.meta["val"])
    return op.signature(*args, **kwargs)


def _by_rows(context: Context) -> bool:
    """Whether a plain linear layer has another provider than PyTorch for some number of rows on this device."""
    device = context.settings.device
    if device.type != "cuda" or not _plain_linears():
        return False
    return "linear_act" in tuning.providers(tuning.device_limits(device)[0])


def _plain_linears() -> tuple[Kernel, ...]:
    """PyTorch's first: without a measurement nothing else computes a plain linear layer."""
    kernels = {k.provider: k for k in PROVIDERS.get("linear_act", ())}
    return tuple(kernels[p] for p in ("cublas", "skinny", "wgmma", "stream", "strip") if p in kernels)


def _choose(
    graph: fx.Graph,
    node: fx.Node,
    op: Op,
    signature: dict[str, Any],
    moving: frozenset[str],
    context: Context,
    result: PassResult,
    refusals: Counter[tuple[str, str, str]],
    places: dict[tuple[str, str, str], fx.Node],
) -> tuple[Kernel, ...]:
    """The kernels that support the call and compute it right, best first; empty: the reference."""
    found: list[Kernel] = []
    for kernel, reason in _providers(op, signature, moving):
        if reason is not None:
            if context.settings.device.type == "cuda":
                refusals[op.name, kernel.provider, reason] += 1
                places.setdefault((op.name, kernel.provider, reason), node)
            continue
        if context.evaluator is None:
            found.append(kernel)
            continue
        check, reason = _check(graph, node, kernel, context.evaluator)
        if reason is None:
            found.append(kernel)
            continue
        text = f"the {kernel.provider} kernel of {op.name} {reason}"
        result.reverted.append(Reverted("lower", module_of(node), source_of(node), text, check))
    return tuple(found)


def _providers(op: Op, signature: dict[str, Any], moving: frozenset[str]) -> Iterator[tuple[Kernel, str | None]]:
    """Kernels of the op, best first, and why one cannot take the call."""
    plain = op is linear_act and signature["kind"] == "identity"
    for kernel in _plain_linears() if plain else PROVIDERS.get(op.name, ()):
        reason = kernel.supports(signature)
        if reason is None and not moving.isdisjoint(kernel.early):
            reason = f"it reads {' and '.join(kernel.early)} before the kernels end that may compute it"
        yield kernel, reason


def _check(graph: fx.Graph, node: fx.Node, kernel: Kernel, evaluator: Evaluator) -> tuple[Check | None, str | None]:
    """The kernel against the node's own op, and what is wrong with it, if anything."""
    with graph.inserting_after(node):
        trial = graph.call_function(at_rest(kernel), node.args, node.kwargs)
    try:
        check = compare(evaluator, [node], [node], [trial], [trial], meaning=False)
    except Exception as error:
        if not choice.is_kernel_failure(error):
            raise
        return None, f"does not run ({choice.brief(error)})"
    finally:
        evaluator.forget([trial])
        graph.erase_node(trial)
    if check.passed:
        return check, None
    return check, f"errs by {check.error_after:.3g}, allowed {check.bound:.3g}"
