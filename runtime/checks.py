"""Can this model, and can these inputs, be optimized? Each refusal names the thing, its value, and the way on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from .errors import InputError, UnsupportedModelError

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
PACKED = ("qweight", "weight_packed", "weight_scale", "SCB")
"""Tensors by which quantised linears are known."""


class StandIn:
    """What `optimize` puts in the place of a module's forward."""


def check_model(model: object, *, dry_run: bool = False) -> nn.Module:
    """The model itself, when `optimize` can take it.

    Raises:
        TypeError: not a `torch.nn.Module`.
        UnsupportedModelError: already optimized, compiled, scripted, adapted (PEFT), quantised, offloaded, split over
            devices, of mixed dtypes, or on the meta device outside a dry run.
    """
    if not isinstance(model, nn.Module):
        hint = (
            "; give an instance, such as AutoModelForCausalLM.from_pretrained(...)" if isinstance(model, type) else ""
        )
        name = model.__name__ if isinstance(model, type) else type(model).__name__
        raise TypeError(f"optimize(model): model is {name}, not a torch.nn.Module{hint}")
    _check_wrapping(model)
    _check_quantisation(model)
    _check_placement(model)
    _check_dtypes(model)
    if device_of(model).type == "meta" and not dry_run:
        raise UnsupportedModelError(
            f"{type(model).__name__} has its weights on the meta device, so nothing can be optimized or verified. "
            "Load the weights first, or ask for a report alone: optimize(model, dry_run=True)"
        )
    return model


def device_of(model: nn.Module) -> torch.device:
    """The device of the first parameter or buffer; the CPU for a model without any."""
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")


