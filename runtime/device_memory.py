"""What PyTorch keeps of a GPU's memory without need: cached blocks, the workspaces of cuBLAS, holes between weights.

The caching allocator puts tensors between 1 and 10 MiB into segments of 20 MiB, and gives a segment back only when all
of it is free. cuBLAS keeps a workspace of 32 MiB for each stream that it ran on, that of a capture included.
"""

from __future__ import annotations

import threading
from typing import Final

import torch
from torch import Tensor, nn

SHARED_SEGMENT: Final = range((1 << 20) + 1, 10 << 20)
"""Bytes of the tensors that share a segment with others."""

_pools: Final[set[tuple[int, ...]]] = set()
"""Of graphs that were captured here; what one lent may outlive it, and its pool then does."""
_lock: Final = threading.Lock()


class _Workspaces:
    """Whether all workspaces that graphs were captured with lie in the graphs' own pools."""

    in_pools = True


def release_unused(*, for_capture: bool = False) -> None:
    """Give back cached blocks and, unless a graph that is not ours may write to them, cuBLAS's workspaces.

    A graph captured after this (`for_capture`) gets a workspace in its own pool, or all keep theirs from then on.
    No other thread may be in a matrix product.
    """
    torch.cuda.empty_cache()  # pools of graphs that are gone are not others'
    with _lock:
        if _Workspaces.in_pools and not other_graphs():
            torch._C._cuda_clearCublasWorkspaces()
        elif for_capture:
            _Workspaces.in_pools = False
    torch.cuda.empty_cache()


def captured(graph: torch.cuda.CUDAGraph) -> None:
    """Says that this graph was captured here, after `release_unused(for_capture=True)`."""
    with _lock:
        _pools.add(tuple(graph.pool()))


def other_graphs() -> bool:
    """Whether there may be CUDA graphs that were not captured here: what warmed them up has left its workspace."""
    if torch.cuda.get_allocator_backend() != "native":
        return True
    found = {tuple(segment["segment_pool_id"]) for segment in torch.cuda.memory_snapshot(include_traces=False)}
    _pools.intersection_update(found)  # no number is given to another pool later
    return bool(found - _pools - {(0, 0)})


def movable(tensor: Tensor) -> bool:
    """Whether a weight shares a segment with others, and nothing else looks at its memory."""
    storage = tensor.untyped_storage()
    return (
        type(tensor) in (Tensor, nn.Parameter)
        and tensor.is_cuda
        and tensor.nbytes in SHARED_SEGMENT
        and storage.nbytes() == tensor.nbytes
        and not tensor.is_inference()
        and uses(tensor) == uses(torch.empty(1))
    )


def uses(tensor: Tensor) -> int:
    """How many hold the tensor's memory, `tensor` and this function included."""
    return int(torch._C._storage_Use_Count(tensor.untyped_storage()._cdata))
