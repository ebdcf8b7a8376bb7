"""Compiles the kernels with the largest tiles for a compute capability and a limit of shared memory: no GPU needed.

    python compile_for.py 86 101376

Prints a JSON list of `{"case", "shared", "estimate", "wgmma", "copies"}`: bytes, whether Hopper's matrix unit is used,
and whether tiles are copied to shared memory past the registers. Run in a process of its own: it puts another driver
and another device limit in place of the real ones.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from regraft.kernels import (
    activation_triton,
    attention_triton,
    linear_act_triton,
    overlap,
    paged_attention_triton,
    paged_decode_triton,
    qkv_rope_slab,
    qkv_rope_stream,
    qkv_rope_strip,
    rms_norm_triton,
    slab_gluon,
    softmax_ring,
    stream_gluon,
    strip_gluon,
    tuning,
)


class NoDevice:
    """As much of a Triton driver as compiling asks for."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def paged(half: torch.dtype, record: Callable[[str, tuning.SharedMemory], None]) -> None:
    """One query, chunks, a width that 16 bytes divide but 16 elements do not, one that they do not, scaled pages."""
    for width, queries, stored in [
        (128, 1, half),
        (128, 300, half),
        (24, 300, half),
        (36, 300, half),
        (128, 300, torch.int8),
    ]:
        q, k = torch.empty(2 * queries, 8, width, dtype=half), torch.empty(2 * queries, 2, width, dtype=half)
        pages = torch.empty(9, 16, 2, width, dtype=stored)
        scales = None if stored == half else torch.empty(9, 16, 2)
        ends, lengths = (torch.empty(n, dtype=torch.int32) for n in (3, 2))
        table = torch.empty(2, 200 if queries == 1 else 3, dtype=torch.int32)  # keys in several parts, or in one
        given = (q, k, k, pages, pages, torch.empty(2 * queries, dtype=torch.int64), ends, lengths, table, queries)
        paged_attention_triton.paged_attention(*given, k_scale=scales, v_scale=scales)
        of = width, width, 2, stored.itemsize, 4 * queries
        few = queries == 1
        plan = paged_decode_triton.plan(*of, 4) if few else paged_attention_triton._plan(*of, width % 8 == 0)
        record(f"paged_attention {width} {queries} {stored}", plan[1])
        if (width, stored) == (128, half):
            paged_attention_triton.paged_attention(*given, relative=torch.empty(8, 129, dtype=half))
            plan = paged_decode_triton.plan(*of, 4, 2) if few else paged_attention_triton._plan(*of, True, 2)
            record(f"paged_attention {width} {queries} biased torch.bfloat16", plan[1])


