"""Cases of mixtures of experts. Peers: `torch._grouped_mm` on sorted tokens, and the experts of transformers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Final

import torch
from torch import Tensor

from .activation import activate
from .case import FEW, Arguments, Case, Part, Peer, plain, randn, rows_of
from .moe import moe_experts

_MODELS: Final = (
    # of, experts, chosen for each token, width, width inside
    ("Mixtral 8x7B", 8, 2, 4096, 14336),
    ("Qwen3-30B-A3B", 128, 8, 2048, 768),
)


def experts(dtype: torch.dtype) -> Iterator[Case]:
    """A prompt, one token, and eight."""
    for of, count, chosen, width, inside in _MODELS:
        for tokens in (4096, 1, 8):

            def arguments(
                device: torch.device,
                sizes: tuple[int, ...] = (tokens, count, chosen, width, inside),
            ) -> Arguments:
                tokens, count, chosen, width, inside = sizes
                scores, index = torch.rand(tokens, count, device=device).topk(chosen, dim=-1)
                return {
                    "hidden": randn(dtype, device, tokens, width),
                    "top_k_index": index,
                    "top_k_weights": (scores / scores.sum(-1, keepdim=True)).to(dtype),
                    "up": randn(dtype, device, count, 2 * inside, width, scale=width**-0.5),
                    "down": randn(dtype, device, count, width, inside, scale=inside**-0.5),
                    "kind": "silu",
                }

            peers: dict[str, Peer] = {"grouped_mm": plain(_grouped)}
            for implementation in ("grouped_mm", "eager"):
                peers[f"transformers, {implementation}"] = functools.partial(_transformers, implementation)
            name = f"{of}: {tokens} tokens, {chosen} of {count} experts, {width} x {inside}"
            yield Case(moe_experts, name, dtype, arguments, peers, _some_tokens)


def _grouped(hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor, up: Tensor, down: Tensor, kind: str) -> Tensor:
    """All pairs of token and expert in the order of the experts, as transformers' `grouped_mm` has it."""
    flat = top_k_index.reshape(-1)
    expert, order = flat.sort(stable=True)
    token = order // top_k_index.shape[1]
    ends = torch.searchsorted(expert, torch.arange(up.shape[0], device=flat.device), right=True).to(torch.int32)
    gate, value = torch._grouped_mm(hidden[token], up.transpose(1, 2), offs=ends).chunk(2, dim=-1)
    y = torch._grouped_mm(activate(gate, kind) * value, down.transpose(1, 2), offs=ends)
    y = y * top_k_weights.reshape(-1)[order, None]
    ordered = torch.empty_like(y).index_copy_(0, order, y)
    return ordered.view(*top_k_index.shape, -1).sum(dim=1)


def _transformers(implementation: str, arguments: Arguments) -> Callable[[], Tensor]:
    """The module of transformers' own code; `eager` waits for the device to say which experts were chosen."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    up, down = arguments["up"], arguments["down"]
    config = MixtralConfig(
        num_local_experts=up.shape[0],
        hidden_size=up.shape[2],
        intermediate_size=down.shape[2],
        hidden_act=arguments["kind"],
    )
    config._experts_implementation = implementation
    with torch.device("meta"):
        experts = MixtralExperts(config)
    experts.gate_up_proj, experts.down_proj = (torch.nn.Parameter(w, requires_grad=False) for w in (up, down))
    given = [arguments[n] for n in ("hidden", "top_k_index", "top_k_weights")]
    return lambda: experts(*given)


def _some_tokens(arguments: Arguments) -> list[Part]:
    count = arguments["hidden"].shape[0]
    parts: list[Part] = []
    for start in sorted({0, max(0, count - FEW)}):
        rows = slice(start, min(start + FEW, count))
        small = {n: arguments[n][rows] for n in ("hidden", "top_k_index", "top_k_weights")}
        parts.append(({**arguments, **small}, functools.partial(rows_of, rows)))
    return parts
