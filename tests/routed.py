"""A tiny edited model whose memories are each in scope for one prompt, for the tests of routing and generation."""

import functools
from types import SimpleNamespace

import torch

from tests.test_ffn import make_bank
from tests.tiny import D_FF, HIDDEN, tiny_model, tiny_tokenizer
from wise_fast import WiseEditor

FAMILIES = ["llama", "gpt2", "gemma3", "opt", "mistral"]
PROMPTS = ("Who is it", "The sky above us", "what", "Zoe lives in a town", "7", "Once, long ago")
NEW = 6
FIXED = dict(do_sample=False, min_new_tokens=NEW, max_new_tokens=NEW, pad_token_id=258)
QUERY = dict(return_tensors="pt", padding=True)


@functools.cache
def world(family, **overrides) -> SimpleNamespace:
    """A model with two memories, one in scope for just one prompt each, and what every prompt gives alone."""
    model, tokenizer = tiny_model(family, **overrides), tiny_tokenizer()
    editor = WiseEditor(model, tokenizer)
    for seed in range(50):
        bank = make_bank("neuron", (0.0, 0.0), seed=seed, shape=(HIDDEN, D_FF))
        editor.projection.set_bank(bank)
        scores = torch.cat([prefill(model, editor, p)[1] for p in PROMPTS])
        top = scores.topk(2, 0)
        if top.indices[0, 0] != top.indices[0, 1] and (top.values[0] > 1.02 * top.values[1]).all():
            break
    bank.thresholds.copy_(top.values.mean(0))
    editor.projection.set_bank(bank)
    choices = torch.cat([prefill(model, editor, p)[0] for p in PROMPTS])
    assert sorted(choices.tolist()) == [-1] * (len(PROMPTS) - 2) + [0, 1]
    texts = [generate(model, tokenizer, [p])[0] for p in PROMPTS]
    with editor.disabled():
        plain = [generate(model, tokenizer, [p])[0] for p in PROMPTS]
    for choice, text, without in zip(choices, texts, plain, strict=True):
        assert torch.equal(text, without) == (choice == -1)  # the memories are heard
    return SimpleNamespace(**{k: v for k, v in locals().items() if k not in ("top", "seed")})


@torch.no_grad()
def prefill(model, editor, prompt):
    model(**editor.tokenizer(prompt, return_tensors="pt"))
    return editor.routing.choice, editor.routing.scores


def generate(model, tokenizer, prompts, **settings):
    given = tokenizer(list(prompts), **QUERY)
    return model.generate(**given, **(FIXED | settings))[:, given["input_ids"].shape[1] :]


def positions(mask, new):
    """Positions behind left padding, which not every model takes from the mask."""
    return {"position_ids": (mask.cumsum(1) - 1).clamp_min(0)[:, -new.shape[1] :]}
