"""Tasks of the literature: which figures each has, what is asked for them, and of whom (edited or unedited model).

    Task            figures (averages over the edits that have what is asked)
    qa              reliability, generalization, locality                       ZsRE and other questions
    hallucination   perplexity, locality                                        a passage and the sentence to follow
    temporal        reliability, ood, locality                                  passages on new entities
    counterfact     reliability, generalization, locality, efficacy, efficacy_rephrased, specificity

What each figure is, is said in `wise_fast.scores.Score` and `wise_fast.measures`. With `generate`, qa and counterfact
also have `exact` and `exact_rephrased`. The targets of the other two are sentences and passages, which no free answer
repeats word for word, so they generate nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from importlib import resources
from types import MappingProxyType

from wise_fast import metrics
from wise_fast.chat import rendered
from wise_fast.data import Edit, as_edits
from wise_fast.formats import check_texts
from wise_fast.measures import (
    LIKELY,
    LIKELY_PASSAGES,
    PERPLEXITY,
    PREFERRED,
    PREFERRED_BY_NEIGHBOURS,
    PREFERRED_REPHRASED,
    RIGHT,
    RIGHT_REPHRASED,
    UNCHANGED,
    Measure,
)
from wise_fast.metrics import Method, Reading, Row, passage
from wise_fast.scores import Evaluation, Score
from wise_fast.state import EditReport

_GENERATED = 8  # progress: what generating for a row costs, in rows that are only scored
_NEW_TOKENS = 24  # longest free answer, unless a target is longer
_EXACT = ("exact", "exact_rephrased")

Progress = Callable[[int, int], None]
Asked = tuple[str, int]  # a prompt to answer freely, and how many lines of the answer count


@dataclass(frozen=True)
class Before:
    """What the unedited model made of rows and prompts; serves any edits whose rows are among them."""

    readings: Mapping[Row, Reading] = field(default_factory=dict)
    answers: Mapping[Asked, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Task:
    """A task by its measures; `generates` where its answers are short enough to be generated freely."""

    name: str
    measures: Mapping[str, Measure]
    generates: bool = True

    @property
    def figures(self) -> tuple[str, ...]:
        """Names of what `Evaluation.summary` gives."""
        return (*self.measures, *(_EXACT if self.generates else ()))

    def before(
        self,
        method: Method,
        edits: Iterable[Edit | dict | EditReport],
        generate: bool = True,
        progress: Progress | None = None,
    ) -> Before:
        """Ask the unedited model everything that `score` can use for these edits, or for some of them.

        It may be asked at any time, as `method.disabled()` gives the unedited model. Besides locality, it holds what
        `Evaluation.summary_before` and the answers before editing come from.
        """
        chosen = _edits(method, edits)
        rows = [row for sheet in self._sheets(method, chosen) for part in sheet.values() for row in part]
        prompts = [_asked(e.prompt, e) for e in chosen] if generate and self.generates else []
        work = _Work(progress, len(set(rows)) + _GENERATED * len(set(prompts)))
        return _ask(method, rows, prompts, work, _room(method, chosen), edited=False)

    def score(
        self,
        method: Method,
        edits: Iterable[Edit | dict | EditReport] | None = None,
        generate: bool = True,
        before: Before | None = None,
        progress: Progress | None = None,
    ) -> Evaluation:
        """Score edits on the model as it is now.

        Args:
            edits: what to score; None takes all edits that the method holds, but for superseded ones.
            generate: also generate freely (greedy, natural stop), where the task does.
            before: what the unedited model gave, of `before`; what it lacks is asked now, which gives the same, as
                `method.disabled()` is the unedited model.
            progress: called with (work done, work in all) after every forward batch.

        Raises:
            EditDataError: an edit is unusable or tokenizes to nothing.
        """
        edits = [report.edit for report in method.edits if not report.superseded] if edits is None else edits
        chosen, generate = _edits(method, edits), generate and self.generates
        held = Before() if before is None else before
        sheets = self._sheets(method, chosen)
        rows = [row for sheet in sheets for part in sheet.values() for row in part]
        compared = [row for sheet in sheets for n, m in self.measures.items() if m.compares for row in sheet[n]]
        prompts = [_asked(e.prompt, e) for e in chosen] if generate else []
        others = [_asked(p, e) for e in chosen for p in e.rephrases] if generate else []
        missing = [row for row in compared if row not in held.readings]
        unanswered = [prompt for prompt in prompts if prompt not in held.answers]
        total = len(set(rows)) + len(set(missing)) + _GENERATED * (len({*prompts, *others}) + len(set(unanswered)))
        work = _Work(progress, total)
        room = _room(method, chosen) if generate else 0
        found = _ask(method, missing, unanswered, work, room, edited=False)
        old = Before({**held.readings, **found.readings}, {**held.answers, **found.answers})
        new = _ask(method, rows, [*prompts, *others], work, room)
        scores = tuple(self._scored(*pair, new, old) for pair in zip(chosen, sheets, strict=True))
        unedited = None
        if before is not None and all(row in old.readings for row in rows):
            unedited = tuple(self._scored(*pair, old, old) for pair in zip(chosen, sheets, strict=True))
        return Evaluation(scores, self.figures, unedited)

    def _sheets(self, method: Method, edits: Sequence[Edit]) -> list[dict[str, list[Row]]]:
        return [{name: m.rows(method.tokenizer, edit) for name, m in self.measures.items()} for edit in edits]

    def _scored(self, edit: Edit, sheet: Mapping[str, list[Row]], new: Before, old: Before) -> Score:
        values = {}
        for name, measure in self.measures.items():
            compared = [old.readings[row] for row in sheet[name]] if measure.compares else ()
            values[name] = measure.value([new.readings[row] for row in sheet[name]], compared)
        score = Score(edit, **values)
        asked = _asked(edit.prompt, edit)
        if asked not in new.answers:
            return score
        others = [new.answers.get(_asked(prompt, edit)) for prompt in edit.rephrases]
        same = [metrics.matches(text, edit.target) for text in others if text is not None]
        return replace(
            score,
            exact=metrics.matches(new.answers[asked], edit.target),
            exact_rephrased=sum(same) / len(same) if same else None,
            answer=new.answers[asked],
            before=old.answers.get(asked),
        )


class _Work:
    """Counts what has been done and tells `progress`."""

    def __init__(self, progress: Progress | None, total: int):
        self.progress, self.total, self.done = progress, total, 0

    def advance(self, rows: int, each: int = 1) -> None:
        self.done += rows * each
        if self.progress is not None:
            self.progress(self.done, self.total)


def _edits(method: Method, edits: Iterable[Edit | dict | EditReport]) -> list[Edit]:
    if not isinstance(edits, (Edit, Mapping)):
        edits = [e.edit if isinstance(e, EditReport) else e for e in edits]
    return rendered(method.tokenizer, as_edits(edits))


def _asked(prompt: str, edit: Edit) -> Asked:
    return prompt, metrics.lines(edit.target)


def _room(method: Method, edits: Sequence[Edit]) -> int:
    """How long a free answer may be, in tokens: no target is cut off, and its natural stop fits."""
    lengths = [len(method.tokenizer(e.target, add_special_tokens=False)["input_ids"]) for e in edits]
    return max([_NEW_TOKENS, *(length + 2 for length in lengths)])


def _ask(
    method: Method, rows: Sequence[Row], prompts: Sequence[Asked], work: _Work, room: int, edited: bool = True
) -> Before:
    """Readings and answers of the edited or the unedited model; what comes twice is asked once."""
    rows, prompts = list(dict.fromkeys(rows)), list(dict.fromkeys(prompts))
    if not rows and not prompts:
        return Before()
    with nullcontext() if edited else method.disabled():
        found = metrics.readings(method, rows, work.advance)
        answers = metrics.answer(
            method,
            [prompt for prompt, _ in prompts],
            max_new_tokens=room,
            advance=lambda count: work.advance(count, _GENERATED),
            kept_lines=[count for _, count in prompts],
        )
    return Before(dict(zip(rows, found, strict=True)), dict(zip(prompts, answers, strict=True)))


TASKS: Mapping[str, Task] = MappingProxyType(
    {
        "qa": Task("qa", {"reliability": RIGHT, "generalization": RIGHT_REPHRASED, "locality": UNCHANGED}),
        "hallucination": Task("hallucination", {"perplexity": PERPLEXITY, "locality": UNCHANGED}, generates=False),
        "temporal": Task(
            "temporal", {"reliability": LIKELY, "ood": LIKELY_PASSAGES, "locality": UNCHANGED}, generates=False
        ),
        "counterfact": Task(
            "counterfact",
            {
                "reliability": RIGHT,
                "generalization": RIGHT_REPHRASED,
                "locality": UNCHANGED,
                "efficacy": PREFERRED,
                "efficacy_rephrased": PREFERRED_REPHRASED,
                "specificity": PREFERRED_BY_NEIGHBOURS,
            },
        ),
    }
)


def evaluate(
    method: Method,
    edits: Iterable[Edit | dict | EditReport] | None = None,
    *,
    generate: bool = True,
    before: Before | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Reliability, generalization, locality and exact answers of edits, as the literature defines them: the task "qa".

    Args:
        method: the editor, or a baseline (`wise_fast.metrics.Method`).
        edits: what to score; None takes all edits that the method holds, but for superseded ones. Rephrases and
            locality are asked where an edit brings them.
        generate: also answer freely (greedy, natural stop), for `exact` and `exact_rephrased`; it takes longest.
        before: what `TASKS["qa"].before` kept of the unedited model, so that it need not be asked again.
        progress: called with (work done, work in all) after every forward batch.

    Returns:
        An `Evaluation`: one `Score` an edit, and by `summary()` their means over the edits that have the figure. All
        are shares from 0 to 1: of tokens under teacher forcing (reliability, generalization, locality), of answers
        (exact, exact_rephrased).

    Raises:
        EditDataError: an edit is unusable or tokenizes to nothing.
    """
    return TASKS["qa"].score(method, edits, generate, before, progress)


def general_ability(
    method: Method, texts: Sequence[str] | None = None, before: float | None = None
) -> dict[str, float | None]:
    """Perplexity on held-out text without and with the edits, so that damage shows.

    Args:
        texts: what to read; None takes the packaged passages. Each is routed by itself, as a prompt.
        before: `perplexity_before` of the same texts, if known; None asks the unedited model.

    Returns:
        `perplexity_before`, `perplexity_after`: over all tokens of all texts, each with the same weight; None where
        there is no token to predict.

    Raises:
        EditDataError: `texts` is no list of texts, or one is longer than the model's context.
    """
    texts = held_out_texts() if texts is None else check_texts(texts, "texts")
    rows = [passage(method.tokenizer, text) for text in texts]
    if before is None:
        with method.disabled():
            before = metrics.perplexity(metrics.readings(method, rows))
    return {"perplexity_before": before, "perplexity_after": metrics.perplexity(metrics.readings(method, rows))}


def held_out_texts() -> list[str]:
    """The packaged passages: everyday and encyclopedic, of a few sentences each."""
    file = resources.files("wise_fast") / "datasets" / "passages.json"
    return json.loads(file.read_text(encoding="utf-8"))
