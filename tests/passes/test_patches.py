"""Convolutions over patches become linear layers where their results are read as tokens; others stay."""

from __future__ import annotations

import pytest
import torch
import zoo
from small_graphs import Small, aten

from regraft.compiler.capture import capture
from regraft.compiler.pipeline import Settings
from regraft.compiler.rule import Stage
from regraft.passes.patches import Patches
from regraft.passes.pipeline import compile_program

CONVOLUTIONS = {1: aten.conv1d.default, 2: aten.conv2d.default, 3: aten.conv3d.default}


def embedded(
    sizes: list[int], kernel: list[int], stride: list[int], *rest: object, bias: bool = True, tokens: bool = True
) -> Small:
    """Three images of four channels, cut into patches of six numbers."""
    small = Small()
    x = small.input("x", torch.randn(3, 4, *sizes, dtype=torch.float64))
    w = small.weight("w", torch.randn(6, 4, *kernel, dtype=torch.float64))
    b = small.weight("b", torch.randn(6, dtype=torch.float64)) if bias else None
    y = small.call(CONVOLUTIONS[len(kernel)], x, w, b, stride, *rest)
    if tokens:
        y = small.call(aten.transpose.int, small.call(aten.flatten.using_ints, y, 2), 1, 2)
    else:
        y = small.call(aten.relu.default, y)
    small.program(y)
    return small


@pytest.mark.parametrize(
    ("sizes", "kernel"),
    [([8], [2]), ([6, 8], [2, 4]), ([7, 11], [3, 3]), ([4, 6, 6], [2, 3, 3]), ([2, 5, 5], [2, 5, 5])],
)
@pytest.mark.parametrize("bias", [True, False])
def test_patches(sizes: list[int], kernel: list[int], bias: bool) -> None:
    small = embedded(sizes, kernel, kernel, bias=bias)
    before = small.run()[0]
    assert len(small.apply(Patches(), stage=Stage.FUSE).rewrites) == 1
    assert not any("conv" in target for target in small.targets())
    after = small.run()[0]
    assert after.shape == before.shape and torch.allclose(after, before, rtol=1e-12, atol=1e-12)


def test_one_stride_for_all_dimensions() -> None:
    small = embedded([6, 8], [2, 2], [2])
    before = small.run()[0]
    assert len(small.apply(Patches(), stage=Stage.FUSE).rewrites) == 1
    assert torch.allclose(small.run()[0], before, rtol=1e-12, atol=1e-12)


def test_padding_by_name_and_a_rest() -> None:
    small = Small()
    x, w = small.input("x", torch.randn(3, 4, 7, 9)), small.weight("w", torch.randn(6, 4, 2, 2))
    y = small.call(aten.conv2d.padding, x, w, None, [2, 2], "valid")
    same = small.call(aten.conv2d.padding, x, small.weight("v", torch.randn(6, 4, 3, 3)), None, [1, 1], "same")
    small.program(small.call(aten.flatten.using_ints, y, 2), small.call(aten.flatten.using_ints, same, 2))
    before = small.run()
    assert len(small.apply(Patches(), stage=Stage.FUSE).rewrites) == 1
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-5) for a, b in zip(small.run(), before, strict=True))


def test_the_rewrite_is_chosen_in_a_model() -> None:
    model, inputs = zoo.build("vit")
    compiled = compile_program(capture(model, inputs, {}, cache=False), Settings(torch.device("cpu"), verify="off"))
    assert next(len(p.rewrites) for p in compiled.passes if p.name == "patches") == 1


@pytest.mark.parametrize(
    "small",
    [
        embedded([8, 8], [3, 3], [2, 2]),
        embedded([6, 8], [2, 4], [2]),
        embedded([8, 8], [2, 2], [2, 2], [1, 1]),
        embedded([8, 8], [2, 2], [2, 2], [0, 0], [2, 2]),
        embedded([8, 8], [1, 1], [1, 1]),
        embedded([8, 8], [2, 2], [2, 2], tokens=False),
    ],
    ids=["overlapping", "overlapping in one dimension", "padded", "dilated", "single", "image"],
)
def test_others_stay(small: Small) -> None:
    assert not small.apply(Patches(), stage=Stage.FUSE).rewrites
