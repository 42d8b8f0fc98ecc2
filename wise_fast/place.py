"""Where a module runs and how its weights are stored: at hand, offloaded, quantized or sharded over ranks.

The side memory needs none of the main memory's weights: what a projection is given and what it returns is enough. So
where the weights are not plain, the module's own forward gives the main output.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

LINEAR = (nn.Linear, Conv1D)


def is_plain(module: nn.Module) -> bool:
    """Whether a module's weight is an ordinary floating point tensor that is at hand."""
    weight = getattr(module, "weight", None)
    if type(weight) not in (Tensor, nn.Parameter):
        return False
    return weight.is_floating_point() and not weight.is_meta and not is_offloaded(module)


def is_quantized(module: nn.Module) -> bool:
    """Whether a module is a linear map, by its sizes, whose weight is stored as something else than numbers of the
    model's dtype: packed integers (bitsandbytes, GGUF) or a tensor of a class of its own (torchao)."""
    weight = getattr(module, "weight", None)
    sizes = (getattr(module, name, None) for name in ("in_features", "out_features"))
    if not isinstance(weight, Tensor) or not all(isinstance(size, int) for size in sizes) or list(module.children()):
        return False
    own = type(weight) not in (Tensor, nn.Parameter) and not is_sharded(module)
    return not weight.is_meta and (own or not weight.is_floating_point())


def is_offloaded(module: nn.Module) -> bool:
    """Whether accelerate keeps a module's weights elsewhere and brings them for each forward."""
    return any(getattr(hook, "offload", False) for hook in _hooks(module))


def is_sharded(module: nn.Module) -> bool:
    """Whether each rank holds a part of a module's weight (tensor parallelism)."""
    weight = getattr(module, "weight", None)
    return hasattr(weight, "device_mesh") and hasattr(weight, "placements")


def reads_shards(module: nn.Module) -> bool:
    """Whether a sharded linear map is cut along its inputs, so that it returns the same on every rank."""
    placements = module.weight.placements
    return len(placements) == 1 and placements[0].is_shard() and placements[0].dim % module.weight.ndim == 1


def device_of(module: nn.Module) -> torch.device:
    """Where a module computes: of its weight, unless that is offloaded."""
    for hook in _hooks(module):
        if getattr(hook, "execution_device", None) is not None:
            return torch.device(hook.execution_device)
    return module.weight.device


def dtype_of(module: nn.Module) -> torch.dtype:
    """What a linear map computes in, as far as the module says."""
    kinds = [module.weight.dtype, getattr(module, "compute_dtype", None)]
    kinds.append(None if getattr(module, "bias", None) is None else module.bias.dtype)
    return next((kind for kind in kinds if kind is not None and kind.is_floating_point), torch.get_default_dtype())


def whole(a: Tensor, width: int, module: nn.Module) -> Tensor:
    """[..., width], what a linear map is given on all ranks together; every rank must ask. No gradient passes."""
    if a.shape[-1] == width or not is_sharded(module):
        return a
    from torch import distributed

    mesh = module.weight.device_mesh
    group, ranks = mesh.get_group(), mesh.size()
    most = -(-width // ranks)  # the last ranks may have less
    padded = nn.functional.pad(a.detach(), (0, most - a.shape[-1])).contiguous()
    parts = [torch.empty_like(padded) for _ in range(ranks)]
    distributed.all_gather(parts, padded, group=group)
    return torch.cat(parts, -1)[..., :width]


def absent(model: nn.Module) -> Iterator[str]:
    """Names of parameters that are nowhere: neither loaded nor offloaded."""
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta and not is_offloaded(module):
                yield f"{prefix}.{name}".lstrip(".")


def parameters(model: nn.Module) -> dict[str, Callable[[], Tensor]]:
    """Readers of a model's parameters by name, each once and wherever it is kept: offloaded ones as they are stored, of
    sharded ones all of it (every rank must ask, in the same order)."""
    tied, seen, readers = getattr(model, "all_tied_weights_keys", None) or {}, set(), {}
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            full = f"{prefix}.{name}".lstrip(".")
            if id(parameter) not in seen and not (full in tied and parameter.is_meta):
                seen.add(id(parameter))
                readers[full] = functools.partial(_read, module, name)
    return readers


def _read(module: nn.Module, name: str) -> Tensor:
    parameter = getattr(module, name)
    if parameter.is_meta:
        maps = (getattr(hook, "weights_map", None) for hook in _hooks(module))
        parameter = next((held[name] for held in maps if held is not None), parameter)
    return parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter


def _hooks(module: nn.Module) -> list:
    """Accelerate's hooks of a module."""
    hook = getattr(module, "_hf_hook", None)
    return [] if hook is None else list(getattr(hook, "hooks", (hook,)))
