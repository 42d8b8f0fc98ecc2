"""A tiny GGUF file, and what lets transformers leave its weights packed where no kernel can be downloaded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from tests.edited import wide_model
from tests.tiny import VOCABULARY, tiny_tokenizer

NAMES = {  # transformers' names of an LFM2's modules: those in the file
    "model.embed_tokens": "token_embd",
    "model.embedding_norm": "token_embd_norm",
    "lm_head": "output",
    "model.layers": "blk",
    "operator_norm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.out_proj": "attn_output",
    "self_attn.q_layernorm": "attn_q_norm",
    "self_attn.k_layernorm": "attn_k_norm",
    "feed_forward.w1": "ffn_gate",
    "feed_forward.w2": "ffn_down",
    "feed_forward.w3": "ffn_up",
    "conv.in_proj": "shortconv.in_proj",
    "conv.out_proj": "shortconv.out_proj",
    "conv.conv": "shortconv.conv",
}


def write_gguf(path: Path, quantization: str = "Q8_0") -> Path:
    """The wide LFM2 with its matrices quantized, and the tiny tokenizer, in one file.

    Args:
        quantization: a type of the `gguf` package that it can quantize to, with blocks of 32.
    """
    gguf = pytest.importorskip("gguf")
    model, kind = wide_model("lfm2"), gguf.GGMLQuantizationType[quantization]
    writer = gguf.GGUFWriter(path, "lfm2")
    _describe(writer, model.config)
    _tokenize(writer)
    for name, tensor in model.state_dict().items():
        for ours, theirs in NAMES.items():
            name = f".{name}".replace(f".{ours}.", f".{theirs}.")[1:]
        values = (tensor[:, 0] if tensor.ndim == 3 else tensor).numpy()  # a convolution's are [channels, 1, taps]
        if tensor.ndim == 2:
            writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _describe(writer, config) -> None:
    heads = [config.num_key_value_heads if kind == "full_attention" else 0 for kind in config.layer_types]
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(heads)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_shortconv_l_cache(config.conv_L_cache)
    writer.add_vocab_size(config.vocab_size)


def _tokenize(writer) -> None:
    tokenizer = tiny_tokenizer()
    known = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    tokens = known + [f"<{i}>" for i in range(len(known), VOCABULARY)]
    normal, control = 1, 3
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types([normal] * 256 + [control] * (VOCABULARY - 256))
    writer.add_token_scores([0.0] * VOCABULARY)  # merges, of which there are none, are derived from them
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_add_bos_token(True)


@contextmanager
def gguf_kernel() -> Iterator[None]:
    """Lets transformers find a GGUF kernel: products of few rows without a gradient, as inference kernels are; what
    has more rows it unpacks by itself on a CPU. Nothing changes where transformers cannot leave weights packed."""
    try:
        from transformers.integrations.gguf import dequant, kernels
    except ImportError:
        yield
        return

    def mul_mat_vec(weight: Tensor, x: Tensor, ggml_type: int, out_features: int) -> Tensor:
        unpacked = dequant.dequantize(weight, ggml_type, x.dtype).reshape(out_features, x.shape[1])
        return nn.functional.linear(x.detach(), unpacked)

    found = SimpleNamespace(mul_mat_vec=mul_mat_vec, GEMV_TYPES=frozenset(dequant.GGML_BLOCK))
    for name in ("dequantize", "get_rows", "mul_mat_id"):  # of devices and experts
        setattr(found, name, None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "_gguf_kernel", kernels.GgufKernel(found))
        yield


def load_packed(path: Path, **settings) -> nn.Module:
    """The file's model with its weights packed, under `gguf_kernel`; skips where transformers cannot."""
    pytest.importorskip("transformers.integrations.gguf.utils", reason="this transformers dequantizes GGUF files")
    pytest.importorskip("accelerate")
    settings = dict(attn_implementation="sdpa") | settings
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, **settings)
    return model.eval().requires_grad_(False)


def pack_gemma(model: nn.Module, path: Path) -> set[str]:
    """Puts the file's blocks in the place of a Gemma 3's linear maps, under `gguf_kernel`: transformers leaves no Gemma
    packed. Returns the types of quantization; maps of one that transformers cannot unpack stay as they are."""
    gguf = pytest.importorskip("gguf")
    packing = pytest.importorskip("transformers.integrations.gguf.utils", reason="transformers dequantizes GGUF files")
    parts = {"attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_down": "mlp.down_proj"}
    found = set()
    for tensor in gguf.GGUFReader(path).tensors:
        _, layer, part, *_ = (*tensor.name.split("."), "", "")
        if part not in parts or tensor.tensor_type not in packing.GGML_BLOCK:
            continue
        name = f"model.layers.{layer}.{parts[part]}"
        plain = model.get_submodule(name)
        packed = packing.GgufLinear(plain.in_features, plain.out_features, int(tensor.tensor_type))
        packed.weight.copy_(torch.from_numpy(tensor.data.copy()))
        model.set_submodule(name, packed)
        found.add(tensor.tensor_type.name)
    return found
