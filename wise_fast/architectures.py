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

from wise_fast import place
from wise_fast.compiled import eagerly
from wise_fast.errors import ConfigError, UnsupportedModelError

SUPPORTED = (
    "decoder-only causal LMs with a dense FFN, such as Llama, Mistral, Qwen2, Qwen3, Gemma 2 and 3, Phi-3, GPT-2, "
    "GPT-J, GPT-NeoX, OPT and LFM2"
)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)  # over tokens, as LFM2 and Qwen3.5 have beside attention
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
        ffns: dotted names of the layers' FFNs, modules that treat every token by itself; None of a layer where there is
            no such module, or the edited projection is in it.
        dtype: of the activations that the projection was given; a quantized weight's own is another.
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
    ffns: tuple[str | None, ...] = ()
    dtype: torch.dtype = torch.float32

    @property
    def holder(self) -> tuple[str, str]:
        """Parent module and attribute that hold the projection."""
        parent, _, attribute = self.projection.rpartition(".")
        return parent, attribute


def linear_shape(module: nn.Module) -> tuple[int, int]:
    """(inputs, outputs) of a linear map; a transformers `Conv1D` stores its weight transposed, a packed one has another
    shape."""
    if place.is_quantized(module):
        return module.in_features, module.out_features
    rows, columns = module.weight.shape
    return (rows, columns) if isinstance(module, Conv1D) else (columns, rows)


def linear_weight(module: nn.Module) -> Tensor:
    """The weight as [outputs, inputs]: a transposed view for Conv1D, so `F.linear` applies to both."""
    return module.weight.t() if isinstance(module, Conv1D) else module.weight


def is_linear(module: nn.Module) -> bool:
    """Whether a module is `x W^T + b` with a floating point weight: a `Linear` or `Conv1D` in effect.

    A subclass counts if it computes the same (Falcon's does; quantization-aware and low-bit ones do not). Weights may
    be offloaded, or cut along their inputs over ranks.
    """
    if not isinstance(module, place.LINEAR) or not module.weight.is_floating_point():
        return False
    if place.is_sharded(module):
        return type(module) is nn.Linear and place.reads_shards(module)
    if type(module) in place.LINEAR:
        return place.is_plain(module) or place.is_offloaded(module)
    if not place.is_plain(module):
        return False
    weight = linear_weight(module)
    x = torch.linspace(-1, 1, weight.shape[1], device=weight.device, dtype=weight.dtype)[None]
    with torch.no_grad():
        made, expected = module(x), nn.functional.linear(x, weight, module.bias)
    scale = nn.functional.linear(x.abs(), weight.abs()).max()
    return bool((made - expected).abs().max() <= 8 * torch.finfo(weight.dtype).eps * scale)


def default_layer(n_layers: int) -> int:
    """Mid-to-late: three quarters of the way up (13 of 18)."""
    return round(0.75 * (n_layers - 1))


def find_architecture(model: nn.Module, layer: int | None = None) -> Architecture:
    """Find the edited projection, the decoder around it and the head.

    Args:
        model: a transformers causal LM.
        layer: index of the decoder layer to edit; None takes `default_layer`.

    Raises:
        UnsupportedModelError: the model is an encoder-decoder, a mixture of experts, quantized in a way that hides the
            projection, adapted, or not a causal LM.
        ConfigError: there is no such layer.
    """
    config = _check_family(model)
    calls = _probe(model)
    names = {module: name for name, module in model.named_modules()}
    layers = _find_layers(model, config, calls, names)
    if layer is None:
        layer = default_layer(len(layers))
    if not isinstance(layer, int) or isinstance(layer, bool) or not -len(layers) <= layer < len(layers):
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
        dtype=calls[projection].dtype,
        ffns=_tokenwise_ffns(model, [names[m] for m in layers], layer, names[projection], calls[projection].dtype),
    )