def main(capability: int, limit: int) -> list[dict[str, Any]]:
    driver.set_active(NoDevice(capability))
    tuning.device_limits = lambda device: ("default", limit)
    attention_triton.multiprocessors = paged_decode_triton.multiprocessors = lambda device: 8
    overlap.compute_capability = lambda device: divmod(capability, 10)
    launched: list[tuple[Any, dict[str, Any]]] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        launched.append((run(self, *args, grid=grid, warmup=True, **kwargs), kwargs))

    JITFunction.run = compile_only
    rows: list[dict[str, Any]] = []

    def streamed(half: torch.dtype) -> None:
        """The kernels whose ring takes nearly all the shared memory there is."""
        stream_gluon.multiprocessors = lambda device: 132
        x, weight = torch.empty(8, 4096, dtype=half), torch.empty(4096, 4096, dtype=half)
        for run in (stream_gluon.linear_act, stream_gluon.gate_up):
            run(x, weight, None, "silu")
            kernel, _ = launched.pop()
            row = {"case": f"stream {run.__name__}", "shared": kernel.metadata.shared, "copies": False}
            rows.append({**row, "estimate": stream_gluon.RING + 1024, "wgmma": "wgmma" in kernel.asm["ptx"]})
        tables, heads = torch.empty(8, 128, dtype=half), (24, 4, 128, True, 1e-6, 0.0, half, "half", None)
        qkv_rope_stream.qkv_rope(x, weight, None, tables, tables, tables[0], tables[0], *heads)
        kernel, _ = launched.pop()
        row = {"case": "stream qkv_rope", "shared": kernel.metadata.shared, "copies": False}
        rows.append({**row, "estimate": stream_gluon.RING + 1024, "wgmma": "wgmma" in kernel.asm["ptx"]})
        strip_gluon.multiprocessors = lambda device: 132
        for columns, rotate in ((4096, False), (1024, False), (2048, True), (512, True)):
            narrow, few = weight[:, :columns], x[:, :columns]
            many = torch.cat((few, few))
            if rotate:
                plain = (24, 4, 128, False, 0.0, 0.0, None, "half", None)
                qkv_rope_strip.qkv_rope(few, narrow, None, tables, tables, None, None, *plain)
            else:
                strip_gluon.gate_up(few, narrow, None, "silu")
                strip_gluon.linear_act(many, narrow, None, "identity")
                if columns <= strip_gluon.MAX_COLUMNS // 2:
                    strip_gluon.gate_up(torch.cat((many, many)), narrow, None, "silu")
            while launched:
                row = {"case": f"strip {columns}", "shared": launched.pop()[0].metadata.shared, "copies": False}
                rows.append({**row, "estimate": strip_gluon.RING + 17 * 1024, "wgmma": False})
        slab_gluon.multiprocessors = lambda device: 132
        wide, shared = torch.empty(28672, 1024, dtype=half), torch.empty(6144, 4096, dtype=half)
        for run, big in ((slab_gluon.linear_act, wide), (slab_gluon.gate_up, wide), (slab_gluon.linear_act, shared)):
            run(torch.empty(40, big.shape[1], dtype=half), big, None, "silu")
            kernel, _ = launched.pop()
            row = {"case": f"slab {run.__name__}", "shared": kernel.metadata.shared, "copies": False}
            rows.append({**row, "estimate": stream_gluon.RING + 1024, "wgmma": "wgmma" in kernel.asm["ptx"]})
        few, tables = torch.empty(40, 1024, dtype=half), torch.empty(40, 128, dtype=half)
        for heads in (48, 96):  # a piece, and three
            weight = torch.empty(heads * 128, 1024, dtype=half)
            given = (few, weight, None, tables, tables, None, None, heads // 2, heads // 4, 128)
            qkv_rope_slab.qkv_rope(*given, False, 0.0, 0.0, None, "half", None)
            kernel, _ = launched.pop()
            row = {"case": f"slab heads {heads}", "shared": kernel.metadata.shared, "copies": False}
            rows.append({**row, "estimate": stream_gluon.RING + 1024, "wgmma": "wgmma" in kernel.asm["ptx"]})
        softmax_ring.multiprocessors = lambda device: 132
        softmax_ring.softmax(torch.empty(300, 200008, dtype=half))
        resident, ring = softmax_ring.RESIDENT, softmax_ring.SLOTS * softmax_ring.PIECE
        shared = resident * launched.pop()[0].metadata.shared  # of all that are on a multiprocessor at once
        row = {"case": "softmax", "shared": shared, "copies": False, "wgmma": False}
        rows.append({**row, "estimate": resident * (ring + 1024)})

    def record(case: str, estimate: tuning.SharedMemory) -> None:
        kernel, kwargs = launched.pop()
        sizes = ((name, value) for name, value in kwargs.items() if name.startswith(("BLOCK_", "GROUP_")))
        blocks = tuple((name, value) for name, value in sizes if value)
        config = tuning.Config(blocks, kwargs["num_warps"], kwargs["num_stages"])
        shared, wgmma = kernel.metadata.shared, "wgmma" in kernel.asm["ptx"]
        copies = "cp.async" in kernel.asm["ptx"]
        rows.append({"case": case, "shared": shared, "estimate": estimate(config), "wgmma": wgmma, "copies": copies})

    half = torch.bfloat16
    pairs = {"mask": torch.ones(1, 1, 300, 300, dtype=torch.bool), "bias": torch.empty(1, 4, 300, 300)}
    for width, value_width, dtype, named in [
        (128, 128, half, {}),
        (128, 128, half, pairs),
        (192, 128, half, {}),
        (256, 256, half, {}),
        (128, 128, torch.float32, {}),
        (40, 40, half, {}),
        (40, 17, half, {}),
    ]:
        q, k = torch.empty(1, 4, 300, width, dtype=dtype), torch.empty(1, 2, 300, width, dtype=dtype)
        v = torch.empty(1, 2, 300, value_width, dtype=dtype)
        attention_triton.attention(q, k, v, scale=0.1, right=0, **named)
        plan = attention_triton._plan(
            width, value_width, dtype.itemsize, 300, named.get("mask"), named.get("bias"), True
        )
        record(f"attention {width}/{value_width} {dtype} {list(named)}", plan[1])
    paged(half, record)
    if capability == 90:
        streamed(half)
    for m, k, dtype in [
        (1, 1024, half),
        (64, 1024, half),
        (512, 1024, half),
        (512, 1024, torch.float32),
        (512, 77, half),
    ]:
        x, weight = torch.empty(m, k, dtype=dtype), torch.empty(2048, k, dtype=dtype)
        linear_act_triton.linear_act(x, weight, None, "gelu")
        record(f"linear_act {m} {k} {dtype}", linear_act_triton._plan(m, 2048, k, dtype.itemsize, 1, True)[1])
        linear_act_triton.gate_up(x, weight, None, "silu")
        record(f"gate_up {m} {k} {dtype}", linear_act_triton._plan(m, 1024, k, dtype.itemsize, 2, True)[1])
    for width in (512, 32768):
        x = torch.empty(4, width, dtype=half)
        rms_norm_triton.add_rms_norm(x, x, x[0], 1e-6)
        record(f"add_rms_norm {width}", tuning.RowMemory(triton.next_power_of_2(width)))
    activation_triton.glu(x, x, "mish")
    record("glu", tuning.RowMemory(0))
    return rows


if __name__ == "__main__":
    print(json.dumps(main(int(sys.argv[1]), int(sys.argv[2]))))
