"""Attention on pages: the reference against `attention` on contiguous keys, the kernels against the reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from kernel_checks import assert_close, in_dtypes, on_devices, refusal
from torch import Tensor

from regraft.kernels.attention import attention
from regraft.kernels.launch import INTERPRETED
from regraft.kernels.op import Kernel
from regraft.kernels.paged_attention import paged_attention
from regraft.kernels.replay import record
from regraft.kernels.table import PROVIDERS

NAN = float("nan")


@dataclass(frozen=True)
class Batch:
    """Sequences with their keys in order, and the same as arguments of the op."""

    k: list[Tensor]
    v: list[Tensor]
    arguments: dict[str, Any]


def batch(
    queries: list[int],
    keys: list[int],
    *,
    heads: int = 4,
    kv_heads: int = 2,
    width: int = 16,
    value_width: int = 16,
    page: int = 16,
    left: int = -1,
    padding: int = 0,
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
    generator: int = 0,
) -> Batch:
    """Pages in no order; NaN wherever no key of a sequence lies, and in the rows that the op is to write.

    `padding`: rows of q, k and v behind the last sequence, of slot -1. Entries of pages that no query sees are -1.
    """
    torch.manual_seed(generator)
    tokens = sum(queries) + padding
    q = torch.randn(tokens, heads, width)
    k, v = ([torch.randn(n, kv_heads, w) for n in keys] for w in (width, value_width))
    counts = [-(-n // page) for n in keys]
    order = torch.randperm(sum(counts) + 2).tolist()
    k_pages = torch.full((sum(counts) + 2, page, kv_heads, width), NAN)
    v_pages = torch.full((sum(counts) + 2, page, kv_heads, value_width), NAN)
    table = torch.full((len(keys), max(1, *counts) + 1), -1, dtype=torch.int32)
    slots = []
    for s, (new, length) in enumerate(zip(queries, keys, strict=True)):
        first = 0 if left < 0 else max(0, length - new - left) // page * page
        for j in range(length):
            if j % page == 0:
                number = order.pop()
            if j >= first:
                table[s, j // page] = number
            if j < length - new:
                k_pages[number, j % page], v_pages[number, j % page] = k[s][j], v[s][j]
            else:
                slots.append(number * page + j % page)
    slots += [-1] * padding
    rest = [torch.full((padding, kv_heads, w), NAN) for w in (width, value_width)]
    news = [torch.cat([*(t[len(t) - n :] for t, n in zip(x, queries, strict=True)), r]) for x, r in zip((k, v), rest)]
    floats = {"q": q, "k": news[0], "v": news[1], "k_pages": k_pages, "v_pages": v_pages}
    integers = {"slots": torch.tensor(slots), "block_table": table}
    integers["cu_seqlens_q"] = torch.tensor([0, *queries]).cumsum(0).int()
    integers["lengths"] = torch.tensor(keys).int()
    arguments: dict[str, Any] = {name: t.to(device, dtype) for name, t in floats.items()}
    arguments |= {name: t.to(device) for name, t in integers.items()}
    arguments |= {"max_q": max(queries), "scale": width**-0.5, "left": left}
    k, v = ([t.to(device, dtype) for t in x] for x in (k, v))
    return Batch(k, v, arguments)


def cloned(arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments with pages and scales of their own."""
    own = ("k_pages", "v_pages", "k_scale", "v_scale")
    return {n: t.clone() if n in own and t is not None else t for n, t in arguments.items()}


OPTIONS: dict[str, dict[str, Any]] = {
    "causal": {},
    "window": {"left": 20},
    "sinks": {"sinks": torch.tensor([0.5, 2.0, -1.0, 0.0])},
    "slopes": {"slopes": torch.tensor([0.5, 0.25, 0.125, 0.0625])},
    "softcap": {"softcap": 1.5},
    "relative": {"relative": torch.linspace(-2, 2, 36).view(4, 9).cos()},
}

