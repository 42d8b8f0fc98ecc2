"""Reliability, generalization and locality, teacher-forced as in the literature and by free generation."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from wise_fast import tokens
from wise_fast.architectures import evaluating
from wise_fast.data import Edit, as_edits
from wise_fast.editor import WiseEditor
from wise_fast.state import EditReport

_BATCH, _NEW_TOKENS = 16, 24
_GENERATED = 8  # progress: what generating for a row costs, in rows that are only scored


@dataclass(frozen=True)
class Score:
    """One edit's figures; None where the edit brings no prompt to ask.

    Attributes:
        reliability, generalization: share of target tokens that are the argmax under teacher forcing.
        locality: share of the reference answers' positions whose argmax is as before editing.
        exact, exact_rephrased: free generation with a natural stop gives exactly the target.
        answer: what free generation gave for the prompt.
    """

    edit: Edit
    reliability: float
    generalization: float | None
    locality: float | None
    exact: bool | None = None
    exact_rephrased: float | None = None
    answer: str | None = None


@dataclass(frozen=True)
class Evaluation:
    """Figures of a set of edits: means over the edits that have them, and the scores they come from."""

    scores: tuple[Score, ...]

    def mean(self, name: str) -> float | None:
        """Mean of one `Score` field over the edits that have it."""
        values = [float(v) for s in self.scores if (v := getattr(s, name)) is not None]
        return sum(values) / len(values) if values else None

    def summary(self) -> dict[str, float | None]:
        names = ("reliability", "generalization", "locality", "exact", "exact_rephrased")
        return {name: self.mean(name) for name in names}


def evaluate(
    editor: WiseEditor,
    edits: Iterable[Edit | dict | EditReport] | None = None,
    *,
    generate: bool = True,
    before: Sequence[Sequence[Tensor]] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Score edits on the model as it is now.

    Args:
        edits: what to score; None takes all edits that the editor holds.
        generate: also generate freely (greedy, natural stop).
        before: `locality_outputs` taken before the first edit; None asks the unedited model now, which gives the
            same, as editing leaves every original weight as it was.
        progress: called with (work done, work in all) after every forward batch; a row scored is one piece of work.
    """
    chosen = as_edits([e.edit if isinstance(e, EditReport) else e for e in (editor.edits if edits is None else edits)])
    advance = _Work(progress, chosen, generate, before is None).advance
    direct = _shares(editor, [[(e.prompt, e.target)] for e in chosen], advance)
    rephrased = _shares(editor, [[(p, e.target) for p in e.rephrases] for e in chosen], advance)
    before = locality_outputs(editor, chosen, edited=False, advance=advance) if before is None else before
    after = locality_outputs(editor, chosen, advance=advance)
    local = [_unchanged(b, a) for b, a in zip(before, after, strict=True)]
    generated = functools.partial(advance, each=_GENERATED)
    answers = answer(editor, [e.prompt for e in chosen], advance=generated) if generate else []
    others = answer(editor, [p for e in chosen for p in e.rephrases], advance=generated) if generate else []
    scores, asked = [], iter(others)
    for i, edit in enumerate(chosen):
        score = Score(edit, direct[i], rephrased[i], local[i])
        if generate:
            same = [matches(next(asked), edit.target) for _ in edit.rephrases]
            share = sum(same) / len(same) if same else None
            score = replace(score, exact=matches(answers[i], edit.target), exact_rephrased=share, answer=answers[i])
        scores.append(score)
    return Evaluation(tuple(scores))


class _Work:
    """Counts what an evaluation has done and tells `progress`."""

    def __init__(self, progress: Callable[[int, int], None] | None, edits: Sequence[Edit], generate: bool, twice: bool):
        asked = sum(1 + len(e.rephrases) for e in edits)
        local = sum(len(e.locality) for e in edits)
        self.progress, self.done = progress, 0
        self.total = asked * (1 + _GENERATED * generate) + local * (1 + twice)

    def advance(self, rows: int, each: int = 1) -> None:
        self.done += rows * each
        if self.progress is not None:
            self.progress(self.done, self.total)


