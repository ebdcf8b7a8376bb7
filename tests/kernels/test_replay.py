"""Launch plans repeat what the launcher does: at other addresses, for every provider, and only where that is right."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime.errors import OutOfResources

from regraft.kernels import choice, replay
from regraft.kernels.linear_act import linear_act
from regraft.kernels.op import Kernel
from regraft.kernels.rms_norm import add_rms_norm
from regraft.kernels.table import PROVIDERS
from regraft.kernels.tuning import Provided


def test_the_key_tells_what_a_launcher_may_look_at() -> None:
    x = torch.zeros(4, 8)
    key = replay.key_of((x, 1, None))
    assert replay.key_of((torch.zeros(4, 8), 1, None)) == key
    for other in (x.t(), x[:2], x.double(), torch.zeros(4 * 8 + 1)[1:].view(4, 8)):
        assert replay.key_of((other, 1, None)) != key
    assert replay.key_of((x, 2, None)) != key
    assert replay.key_of((x, x))[-1] is None


def test_the_table_chooses_among_the_kernels_that_support_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    def kernel(provider: str) -> Kernel:
        return Kernel(add_rms_norm, provider, lambda *args: provider, lambda signature: None)

    ours, peer = kernel("triton"), kernel("peer")
    table = {"add_rms_norm": (Provided((("rows", 3, 9),), "absent"), Provided((("rows", 3, 9),), "peer"))}
    monkeypatch.setattr(choice.tuning, "providers", lambda file: table)
    cpu = torch.device("cpu")

    def chosen(rows: int, *kernels: Kernel) -> str:
        args = (torch.zeros(rows, 8), torch.zeros(rows, 8), None, 1e-6)
        return choice.choose(add_rms_norm, kernels, args, cpu).provider

    assert chosen(2, ours, peer) == "triton"
    assert chosen(3, ours, peer) == "peer"
    assert chosen(10, ours, peer) == "triton"
    assert chosen(3, ours) == "triton"


def test_keywords_and_defaults_reach_the_kernel() -> None:
    seen: list[tuple[Any, ...]] = []

    def run(*args: Any) -> torch.Tensor:
        seen.append(args)
        return args[0]

    x = torch.zeros(2, 8)
    choice.bind(add_rms_norm, [Kernel(add_rms_norm, "here", run, lambda signature: None)])(x, x, None, 1e-6, offset=1.0)
    assert seen[0][3:] == (1e-6, 1.0, None, None)


def test_no_plan_is_written_that_is_never_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Arguments at one address, as queries that stand for keys which are not read, are run without one each time."""
    recorded: list[int] = []

    def record(run: Any, args: tuple[Any, ...]) -> tuple[Any, None]:
        recorded.append(len(args))
        return run(*args), None

    monkeypatch.setattr(replay, "record", record)
    bound = choice.bind(add_rms_norm, [Kernel(add_rms_norm, "here", lambda *args: args[0], lambda signature: None)])
    x = torch.zeros(2, 8)
    assert bound(x, x, None, 1e-6) is x and recorded == []
    bound(x, x.clone(), None, 1e-6)
    assert recorded == [4]


@pytest.mark.gpu
def test_a_plan_computes_what_the_launcher_computes() -> None:
    (kernel, *_) = PROVIDERS["add_rms_norm"]
    bound = choice.bind(add_rms_norm, [kernel])
    torch.manual_seed(0)
    for rows in (5, 5, 5, 7, 7, 5):
        x, r = (torch.randn(rows, 512, dtype=torch.bfloat16, device="cuda") for _ in range(2))
        w = torch.randn(512, dtype=torch.bfloat16, device="cuda")
        for made, want in zip(bound(x, r, w, 1e-6), kernel.run(x, r, w, 1e-6), strict=True):
            assert torch.equal(made, want)
        turned = x.t().contiguous().t()
        for made, want in zip(bound(turned, r, w, 1e-6), kernel.run(turned, r, w, 1e-6), strict=True):
            assert torch.equal(made, want)
        for made, want in zip(bound(x, x, w, 1e-6), kernel.run(x, x, w, 1e-6), strict=True):
            assert torch.equal(made, want)
    key = replay.key_of((x, r, w, 1e-6))
    _, plan = replay.record(kernel.run, (x, r, w, 1e-6))
    assert key[-1] is not None and plan is not None