def _check_family(model: nn.Module):
    found = type(model).__name__
    config = getattr(model, "config", None)
    if config is None or not hasattr(model, "get_output_embeddings"):
        raise UnsupportedModelError(f"{found} is not a transformers model; supported: {SUPPORTED}")
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(f"{found} is an encoder-decoder; supported: {SUPPORTED}")
    absent = next(place.absent(model), None)
    if absent is not None:
        raise UnsupportedModelError(f"{found} is not loaded: {absent} is on the meta device. Supported: {SUPPORTED}")
    if model.get_output_embeddings() is None:
        raise UnsupportedModelError(f"{found} has no LM head: load it as a causal LM. Supported: {SUPPORTED}")
    if not model.can_generate():
        raise UnsupportedModelError(f"{found} is not a causal LM; supported: {SUPPORTED}")
    config = config.get_text_config()
    experts = [name for name in _EXPERT_FIELDS if (getattr(config, name, None) or 0) > 1]
    if experts:
        raise UnsupportedModelError(
            f"{found} is a mixture of experts ({experts[0]} = {getattr(config, experts[0])}); supported: {SUPPORTED}"
        )
    return config


@dataclass(frozen=True)
class _Call:
    """What a module did: whether it changed the width of what it was given, and the dtype that it was given."""

    widens: bool = False
    dtype: torch.dtype | None = None


