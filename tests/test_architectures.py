"""Finding the parts of a model: every family, and clear refusals that leave the model alone."""

import copy

import pytest
import torch
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

from tests.tiny import D_FF, FAMILIES, HIDDEN, LAYERS, tiny_model
from wise_fast.architectures import default_layer, evaluating, find_architecture, linear_weight
from wise_fast.errors import ConfigError, UnsupportedModelError

PROJECTIONS = {
    "lfm2": ("model", "model.layers.{}.feed_forward.w2"),
    "gpt2": ("transformer", "transformer.h.{}.mlp.c_proj"),
    "gptj": ("transformer", "transformer.h.{}.mlp.fc_out"),
    "gpt_neox": ("gpt_neox", "gpt_neox.layers.{}.mlp.dense_4h_to_h"),
    "gpt_neox_sequential": ("gpt_neox", "gpt_neox.layers.{}.mlp.dense_4h_to_h"),
    "opt": ("model.decoder", "model.decoder.layers.{}.fc2"),
    "opt_post_norm": ("model.decoder", "model.decoder.layers.{}.fc2"),
    "opt_projected": ("model.decoder", "model.decoder.layers.{}.fc2"),
}
WITH_BIAS = {"gpt2", "gptj", "gpt_neox", "gpt_neox_sequential", "opt", "opt_post_norm", "opt_projected"}
SMALL = dict(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)


def hooks(model: nn.Module) -> int:
    return sum(
        len(getattr(module, name))
        for module in model.modules()
        for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_forward_hooks_always_called")
    )


def snapshot(model: nn.Module) -> tuple:
    modules = [(name, id(m), m.training, "forward" in m.__dict__) for name, m in model.named_modules()]
    return hooks(model), modules, {k: v.clone() for k, v in model.state_dict().items()}


def assert_unchanged(model: nn.Module, before: tuple) -> None:
    after = snapshot(model)
    assert after[:2] == before[:2]
    assert after[2].keys() == before[2].keys()
    for name, value in before[2].items():
        assert torch.equal(after[2][name], value), name


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_found(family):
    model = tiny_model(family).train()
    before = snapshot(model)
    found = find_architecture(model)
    assert_unchanged(model, before)
    decoder, projection = PROJECTIONS.get(family, ("model", "model.layers.{}.mlp.down_proj"))
    assert found.layer == default_layer(LAYERS) == 2
    assert found.projection == projection.format(2)
    assert (found.decoder, found.head, found.d_ff, found.d_out) == (decoder, "lm_head", D_FF, HIDDEN)
    assert len(found.layers) == LAYERS and found.projection.startswith(found.layers[2] + ".")
    inside = None if family.startswith("opt") else projection.rpartition(".")[0]
    assert found.ffns == tuple(inside and inside.format(i) if i != 2 else None for i in range(LAYERS))
    assert found.context == 512 and found.family == model.config.model_type
    module = model.get_submodule(found.projection)
    assert isinstance(module, Conv1D) == (family == "gpt2")
    assert (module.bias is not None) == (family in WITH_BIAS)
    parent, attribute = found.holder
    assert getattr(model.get_submodule(parent), attribute) is module


def test_an_ffn_that_mixes_tokens_computes_all_of_them():
    class Mixing(type(tiny_model("llama").model.layers[0].mlp)):
        def forward(self, x):
            return super().forward(x).cumsum(1)

    model = tiny_model("llama")
    model.model.layers[0].mlp.__class__ = Mixing
    assert find_architecture(model).ffns == (None, "model.layers.1.mlp", None, "model.layers.3.mlp")


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_linear_weight_is_outputs_by_inputs(family):
    model = tiny_model(family)
    module = model.get_submodule(find_architecture(model).projection)
    x = torch.randn(5, D_FF)
    torch.testing.assert_close(nn.functional.linear(x, linear_weight(module), module.bias), module(x))


@pytest.mark.parametrize("layer, expected", [(0, 0), (3, 3), (-1, 3), (-4, 0)])
def test_layer_is_settable(layer, expected):
    found = find_architecture(tiny_model("gpt_neox"), layer)
    assert found.layer == expected and f"layers.{expected}." in found.projection


@pytest.mark.parametrize("layer", [4, -5, "2", 1.0, True])
def test_layer_out_of_range_says_what_there_is(layer):
    model = tiny_model("opt")
    before = snapshot(model)
    with pytest.raises(ConfigError, match=r"4 layers, 0 to 3"):
        find_architecture(model, layer)
    assert_unchanged(model, before)


@pytest.mark.parametrize("n, expected", [(1, 0), (2, 1), (4, 2), (18, 13), (32, 23)])
def test_default_layer_is_three_quarters_up(n, expected):
    assert default_layer(n) == expected


def mixtral(experts=2):
    config = transformers.MixtralConfig(
        **SMALL, num_key_value_heads=1, num_local_experts=experts, num_experts_per_tok=1
    )
    return transformers.MixtralForCausalLM(config)


