"""An op, declared once: its reference in plain PyTorch is schema, fake, CPU fallback and test oracle at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch

from .cost import Cost

NAMESPACE: Final = "regraft"
_LIBRARY: Final = torch.library.Library(NAMESPACE, "FRAGMENT")


@dataclass(frozen=True)
class TensorSpec:
    """What is known of a tensor before the call: `None` in `shape` is a size that may change from call to call."""

    shape: tuple[int | None, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, tensor: torch.Tensor) -> TensorSpec:
        """The spec of a real or fake tensor; a symbolic size becomes `None`."""
        shape = tuple(size if isinstance(size, int) else None for size in tensor.shape)
        return cls(shape, tensor.dtype, tensor.device)


Signature = dict[str, Any]
"""By argument name of the op: a `TensorSpec` for a tensor, the Python value for anything else, `None` where absent."""


@dataclass(frozen=True)
class Op:
    """A semantic or fused op in `torch.ops.regraft`.

    `cost(*args, **kwargs)` takes what the op takes, as fake or meta tensors, and returns FLOPs and bytes.
    """

    name: str
    reference: Callable[..., Any]
    overload: torch._ops.OpOverload
    cost: Callable[..., Cost]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.overload(*args, **kwargs)

    def signature(self, *args: Any, **kwargs: Any) -> Signature:
        """The arguments by name, defaults filled in, tensors as `TensorSpec`; what `supports` and `select` read.

        Raises `TypeError` where the arguments do not fit the schema.
        """
        arguments = self.overload._schema.arguments
        if len(args) > len(arguments):
            raise TypeError(f"{self.name} takes {len(arguments)} arguments, got {len(args)}")
        values = dict(zip((a.name for a in arguments), args, strict=False))
        known = {a.name for a in arguments}
        for name, value in kwargs.items():
            if name not in known or name in values:
                raise TypeError(f"{self.name} got an unexpected or repeated argument {name!r}")
            values[name] = value
        signature: Signature = {}
        for argument in arguments:
            if argument.name in values:
                value = values[argument.name]
            elif argument.has_default_value():
                value = argument.default_value
            else:
                raise TypeError(f"{self.name} is missing the argument {argument.name!r}")
            signature[argument.name] = TensorSpec.of(value) if isinstance(value, torch.Tensor) else value
        return signature


@dataclass(frozen=True)
class Kernel:
    """A provider of an op: `run` takes the op's arguments, `supports` says why it cannot, or `None`.

    `early` names arguments that it reads while the kernels before it still run: a graph may give it weights there only.
    """

    op: Op
    provider: str
    run: Callable[..., Any]
    supports: Callable[[Signature], str | None]
    early: tuple[str, ...] = ()


def define(
    *, cost: Callable[..., Cost], fake: Callable[..., Any] | None = None, mutates: tuple[str, ...] = ()
) -> Callable[[Callable[..., Any]], Op]:
    """Register `regraft::<function name>` from its reference.

    The reference writes to no argument but those of `mutates` and never returns an alias of an input; the schema comes
    from its annotations. It runs on every device for which no kernel is chosen, and on fake tensors to give shapes,
    dtypes and strides, unless `fake` does that: for a reference that looks at values.
    """

    def register(reference: Callable[..., Any]) -> Op:
        name = reference.__name__
        _LIBRARY.define(torch.library.infer_schema(reference, mutates_args=mutates, op_name=name))
        _LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{name}", fake or reference, lib=_LIBRARY)
        overload = getattr(getattr(torch.ops, NAMESPACE), name).default
        return Op(name, reference, overload, cost)

    return register
