"""Every Triton kernel once, at an odd shape, for the memory checker. From the repository root:

    compute-sanitizer --tool memcheck --error-exitcode 1 python3 tests/kernels/memcheck.py

Each tensor gets an allocation of its own, so that a step beyond its end is seen.
"""

from __future__ import annotations

import os

os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"

from typing import Any

import torch

from regraft.kernels.argmax_triton import argmax
from regraft.kernels.gumbel_triton import launch as add_gumbel
from regraft.kernels.samples_triton import samples
from regraft.kernels.table import OPS, PROVIDERS, select


def calls(dtype: torch.dtype) -> list[tuple[str, tuple[Any, ...], dict[str, Any]]]:
    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device="cuda").to(dtype)

    x, weight = randn(3, 7, 77), randn(77)
    q, k, v = (randn(2, 37, heads, 80).transpose(1, 2) for heads in (6, 2, 2))
    cos, sin = randn(2, 1, 37, 34), randn(2, 1, 37, 34)
    gains = (randn(64), randn(64))
    plain = (False, 0.0, 0.0, None, "half", None)
    normed = (True, 1e-6, 1.0, None, "half", torch.float32)

    def tables(width: int) -> tuple[torch.Tensor, torch.Tensor]:
        return randn(1, 37, width), randn(1, 37, width)

    def few_tables(rows: int, width: int = 128) -> tuple[torch.Tensor, torch.Tensor]:
        return randn(rows, width), randn(rows, width)

    def few(rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return randn(rows, 136), randn(columns, 136), randn(columns)

    def summed(width: int) -> tuple[Any, ...]:
        """What a norm in front of a product is given: one row."""
        return randn(1, width), randn(1, width), randn(width), 1e-6, 0.0, None, dtype

    wide_gains = (randn(128), randn(128))
    packed = randn(74, 6, 80), randn(74, 2, 80), randn(74, 2, 80)
    pages, table = (randn(8, 16, 2, 80), randn(8, 16, 2, 80)), torch.randperm(8)[:6].int().cuda().view(2, 3)
    table = torch.cat((table[:1], table))

    def ends(*lengths: int) -> torch.Tensor:
        return torch.tensor([0, *lengths]).cumsum(0).int().cuda()

    everything = {
        "mask": torch.rand(2, 1, 37, 37, device="cuda") > 0.3,
        "bias": torch.randn(1, 6, 37, 37, device="cuda"),
        "key_mask": torch.rand(2, 37, device="cuda") > 0.2,
        "sinks": torch.randn(6, device="cuda"),
        "scale": 0.1,
        "left": 19,
        "right": 0,
        "softcap": 4.0,
    }

    def paged(pages: torch.dtype, *lengths: int, new: int, **more: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """`new` queries of each sequence; -1 in the table where no page is."""
        blocks = [-(-n // 16) for n in lengths]
        table, order = torch.full((len(lengths), max(blocks) + 1), -1), torch.randperm(sum(blocks))
        for s, own in enumerate(order.split(blocks)):
            table[s, : len(own)] = own
        slots = [int(table[s, j // 16]) * 16 + j % 16 for s, n in enumerate(lengths) for j in range(n - new, n)]
        q, k, v = (randn(len(slots) + 3, heads, 80) for heads in (6, 2, 2))
        store = [torch.randint(-99, 99, (sum(blocks), 16, 2, 80), device="cuda").to(pages) for _ in range(2)]
        sequences = ends(*[new] * len(lengths)), torch.tensor(lengths).int().cuda(), table.int().cuda()
        named = {"sinks": torch.randn(6, device="cuda"), "slopes": torch.rand(6, device="cuda"), "scale": 0.1, **more}
        if pages != dtype:
            named |= {name: torch.rand(sum(blocks), 16, 2, device="cuda") for name in ("k_scale", "v_scale")}
        return (q, k, v, *store, torch.tensor([*slots, -1, -1, -1]).cuda(), *sequences, new), named

    def experts(tokens: int, top: int, count: int, width: int, inner: int) -> tuple[torch.Tensor, ...]:
        index = torch.rand(tokens, count, device="cuda").topk(top).indices
        weights = torch.rand(tokens, top, device="cuda")
        given = randn(tokens, width), randn(count, 2 * inner, width), randn(count, width, inner)
        biases = randn(count, 2 * inner), randn(count, width)
        hidden, up, down, up_bias, down_bias = (t.bfloat16() for t in (*given, *biases))  # not in fp32
        return hidden, index, weights, up, down, up_bias, down_bias

    return [
        ("rms_norm", (x, weight, 1e-6, 0.0, dtype, None), {}),
        ("add_rms_norm", (x, x, weight, 1e-6, 1.0, None, dtype), {}),
        ("layer_norm", (x, weight, weight, 1e-5), {}),
        ("add_layer_norm", (x, x, weight, weight, 1e-5), {}),
        ("norm_linear_act", (x, x, weight, 1e-6, 0.0, None, dtype, randn(19, 77), randn(19), "gelu"), {}),
        ("softmax", (x, None, dtype), {}),
        ("softmax", (randn(3, 17001), torch.float32, dtype), {}),
        ("softmax", (randn(300, 33032), torch.float32, dtype), {}),  # rows shared by programs
        ("softmax", (randn(3, 200008),), {}),
        ("rope", (q, cos, sin, "half"), {}),
        ("rope", (q, cos, sin, "interleaved"), {}),
        ("norm_rope", (q, randn(80), cos, sin, 1e-6, 0.0, dtype), {}),
        ("attention", (q, k, v), everything),
        ("attention", (q[:, :, -1:], k, v), {"scale": 0.1, "right": 0}),
        ("attention", (q, k, randn(2, 2, 37, 17)), {"scale": 0.1}),
        ("attention", (q, k, v), {"scale": 0.1, "right": 0}),
        (
            "attention",
            (q, k, v),
            {n: everything[n] for n in ("key_mask", "sinks", "scale", "left", "right", "softcap")},
        ),
        ("attention", (q[:, :, -1:], *(randn(2, 2, 777, 80) for _ in range(2))), {"scale": 0.1, "right": 0}),
        ("varlen_attention", (*packed, ends(37, 1, 36), ends(37, 1, 36), 37, 37), {"scale": 0.1, "right": 0}),
        ("varlen_attention", (packed[0], *pages, ends(37, 1, 36), ends(40, 3, 36), 37, 40, table), {"scale": 0.1}),
        ("paged_attention", *paged(dtype, 40, 1, 777, new=1)),
        ("paged_attention", *paged(dtype, 40, 37, 100, new=37)),
        ("paged_attention", *paged(dtype, 37, 37, new=37, slopes=None, fresh=True)),
        ("paged_attention", *paged(torch.int8, 40, 3, new=2)),
        ("paged_attention", *paged(torch.float8_e4m3fn, 400, 3, new=1)),
        ("activation", (x[..., ::2], "gelu_tanh"), {}),
        ("glu", (x[..., :33], x[..., 33:66], "silu"), {}),
        ("linear_act", (randn(67, 77), randn(131, 77), randn(131), "gelu"), {}),
        ("linear_act", (randn(1, 77), randn(77, 131).t(), None, "identity"), {}),
        ("gate_up", (randn(67, 77), randn(2 * 71, 77), randn(2 * 71), "silu"), {}),
        ("gate_up", (randn(3, 5, 77), randn(2 * 71, 77), None, "silu"), {}),
        # few rows that 16 bytes divide
        ("linear_act", (randn(1, 264), randn(131, 264), randn(131), "gelu"), {}),
        ("gate_up", (randn(1, 72), randn(2 * 71, 72), randn(2 * 71), "silu"), {}),
        ("linear_act", (randn(5, 264), randn(131, 264), randn(131), "gelu"), {}),
        ("linear_act", (randn(33, 72), randn(131, 72), None, "identity"), {}),
        ("gate_up", (randn(3, 264), randn(2 * 71, 264), randn(2 * 71), "silu"), {}),
        ("gate_up", (randn(40, 72), randn(2 * 71, 72), None, "silu"), {}),
        ("moe_experts", experts(2, 2, 5, 72, 40), {}),
        ("moe_experts", experts(37, 2, 5, 72, 40), {}),
        ("moe_experts", experts(37, 2, 5, 72, 40)[:-2], {}),  # without biases, which the grouped product does not add
        ("moe_experts", experts(37, 3, 5, 33, 21), {"interleaved": True, "limit": 7.0, "alpha": 1.7, "up_offset": 1.0}),
        # sizes that TMA takes
        ("linear_act", (randn(141, 72), randn(264, 72), randn(264), "gelu"), {}),
        ("linear_act", (randn(141, 72), randn(72, 264).t(), None, "silu"), {}),
        ("gate_up", (randn(141, 72), randn(2 * 136, 72), randn(2 * 136), "silu"), {}),
        ("linear_act", (randn(9, 2056), randn(300, 2056), randn(300), "gelu"), {}),  # tiles in parts
        ("linear_act", (randn(3, 2240), randn(301, 2240), randn(301), "gelu"), {}),  # strips
        ("gate_up", (randn(16, 960), randn(2 * 1061, 960), None, "silu"), {}),
        ("linear_act", (randn(19, 1088), randn(301, 1088), randn(301), "gelu"), {}),
        ("gate_up", (randn(29, 1472), randn(2 * 9001, 1472), None, "silu"), {}),
        ("gate_up", (randn(64, 2056), randn(2 * 300, 2056), None, "silu"), {}),
        ("linear_act", (randn(33, 2056), randn(304, 2056), randn(304), "gelu"), {}),  # slabs
        ("linear_act", (randn(33, 3592), randn(4616, 3592), randn(4616), "gelu"), {}),  # in clusters
        ("linear_act", (randn(24, 4104), randn(536, 4104), None, "identity"), {}),
        ("linear_act", (randn(64, 136), randn(6008, 136), None, "silu"), {}),
        ("gate_up", (randn(21, 200), randn(2 * 9000, 200), randn(2 * 9000), "silu"), {}),
        (
            "qkv_rope",
            (randn(37, 72), randn(5 * 80, 72), None, randn(37, 34), randn(37, 34), *(None,) * 2, 2, 1, 80, *plain),
            {},
        ),
        ("qkv_rope", (randn(3, 37, 72), randn(5 * 80, 72), None, *tables(34), *(None,) * 2, 2, 1, 80, *plain), {}),
        ("qkv_rope", (randn(3, 37, 72), randn(5 * 64, 72), randn(5 * 64), *tables(64), *gains, 2, 2, 64, *normed), {}),
        ("qkv_rope", (randn(3, 37, 72), randn(3 * 128, 72), None, *tables(128), *(None,) * 2, 1, 1, 128, *plain), {}),
        # few rows: a head is a tile; the last 40 columns are none
        ("qkv_rope", (*few(5, 3 * 128 + 40), *few_tables(5), *wide_gains, 1, 1, 128, *normed), {}),
        ("qkv_rope", (*few(33, 3 * 128), *few_tables(33), *(None,) * 2, 1, 1, 128, *plain), {}),
        ("qkv_rope", (randn(5, 192), randn(3 * 80, 192), None, *few_tables(5, 80), *(None,) * 2, 1, 1, 80, *plain), {}),
        ("qkv_rope", (*few(19, 59 * 96), *few_tables(19, 96), *(None,) * 2, 40, 9, 96, *plain), {}),  # pieces in slabs
        ("qkv_rope", (*few(2, 37 * 112), *few_tables(2, 112), *(None,) * 2, 20, 9, 112, *plain), {}),
        ("norm_gate_up", (*summed(264), randn(2 * 71, 264), randn(2 * 71), "silu"), {}),
        ("norm_gate_up", (*summed(4104), randn(2 * 71, 4104), None, "silu"), {}),
        ("norm_linear_act", (*summed(264), randn(131, 264), None, "gelu"), {}),
        (
            "norm_qkv_rope",
            (*summed(264), randn(3 * 80, 264), None, *few_tables(1, 34), *(None,) * 2, 1, 1, 80, *plain),
            {},
        ),
        (
            "norm_qkv_rope",
            (*summed(264), randn(3 * 80, 264), None, *few_tables(1, 80), *(None,) * 2, 1, 1, 80, *plain),
            {},
        ),
    ]


def beside_ops() -> None:
    """The kernels of `generate` that are no op's."""
    scores, drawn = torch.randn(3, 4099, device="cuda"), torch.tensor([True, False, True], device="cuda")
    numbers = torch.arange(3, device="cuda")
    if not bool(add_gumbel(scores, numbers, numbers, drawn).isfinite().all()):
        raise RuntimeError("noise is not finite")
    if not torch.equal(argmax(scores, torch.zeros(3, dtype=torch.int32, device="cuda")), scores.argmax(-1)):
        raise RuntimeError("argmax is not torch's")
    tensors = [torch.ones(count, dtype=torch.uint8, device="cuda") for count in (1, 77, 4099)]
    places = torch.tensor([(t.data_ptr(), t.numel(), 1) for t in tensors], device="cuda")
    if not bool((samples(places, 64)[..., 0] == 1).all()):
        raise RuntimeError("samples are not what stands there")


def main() -> None:
    torch.manual_seed(0)
    beside_ops()
    seen: set[tuple[str, str]] = set()
    for dtype in (torch.bfloat16, torch.float32):
        for name, args, kwargs in calls(dtype):
            signature = OPS[name].signature(*args, **kwargs)
            kernels = [k for k in PROVIDERS[name] if k.supports(signature) is None]
            if not kernels:
                raise RuntimeError(f"{name} has no kernel here: {select(OPS[name], signature)[1]}")
            for kernel in kernels:
                results = kernel.run(*args, **kwargs)
                torch.cuda.synchronize()
                for result in results if isinstance(results, tuple) else (results,):
                    if not bool(result.isfinite().all()):
                        raise RuntimeError(f"{name} by {kernel.provider} in {dtype} is not finite")
                seen.add((name, kernel.provider))
    missing = {(k.op.name, k.provider) for kernels in PROVIDERS.values() for k in kernels} - seen
    if {name for name, _ in seen} != set(PROVIDERS) or (missing and torch.cuda.get_device_capability()[0] == 9):
        raise RuntimeError(f"not run: {sorted(missing)}")
    print(f"{len(seen)} kernels ran")


if __name__ == "__main__":
    main()
