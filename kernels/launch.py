"""What every Triton launcher needs: dtypes, common reasons to refuse a signature, and strides with few dimensions."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Final

import torch
import triton
import triton.language as tl

from .op import Signature, TensorSpec
from .replay import empty, empty_like, launch, launch_in_clusters, library, rows_like

__all__ = ["empty", "empty_like", "launch", "launch_in_clusters", "library", "rows_like"]

TL_DTYPES: Final[Mapping[torch.dtype, tl.dtype]] = MappingProxyType(
    {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
)
"""The floating-point dtypes that the kernels read and write."""

MINIMUM_CAPABILITY: Final = (8, 0)

INTERPRETED: Final[bool] = bool(triton.knobs.runtime.interpret)
"""Whether TRITON_INTERPRET=1 was set when the kernels were defined: they run on CPU tensors then."""


def refuse_tensors(signature: Signature, floats: Iterable[str], others: Iterable[str] = ()) -> str | None:
    """Why Triton cannot take these tensors, or `None`: a device without Triton, a dtype without a kernel.

    `floats` and `others` name arguments of the signature; only the dtypes of `floats` are looked at. Absent (`None`)
    arguments are fine.
    """
    floats = tuple(floats)
    for name in (*floats, *others):
        spec = signature[name]
        if spec is None:
            continue
        if not isinstance(spec, TensorSpec):
            return f"{name} is not a tensor"
        if spec.device.type != ("cpu" if INTERPRETED else "cuda"):
            wanted = "the CPU, because TRITON_INTERPRET=1 is set" if INTERPRETED else "a CUDA device"
            return f"{name} is on {spec.device.type}; the Triton kernels run on {wanted}"
        if name in floats and spec.dtype not in TL_DTYPES:
            return f"{name} is {_name(spec.dtype)}; the Triton kernels take float32, float16 and bfloat16"
        if spec.dtype == torch.bfloat16 and INTERPRETED:
            return f"{name} is bfloat16, which Triton's interpreter truncates instead of rounding"
        if not INTERPRETED and compute_capability(spec.device) < MINIMUM_CAPABILITY:
            major, minor = compute_capability(spec.device)
            return f"the device has compute capability {major}.{minor}; Triton supports 8.0 and later"
    return None


def refuse_mixed(signature: Signature, names: Sequence[str]) -> str | None:
    """Why tensors that one dot product reads cannot be used together, or `None`."""
    dtypes = {name: signature[name].dtype for name in names if signature[name] is not None}
    if len(set(dtypes.values())) > 1:
        return "dtypes differ: " + ", ".join(f"{name} {_name(dtype)}" for name, dtype in dtypes.items())
    return None


def refuse_different_shapes(signature: Signature, first: str, second: str) -> str | None:
    """Why an elementwise pair cannot be used, or `None`; sizes that are not known are taken to agree."""
    a, b = signature[first].shape, signature[second].shape
    if len(a) != len(b) or any(x != y for x, y in zip(a, b, strict=True) if x is not None and y is not None):
        return f"{first} {list(a)} and {second} {list(b)} differ in shape"
    return None


def refuse_width(signature: Signature, name: str, limit: int) -> str | None:
    """Why a kernel that keeps the last dimension in registers cannot take it, or `None`."""
    shape = signature[name].shape
    if not shape:
        return f"{name} has no dimensions"
    if shape[-1] is None:
        return f"the last dimension of {name} is not known"
    if not 0 < shape[-1] <= limit:
        return f"the last dimension of {name} is {shape[-1]}; this kernel takes 1 to {limit}"
    return None


def refuse_vector(signature: Signature, name: str, size: int | None) -> str | None:
    """Why a parameter that is read along the last dimension cannot be used, or `None`; an absent one can."""
    spec = signature[name]
    if spec is None or spec.shape == (size,):
        return None
    return f"{name} is {list(spec.shape)}, not one number for each of {size}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@functools.cache
def compute_capability(device: torch.device) -> tuple[int, int]:
    """Major and minor compute capability of a CUDA device."""
    return torch.cuda.get_device_capability(device)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many a CUDA device has; a few in the interpreter."""
    return 8 if INTERPRETED else torch.cuda.get_device_properties(device).multi_processor_count


def on_device(tensor: torch.Tensor) -> contextlib.AbstractContextManager[object]:
    """Makes the tensor's device the current one for a launch: Triton launches on the current device."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


ALIGNMENT: Final = 16
"""Bytes of the widest load."""


def rows_aligned(tensor: torch.Tensor) -> bool:
    """Whether every row of the last dimension can be read in loads of 16 bytes.

    Kernels with a dot product use it to choose a configuration: rows that are read element by element pass through
    registers into shared memory, and with tiles large enough for Hopper's wgmma the ptxas of CUDA 12.8, which Triton
    3.6 brings, has been seen to read a matrix descriptor before it is computed.
    """
    elements = ALIGNMENT // tensor.element_size()
    steps = [step for size, step in zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True) if size > 1]
    contiguous = tensor.stride(-1) == 1 and tensor.shape[-1] % elements == 0
    return contiguous and tensor.data_ptr() % ALIGNMENT == 0 and all(step % elements == 0 for step in steps)


def collapse(
    shape: Sequence[int], strides: Sequence[Sequence[int]], rank: int
) -> tuple[list[int], list[list[int]]] | None:
    """The same elements with exactly `rank` dimensions, for tensors of one shape, or `None` if that needs a copy.

    Neighbouring dimensions are merged where every tensor's strides allow it, and sizes of 1 are put in front.
    """
    sizes: list[int] = []
    steps: list[list[int]] = [[] for _ in strides]
    for dim, size in enumerate(shape):
        if size == 1:
            continue
        if sizes and all(mine[-1] == stride[dim] * size for mine, stride in zip(steps, strides, strict=True)):
            sizes[-1] *= size
            for mine, stride in zip(steps, strides, strict=True):
                mine[-1] = stride[dim]
        else:
            sizes.append(size)
            for mine, stride in zip(steps, strides, strict=True):
                mine.append(stride[dim])
    missing = rank - len(sizes)
    if missing < 0:
        return None
    return [1] * missing + sizes, [[0] * missing + mine for mine in steps]