def qwen2_moe():
    experts = dict(num_experts=2, num_experts_per_tok=1, moe_intermediate_size=8, shared_expert_intermediate_size=8)
    return transformers.Qwen2MoeForCausalLM(transformers.Qwen2MoeConfig(**SMALL, **experts, num_key_value_heads=1))


def t5():
    config = transformers.T5Config(vocab_size=64, d_model=16, d_ff=32, num_layers=1, num_heads=2, d_kv=8)
    return transformers.T5ForConditionalGeneration(config)


def bert(kind, **settings):
    return lambda: getattr(transformers, kind)(transformers.BertConfig(**SMALL, **settings))


def classifier():
    return transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**SMALL, num_key_value_heads=1))


def mamba():
    return transformers.MambaForCausalLM(transformers.MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=2))


REFUSED = {
    "mixtral": (mixtral, "mixture of experts .num_local_experts = 2"),
    "one expert": (lambda: mixtral(1), "expert weights"),
    "shared expert": (qwen2_moe, "mixture of experts .num_experts = 2"),
    "t5": (t5, "T5ForConditionalGeneration is an encoder-decoder"),
    "masked": (bert("BertForMaskedLM"), "BertForMaskedLM is not a causal LM"),
    "bidirectional": (bert("BertLMHeadModel"), "see later ones"),
    "base": (lambda: tiny_model("llama").model, "LlamaModel has no LM head"),
    "classifier": (classifier, "no LM head"),
    "mamba": (mamba, r"MambaForCausalLM ends a convolution over tokens \(MambaMixer\)"),
    "module": (lambda: nn.Sequential(nn.Linear(3, 3)), "Sequential is not a transformers model"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_edited_is_named_and_left_alone(name):
    make, message = REFUSED[name]
    model = make().train()
    before = snapshot(model)
    with pytest.raises(UnsupportedModelError, match=message) as error:
        find_architecture(model)
    assert "Llama, Mistral" in str(error.value)
    assert_unchanged(model, before)


class Opaque(nn.Module):
    """A linear map of a kind that nobody knows."""

    def __init__(self, base):
        super().__init__()
        self.hidden = [base]

    def forward(self, x):
        return self.hidden[0](x)


class Scaled(nn.Linear):
    """A subclass that computes something else."""

    def forward(self, x):
        return 1.01 * super().forward(x)


class Wrapped(nn.Linear):
    """A subclass that computes the same."""

    def forward(self, x):
        return x @ self.weight.t()


class LowRank(nn.Module):
    def __init__(self, base):
        super().__init__()
        self.base_layer, self.down, self.up = base, nn.Linear(D_FF, 4), nn.Linear(4, HIDDEN)

    def forward(self, x):
        return self.base_layer(x) + self.up(self.down(x))


def reclass(kind):
    def change(linear):
        linear = copy.copy(linear)
        linear.__class__ = kind
        return linear

    return change


@pytest.mark.parametrize(
    "replace, message",
    [
        (Opaque, r"\.Opaque, expected nn.Linear or Conv1D.*load the model unquantized"),
        (reclass(Scaled), r"\.Scaled of torch.float32 on cpu, expected nn.Linear"),
        (LowRank, "takes 4 inputs to 32 outputs .*merge adapters"),
        (lambda linear: linear.to("meta"), "down_proj.weight is on the meta device"),
    ],
)
def test_a_projection_of_another_kind_is_refused(replace, message):
    model = tiny_model("llama")
    mlp = model.model.layers[2].mlp
    mlp.down_proj = replace(mlp.down_proj)
    before = hooks(model)
    with pytest.raises(UnsupportedModelError, match=message):
        find_architecture(model)
    assert hooks(model) == before


@pytest.mark.parametrize("scope", ["mlp", "layer"])
def test_dynamically_quantized_layers_are_refused(scope):
    model = tiny_model("llama")
    target = model.model.layers[2].mlp if scope == "mlp" else model
    try:
        torch.ao.quantization.quantize_dynamic(target, {nn.Linear}, inplace=True)
    except RuntimeError as error:
        pytest.skip(f"no quantization engine: {error}")
    with pytest.raises(UnsupportedModelError, match=r"quantized.*\.Linear, expected nn.Linear"):
        find_architecture(model)


def test_a_subclass_that_computes_the_same_is_found():
    model = tiny_model("llama")
    mlp = model.model.layers[2].mlp
    mlp.down_proj = reclass(Wrapped)(mlp.down_proj)
    assert find_architecture(model).projection == "model.layers.2.mlp.down_proj"


def test_bf16_models_are_found():
    assert find_architecture(tiny_model("gemma3").bfloat16()).d_ff == D_FF


def test_evaluating_restores_each_modules_mode():
    model = tiny_model("gpt2").train()
    model.transformer.h[1].eval()
    modes = [m.training for m in model.modules()]
    with pytest.raises(RuntimeError), evaluating(model):
        assert not any(m.training for m in model.modules())
        raise RuntimeError
    assert [m.training for m in model.modules()] == modes
