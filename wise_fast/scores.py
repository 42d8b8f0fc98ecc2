"""Scores: the figures of one edit, and their means over many."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from wise_fast.data import Edit


@dataclass(frozen=True)
class Score:
    """One edit's figures; None where the task has no such figure, or the edit brings no prompt to ask.

    Attributes:
        reliability, generalization: share of target tokens that are the argmax under teacher forcing, for the prompt
            and its paraphrases. Task "temporal": reliability is the share with a probability above 0.8.
        locality: share of the reference answers' positions whose argmax is as before editing.
        ood: share of the tokens of the out-of-distribution passages with a probability above 0.8.
        perplexity: of the target given the prompt.
        efficacy, efficacy_rephrased: whether the target is likelier than the truth; for paraphrases the share.
        specificity: share of the neighbours' prompts whose own answer is likelier than the target.
        exact, exact_rephrased: free generation with a natural stop gives exactly the target.
        answer, before: what free generation gave for the prompt, with and without the edits.
    """

    edit: Edit
    reliability: float | None = None
    generalization: float | None = None
    locality: float | None = None
    ood: float | None = None
    perplexity: float | None = None
    efficacy: float | None = None
    efficacy_rephrased: float | None = None
    specificity: float | None = None
    exact: bool | None = None
    exact_rephrased: float | None = None
    answer: str | None = None
    before: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {f.name: getattr(self, f.name) for f in fields(self)} | {"edit": self.edit.to_dict()}


@dataclass(frozen=True)
class Evaluation:
    """Figures of a set of edits: means over the edits that have them, and the scores they come from.

    Attributes:
        scores: one an edit.
        figures: names of the task's figures.
        unedited: scores of the unedited model, where `Task.before` was asked of all these edits; else None.
    """

    scores: tuple[Score, ...]
    figures: tuple[str, ...]
    unedited: tuple[Score, ...] | None = None

    def mean(self, name: str) -> float | None:
        """Mean of one `Score` field over the edits that have it."""
        return _mean(self.scores, name)

    def summary(self) -> dict[str, float | None]:
        """Every figure of the task."""
        return {name: self.mean(name) for name in self.figures}

    def summary_before(self) -> dict[str, float | None] | None:
        """The same of the unedited model, or None when it was not asked."""
        return None if self.unedited is None else {name: _mean(self.unedited, name) for name in self.figures}


def _mean(scores: Sequence[Score], name: str) -> float | None:
    values = [float(v) for s in scores if (v := getattr(s, name)) is not None]
    return sum(values) / len(values) if values else None
