"""Finds, in any decoder-only Hugging Face causal LM, the parts that WISE edits.

Nothing is configured per family. One probe forward of a few tokens shows which modules run, in which order and with
which shapes; from that order follow the decoder, its layers, the value projection of a layer's FFN (the last linear
map that runs in the layer) and the head.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from wise_fast.errors import ConfigError, UnsupportedModelError

SUPPORTED = (
    "decoder-only causal LMs with a dense FFN in floating point, such as Llama, Mistral, Qwen2, Qwen3, Gemma 2 and 3, "
    "Phi-3, GPT-2, GPT-J, GPT-NeoX and OPT"
)
_LINEAR = (nn.Linear, Conv1D)
_EXPERT_FIELDS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")


@dataclass(frozen=True)
class Architecture:
    """The parts of a causal LM that editing and serving touch.

    Attributes:
        decoder: outermost module below the model that runs the layers; routing hooks sit on it.
        layers: the decoder layers, in order.
        layer: index of the edited layer.
        projection: dotted name, from the model's root, of that layer's value projection.
        head: dotted name of the LM head.
        d_ff: inputs of the value projection.
        d_out: its outputs, the width of the residual stream.
        family: `config.model_type`, for messages and saved directories.
        context: longest input in tokens, or None when the config does not say.
    """

    decoder: str
    layers: tuple[str, ...]
    layer: int
    projection: str
    head: str
    d_ff: int
    d_out: int
    family: str
    context: int | None

    @property
    def holder(self) -> tuple[str, str]:
        """Parent module and attribute that hold the projection."""
        parent, _, attribute = self.projection.rpartition(".")
        return parent, attribute


def linear_shape(module: nn.Module) -> tuple[int, int]:
    """(inputs, outputs) of an `nn.Linear` or a transformers `Conv1D`, whose weight is stored transposed."""
    rows, columns = module.weight.shape
    return (rows, columns) if isinstance(module, Conv1D) else (columns, rows)


def linear_weight(module: nn.Module) -> Tensor:
    """The weight as [outputs, inputs]: a transposed view for Conv1D, so `F.linear` applies to both."""
    return module.weight.t() if isinstance(module, Conv1D) else module.weight


def default_layer(n_layers: int) -> int:
    """Mid-to-late: three quarters of the way up, where the prototype of DESIGN section 6 stood (13 of 18)."""
    return round(0.75 * (n_layers - 1))


def find_architecture(model: nn.Module, layer: int | None = None) -> Architecture:
    """Find the edited projection, the decoder around it and the head.

    Args:
        model: a transformers causal LM.
        layer: index of the decoder layer to edit; None takes `default_layer`.

    Raises:
        UnsupportedModelError: the model is an encoder-decoder, a mixture of experts, quantized, or not a causal LM.
        ConfigError: there is no such layer.
    """
    config = _check_family(model)
    calls = _probe(model)
    names = {module: name for name, module in model.named_modules()}
    layers = _find_layers(model, config, calls, names)
    if layer is None:
        layer = default_layer(len(layers))
    if not isinstance(layer, int) or not -len(layers) <= layer < len(layers):
        raise ConfigError(f"layer {layer!r} does not exist: the model has {len(layers)} layers, 0 to {len(layers) - 1}")
    layer %= len(layers)
    projection = _find_projection(model, layers[layer], calls)
    d_ff, d_out = linear_shape(projection)
    first = names[layers[0]]
    decoder = min((names[m] for m in calls if names[m] and first.startswith(names[m] + ".")), key=len)
    return Architecture(
        decoder=decoder,
        layers=tuple(names[m] for m in layers),
        layer=layer,
        projection=names[projection],
        head=names[model.get_output_embeddings()],
        d_ff=d_ff,
        d_out=d_out,
        family=config.model_type,
        context=getattr(config, "max_position_embeddings", None),
    )


def _check_family(model: nn.Module):
    found = type(model).__name__
    config = getattr(model, "config", None)
    if config is None or not hasattr(model, "get_output_embeddings"):
        raise UnsupportedModelError(f"{found} is not a transformers model; supported: {SUPPORTED}")
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(f"{found} is an encoder-decoder; supported: {SUPPORTED}")
    if getattr(config, "quantization_config", None) is not None:
        raise UnsupportedModelError(f"{found} has quantized weights; load it unquantized. Supported: {SUPPORTED}")
    if model.get_output_embeddings() is None:
        raise UnsupportedModelError(f"{found} has no LM head: load it as a causal LM. Supported: {SUPPORTED}")
    config = config.get_text_config()
    experts = [name for name in _EXPERT_FIELDS if (getattr(config, name, None) or 0) > 1]
    if experts:
        raise UnsupportedModelError(
            f"{found} is a mixture of experts ({experts[0]} = {getattr(config, experts[0])}); supported: {SUPPORTED}"
        )
    return config


def _probe(model: nn.Module) -> list[nn.Module]:
    """Modules in the order in which they finish in one forward of three tokens."""
    calls: list[nn.Module] = []
    handles = [m.register_forward_hook(lambda m, _args, _out: calls.append(m)) for m in model.modules()]
    device = model.get_input_embeddings().weight.device
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = torch.arange(3, device=device)[None] % vocabulary
    try:
        with torch.no_grad(), evaluating(model):
            model(input_ids=ids, use_cache=False)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UnsupportedModelError(
            f"{type(model).__name__} does not run as a causal LM on token ids ({error}); supported: {SUPPORTED}"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _find_layers(model, config, calls, names) -> list[nn.Module]:
    called = set(calls)
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == config.num_hidden_layers and set(module) <= called:
            return list(module)
    raise UnsupportedModelError(
        f"{type(model).__name__} has no list of {config.num_hidden_layers} decoder layers; supported: {SUPPORTED}"
    )


def _find_projection(model: nn.Module, layer: nn.Module, calls: list[nn.Module]) -> nn.Module:
    inside = set(layer.modules())
    family = type(model).__name__
    stacked = [name for name, p in layer.named_parameters() if p.ndim > 2]
    if stacked or any("expert" in name.lower() for name, _ in layer.named_modules()):
        raise UnsupportedModelError(
            f"{family} has expert weights in its layers ({(stacked or ['experts'])[0]}); supported: {SUPPORTED}"
        )
    linear = [m for m in calls if m in inside and not list(m.children()) and getattr(m, "weight", None) is not None]
    linear = [m for m in linear if m.weight.ndim == 2]
    width = model.get_input_embeddings().weight.shape[1]
    if not linear:
        raise UnsupportedModelError(f"no linear map runs in a layer of {family}; supported: {SUPPORTED}")
    last = linear[-1]
    if not isinstance(last, _LINEAR) or not last.weight.is_floating_point():
        raise UnsupportedModelError(
            f"the FFN's value projection of {family} is a {type(last).__name__} of {last.weight.dtype}, expected "
            f"nn.Linear or Conv1D in floating point; supported: {SUPPORTED}"
        )
    if len(linear) < 3 or linear_shape(last)[0] <= 0 or linear_shape(last)[1] < min(width, linear_shape(last)[0]):
        raise UnsupportedModelError(
            f"the last linear map of a layer of {family} has shape {tuple(last.weight.shape)} and does not look like "
            f"an FFN's value projection; supported: {SUPPORTED}"
        )
    return last


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Run with the model in eval mode, and put every module's own mode back."""
    training = [m for m in model.modules() if m.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