STEPS = {
    "decode": ([1, 1, 1], [70, 1, 16]),
    "chunks": ([5, 33, 1, 20], [5, 50, 33, 61]),
    "runs": ([3, 1, 4], [40, 17, 4]),
    "empty": ([1, 0, 1], [30, 0, 5]),
}


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("step", STEPS)
def test_reference_is_attention_on_contiguous_keys(step: str, option: str) -> None:
    queries, keys = STEPS[step]
    named = dict(OPTIONS[option])
    made = batch(queries, keys, left=named.get("left", -1), value_width=8, padding=2)
    y = paged_attention(**{**made.arguments, **named})
    slopes, relative = named.pop("slopes", None), named.pop("relative", None)
    row = 0
    for s, (new, length) in enumerate(zip(queries, keys, strict=True)):
        bias = None if slopes is None else slopes[:, None, None] * torch.arange(length)
        if relative is not None:
            places = torch.arange(length)
            bias = relative[:, (places[length - new :, None] - places).clamp(0, 8)]
        heads_first = (t.transpose(0, 1)[None] for t in (made.arguments["q"][row : row + new], made.k[s], made.v[s]))
        if new:
            expected = attention(*heads_first, bias=bias, scale=0.25, right=0, **named)[0]
            assert torch.allclose(y[row : row + new], expected, rtol=1e-12, atol=1e-12)
        row += new
    assert bool((y[row:] == 0).all())


def test_reference_writes_rows_to_their_slots() -> None:
    made = batch([3, 1], [18, 4], padding=2)
    before = cloned(made.arguments)
    paged_attention(**made.arguments)
    for name in ("k", "v"):
        expected = before[f"{name}_pages"].flatten(0, 1)
        expected[before["slots"][:4]] = before[name][:4]
        assert torch.equal(made.arguments[f"{name}_pages"].flatten(0, 1).nan_to_num(), expected.nan_to_num())


