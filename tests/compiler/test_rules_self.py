"""Every rule of the pipeline against its own pattern, in fp64 on odd sizes; and that wrong rules fail."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx, nn

from regraft.compiler.match import Match
from regraft.compiler.pattern import Builder
from regraft.compiler.provenance import rewritten_by
from regraft.compiler.rule import Emitter, GroupRule, Reject, Rule, Stage
from regraft.compiler.selftest import SelfTestError, self_test
from regraft.passes import eager_attention as eager
from regraft.passes.eager_attention import ADD, CAP, DEPTH, FILL, FLOOR, SCALE, SHIFT, SHIFT_2, WHERE, WHERE_NOT
from regraft.passes.pipeline import PASSES

aten = torch.ops.aten
END = 2**62
RULES = {rule.name: rule for step in PASSES for rule in step.rules}


def weight(*sizes: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*sizes, dtype=torch.float64))


def x(draw: int, *last: int) -> torch.Tensor:
    return torch.randn(3 - draw % 2, 5 + 2 * draw, *last, dtype=torch.float64)


def norm(draw: int) -> dict[str, Any]:
    return {"x": x(draw, 7 + 2 * draw), "w": weight(7 + 2 * draw), "eps": 1e-5}


def folded_linear(draw: int) -> dict[str, Any]:
    inner, outer = 5 + 2 * draw, 9 + draw
    value = x(draw, inner)
    sizes = {"rows": [-1, inner], "sizes": [*value.shape[:2], outer]}
    return {"x": value, "w": weight(inner, outer), "b": weight(outer), **sizes}


def rows_linear(draw: int) -> dict[str, Any]:
    return {"x": torch.randn(7 + draw, 5), "w": weight(5, 9 + draw), "b": weight(9 + draw)}


def tables(draw: int, width: int) -> dict[str, Any]:
    angle = torch.randn(5 + 2 * draw, width, dtype=torch.float64)
    return {"cos": angle.cos(), "sin": angle.sin()}


def rope(draw: int) -> dict[str, Any]:
    width = 6 + 4 * draw
    half = {"a": 0, "b": width // 2, "c": width // 2, "d": END}
    return {"x": torch.randn(2, 3, 5 + 2 * draw, width), **half, **tables(draw, width)}


def rope_interleaved(draw: int) -> dict[str, Any]:
    width = 6 + 4 * draw
    value = torch.randn(2, 3, 5 + 2 * draw, width)
    return {"x": value, "a": END, "b": END, "shape": list(value.shape), **tables(draw, width)}


def rope_half_tables(draw: int) -> dict[str, Any]:
    width = 6 + 4 * draw
    halves = {"a": 0, "b": width // 2, "c": width // 2, "d": END, "step": 1}
    pairs = {"a": 0, "b": END, "c": 1, "d": END, "step": 2}
    return {"x": torch.randn(2, 3, 5 + 2 * draw, width), **(pairs if draw % 2 else halves), **tables(draw, width // 2)}


def rope_complex(draw: int) -> dict[str, Any]:
    width = 6 + 4 * draw
    value = torch.randn(2, 3, 5 + 2 * draw, width, dtype=torch.float64)
    angles = torch.randn(5 + 2 * draw, width // 2, dtype=torch.float64)
    shapes = {"pairs": [*value.shape[:-1], width // 2, 2], "shape": list(value.shape)}
    return {"x": value, "freqs": torch.polar(torch.ones_like(angles), angles), **shapes}


def rope_partial(draw: int) -> dict[str, Any]:
    rotated, kept = 4 + 2 * draw, 3 + draw
    given = {"layout": "interleaved" if draw % 2 else "half", "compute_dtype": None}
    slices = {"a": 0, "b": rotated, "c": rotated, "d": END}
    return {"x": torch.randn(2, 3, 5 + 2 * draw, rotated + kept), **slices, **given, **tables(draw, rotated)}


def norm_rope(draw: int) -> dict[str, Any]:
    width = 6 + 4 * draw
    given = {"eps": 1e-6, "offset": float(draw % 2), "mid_dtype": None, "out_dtype": None}
    heads = {"dim0": -3, "dim1": -2, "layout": "half", "compute_dtype": None}
    value = torch.randn(2, 5 + 2 * draw, 5 + 2 * draw, width)  # as many heads as tokens: both forms are rotations
    return {"x": value, "weight": weight(width), **given, **heads, **tables(draw, width)}


def patches(draw: int) -> dict[str, Any]:
    kernel = [2, 3 + draw]
    given = {"bias": weight(6) if draw % 2 else None, "stride": kernel}
    return {"x": torch.randn(3, 4, 7 + draw, 12 + draw), "w": weight(6, 4, *kernel), **given}


def attention(draw: int) -> dict[str, Any]:
    batch, heads, queries, keys, width = 2, 3, 4 + draw, 7 + draw, 5 + 2 * draw
    q, k, v = (torch.randn(batch, heads, n, width) for n in (queries, keys, keys))
    return {"q": q, "k": k, "v": v}


def sdpa(draw: int) -> dict[str, Any]:
    given = attention(draw)
    shape = (2, 1, given["q"].shape[2], given["k"].shape[2])
    masks = (None, torch.rand(shape) < 0.8, torch.randn(shape))
    mask = masks[draw % 3]
    if mask is not None and mask.dtype is torch.bool:
        mask[..., 0] = True
    return {**given, "mask": mask, "dropout": 0.0, "causal": False, "scale": (None, 0.3)[draw % 2], "enable_gqa": False}


def eager_attention(draw: int) -> dict[str, Any]:
    """Anything that may happen to scores `[2, 3, queries, keys]`."""
    given = attention(draw)
    queries, keys = given["q"].shape[2], given["k"].shape[2]
    mask = torch.rand(2, 1, queries, keys) < 0.6  # whether true means visible or hidden, each row sees a key
    mask[..., 0], mask[..., 1] = True, False
    sizes = ((2, 1, queries, keys), (3, queries, keys), (queries, keys), (1, 3, 1, keys))
    steps: dict[str, Any] = {}
    for i in range(DEPTH):
        steps |= {f"by_{i}": 0.37 + 0.2 * i, f"added_{i}": torch.randn(sizes[(draw + i) % 4]), f"cap_{i}": 1.5}
        steps |= {f"mask_{i}": mask, f"lowest_{i}": float("-inf") if i % 2 else -1e30}
    sinks = torch.randn(3).reshape(1, 3, 1, 1).expand(2, 3, queries, 1)
    steps |= {"by_q": 0.7, "by_k": 1.9}
    rest = {"sinks": sinks, "end": -1, "hidden_after": mask, "nan": None, "softmax_dtype": None}
    return {"q": given["q"], "kt": given["k"].transpose(2, 3), "v": given["v"], **steps, **rest}


def eager_attention_without_heads(draw: int) -> dict[str, Any]:
    """Three dimensions, as in Bloom, with the bias added by the product itself."""
    given = eager_attention(draw)
    operands = {name: given[name].flatten(0, 1) for name in ("q", "kt", "v")}
    queries, keys = operands["q"].shape[1], operands["v"].shape[1]
    mask = given["mask_0"].expand(2, 3, queries, keys).flatten(0, 1)
    steps = {f"mask_{i}": mask for i in range(DEPTH)} | {f"added_{i}": torch.randn(6, 1, keys) for i in range(DEPTH)}
    return {**given, **operands, **steps, "alibi": torch.randn(6, 1, keys), "beta": 0.7, "alpha": 0.3}


def chain(*forms: int, **rest: int) -> dict[str, int]:
    """The steps from the product outwards, and what else is chosen, by tag."""
    tags = {"base": 0, "q_form": 2, "k_form": 2, f"step_{DEPTH - 1 - len(forms)}": 0, "with_sinks": 0, **rest}
    for i, form in enumerate(reversed(forms)):
        tags |= {f"step_{DEPTH - 1 - i}": 1, f"form_{DEPTH - 1 - i}": form}
    return tags


def repeat_kv(draw: int) -> dict[str, Any]:
    given, times = attention(draw), 2 + draw
    batch, kv, keys, width = given["k"].shape
    grown = {"q": torch.randn(batch, kv * times, 4 + draw, width)}
    for name in "kv":
        grown |= {f"{name}_sizes": [batch, kv, times, keys, width], f"{name}_shape": [batch, kv * times, keys, width]}
        grown |= {f"{name}_times": times}
    rest = {"mask": None, "bias": None, "key_mask": None, "sinks": None, "scale": 0.3, "left": -1, "right": -1}
    return {**given, **grown, **rest, "softcap": 0.0}


def gate_up(draw: int) -> dict[str, Any]:
    inner, outer = 5 + 2 * draw, 8 + 2 * draw
    bias = {"gate_bias": weight(outer), "up_bias": weight(outer)} if draw % 2 else {"gate_bias": None, "up_bias": None}
    kind = ("silu", "gelu_tanh", "relu")[draw % 3]
    weights = {"gate_weight": weight(outer, inner), "up_weight": weight(outer, inner)}
    return {"x": x(draw, inner), "kind": kind, **weights, **bias}


def packed_gate_up(draw: int) -> dict[str, Any]:
    inner, half = 5 + 2 * draw, 3 + 2 * draw
    slices = {"a": 0, "b": half, "c": half, "d": 2 * half}
    return {"x": x(draw, inner), "weight": weight(2 * half, inner), "bias": weight(2 * half), "kind": "silu"} | slices


def linear_act(draw: int) -> dict[str, Any]:
    bias = weight(9) if draw % 2 else None
    return {"x": x(draw, 5), "weight": weight(9, 5), "bias": bias, "kind": ("relu", "gelu", "quick_gelu")[draw % 3]}


def add_rms_norm(draw: int) -> dict[str, Any]:
    width = 5 + 2 * draw
    given = {"weight": weight(width), "eps": 1e-6, "offset": float(draw % 2), "mid_dtype": None, "out_dtype": None}
    return {"x": x(draw, width), "residual": x(draw, width), **given}


def add_layer_norm(draw: int) -> dict[str, Any]:
    width = 5 + 2 * draw
    given = {"weight": weight(width), "bias": weight(width) if draw % 2 else None, "eps": 1e-5}
    return {"x": x(draw, width), "residual": x(draw, width), **given}


def qkv_rope(draw: int) -> dict[str, Any]:
    """By turns with the heads in front of the sequence and behind it."""
    batch, length, head, inner = 3 - draw % 2, 5 + 2 * draw, 6, 7
    given: dict[str, Any] = {"x": torch.randn(batch, length, inner), "weight": weight(8 * head, inner)}
    given |= {"bias": weight(8 * head) if draw % 2 else None, "v_start": 6 * head, "v_end": END}
    for of, start, heads in (("q", 0, 4), ("k", 4, 2)):
        given |= {f"{of}_start": start * head, f"{of}_end": (start + heads) * head, f"{of}_dim0": 1, f"{of}_dim1": 2}
        given |= {f"{of}_sizes": [batch, length, heads, head], f"{of}_weight": weight(head), f"{of}_eps": 1e-6}
        given |= {f"{of}_offset": 0.0, f"{of}_mid_dtype": None, f"{of}_out_dtype": None}
    angle = torch.randn(1, length, head, dtype=torch.float64)
    dims = {"cos_dim": 1 + draw % 2, "sin_dim": 1 + draw % 2}
    return {**given, **dims, "cos": angle.cos(), "sin": angle.sin(), "layout": "half", "compute_dtype": None}


def layer_norm(draw: int) -> dict[str, Any]:
    given = {"shape": [7], "weight": weight(7), "bias": weight(7) if draw % 2 else None, "eps": 1e-5, "cudnn": True}
    return {"x": x(draw, 7), **given}


def aten_rms_norm(draw: int) -> dict[str, Any]:
    width = 7 + 2 * draw
    return {"x": x(draw, width), "shape": [width], "weight": weight(width), "eps": (None, 1e-5)[draw % 2]}


def written_norm(draw: int) -> dict[str, Any]:
    width = 7 + 2 * draw
    return {"x": x(draw, width), "w": weight(width), "b": weight(width), "eps": 1e-5, "correction": 0}


def centered(draw: int) -> dict[str, Any]:
    return {"x": x(draw, 7), "weight": weight(7), "eps": 1e-5, "mid_dtype": None, "out_dtype": None}


class Siblings(nn.Module):
    """Linears on one value inside one block, some with bias."""

    def __init__(self, count: int, inner: int) -> None:
        super().__init__()
        outers = (9, 5, 7, 3)
        self.block = nn.Module()
        self.block.parts = nn.ModuleList(nn.Linear(inner, outers[i], bias=i % 2 == 1) for i in range(count))

    def forward(self, value: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(part(value) for part in self.block.parts)


def siblings(draw: int) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    return Siblings(2 + draw, 5 + 2 * draw), (x(draw, 5 + 2 * draw),)


SAMPLES: dict[str, Callable[[int], Any]] = {
    "addmm_linear": folded_linear,
    "mm_linear": folded_linear,
    "flat_addmm_linear": rows_linear,
    "matmul_linear": lambda d: {"x": x(d, 5), "w": weight(5, 9 + d)},
    "rms_norm": norm,
    "rms_norm_without_weight": norm,
    "aten_rms_norm": aten_rms_norm,
    "layer_norm": layer_norm,
    "centered_rms_norm": centered,
    "softmax": lambda d: {"x": x(d, 7), "dim": -1, "wide": torch.float64 if d % 2 else None},
    "written_layer_norm": written_norm,
    "divided_rms_norm": written_norm,
    "rope_half": rope,
    "rope_interleaved": rope_interleaved,
    "rope_half_tables": rope_half_tables,
    "rope_partial": rope_partial,
    "rope_complex": rope_complex,
    "norm_rope": norm_rope,
    **{name: lambda d: {"x": 2 * x(d, 7)} for name in RULES if name.startswith("activation_")},
    "glu": lambda d: {"gate": x(d, 7), "up": x(d, 7), "kind": ("silu", "gelu")[d % 2]},
    "sdpa_attention": sdpa,
    "repeat_kv": repeat_kv,
    "qkv": siblings,
    "qkv_rope": qkv_rope,
    "gate_up": gate_up,
    "packed_gate_up": packed_gate_up,
    "linear_act": linear_act,
    "patches": patches,
    "softcap": lambda d: {"x": 20 * x(d, 7), "cap": 5.0 + d},
    "add_rms_norm": add_rms_norm,
    "add_layer_norm": add_layer_norm,
}


def test_every_rule_has_a_sample() -> None:
    assert set(SAMPLES) | {"eager_attention"} == set(RULES)


@pytest.mark.parametrize("name", sorted(set(RULES) - {"eager_attention"}))
def test_rule(name: str) -> None:
    tested = self_test(RULES[name], SAMPLES[name])
    assert tested.fired >= 3


SCORES = (
    *[(form,) for form in (SCALE, eager.DIVIDE, ADD, FILL, WHERE, WHERE_NOT, CAP, SHIFT, SHIFT_2, FLOOR)],
    (SCALE, ADD, FILL),
    (ADD, SCALE, WHERE_NOT),
    (ADD, ADD, eager.DIVIDE, WHERE),
    (SCALE, CAP, ADD, FILL, SHIFT),
    (),
)
"""What may happen to the scores, from the product outwards."""


@pytest.mark.parametrize("draw", range(4))
def test_eager_attention(draw: int) -> None:
    spellings = [chain(*forms) for forms in SCORES]
    spellings += [chain(SCALE, q_form=q, k_form=k) for q in (0, 1, 2) for k in (0, 1)]
    spellings += [chain(FILL, cleared=0), chain(SCALE, ADD, cleared=1)]
    tested = self_test(RULES["eager_attention"], lambda _: eager_attention(draw), draws=1, spellings=spellings)
    assert tested.fired == len(spellings)


def test_eager_attention_with_a_factor_for_each_head() -> None:
    given = {f"by_{i}": torch.rand(3, 1, 1) for i in range(DEPTH)}
    sample = lambda draw: eager_attention(draw) | given  # noqa: E731
    assert self_test(RULES["eager_attention"], sample, spellings=[chain(SCALE), chain(SCALE, ADD)]).fired == 6
    with pytest.raises(SelfTestError, match="multiplied by a tensor"):
        self_test(RULES["eager_attention"], sample, spellings=[chain(ADD, SCALE)])


@pytest.mark.parametrize("draw", range(3))
def test_eager_attention_without_heads(draw: int) -> None:
    rule = RULES["eager_attention"]
    spellings = [chain(), chain(base=1), chain(FILL, base=1), chain(ADD, WHERE)]
    tested = self_test(rule, lambda _: eager_attention_without_heads(draw), draws=1, spellings=spellings)
    assert tested.fired == len(spellings)


class Silu(Rule):
    """A right rule, for wrong ones to differ from."""

    stage = Stage.RAISE

    def pattern(self, p: Builder, x: Any) -> Any:
        return p.mul(x, p.sigmoid(x))

    def emit(self, m: Match, g: Emitter) -> fx.Node:
        return g.silu(m.x)


class Halved(Silu):
    """Wrong by meaning."""

    def emit(self, m: Match, g: Emitter) -> fx.Node:
        return g.mul(g.silu(m.x), 0.5)


class Endless(Silu):
    """Right, but matches its own result."""

    def emit(self, m: Match, g: Emitter) -> fx.Node:
        return g.mul(m.x, g.sigmoid(m.x))


class Transposed(Silu):
    """Wrong by shape."""

    def emit(self, m: Match, g: Emitter) -> fx.Node:
        return g.transpose(g.silu(m.x), 0, 1)


class Rounded(Silu):
    """Wrong by precision."""

    def emit(self, m: Match, g: Emitter) -> fx.Node:
        narrow = g.cast(g.silu(m.x), dtype=torch.float16)
        return g.cast(narrow, dtype=m.dtype(m.x))


class Timid(Silu):
    """Refuses everything."""

    def check(self, m: Match) -> Reject | None:
        return Reject("never", m.x)


class Impossible(Silu):
    """One alternative of the pattern takes an operator that its operands do not allow."""

    def pattern(self, p: Builder, x: Any) -> Any:
        return p.any(p.mul(x, p.sigmoid(x)), p.mul(x, p.t(x)))


class Raising(Silu):
    """Emits something that cannot be computed."""

    def emit(self, m: Match, g: Emitter) -> fx.Node:
        return g.matmul(m.x, m.x)


class Shuffled(GroupRule):
    """A group rule that gives its siblings back in the wrong order."""

    targets = frozenset([aten.linear.default])

    def key(self, node: fx.Node) -> Any:
        return None if rewritten_by(node) else node.args[0]

    def emit(self, group: Any, g: Emitter) -> tuple[fx.Node, ...]:
        return tuple(g.linear(*node.args) for node in reversed(group))


def plain(draw: int) -> dict[str, Any]:
    return {"x": x(draw, 7)}


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        (Halved(), "changes the result"),
        (Transposed(), r"makes torch.float64 \[.*\] of torch.float64"),
        (Rounded(), "changes the result"),
        (Timid(), "fired nowhere: never"),
        (Impossible(), "the alternative mul .* never fired"),
        (Raising(), "what it put there raises"),
        (Endless(), "fires again"),
    ],
    ids=lambda value: value.name if isinstance(value, Rule) else "",
)
def test_a_wrong_rule_fails(rule: Rule, said: str) -> None:
    with pytest.raises(SelfTestError, match=said):
        self_test(rule, plain)


def test_a_right_rule_passes() -> None:
    tested = self_test(Silu(), plain)
    assert (tested.fired, tested.fired_with_casts) == (3, 3)


def test_a_wrong_group_rule_fails() -> None:
    def equal_siblings(draw: int) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
        module = Siblings(2, 5)
        module.block.parts = nn.ModuleList(nn.Linear(5, 3) for _ in range(2))
        return module, (x(draw, 5),)

    with pytest.raises(SelfTestError, match="changes the result"):
        self_test(Shuffled(), equal_siblings)


def test_a_rule_that_rounds_more_fails_in_low_precision_only() -> None:
    class Wide(Silu):
        """silu in fp64, and a detour over fp8 in bf16."""

        def emit(self, m: Match, g: Emitter) -> fx.Node:
            result = g.silu(m.x)
            if m.dtype(m.x) is torch.float64:
                return result
            return g.cast(g.cast(result, dtype=torch.float8_e4m3fn), dtype=m.dtype(m.x))

    with pytest.raises(SelfTestError, match=r"is wrong .*with casts.* is allowed"):
        self_test(Wide(), plain)


def test_a_sample_without_a_variable_is_named() -> None:
    with pytest.raises(ValueError, match="has no 'x'"):
        self_test(Silu(), lambda draw: {})
