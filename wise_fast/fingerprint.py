"""Which base model a saved editor belongs to."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from wise_fast.architectures import Architecture, find_architecture
from wise_fast.errors import ConfigError, StorageError
from wise_fast.ffn import DualMemoryLinear
from wise_fast.place import parameters

_SAMPLES = 512


def describe(model: nn.Module, architecture: Architecture) -> dict:
    """Facts about a base model that a saved directory keeps, as JSON values; an attached editor does not change them.

    `weights` is a sha256 over the bytes, in the dtype they are stored in, of the whole weight (and bias) of the edited
    projection and of 512 evenly spaced elements, first and last among them, of every other parameter, with all names
    and shapes. Another checkpoint, fine-tune, dtype or vocabulary size changes it; a change that misses every sampled
    element does not. Where parameters are kept, offloaded or cut over ranks, does not matter. Quantized weights are
    taken as they are stored, so a quantized model is another base model than the one it was made of.
    """
    projection = model.get_submodule(architecture.projection)
    # An editor's model may have been cast since its architecture was found.
    dtype = projection.dtype if isinstance(projection, DualMemoryLinear) else architecture.dtype
    digest, wrapped, own = hashlib.sha256(), f"{architecture.projection}.base_layer.", f"{architecture.projection}."
    readers = {name.replace(wrapped, own): read for name, read in parameters(model).items()}
    for name in sorted(readers):
        parameter = readers[name]()
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype};".encode())
        for stored in _stored(parameter):
            digest.update(_bytes(stored if name.startswith(own) else _sample(stored)))
    return {
        "family": architecture.family,
        "layers": len(architecture.layers),
        "layer": architecture.layer,
        "projection": architecture.projection,
        "shape": [architecture.d_out, architecture.d_ff],
        "dtype": str(dtype).removeprefix("torch."),
        "weights": digest.hexdigest(),
    }


def check(base: dict, model: nn.Module, layer: int | None) -> None:
    """Raise unless `model`, edited at `layer`, is the base model that `base` describes. The model is not changed.

    Raises:
        StorageError: it is another model, or the same in another dtype.
        ConfigError: the model has an editor already.
        UnsupportedModelError: the model's structure cannot be edited.
    """
    if any(isinstance(module, DualMemoryLinear) for module in model.modules()):
        raise ConfigError("the model has side memories already; unload() the editor that put them there first")
    try:
        found = describe(model, find_architecture(model, layer))
    except ConfigError as error:
        raise StorageError(
            f"the saved editor belongs to another base model, of {base['layers']} layers: {error}"
        ) from error
    compare(base, found)


def compare(base: dict, found: dict) -> None:
    """Raise StorageError unless the base model of saved edits, `base`, is the one that was `found`, see `describe`."""
    names = [name for name in ("family", "layers", "layer", "projection", "shape") if base[name] != found[name]]
    if names and {*names} <= {"layer", "projection"}:
        raise StorageError(
            f"the saved edits are of layer {base['layer']}, this editor's of layer {found['layer']}, and an editor "
            f"serves one; load them into one made with WiseConfig(layer={base['layer']})"
        )
    if names:
        facts = "; ".join(f"its {name} is {base[name]}, this model's {found[name]}" for name in names)
        raise StorageError(f"the saved editor belongs to another base model: {facts}. Load the model it was made for")
    if base["dtype"] != found["dtype"]:
        raise StorageError(
            f"the saved editor belongs to a base model in {base['dtype']}, but this model is in {found['dtype']}, and "
            f"a fingerprint holds for one dtype only: load the model with dtype=torch.{base['dtype']}"
        )
    if base["weights"] != found["weights"]:
        raise StorageError(
            "the saved editor belongs to another base model: the structure is the same, but the weights differ "
            f"(fingerprint {base['weights'][:12]}, this model's {found['weights'][:12]}). Load the checkpoint it was "
            "made for, without later fine-tuning"
        )


def _stored(parameter: Tensor) -> Iterator[Tensor]:
    """The plain tensors that a parameter is made of: itself, unless it is of a class of its own (quantized)."""
    if hasattr(parameter, "__tensor_flatten__"):
        for name in parameter.__tensor_flatten__()[0]:
            yield from _stored(getattr(parameter, name))
    elif not parameter.is_meta:
        yield parameter


def _sample(parameter: Tensor) -> Tensor:
    flat, count = parameter.detach().reshape(-1), min(_SAMPLES, parameter.numel())
    return flat[torch.arange(count, device=flat.device) * (flat.numel() - 1) // max(count - 1, 1)]


def _bytes(values: Tensor) -> bytes:
    return values.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