@pytest.mark.parametrize("pages", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_reference_divides_by_a_scale(pages: torch.dtype) -> None:
    """What is read is what was written to half a step: of the scale for int8, of three bits of mantissa for fp8."""
    made = batch([40], [40], dtype=torch.float32)
    arguments = dict(made.arguments)
    shape = arguments["k_pages"].shape[:3]
    for name in ("k", "v"):
        arguments[f"{name}_pages"] = torch.zeros(arguments[f"{name}_pages"].shape, dtype=pages)
        arguments[f"{name}_scale"] = torch.full(shape, NAN)
    arguments["k"][3, 1] = 0.0
    y = paged_attention(**arguments)
    assert bool(y.isfinite().all())
    at = arguments["slots"]
    for name in ("k", "v"):
        scale = arguments[f"{name}_scale"].flatten(0, 1)[at][..., None]
        read = arguments[f"{name}_pages"].float().flatten(0, 1)[at] * scale
        x = arguments[name]
        step = 0.5 * scale if pages == torch.int8 else x.abs() / 16 + scale * 2.0**-10
        assert bool(((read - x).abs() <= step * 1.001).all())


KERNEL, BEGINS = PROVIDERS["paged_attention"] if PROVIDERS else (None, None)


SCALED = [torch.int8] if INTERPRETED else [torch.int8, torch.float8_e4m3fn]
"""The interpreter truncates to float8_e4m3fn instead of rounding."""


def run_kernel(arguments: dict[str, Any], kernel: Kernel | None = KERNEL) -> Tensor:
    assert kernel is not None
    assert kernel.supports(paged_attention.signature(**arguments)) is None
    result: Tensor = kernel.run(**arguments)
    return result


def check(arguments: dict[str, Any], ulps: float = 16.0, kernel: Kernel | None = KERNEL) -> None:
    """Result and pages of the kernel against those of the reference; an fp64 run of it is the oracle."""
    mine, plain, wide = (cloned(arguments) for _ in range(3))
    for name in ("q", "k", "v", "sinks", "slopes", "relative"):
        if wide.get(name) is not None:
            wide[name] = wide[name].double()
    if wide.get("k_scale") is None:
        wide |= {name: wide[name].double() for name in ("k_pages", "v_pages")}
    actual, reference = run_kernel(mine, kernel), paged_attention.reference(**plain)
    assert_close(actual, reference, paged_attention.reference(**wide), ulps)
    for name in ("k_pages", "v_pages"):
        assert torch.equal(mine[name].float().nan_to_num(7e7), plain[name].float().nan_to_num(7e7))
    for name in ("k_scale", "v_scale"):
        if plain.get(name) is not None:
            assert torch.equal(mine[name].nan_to_num(7e7), plain[name].nan_to_num(7e7))


@on_devices
@in_dtypes
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("step", STEPS)
def test_triton(step: str, option: str, dtype: torch.dtype, device: str) -> None:
    """What lies in pages beside the keys of a sequence is NaN, and so are rows of padding."""
    named: dict[str, Any] = {n: x.to(device) if isinstance(x, Tensor) else x for n, x in OPTIONS[option].items()}
    made = batch(*STEPS[step], left=named.get("left", -1), padding=2, dtype=dtype, device=device)
    check({**made.arguments, **named})


@on_devices
@in_dtypes
@pytest.mark.parametrize("option", [name for name in OPTIONS if name not in ("slopes", "relative")])
def test_sequences_that_begin_need_no_pages(option: str, dtype: torch.dtype, device: str) -> None:
    """Pages are written, and what they hold besides is NaN; a call that is not fresh reads them."""
    named: dict[str, Any] = {n: x.to(device) if isinstance(x, Tensor) else x for n, x in OPTIONS[option].items()}
    for queries, keys, fresh in (([5, 33, 0, 1], [5, 33, 0, 1], True), ([5, 20], [40, 20], False)):
        made = batch(queries, keys, left=named.get("left", -1), padding=2, dtype=dtype, device=device)
        check({**made.arguments, **named, "fresh": fresh}, kernel=BEGINS)


@on_devices
def test_biases_are_read_with_pages(device: str) -> None:
    arguments = batch([3, 4], [3, 4], dtype=torch.float16, device=device).arguments
    assert BEGINS is not None and BEGINS.supports(paged_attention.signature(**arguments)) is None
    for name, bias in (("slopes", torch.ones(4, device=device)), ("relative", torch.ones(4, 9, device=device))):
        assert BEGINS.supports(paged_attention.signature(**arguments, **{name: bias})) == f"{name} is given"


@on_devices
@in_dtypes
@pytest.mark.parametrize(("width", "value_width"), [(40, 40), (80, 80), (96, 96), (24, 8), (16, 72), (192, 128)])
def test_triton_head_dimensions(width: int, value_width: int, dtype: torch.dtype, device: str) -> None:
    for queries, keys in ([1, 1], [37, 12]), ([9, 20], [9, 33]):
        check(batch(queries, keys, width=width, value_width=value_width, dtype=dtype, device=device).arguments)


@on_devices
@in_dtypes
@pytest.mark.parametrize(("heads", "kv_heads"), [(3, 3), (4, 1), (10, 2), (14, 2), (8, 1), (20, 1)])
@pytest.mark.parametrize("queries", [1, 4])
def test_triton_groups(queries: int, heads: int, kv_heads: int, dtype: torch.dtype, device: str) -> None:
    made = batch([queries, queries], [45, 6], heads=heads, kv_heads=kv_heads, dtype=dtype, device=device)
    sinks, slopes = torch.randn(heads, device=device), torch.rand(heads, device=device)
    check({**made.arguments, "sinks": sinks, "slopes": slopes})


@on_devices
@in_dtypes
@pytest.mark.parametrize("page", [1, 16, 12, 64])
def test_triton_page_sizes(page: int, dtype: torch.dtype, device: str) -> None:
    check(batch([1, 5, 30], [70, 11, 61], page=page, left=25, dtype=dtype, device=device).arguments)


@on_devices
@in_dtypes
@pytest.mark.parametrize("option", OPTIONS)
def test_triton_divides_long_keys(option: str, dtype: torch.dtype, device: str) -> None:
    """A table for many more keys than most sequences have: some of the programs that share the keys have none."""
    named: dict[str, Any] = {n: x.to(device) if isinstance(x, Tensor) else x for n, x in OPTIONS[option].items()}
    if option == "window":
        named["left"] = 130
    made = batch([1, 1, 2], [513, 3, 190], left=named.get("left", -1), padding=1, dtype=dtype, device=device)
    check({**made.arguments, **named})


@on_devices
@in_dtypes
@pytest.mark.parametrize("pages", SCALED, ids=str)
@pytest.mark.parametrize("queries", [1, 20])
def test_triton_scaled_pages(queries: int, pages: torch.dtype, dtype: torch.dtype, device: str) -> None:
    """Written in one call and read in the next; the rest of the pages has NaN as its scale."""
    made = batch([70, 40], [70, 40], value_width=24, dtype=dtype, device=device)
    arguments = dict(made.arguments)
    shape = arguments["k_pages"].shape[:3]
    for name in ("k", "v"):
        arguments[f"{name}_pages"] = torch.zeros(arguments[f"{name}_pages"].shape, dtype=pages, device=device)
        arguments[f"{name}_scale"] = torch.full(shape, NAN, device=device)
    arguments["k"][3, 1] = 0.0
    check(arguments)
    run_kernel(arguments)
    last = [*range(70 - queries, 70), *range(110 - queries, 110)]
    news = {name: torch.randn_like(arguments[name][last]) for name in ("q", "k", "v")}
    ends = torch.tensor([0, queries, 2 * queries], dtype=torch.int32, device=device)
    check({**arguments, **news, "slots": arguments["slots"][last], "cu_seqlens_q": ends, "max_q": queries})


@on_devices
@in_dtypes
def test_triton_rows_of_a_projection(dtype: torch.dtype, device: str) -> None:
    """q, k and v as views of one product, some rows of which are not to be written: their keys are in the pages."""
    made = batch([1, 3], [40, 20], dtype=dtype, device=device)
    arguments = dict(made.arguments)
    for name, x in (("k", made.k), ("v", made.v)):
        arguments[f"{name}_pages"].flatten(0, 1)[arguments["slots"][:1]] = x[0][-1]
    joined = torch.cat([arguments[n].flatten(1) for n in ("q", "k", "v")], dim=-1)
    q, k, v = joined.split((64, 32, 32), dim=-1)
    arguments |= {"q": q.unflatten(1, (4, 16)), "k": k.unflatten(1, (2, 16)), "v": v.unflatten(1, (2, 16))}
    arguments["slots"] = torch.tensor([-1, *arguments["slots"][1:].tolist()], device=device)
    arguments["k"][0], arguments["v"][0] = NAN, NAN
    check(arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("queries", [1, 5, 300])
def test_one_graph_and_one_plan_serve_all_lengths(queries: int) -> None:
    """The launch is the same for all lengths: what was recorded for one gives the result of another."""
    made = batch([queries] * 3, [900, 300, 700], width=64, value_width=64, dtype=torch.bfloat16, device="cuda")
    assert KERNEL is not None
    static = cloned(made.arguments)
    ordered = [static.get(a.name, a.default_value) for a in paged_attention.overload._schema.arguments]
    _, plan = record(KERNEL.run, tuple(ordered))
    assert plan is not None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = KERNEL.run(*ordered)
    other = batch(
        [queries, 0, queries], [queries, 0, 850], width=64, value_width=64, dtype=torch.bfloat16, device="cuda"
    )
    for name in ("q", "k", "v", "slots"):
        static[name].copy_(torch.zeros_like(static[name]) - 1)
        static[name][: 2 * queries].copy_(other.arguments[name])
    static["cu_seqlens_q"].copy_(other.arguments["cu_seqlens_q"])
    static["lengths"].copy_(other.arguments["lengths"])
    static["block_table"].fill_(-1)
    table = other.arguments["block_table"]
    static["block_table"][:, : table.shape[1]] = table
    for name in ("k_pages", "v_pages"):
        static[name][: len(other.arguments[name])] = other.arguments[name]
    plain = cloned(static)
    graph.replay()
    expected = paged_attention.reference(**plain)
    exact = paged_attention.reference(
        **{n: t.double() if n in ("q", "k", "v") else t for n, t in cloned(static).items()}
    )
    assert_close(y, expected, exact)
    assert torch.equal(plan(ordered), y)
    assert bool((y[2 * queries :] == 0).all())


@pytest.mark.gpu
def test_replays_see_what_the_steps_before_wrote() -> None:
    """Keys are read before kernels that run have ended: what a graph decodes is what kernels one by one decode."""
    from regraft.kernels.skinny_triton import linear_act

    assert KERNEL is not None
    torch.manual_seed(0)
    layers, rows, page, most, heads, kv_heads, width = 3, 4, 16, 64, 8, 2, 64
    steps, inner = 400, (heads + 2 * kv_heads) * width
    projections = torch.randn(layers, inner, heads * width, device="cuda", dtype=torch.bfloat16) * 0.04
    table = torch.randperm(rows * most, device="cuda").view(rows, most).int()
    ends = torch.arange(rows + 1, device="cuda", dtype=torch.int32)
    begins = torch.tensor([0, 100, 250, 560], device="cuda", dtype=torch.int32)
    start = torch.randn(rows, heads * width, device="cuda", dtype=torch.bfloat16)

    def decoder(between: Callable[[], None]) -> Callable[[], Tensor]:
        pages = torch.zeros(layers, 2, rows * most, page, kv_heads, width, device="cuda", dtype=torch.bfloat16)
        lengths, x = begins.clone(), start.clone()

        def step() -> Tensor:
            lengths.add_(1)
            at = (lengths - 1).long()
            slots = table.gather(1, (at // page)[:, None])[:, 0].long() * page + at % page
            y = torch.nn.functional.rms_norm(x, (heads * width,))
            for layer in range(layers):
                between()
                joined = linear_act(y, projections[layer], None, "identity").view(rows, -1, width)
                between()
                q, k, v = joined.split((heads, kv_heads, kv_heads), dim=1)
                given = (q, k, v, *pages[layer], slots, ends, lengths, table, 1)
                y = KERNEL.run(*given, scale=width**-0.5).flatten(1)
            between()
            return x.copy_(y)

        return step

    def nothing() -> None:
        return None

    slow, fast = decoder(torch.cuda.synchronize), decoder(nothing)
    expected = [slow().clone() for _ in range(steps)]
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        first = [fast().clone() for _ in range(2)]
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        y = fast()
    actual = list(first)
    for _ in range(steps - 2):
        graph.replay()
        actual.append(y.clone())
    different = [i for i, (a, b) in enumerate(zip(actual, expected, strict=True)) if not torch.equal(a, b)]
    assert not different


@on_devices
def test_triton_needs_neither_number_nor_size_of_pages(device: str) -> None:
    """Both are symbols when a program is compiled: they come with the pages that it is bound to."""
    assert KERNEL is not None
    signature = paged_attention.signature(**batch([1], [9], dtype=torch.float32, device=device).arguments)
    for name in ("k_pages", "v_pages"):
        signature[name] = replace(signature[name], shape=(None, None, *signature[name].shape[2:]))
    assert KERNEL.supports(signature) is None


@on_devices
def test_triton_refuses(device: str) -> None:
    arguments = batch([1], [9], dtype=torch.float32, device=device).arguments
    assert "not torch.int32" in refusal(paged_attention, **{**arguments, "lengths": arguments["lengths"].long()})
    assert "not torch.int64" in refusal(paged_attention, **{**arguments, "slots": arguments["slots"].int()})
    assert "heads" in refusal(paged_attention, **{**arguments, "q": arguments["q"][:, :3]})
    assert "do not fit" in refusal(paged_attention, **{**arguments, "k": arguments["k"][:, :1]})
    pages = {name: arguments[name].nan_to_num().to(torch.int8) for name in ("k_pages", "v_pages")}
    assert "need scales" in refusal(paged_attention, **{**arguments, **pages})
    strided = {name: arguments[name].transpose(2, 3).contiguous().transpose(2, 3) for name in ("k_pages", "v_pages")}
    with pytest.raises(ValueError, match="contiguous"):
        run_kernel({**arguments, **strided})
