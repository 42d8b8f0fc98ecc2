"""Texts that the model writes itself: random prefixes for robustness, and unrelated text for the margin loss."""

from __future__ import annotations

import torch
from torch import nn

from wise_fast.architectures import evaluating


@torch.no_grad()
def sample_texts(model: nn.Module, tokenizer, count: int, length: int, generator: torch.Generator) -> list[str]:
    """`count` texts of `length` tokens sampled from the model at temperature 1, special tokens excluded.

    Sampling draws from `generator` (CPU) alone, so the same model and seed give the same texts.
    """
    if count == 0:
        return []
    device = model.get_input_embeddings().weight.device
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    size = model.get_input_embeddings().weight.shape[0]
    ids = torch.full((count, 1), 0 if first is None else first, device=device)
    banned = [i for i in tokenizer.all_special_ids if i < size]
    cache, texts = None, []
    with evaluating(model):
        for _ in range(length):
            output = model(input_ids=ids, past_key_values=cache, use_cache=True)
            cache, logits = output.past_key_values, output.logits[:, -1, : len(tokenizer)].float().cpu()
            logits[:, banned] = -torch.inf
            ids = torch.multinomial(logits.softmax(-1), 1, generator=generator).to(device)
            texts.append(ids)
    decoded = tokenizer.batch_decode(torch.cat(texts, 1), skip_special_tokens=True)
    return [" ".join(text.split()) for text in decoded]