def dtype_of(model: nn.Module) -> torch.dtype:
    """The floating dtype most elements of the parameters have."""
    sizes: Counter[torch.dtype] = Counter()
    for parameter in model.parameters():
        if parameter.is_floating_point():
            sizes[parameter.dtype] += parameter.numel()
    return sizes.most_common(1)[0][0] if sizes else torch.get_default_dtype()


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all distinct parameters."""
    return sum(p.numel() * p.element_size() for p in model.parameters())


class UnfitError(InputError):
    """Inputs of a call that no graph takes; `what` they are, in few words."""

    def __init__(self, message: str, what: str) -> None:
        super().__init__(message)
        self.what = what


def check_inputs(inputs: Mapping[str, Any], past: object = None) -> None:
    """Refuse inputs that no graph takes, naming the argument.

    Raises:
        UnfitError: an empty batch, or an attention mask whose shape does not belong to the tokens.
    """
    for name, value in inputs.items():
        if isinstance(value, torch.Tensor) and value.numel() == 0:
            message = f"{name} has shape {list(value.shape)}: an empty batch; give at least one row and one token"
            raise UnfitError(message, f"an empty {name}")
    if past is None:  # with tokens in a cache the mask is longer than the tokens given
        for prefix in ("", "decoder_"):
            _check_mask(inputs, prefix)


def _check_mask(inputs: Mapping[str, Any], prefix: str) -> None:
    mask = inputs.get(prefix + "attention_mask")
    tokens_name = prefix + ("inputs_embeds" if inputs.get(prefix + "input_ids") is None else "input_ids")
    tokens = inputs.get(tokens_name)
    if not isinstance(mask, torch.Tensor) or not isinstance(tokens, torch.Tensor) or tokens.ndim < 2:
        return
    batch, length = tokens.shape[:2]
    if mask.ndim == 2 and tuple(mask.shape) != (batch, length):
        raise UnfitError(
            f"{prefix}attention_mask has shape {list(mask.shape)}; for {tokens_name} of shape {list(tokens.shape)} it "
            f"must be [{batch}, {length}], one entry for each token",
            f"an {prefix}attention_mask of another shape than {tokens_name}",
        )


def _check_wrapping(model: nn.Module) -> None:
    name = type(model).__name__
    if isinstance(model.__dict__.get("forward"), StandIn):
        raise UnsupportedModelError(
            f"this {name} is already optimized; call regraft.restore(model) first to optimize it in another way"
        )
    for module_name, module in model.named_modules():
        if module_name and isinstance(module.__dict__.get("forward"), StandIn):
            raise UnsupportedModelError(
                f"{module_name} inside this {name} is already optimized; call regraft.restore on it first"
            )
    if hasattr(model, "_orig_mod"):
        raise UnsupportedModelError(
            "the model was wrapped by torch.compile; optimize the original instead: regraft.optimize(model._orig_mod)"
        )
    if isinstance(model, torch.jit.ScriptModule):
        raise UnsupportedModelError("the model is a TorchScript module; give the original nn.Module")
    adapters = adapters_in(model)
    if adapters:
        raise UnsupportedModelError(
            f"the model carries PEFT adapters ({adapters[0] or name}, {len(adapters)} modules), whose weights may be "
            "switched at run time. Merge them first: model = model.merge_and_unload(); then regraft.optimize(model)"
        )


def adapters_in(model: nn.Module) -> list[str]:
    """Names of the modules that PEFT put there."""
    return [n for n, m in model.named_modules() if _from_package(m, "peft")]


def adapted(model: nn.Module) -> str | None:
    """Why no graph may serve the model, where PEFT has put adapters into it since; None where it has not."""
    names = adapters_in(model)
    return f"PEFT adapters in the model ({names[0]}), which may be switched between calls" if names else None


def _from_package(module: nn.Module, package: str) -> bool:
    return type(module).__module__.partition(".")[0] == package


def _check_quantisation(model: nn.Module) -> None:
    advice = "quantised weights are not supported yet; load it with dtype=torch.bfloat16 and no quantization_config"
    name = type(model).__name__
    config = getattr(model, "config", None)
    method = getattr(config, "quantization_config", None)
    if getattr(model, "is_quantized", False) or method is not None:
        how = method.get("quant_method") if isinstance(method, dict) else getattr(method, "quant_method", None)
        how = getattr(how, "value", how) or "unknown method"
        raise UnsupportedModelError(f"this {name} is quantised ({how}): {advice}")
    for weight_name, parameter in model.named_parameters():
        if parameter.dtype not in FLOATS or type(parameter.data) is not torch.Tensor:
            kind = type(parameter.data).__name__
            what = str(parameter.dtype) if kind == "Tensor" else kind
            raise UnsupportedModelError(f"{weight_name} is {what}: {advice}")
    for module_name, module in model.named_modules():
        packed = [k for k in PACKED if isinstance(getattr(module, k, None), torch.Tensor)]
        if packed:
            raise UnsupportedModelError(f"{module_name} ({type(module).__name__}) holds {packed[0]}: {advice}")


def _check_placement(model: nn.Module) -> None:
    name = type(model).__name__
    merge = "load it onto one device, with device_map=None or a single device"
    placement = getattr(model, "hf_device_map", None)
    if isinstance(placement, Mapping):
        places = sorted({str(p) for p in placement.values()})
        if len(places) > 1 or ({"cpu", "disk"} & set(places) and device_of(model).type != "cpu"):
            raise UnsupportedModelError(f"this {name} is split over {', '.join(places)} by its device_map: {merge}")
    for module_name, module in model.named_modules():
        hook = getattr(module, "_hf_hook", None)
        hooks = getattr(hook, "hooks", (hook,))
        if any(getattr(h, "offload", False) for h in hooks):
            raise UnsupportedModelError(f"{module_name or name} is offloaded by accelerate: {merge}")
    devices = {t.device: n for n, t in (*model.named_parameters(), *model.named_buffers())}
    if len(devices) > 1:
        where = "; ".join(f"{n} on {d}" for d, n in sorted(devices.items(), key=lambda item: str(item[0])))
        raise UnsupportedModelError(f"the weights of this {name} are on several devices ({where}): {merge}")


def _check_dtypes(model: nn.Module) -> None:
    """One dtype for the weights that are multiplied; norms and such may be kept in fp32 beside bf16, as models do."""
    matrices: dict[torch.dtype, str] = {}
    for name, parameter in model.named_parameters():
        if parameter.ndim >= 2:
            matrices.setdefault(parameter.dtype, name)
    if len(matrices) > 1 and not _keeps_fp32(model, matrices):
        where = "; ".join(f"{n} is {d}" for d, n in matrices.items())
        raise UnsupportedModelError(
            f"the weights of this {type(model).__name__} have mixed dtypes ({where}); bring them to one, such as "
            "model.to(torch.bfloat16)"
        )


def _keeps_fp32(model: nn.Module, matrices: Mapping[torch.dtype, str]) -> bool:
    """Whether the model itself asks for some modules in fp32 (T5's `wo`), and only those differ."""
    lists = (getattr(model, name, None) or () for name in ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict"))
    kept = [part for names in lists for part in names]
    lower = {d for d in matrices if d is not torch.float32}
    if len(lower) > 1:
        return False
    wide = [n for n, p in model.named_parameters() if p.ndim >= 2 and p.dtype is torch.float32]
    return all(any(part in name for part in kept) for name in wide)
