"""What a method's model makes of text: readings under teacher forcing, free answers, and the formulas over them.

A method is anything that edits a model (`Method`): the editor, or a baseline beside it. All are measured alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from wise_fast import tokens
from wise_fast.architectures import evaluating
from wise_fast.errors import EditDataError
from wise_fast.state import EditReport

LIKELY = 0.8  # a token counts as known above this probability (temporal task)
_BATCH, _NEW_TOKENS = 16, 24
_LOGITS = 2**26  # numbers of logits in one batch: what a large vocabulary and long passages may take

Advance = Callable[[int], None]


class Method(Protocol):
    """What edits a model and can be scored.

    Attributes:
        model: a causal LM whose `generate` answers with the edits.
        tokenizer: its tokenizer.
        stop: id of the token that ends an edited answer, or None.
        device: where inputs go.
        edits: reports of the edits held, in order.
    """

    model: nn.Module
    tokenizer: Any
    stop: int | None

    @property
    def device(self) -> torch.device: ...

    @property
    def edits(self) -> list[EditReport]: ...

    def edit(self, edits: Any, progress: bool = False) -> list[EditReport]:
        """Teach facts; one report an edit."""
        ...

    def disabled(self) -> AbstractContextManager[None]:
        """The unedited model inside the block."""
        ...

    def asking(self, prompt_mask: Tensor) -> AbstractContextManager[None]:
        """Tells a router which tokens of the forward inside are prompt, [B, T] bool; others do nothing."""
        ...

    def head_at(self, positions: Tensor) -> AbstractContextManager[None]:
        """The LM head sees only these of the flattened [B*T] tokens: logits become [1, M, vocabulary]."""
        ...


@dataclass(frozen=True)
class Row:
    """Token ids to read: labels begin at place `first` (from 1), and routing scores the first `prompt` tokens."""

    ids: tuple[int, ...]
    first: int
    prompt: int


@dataclass(frozen=True)
class Reading:
    """What the model made of one row's n labels, on the CPU.

    Attributes:
        labels: [n] int64.
        best: [n] int64, the argmax in each label's place.
        logp: [n] fp32, each label's log-probability.
    """

    labels: Tensor
    best: Tensor
    logp: Tensor


def question(tokenizer: Any, prompt: str, target: str) -> Row:
    """The target's tokens behind the prompt; routed on the prompt. EditDataError if either tokenizes to nothing."""
    example = tokens.encode_target(tokenizer, prompt, target)
    return Row(example.prompt + example.target, len(example.prompt), len(example.prompt))


def passage(tokenizer: Any, text: str) -> Row:
    """Every token of a text that has another before it (the BOS token, where there is one, counts as one).

    There is no target, so all of it is prompt: routing decides on the whole passage, as for a plain forward of it.
    """
    ids = tokens.encode(tokenizer, text)
    if not ids:
        raise EditDataError(f"the text {text[:60]!r} tokenizes to nothing; give it some text")
    return Row(ids, 1, len(ids))


@torch.no_grad()
def readings(method: Method, rows: Sequence[Row], advance: Advance | None = None) -> list[Reading]:
    """Read every row under teacher forcing. `advance` is called with the number of rows of every batch that is done.

    Raises:
        EditDataError: a row is longer than the model's context.
    """
    context = getattr(method.model.config, "max_position_embeddings", None)
    longest = max((max(row.prompt, len(row.ids) - 1) for row in rows), default=0)  # a last label is not read
    if context is not None and longest > context:
        raise EditDataError(
            f"a text to score has {longest} tokens, but the model's context is {context}; shorten it or split it"
        )
    out: list[Reading] = [Reading(*(torch.empty(0),) * 3)] * len(rows)
    for chosen, batch in _batches(method, rows, advance):
        model = method.model
        with evaluating(model), method.asking(batch.prompt_mask), method.head_at(batch.positions):
            output = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
        logits = output.logits[0]
        best = logits.argmax(-1)
        picked = logits.gather(-1, batch.labels.to(logits.device)[:, None])[:, 0].float()
        found = [t.cpu() for t in (batch.labels, best, picked - logits.float().logsumexp(-1))]
        of = batch.row.cpu()
        for place, i in enumerate(chosen):
            out[i] = Reading(*(t[of == place] for t in found))
    return out


