"""Texts that the model writes itself: random prefixes for robustness, and unrelated text for the margin loss."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from wise_fast.architectures import evaluating
from wise_fast.place import device_of
from wise_fast.subjects import find_subject


@torch.no_grad()
def sample_texts(model: nn.Module, tokenizer, lengths: Sequence[int], generator: torch.Generator) -> list[str]:
    """A text of each of these lengths in tokens, sampled from the model at temperature 1 without special tokens.

    Sampling draws from `generator` (CPU) alone, so the same model and seed give the same texts.
    """
    if not lengths:
        return []
    count = len(lengths)
    device = device_of(model.get_input_embeddings())
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    size = model.get_input_embeddings().weight.shape[0]
    ids = torch.full((count, 1), 0 if first is None else first, device=device)
    banned = [i for i in tokenizer.all_special_ids if i < size]
    cache, texts = None, []
    with evaluating(model):
        for _ in range(max(lengths)):
            output = model(input_ids=ids, past_key_values=cache, use_cache=True)
            cache, logits = output.past_key_values, output.logits[:, -1, : len(tokenizer)].float().cpu()
            logits[:, banned] = -torch.inf
            ids = torch.multinomial(logits.softmax(-1), 1, generator=generator).to(device)
            texts.append(ids)
    rows = [row[:length] for row, length in zip(torch.cat(texts, 1), lengths, strict=True)]
    decoded = tokenizer.batch_decode(rows, skip_special_tokens=True)
    return [" ".join(text.split()) for text in decoded]


def drop_words(text: str, rate: float, generator: torch.Generator, keep: str | None = None) -> str:
    """`text` without a random share of its words; the words of `keep` (the subject) always stay. Where nobody says what
    that is, words with a capital or a digit stay: without its subject an edit contradicts all others of its form.

    Paraphrases share a prompt's content words, not its wording, so an edit that holds without some of the wording
    holds for more of them. Unless the rate is 0, one word at least goes if it may: the text as it is is no other row.
    """
    words, draws = text.split(), torch.rand(len(text.split()), generator=generator).tolist()
    if keep:
        stay = [word.strip("?.,!'s") in keep.split() for word in words]
    else:
        stay = [any(c.isupper() or c.isdigit() for c in word) for word in words]
    free = sorted((draw, place) for place, draw in enumerate(draws) if not stay[place])
    gone = {place for draw, place in free if draw < rate} or {place for _, place in free[:1] if rate}
    return " ".join(word for place, word in enumerate(words) if place not in gone) or text


SUBJECTS = (
    "Portugal",
    "Marie Curie",
    "the river Danube",
    "Mount Kenya",
    "Osaka",
    "Pride and Prejudice",
    "Vincent van Gogh",
    "Siemens",
    "the Atacama Desert",
    "Simon Bolivar",
    "The Seventh Seal",
    "Helianthus annuus",
    "HMS Victory",
    "Queens Park Rangers",
    "Jane Goodall",
    "the University of Bologna",
)


def swap_subject(prompt: str, subject: str | None, count: int, generator: torch.Generator) -> list[str]:
    """The prompt asked of up to `count` other subjects: its nearest neighbours that the edit must not change. One that
    has no subject (`find_subject`) gives none."""
    place = find_subject(prompt, subject)
    if place is None:
        return []
    start, end = place
    order = torch.randperm(len(SUBJECTS), generator=generator).tolist()
    others = [SUBJECTS[i] for i in order if SUBJECTS[i].lower() != prompt[start:end].lower()]
    return [prompt[:start] + other + prompt[end:] for other in others[:count]]
