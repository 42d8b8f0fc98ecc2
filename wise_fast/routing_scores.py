"""How loud prompts are in the router's terms: the figure-3 data of the paper, as ratios of score to threshold."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from wise_fast import tokens
from wise_fast.architectures import evaluating
from wise_fast.data import Edit
from wise_fast.material import seed_of

_BATCH = 16
SAMPLE = 100  # edits whose prompts are asked


def routing_ratios(method, edits: Sequence[Edit], seed: int = 0, most: int = SAMPLE) -> dict[str, list[float]] | None:
    """Ratios for the prompts of a sample of edits, their first rephrases, and their first locality prompts.

    Args:
        method: an editor that serves its edits.
        edits: those taught so far.
        seed: of the sample.
        most: edits in the sample; it is in the order of `edits`.

    Returns:
        `edit`, `rephrase` and `unrelated`: per prompt, the largest score / threshold over the memories. Above 1 the
        prompt is in scope. None if the method has no router, or serves no memory.
    """
    routing = getattr(method, "routing", None)
    if routing is None or not method.projection.memories:
        return None
    return {kind: scope_ratios(method, texts) for kind, texts in sample_prompts(edits, seed, most).items()}


def sample_prompts(edits: Sequence[Edit], seed: int, most: int = SAMPLE) -> dict[str, list[str]]:
    """The prompts of at most so many of these edits: `edit`, first `rephrase`, first `unrelated` one."""
    generator = torch.Generator().manual_seed(seed_of(seed, "routing", len(edits)))
    chosen = [edits[i] for i in torch.randperm(len(edits), generator=generator)[:most].sort().values.tolist()]
    return {
        "edit": [edit.prompt for edit in chosen],
        "rephrase": [text for edit in chosen for text in edit.rephrases[:1]],
        "unrelated": [place.prompt for edit in chosen for place in edit.locality[:1]],
    }


@torch.no_grad()
def scope_ratios(method, prompts: Sequence[str]) -> list[float]:
    """Largest score / threshold of each prompt, in order; above 1 it is in scope. All its tokens count, as in serving.

    The method serves at least one memory.
    """
    rows = [tokens.Example(tokens.encode(method.tokenizer, prompt), ()) for prompt in prompts]
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].prompt))
    found = [0.0] * len(rows)
    first = torch.zeros(1, dtype=torch.long, device=method.device)
    for start in range(0, len(order), _BATCH):
        chosen = order[start : start + _BATCH]
        batch = tokens.collate([rows[i] for i in chosen], tokens.pad_token(method.tokenizer), method.device)
        with evaluating(method.model), method.routing.prompt(batch.prompt_mask), method.tail.head_at(first):
            method.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
        best = (method.routing.scores / method.routing.thresholds).max(1).values
        for i, ratio in zip(chosen, best.tolist(), strict=True):
            found[i] = ratio
    return found
