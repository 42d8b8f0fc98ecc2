"""Names of the figures of a run: their order, what each one is, and how a number is written in a table."""

from __future__ import annotations

from collections.abc import Sequence

from wise_fast.document import NOTHING
from wise_fast.recorded import Run, number

MB = 1e6
_ORDER = ("reliability", "generalization", "ood", "perplexity", "locality", "efficacy", "efficacy_rephrased")
# name: (title of its plot, what it is)
MEANINGS = {
    "reliability": ("Reliability", "target tokens right, edited prompts"),
    "generalization": ("Generalization", "target tokens right, paraphrases"),
    "locality": ("Locality", "tokens unchanged, unrelated prompts"),
    "ood": ("Out-of-distribution passages", "tokens with a probability above 0.8"),
    "perplexity": ("Perplexity of the targets", "perplexity"),
    "efficacy": ("Efficacy", "target likelier than the truth"),
    "efficacy_rephrased": ("Efficacy, paraphrases", "target likelier than the truth"),
    "specificity": ("Specificity", "neighbours' own answer likelier than the target"),
    "exact": ("Free answers", "answers that are the target, edited prompts"),
    "exact_rephrased": ("Free answers to paraphrases", "answers that are the target, paraphrases"),
    "perplexity_after": ("Perplexity on held-out text", "perplexity"),
    "perplexity_before": ("Perplexity on held-out text, unedited", "perplexity"),
}
SHORT = {"reliability": "Rel", "generalization": "Gen", "locality": "Loc", "ood": "OOD", "perplexity": "PPL"}
PERPLEXITY = "perplexity"


def figures_of(runs: Sequence[Run]) -> list[str]:
    """Names of the figures that some run has, best known first."""
    names = dict.fromkeys(name for run in runs for e in run.evaluations for name in e["figures"])
    return sorted(names, key=lambda n: (_ORDER.index(n) if n in _ORDER else len(_ORDER), list(names).index(n)))


def label_of(name: str) -> str:
    return SHORT.get(name, name.replace("_", " "))


def cell(value: object) -> str:
    found = number(value)
    if found is None:
        return NOTHING
    if abs(found) >= 1000:
        return f"{found:.0f}"
    return f"{found:.3f}" if abs(found) <= 10 else f"{found:.1f}"


def count(value: object) -> str:
    found = number(value)
    return NOTHING if found is None else f"{found:.0f}"