def _batches(method: Method, rows: Sequence[Row], advance: Advance | None) -> Iterator[tuple[list[int], tokens.Batch]]:
    """Right-padded batches of rows of like length, with their places in `rows`."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].ids))
    most = max(1, _LOGITS // method.model.get_output_embeddings().weight.shape[0])
    pad = tokens.pad_token(method.tokenizer)
    while order:
        chosen, labels = [], 0
        for i in order[:_BATCH]:
            labels += len(rows[i].ids) - rows[i].first
            if chosen and labels > most:
                break
            chosen.append(i)
        order = order[len(chosen) :]
        yield chosen, _collate([rows[i] for i in chosen], pad, method.device)
        if advance is not None:
            advance(len(chosen))


def _collate(rows: Sequence[Row], pad: int, device: torch.device) -> tokens.Batch:
    """One right-padded batch. A last label that is not prompt needs no input position and is left out."""
    lengths = [max(row.prompt, len(row.ids) - 1) for row in rows]
    size = (len(rows), max(lengths))
    ids, seen, prompt = torch.full(size, pad), torch.zeros(size, dtype=torch.long), torch.zeros(size, dtype=torch.bool)
    positions, labels, of = [], [], []
    for i, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        ids[i, :length] = torch.tensor(row.ids[:length])
        seen[i, :length] = 1
        prompt[i, : row.prompt] = True
        positions += [i * size[1] + place - 1 for place in range(row.first, len(row.ids))]
        labels += row.ids[row.first :]
        of += [i] * (len(row.ids) - row.first)
    lists = (torch.tensor(t, dtype=torch.long) for t in (positions, labels, of))
    return tokens.Batch(*(t.to(device) for t in (ids, seen, prompt, *lists)))


def right(after: Sequence[Reading], before: Sequence[Reading] = ()) -> float | None:
    """Share of labels that are the argmax, averaged over rows: reliability and generalization of the literature."""
    return _mean([(r.best == r.labels).float() for r in after])


def unchanged(after: Sequence[Reading], before: Sequence[Reading]) -> float | None:
    """Share of positions whose argmax is the unedited model's, averaged over rows: locality of the literature."""
    return _mean([(a.best == b.best).float() for a, b in zip(after, before, strict=True)])


def likely(after: Sequence[Reading], before: Sequence[Reading] = ()) -> float | None:
    """Share of labels with a probability above 0.8, averaged over rows; padding is no label."""
    return _mean([(r.logp.exp() > LIKELY).float() for r in after])


def perplexity(after: Sequence[Reading], before: Sequence[Reading] = ()) -> float | None:
    """exp of the mean NLL over all labels of all rows, every label with the same weight; inf or NaN if the NLL is."""
    found = [r.logp for r in after if len(r.logp)]
    return float((-torch.cat(found).double().mean()).exp()) if found else None


def preferred(after: Sequence[Reading], before: Sequence[Reading] = ()) -> float | None:
    """Share of (wanted, other) row pairs, given in turn, in which the wanted answer is the likelier one.

    Compared is the mean log-probability of a token, so that length does not decide (CounterFact, Meng et al. 2022).
    """
    pairs = zip(after[::2], after[1::2], strict=True)
    return _mean([(one.logp.mean() > other.logp.mean()).float()[None] for one, other in pairs])


def _mean(rows: Sequence[Tensor]) -> float | None:
    """Mean over rows of their means; None when none has a label."""
    shares = [float(row.mean()) for row in rows if len(row)]
    return sum(shares) / len(shares) if shares else None


def matches(answer: str, target: str) -> bool:
    """Exact match, outer and repeated white space aside."""
    return answer.split() == target.split()


def lines(target: str) -> int:
    """Lines of a target, outer white space aside: as many of an answer are compared with it."""
    return max(1, len(target.strip().splitlines()))


def answer(
    method: Method,
    prompts: Sequence[str],
    max_new_tokens: int = _NEW_TOKENS,
    advance: Advance | None = None,
    kept_lines: Sequence[int] | None = None,
) -> list[str]:
    """Greedy answers by the model's own `generate`, each up to its natural stop: EOS, or the end of the line.

    Args:
        advance: called with the number of prompts of every batch that is done.
        kept_lines: how many lines of each answer are kept; one each when None.
    """
    tokenizer = method.tokenizer
    out = [""] * len(prompts)
    kept_lines = [1] * len(prompts) if kept_lines is None else kept_lines
    encoded = [tokens.encode(tokenizer, prompt) for prompt in prompts]
    rows = [Row(ids, len(ids), len(ids)) for ids in encoded]
    stops = sorted({t for t in (tokenizer.eos_token_id, method.stop) if t is not None}) or None
    for chosen, batch in _batches(method, rows, advance):
        ids, mask = (tokens.to_left(t, batch.attention_mask) for t in (batch.input_ids, batch.attention_mask))
        with evaluating(method.model):
            made = method.model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                eos_token_id=stops,
                pad_token_id=tokens.pad_token(tokenizer),
            )
        texts = tokenizer.batch_decode(made[:, ids.shape[1] :], skip_special_tokens=True)
        for i, text in zip(chosen, texts, strict=True):
            kept = text.strip().splitlines()[: kept_lines[i]]
            out[i] = "\n".join(line.rstrip() for line in kept).strip()
    return out
