"""Pages in memory: each layer has its own, a copy takes all layers of a group and their scales along."""

from __future__ import annotations

import pytest
import torch

from regraft.compiler.program import LayerSpec
from regraft.runtime.decoding.memory import block_bytes
from regraft.runtime.decoding.pages import Pages


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int8])
def test_copies_take_every_layer_of_the_group(dtype: torch.dtype) -> None:
    layers = [LayerSpec(2, 3, 5, -1, 0, dtype), LayerSpec(1, 4, 4, 7, 1, dtype), LayerSpec(2, 3, 5, -1, 0, dtype)]
    layers.append(LayerSpec(4, 3, 3, -1, 0, dtype))
    pages = Pages(layers, [6, 4], 16, torch.device("cpu"))
    tensors = [t for pair in pages.layers for t in pair]
    if dtype in (torch.float8_e4m3fn, torch.int8):
        assert pages.scales is not None
        tensors += [t for pair in pages.scales for t in pair]
        assert {tuple(t.shape) for t in tensors[8:]} == {(6, 16, 2), (4, 16, 1), (6, 16, 4)}
    else:
        assert pages.scales is None
    assert pages.layers[3][0].shape == (6, 16, 4, 3) and pages.layers[0][1].shape == (6, 16, 2, 5)
    assert pages.nbytes == 6 * block_bytes(layers, 0, 16) + 4 * block_bytes(layers, 1, 16)
    for number, tensor in enumerate(tensors):
        for block in range(tensor.shape[0]):
            tensor[block] = float(number * 6 + block)
    expected = [t.float().clone() for t in tensors]
    for index, tensor in enumerate(expected):
        if len(tensor) == 6:  # group 0
            tensor[4], tensor[5] = expected[index][1].clone(), expected[index][0].clone()
        else:
            tensor[3] = expected[index][2].clone()
    pages.copy([(0, 1, 4), (1, 2, 3), (0, 0, 5)])
    for tensor, wanted in zip(tensors, expected):
        assert torch.equal(tensor.float(), wanted)
