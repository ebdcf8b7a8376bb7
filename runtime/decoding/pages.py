"""The memory of the KV cache: one tensor for all layers that are alike, so that a page is copied by few kernels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...compiler.program import LayerSpec
from ...kernels.paged_attention import PAGE_DTYPES


class Pages:
    """K and V of every layer, and the scales of pages that hold scaled numbers.

    Args:
        layers: what each attention keeps.
        counts: pages of each group.
        block_size: tokens of a page.
    """

    def __init__(
        self, layers: Sequence[LayerSpec], counts: Sequence[int], block_size: int, device: torch.device
    ) -> None:
        alike: dict[LayerSpec, list[int]] = {}
        for index, layer in enumerate(layers):
            alike.setdefault(layer, []).append(index)
        self._stacks: list[tuple[int, list[Tensor]]] = []
        """Of layers that are alike: their group, and tensors [layers, P, page, ...]."""
        self.layers: list[tuple[Tensor, Tensor]] = [(torch.empty(0), torch.empty(0))] * len(layers)
        """K and V of each layer, [P, page, kv_heads, dim]."""
        scales: list[tuple[Tensor, Tensor] | None] = [None] * len(layers)
        for layer, members in alike.items():
            shape = (len(members), counts[layer.group], block_size, layer.kv_heads)
            stack = [
                torch.zeros((*shape, dim), dtype=layer.dtype, device=device) for dim in (layer.key_dim, layer.value_dim)
            ]
            if layer.dtype in PAGE_DTYPES:
                stack += [torch.zeros(shape, dtype=torch.float32, device=device) for _ in range(2)]
            for place, index in enumerate(members):
                self.layers[index] = (stack[0][place], stack[1][place])
                if len(stack) == 4:
                    scales[index] = (stack[2][place], stack[3][place])
            self._stacks.append((layer.group, stack))
        found = [pair for pair in scales if pair is not None]
        self.scales = found if len(found) == len(layers) else None
        """Scales of each layer, float32 [P, page, kv_heads]."""

    @property
    def nbytes(self) -> int:
        """Bytes of all pages."""
        return sum(t.numel() * t.element_size() for _, stack in self._stacks for t in stack)

    def copy(self, copies: Sequence[tuple[int, int, int]]) -> None:
        """Copy pages (group, from, to) in all layers of the group. No page is both a source and a target."""
        for group in {g for g, _, _ in copies}:
            pairs = torch.tensor([[a, b] for g, a, b in copies if g == group])
            for owner, stack in self._stacks:
                if owner == group:
                    source, target = pairs.to(stack[0].device, non_blocking=True).unbind(1)
                    for tensor in stack:
                        raw = tensor.view(torch.int8) if tensor.dtype in PAGE_DTYPES else tensor
                        raw.index_copy_(1, target, raw.index_select(1, source))
