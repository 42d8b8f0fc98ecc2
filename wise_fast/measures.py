"""Measures: which texts a figure reads for an edit, and what it makes of the model's readings of them.

Definitions are those of the literature. Reliability and generalization: target tokens
that are the argmax. Locality: argmax unchanged at the reference answer's positions. Temporal: tokens with a probability
above 0.8, of the target behind its prompt (reliability) and of a whole passage, where there is no target and routing
decides on all of it (ood). CounterFact (Meng et al. 2022): whether the wanted answer is likelier than another one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from wise_fast import metrics
from wise_fast.data import Edit
from wise_fast.metrics import Reading, Row, passage, question


@dataclass(frozen=True)
class Measure:
    """One figure: the rows it reads for an edit, and what it makes of the readings (after, before) of them.

    `compares` tells that it looks at the readings of the unedited model too.
    """

    rows: Callable[[Any, Edit], list[Row]]
    value: Callable[[Sequence[Reading], Sequence[Reading]], float | None]
    compares: bool = False


def _direct(tokenizer: Any, edit: Edit) -> list[Row]:
    return [question(tokenizer, edit.prompt, edit.target)]


def _rephrased(tokenizer: Any, edit: Edit) -> list[Row]:
    return [question(tokenizer, prompt, edit.target) for prompt in edit.rephrases]


def _unrelated(tokenizer: Any, edit: Edit) -> list[Row]:
    """Locality prompts with their reference answers; of one without, a single token is looked at."""
    return [question(tokenizer, place.prompt, place.answer or "x") for place in edit.locality]


def _passages(tokenizer: Any, edit: Edit) -> list[Row]:
    return [passage(tokenizer, text) for text in edit.ood_prompts]


def _against_truth(tokenizer: Any, edit: Edit) -> list[Row]:
    pair = (edit.target, edit.truth) if edit.truth else ()
    return [question(tokenizer, edit.prompt, text) for text in pair]


def _rephrased_against_truth(tokenizer: Any, edit: Edit) -> list[Row]:
    pair = (edit.target, edit.truth) if edit.truth else ()
    return [question(tokenizer, prompt, text) for prompt in edit.rephrases for text in pair]


def _neighbours(tokenizer: Any, edit: Edit) -> list[Row]:
    """Of neighbours with a known answer: that answer, then the edit's target."""
    known = [place for place in edit.locality if place.answer]
    return [question(tokenizer, place.prompt, text) for place in known for text in (place.answer, edit.target)]


RIGHT = Measure(_direct, metrics.right)
RIGHT_REPHRASED = Measure(_rephrased, metrics.right)
UNCHANGED = Measure(_unrelated, metrics.unchanged, compares=True)
PERPLEXITY = Measure(_direct, metrics.perplexity)
LIKELY = Measure(_direct, metrics.likely)
LIKELY_PASSAGES = Measure(_passages, metrics.likely)
PREFERRED = Measure(_against_truth, metrics.preferred)
PREFERRED_REPHRASED = Measure(_rephrased_against_truth, metrics.preferred)
PREFERRED_BY_NEIGHBOURS = Measure(_neighbours, metrics.preferred)
