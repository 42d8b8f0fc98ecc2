"""Tiny random causal LMs of every supported family, and a byte-level tokenizer, for tests that need no download."""

from __future__ import annotations

import copy
import functools
import json

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import nn
from transformers import PreTrainedTokenizerFast

VOCABULARY, HIDDEN, D_FF, LAYERS = 260, 32, 64, 4

_COMMON = dict(vocab_size=VOCABULARY, bos_token_id=256, eos_token_id=257, pad_token_id=258, tie_word_embeddings=False)
_LLAMA = _COMMON | dict(
    hidden_size=HIDDEN,
    intermediate_size=D_FF,
    num_hidden_layers=LAYERS,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=512,
    initializer_range=0.2,
)
_GEMMA = _LLAMA | dict(
    tie_word_embeddings=True,
    query_pre_attn_scalar=8,
    sliding_window=4,
    layer_types=["sliding_attention", "full_attention"] * (LAYERS // 2),
)
_GPT = _COMMON | dict(n_embd=HIDDEN, n_layer=LAYERS, n_head=4, n_positions=512, initializer_range=0.2)
_NEOX = {k: v for k, v in _LLAMA.items() if k not in ("num_key_value_heads", "head_dim")}
_OPT = {k: v for k, v in _NEOX.items() if k not in ("intermediate_size", "initializer_range")} | dict(
    ffn_dim=D_FF, init_std=0.2, word_embed_proj_dim=HIDDEN
)

# family: (config class, model class, settings)
FAMILIES: dict[str, tuple[str, str, dict]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", _LLAMA),
    "mistral": ("MistralConfig", "MistralForCausalLM", _LLAMA | dict(sliding_window=4)),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", {k: v for k, v in _LLAMA.items() if k != "head_dim"}),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", _LLAMA),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", _GEMMA),
    "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM", _GEMMA),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", {k: v for k, v in _LLAMA.items() if k != "head_dim"}),
    "lfm2": (
        "Lfm2Config",
        "Lfm2ForCausalLM",
        {k: v for k, v in _LLAMA.items() if k != "head_dim"}
        | dict(block_auto_adjust_ff_dim=False, layer_types=["conv", "full_attention"] * (LAYERS // 2)),
    ),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", _GPT | dict(n_inner=D_FF, tie_word_embeddings=True)),
    "gptj": ("GPTJConfig", "GPTJForCausalLM", _GPT | dict(n_inner=D_FF, rotary_dim=4)),
    "gpt_neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", _NEOX),
    "gpt_neox_sequential": ("GPTNeoXConfig", "GPTNeoXForCausalLM", _NEOX | dict(use_parallel_residual=False)),
    "opt": ("OPTConfig", "OPTForCausalLM", _OPT),
    "opt_post_norm": ("OPTConfig", "OPTForCausalLM", _OPT | dict(do_layer_norm_before=False)),
    "opt_projected": ("OPTConfig", "OPTForCausalLM", _OPT | dict(do_layer_norm_before=False, word_embed_proj_dim=16)),
}


def tiny_model(family: str, seed: int = 0, **overrides) -> nn.Module:
    """A random model in eval mode and fp32, seeded, with weights large enough for its logits to differ.

    Args:
        family: a key of `FAMILIES`.
        seed: of the weights.
        overrides: settings of the config, such as `num_hidden_layers` or `attn_implementation`.
    """
    return copy.deepcopy(_initialized(family, seed, json.dumps(overrides, sort_keys=True)))


@functools.cache
def _initialized(family: str, seed: int, overrides: str) -> nn.Module:
    """The model that `tiny_model` copies, which is faster than to make it again."""
    config_class, model_class, settings = FAMILIES[family]
    config = getattr(transformers, config_class)(**(settings | json.loads(overrides)))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(transformers, model_class)(config)
        with torch.no_grad():  # biases and norms start at 0 and 1, which hides mistakes with either
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def tiny_tokenizer(pad: bool = True, padding_side: str = "left", bos: bool = True) -> PreTrainedTokenizerFast:
    """One token a byte, so any text survives a round trip; ids fit `tiny_model`.

    Args:
        pad: whether it has a pad token.
        padding_side: "left" or "right".
        bos: put the BOS token in front of every text.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = [*alphabet, "<bos>", "<eos>", "<pad>"]
    backend = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    if bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", names.index("<bos>"))]
        )
    tokens = dict(bos_token="<bos>", eos_token="<eos>") | (dict(pad_token="<pad>") if pad else {})
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, padding_side=padding_side, clean_up_tokenization_spaces=False, **tokens
    )