def _probe(model: nn.Module) -> dict[nn.Module, _Call]:
    """Modules in the order in which they last finish."""
    calls: dict[nn.Module, _Call] = {}

    def note(module, args, output):
        tensors = bool(args) and isinstance(args[0], torch.Tensor) and isinstance(output, torch.Tensor)
        calls.pop(module, None)
        calls[module] = _Call(args[0].shape[-1:] != output.shape[-1:], args[0].dtype) if tensors else _Call()

    handles = [m.register_forward_hook(note) for m in model.modules()]
    # Two texts that differ in their last token alone: a causal LM says the same of their first.
    device = place.device_of(model.get_input_embeddings())
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = torch.tensor([[0, 1, 2], [0, 1, 3]], device=device) % vocabulary
    try:
        with torch.no_grad(), evaluating(model):
            logits = model(input_ids=ids, use_cache=False, return_dict=True).logits
    except (TypeError, ValueError, RuntimeError) as error:
        raise UnsupportedModelError(
            f"{type(model).__name__} does not run as a causal LM on token ids ({error}); supported: {SUPPORTED}"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    first = logits[:, 0].float()
    # Activations quantized on the way may share a scale with those of later tokens.
    quantized = any(map(place.is_quantized, calls))
    slack = 0.05 if quantized else 64 * torch.finfo(logits.dtype).eps
    if (first[0] - first[1]).abs().max() > slack * first.abs().max():
        raise UnsupportedModelError(
            f"{type(model).__name__} lets a token see later ones, so it is not a causal LM; supported: {SUPPORTED}"
        )
    return calls


def _find_layers(model, config, calls, names) -> list[nn.Module]:
    called = set(calls)
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == config.num_hidden_layers and set(module) <= called:
            return list(module)
    raise UnsupportedModelError(
        f"{type(model).__name__} has no list of {config.num_hidden_layers} decoder layers; supported: {SUPPORTED}"
    )


def _find_projection(model: nn.Module, layer: nn.Module, calls: dict[nn.Module, _Call]) -> nn.Module:
    family = type(model).__name__
    kernels = {id(m.weight) for m in layer.modules() if isinstance(m, _CONVOLUTIONS)}
    stacked = [name for name, p in layer.named_parameters() if p.ndim > 2 and id(p) not in kernels]
    if stacked or any("expert" in name.lower() for name, _ in layer.named_modules()):
        raise UnsupportedModelError(
            f"{family} has expert weights in its layers ({(stacked or ['experts'])[0]}); supported: {SUPPORTED}"
        )
    inside = set(layer.modules())
    ran = [m for m in calls if m in inside]
    linear = [m for m in ran if not list(m.children()) and getattr(getattr(m, "weight", None), "ndim", 0) == 2]
    last = linear[-1] if linear else None
    # What changes the width behind the last known linear map is a linear map of a kind that is not known.
    behind = ran[ran.index(last) + 1 :] if linear else ran
    unknown = [m for m in behind if calls[m].widens and last not in set(m.modules())]
    found = unknown[-1] if unknown else last
    if not is_linear(found) and not place.is_quantized(found):
        weight = getattr(found, "weight", None)
        kind = f" of {weight.dtype} on {weight.device}" if isinstance(weight, torch.Tensor) else ""
        raise UnsupportedModelError(
            f"the FFN's value projection of {family} is a {type(found).__module__}.{type(found).__name__}{kind}, "
            f"expected nn.Linear or Conv1D, in floating point or with in_features, out_features and a packed weight; "
            f"load the model unquantized. Supported: {SUPPORTED}"
        )
    holder = next(m for m in layer.modules() if found in set(m.children()))
    if any(isinstance(m, _CONVOLUTIONS) for m in holder.modules()):
        raise UnsupportedModelError(
            f"the last linear map of a layer of {family} ends a convolution over tokens ({type(holder).__name__}), not "
            f"an FFN; supported: {SUPPORTED}"
        )
    # An FFN widens: what ends in a narrow linear map is an adapter (LoRA), what has too few of them no transformer.
    width = _width(model)
    d_ff, d_out = linear_shape(found)
    if len(linear) < 3 or d_out < min(width, d_ff) or d_ff < d_out:
        raise UnsupportedModelError(
            f"the last linear map of a layer of {family} takes {d_ff} inputs to {d_out} outputs and does not look like "
            f"an FFN's value projection (merge adapters first); supported: {SUPPORTED}"
        )
    return found


def _width(model: nn.Module) -> int:
    embedding = model.get_input_embeddings()
    return getattr(embedding, "embedding_dim", None) or embedding.weight.shape[1]


def _tokenwise_ffns(model, layers: list[str], layer: int, projection: str, dtype) -> tuple[str | None, ...]:
    """What stands where the edited layer holds its value projection, if it gives each token what it gives alone.

    One module of each class is asked, not the edited one.
    """
    inside, _, attribute = projection.removeprefix(layers[layer]).rpartition(".")
    names = [name + inside for name in layers]
    modules = dict(model.named_modules())
    found = [modules.get(name) if inside and i != layer else None for i, name in enumerate(names)]
    asked = {type(m): m for m in found if m}
    alone = {kind: _is_tokenwise(model, module, attribute, dtype) for kind, module in asked.items()}
    return tuple(name if alone.get(type(module)) else None for name, module in zip(names, found, strict=True))


def _is_tokenwise(model, ffn: nn.Module, projection: str, dtype: torch.dtype) -> bool:
    """Whether a module gives each token of three what it gives the token alone."""
    width, device = _width(model), place.device_of(getattr(ffn, projection))
    x = torch.linspace(-1, 1, 3 * width, device=device, dtype=dtype).sin().view(1, 3, width)
    try:
        with torch.no_grad(), evaluating(model):
            together, alone = ffn(x), torch.cat([ffn(x[:, i : i + 1]) for i in range(3)], 1)
    except (TypeError, ValueError, RuntimeError, IndexError):
        return False
    same = isinstance(together, Tensor) and together.shape == x.shape == alone.shape
    return same and bool((together - alone).abs().max() <= 64 * torch.finfo(dtype).eps * together.abs().max())


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Run with the model in eval mode and without compiled graphs, and put every module's own mode back."""
    training = [m for m in model.modules() if m.training]
    for module in training:
        module.training = False
    try:
        with eagerly():
            yield
    finally:
        for module in training:
            module.training = True