@pytest.mark.gpu
@pytest.mark.parametrize("op", sorted(PROVIDERS))
def test_plans_exist_for_every_op(op: str) -> None:
    from regraft.kernels.cases import cases

    case = cases(torch.bfloat16)[op][0]
    arguments = case.arguments(torch.device("cuda"))
    args = choice.arranged(case.op, (), arguments)
    kernel = next(k for k in PROVIDERS[op] if k.provider in ("triton", "wgmma", "gemv"))
    assert kernel.supports(case.op.signature(*args)) is None
    result, plan = replay.record(kernel.run, args)
    assert plan is not None
    again = plan(args)
    for one, other in zip(
        [result] if isinstance(result, torch.Tensor) else result,
        [again] if isinstance(again, torch.Tensor) else again,
        strict=True,
    ):
        assert torch.equal(one, other)


def test_a_kernel_that_does_not_compile_makes_room_for_the_next(caplog: pytest.LogCaptureFixture) -> None:
    def failing(*args: Any) -> torch.Tensor:
        raise OutOfResources(300_000, 232_448, "shared memory")

    def wrong(*args: Any) -> torch.Tensor:
        raise KeyError("a bug")

    x = torch.randn(2, 8)
    refused = Kernel(add_rms_norm, "first", failing, lambda signature: None)
    other = Kernel(add_rms_norm, "second", add_rms_norm.reference, lambda signature: None)
    want = add_rms_norm.reference(x, x, None, 1e-6)
    for kernels in ([refused, other], [refused]):
        caplog.clear()
        made = choice.bind(add_rms_norm, kernels)(x, x, None, 1e-6)
        assert all(torch.equal(a, b) for a, b in zip(made, want, strict=True))
        assert "the first kernel of add_rms_norm does not run here" in caplog.text
    with pytest.raises(KeyError):
        choice.bind(add_rms_norm, [Kernel(add_rms_norm, "third", wrong, lambda signature: None)])(x, x, None, 1e-6)


@pytest.mark.gpu
def test_plans_keep_no_tensors() -> None:
    for kernel in PROVIDERS["linear_act"]:
        bound = choice.bind(linear_act, [kernel])
        x = torch.randn(256, 512, dtype=torch.bfloat16, device="cuda")
        w = torch.randn(768, 512, dtype=torch.bfloat16, device="cuda")
        bound(x, w, None, "silu")
        del x
        x = torch.randn(256, 512, dtype=torch.bfloat16, device="cuda")
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        y = [bound(torch.randn_like(x), w, None, "silu") for _ in range(5)]
        x2 = torch.randn(512, 512, dtype=torch.bfloat16, device="cuda")
        y.append(bound(x2, w, None, "silu"))
        del y, x2
        assert torch.cuda.memory_allocated() == before, kernel.provider


class _Metadata(NamedTuple):
    num_warps: int
    num_ctas: int
    shared: int
    target: GPUTarget


class _Compiled:
    def __init__(self) -> None:
        self.metadata = _Metadata(4, 1, 1024, GPUTarget("cuda", 90, 32))
        self.packed_metadata: Any = None


class _Future:
    """What Triton hands out for a kernel that others are compiling: it has the attributes of the kernel to come."""

    def __init__(self, kernel: _Compiled) -> None:
        self.kernel = kernel

    def result(self) -> _Compiled:
        return self.kernel

    def __getattr__(self, name: str) -> Any:
        return getattr(self.kernel, name)


@pytest.mark.parametrize("wrap", [lambda kernel: kernel, _Future])
def test_what_is_launched_in_clusters_is_the_kernel_itself(wrap: Any) -> None:
    kernel = _Compiled()
    replay._in_clusters(wrap(kernel), 2)
    assert kernel.packed_metadata == (4, 2, 1024)
    assert kernel.metadata.num_ctas == 1  # as it was compiled
    replay._in_clusters(None, 2)  # a hook that compiles nothing