def matches(answer: str, target: str) -> bool:
    """Exact match, outer and repeated white space aside."""
    return answer.split() == target.split()


def locality_outputs(
    editor: WiseEditor, edits: Sequence[Edit], edited: bool = True, advance: Callable[[int], None] | None = None
) -> list[list[Tensor]]:
    """Per edit and locality prompt, the argmax at the positions of the reference answer (of one token without one)."""
    rows = [tokens.encode_target(editor.tokenizer, p.prompt, p.answer or "x") for e in edits for p in e.locality]
    with nullcontext() if edited else editor.disabled():
        flat = iter(predictions(editor, rows, advance))
    return [[next(flat) for _ in edit.locality] for edit in edits]


def _unchanged(before: Sequence[Tensor], after: Sequence[Tensor]) -> float | None:
    shares = [float((b == a).float().mean()) for b, a in zip(before, after, strict=True)]
    return sum(shares) / len(shares) if shares else None


def _shares(
    editor: WiseEditor, pairs: Sequence[Sequence[tuple[str, str]]], advance: Callable[[int], None] | None = None
) -> list[float | None]:
    """Per edit, the mean over its (prompt, target) pairs of the share of target tokens that are the argmax."""
    rows = [[tokens.encode_target(editor.tokenizer, *pair) for pair in group] for group in pairs]
    found = iter(predictions(editor, [row for group in rows for row in group], advance))
    shares = [[float((next(found) == torch.tensor(row.target)).float().mean()) for row in group] for group in rows]
    return [sum(s) / len(s) if s else None for s in shares]


@torch.no_grad()
def predictions(
    editor: WiseEditor, rows: Sequence[tokens.Example], advance: Callable[[int], None] | None = None
) -> list[Tensor]:
    """Argmax at every target position under teacher forcing, one [len(target)] tensor a row; routed on prompts.

    `advance` is called with the number of rows of every batch that is done.
    """
    out: list[Tensor] = [torch.empty(0)] * len(rows)
    for chosen, batch in _batches(editor, rows, advance):
        with evaluating(editor.model), editor.routing.prompt(batch.prompt_mask), editor.tail.head_at(batch.positions):
            output = editor.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
        best = output.logits[0].argmax(-1)
        for place, i in enumerate(chosen):
            out[i] = best[batch.row == place].cpu()
    return out


def _batches(
    editor: WiseEditor, rows: Sequence[tokens.Example], advance: Callable[[int], None] | None
) -> Iterator[tuple[list[int], tokens.Batch]]:
    """Right-padded batches of rows of like length, with their places in `rows`."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].prompt) + len(rows[i].target))
    pad = tokens.pad_token(editor.tokenizer)
    for start in range(0, len(rows), _BATCH):
        chosen = order[start : start + _BATCH]
        yield chosen, tokens.collate([rows[i] for i in chosen], pad, editor.device)
        if advance is not None:
            advance(len(chosen))


def answer(
    editor: WiseEditor,
    prompts: Sequence[str],
    max_new_tokens: int = _NEW_TOKENS,
    advance: Callable[[int], None] | None = None,
) -> list[str]:
    """Greedy answers by the model's own `generate`, each up to its natural stop: EOS, or the end of the line.

    `advance` is called with the number of prompts of every batch that is done.
    """
    tokenizer = editor.tokenizer
    out = [""] * len(prompts)
    rows = [tokens.Example(tokens.encode(tokenizer, prompt), ()) for prompt in prompts]
    stops = sorted({t for t in (tokenizer.eos_token_id, editor.stop) if t is not None}) or None
    for chosen, batch in _batches(editor, rows, advance):
        ids, mask = (tokens.to_left(t, batch.attention_mask) for t in (batch.input_ids, batch.attention_mask))
        with evaluating(editor.model):
            made = editor.model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                eos_token_id=stops,
                pad_token_id=tokens.pad_token(tokenizer),
            )
        texts = tokenizer.batch_decode(made[:, ids.shape[1] :], skip_special_tokens=True)
        for i, text in zip(chosen, texts, strict=True):
            out[i] = (text.strip().splitlines() or [""])[0].strip()
    return out
