"""The pictures of a report: which curves there are to draw of the runs, and captions that say what they show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from wise_fast import plots
from wise_fast.document import Block, Heading, Picture
from wise_fast.figures import MB, MEANINGS, PERPLEXITY, cell
from wise_fast.recorded import Run, number

_UNPLOTTED = ("perplexity_before",)
_KINDS = {"edit": "edits", "rephrase": "paraphrases", "unrelated": "unrelated prompts"}


def quality(runs: Sequence[Run], names: Sequence[str]) -> list[Block]:
    blocks: list[Block] = []
    for name in names:
        curves = [plots.Curve(run.name, run.figure(name), i) for i, run in enumerate(runs) if run.figure(name)]
        if not curves or name in _UNPLOTTED:
            continue
        share = not name.startswith(PERPLEXITY) and max(y for c in curves for _, y in c.points) <= 1
        title, label = MEANINGS.get(name, (name.replace("_", " ").capitalize(), name.replace("_", " ")))
        label = f"share of {label}" if share and name in MEANINGS and len(label) < 36 else label
        png = plots.against_t(curves, title, label, share, _reference(runs, name))
        ends = ", ".join(f"{c.name} {cell(c.points[-1][1])} at T = {c.points[-1][0]}" for c in curves)
        blocks.append(Picture(_slug(name), png, f"{title} against the number of edits: {ends}."))
    return [Heading("Quality against the number of edits"), *blocks] if blocks else []


def _reference(runs: Sequence[Run], name: str) -> tuple[str, float] | None:
    """The unedited model's value of a figure, of all edits at the end, where it was asked."""
    for run in runs:
        figures = run.last["figures"] if run.last else {}
        before = run.last.get("unedited") if run.last else None
        level = figures.get("perplexity_before") if name == "perplexity_after" else (before or {}).get(name)
        if name != "locality" and (value := number(level)) is not None:
            return "unedited", value
    return None


def routing(runs: Sequence[Run]) -> list[Block]:
    blocks: list[Block] = []
    for run in runs:
        found = next((e for e in reversed(run.evaluations) if isinstance(e.get("routing"), Mapping)), None)
        if found is None:
            continue
        values = {k: [n for v in found["routing"].get(k) or () if (n := number(v)) is not None] for k in _KINDS}
        if not any(values.values()):
            continue
        png = plots.routing(values, f"{run.name}: routing at T = {found['t']}")
        shares = ", ".join(f"{sum(x > 1 for x in v) / len(v):.1%} of {_KINDS[k]}" for k, v in values.items() if v)
        caption = f"{run.name}, T = {found['t']}: routing score over threshold, a dot a prompt; in scope are {shares}."
        blocks.append(Picture(f"routing-{_slug(run.name)}", png, caption))
    return [Heading("Routing"), *blocks] if blocks else []


def cost(runs: Sequence[Run]) -> list[Block]:
    blocks: list[Block] = []
    seconds = [plots.Curve(run.name, run.seconds(), i) for i, run in enumerate(runs) if run.seconds()]
    if seconds:
        png = plots.per_edit(seconds, "Time per edit", "seconds")
        caption = "Seconds of every edit, and their running median; named is the median over the run."
        blocks.append(Picture("seconds", png, caption))
    for name, title, about in (
        ("served", "Memory served", "Bytes that serving holds beside the model"),
        ("rss", "Peak memory of the process", "Peak resident memory of the process so far, the model included"),
    ):
        curves = [
            plots.Curve(run.name, [(t, value / MB) for t, value in run.series(name)], i)
            for i, run in enumerate(runs)
            if run.series(name)
        ]
        if curves:
            caption = f"{about}, in MB (1e6 bytes)."
            blocks.append(Picture(_slug(title), plots.total(curves, title, "MB"), caption))
    return [Heading("Cost"), *blocks] if blocks else []


def _slug(text: str) -> str:
    kept = "".join(c if c.isascii() and c.isalnum() else "-" for c in text.lower())
    return "-".join(part for part in kept.split("-") if part) or "plot"
