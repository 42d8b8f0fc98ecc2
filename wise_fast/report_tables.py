"""The tables of a report: results, evaluation points, worst and failed edits, settings, and what is missing."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import median

from wise_fast.document import NOTHING, Block, Grid, Heading, Paragraph, shown
from wise_fast.figures import MB, MEANINGS, PERPLEXITY, cell, count, label_of
from wise_fast.recorded import Run, number

_WORST = 15
_ABOUT_COSTS = {"s per edit": "median wall time", "peak MB": "resident memory of the process, the model included"}


def result(runs: Sequence[Run], names: Sequence[str]) -> list[Block]:
    """One row a method: its last figures and what they cost; the unedited model's first, where it was asked."""
    columns = [
        "method",
        "T",
        *map(label_of, names),
        "s per edit",
        "edits that hold",
        "memories",
        "served MB",
        "peak MB",
    ]
    rows = []
    before = next((r.last["unedited"] for r in runs if r.last and isinstance(r.last.get("unedited"), Mapping)), None)
    if before is not None:
        known = next(
            (v for r in runs if r.last and (v := r.last["figures"].get("perplexity_before")) is not None), None
        )
        before = {"perplexity_after": known, **before}
        rows.append(["unedited model", NOTHING, *(cell(before.get(name)) for name in names), *[NOTHING] * 5])
    for run in runs:
        figures = run.last["figures"] if run.last else {}
        rows.append([shown(run.name), str(run.last["t"] if run.last else 0), *(cell(figures.get(n)) for n in names)])
        rows[-1] += _costs(run)
    grid = Grid(columns, rows, frozenset(columns[1:])).told()
    told = [name for name in names if name in MEANINGS and label_of(name) in grid.columns]
    known = [f"{label_of(name)}: {_meaning(name)}" for name in told]
    known += [f"{name}: {what}" for name, what in _ABOUT_COSTS.items() if name in grid.columns]
    return [Heading("Result"), grid, *([Paragraph("; ".join(known) + ".")] if known else [])]


def _meaning(name: str) -> str:
    title, what = MEANINGS[name]
    title = title[0].lower() + title[1:]
    return title if what in title.lower() else f"{title} ({what})"


def _costs(run: Run) -> list[str]:
    seconds = [value for _, value in run.seconds()]
    reports = run.reports
    held = f"{sum(bool(r.get('success')) for r in reports)} of {len(reports)}" if reports else NOTHING
    memories, served, peak = (_last(run, name) for name in ("memories", "served", "rss"))
    return [
        cell(median(seconds) if seconds else None),
        held,
        count(memories),
        cell(None if served is None else served / MB),
        cell(None if peak is None else peak / MB),
    ]


def _last(run: Run, name: str) -> float | None:
    series = run.series(name)
    return series[-1][1] if series else None


def points(runs: Sequence[Run], names: Sequence[str]) -> list[Block]:
    columns = ["method", "T", *map(label_of, names), "seconds to score"]
    rows = [
        [shown(run.name), str(e["t"]), *(cell(e["figures"].get(name)) for name in names), cell(e.get("seconds"))]
        for run in runs
        for e in run.evaluations
    ]
    return [Heading("All evaluation points"), Grid(columns, rows, frozenset(columns[1:])).told()] if rows else []


def worst(runs: Sequence[Run], names: Sequence[str]) -> list[Block]:
    """The edits that fare worst at the end, with what the model said before and says now."""
    blocks: list[Block] = []
    for run in runs:
        scores = [s for s in (run.last or {}).get("scores") or () if isinstance(s, Mapping)]
        ranked = sorted(range(len(scores)), key=lambda i: (-_badness(scores[i]), i))
        chosen = [i for i in ranked if _badness(scores[i]) > 1e-9][:_WORST]
        if not chosen:
            continue
        present = [n for n in names if any(number(scores[i].get(n)) is not None for i in chosen)]
        columns = ["#", "prompt", "target", "before", "after", *map(label_of, present)]
        rows = [[str(i + 1), *_texts(scores[i]), *(cell(scores[i].get(name)) for name in present)] for i in chosen]
        faulty = sum(_badness(score) > 1e-9 for score in scores)
        title = f"{shown(run.name)}: the worst {len(chosen)} of {faulty} edits that fall short of perfect"
        blocks.append(Grid(columns, rows, frozenset(["#", *columns[5:]]), title).told())
    return [Heading("Worst edits"), *blocks] if blocks else []


def _texts(score: Mapping) -> list[str]:
    edit = score.get("edit") or {}
    given = (edit.get("prompt"), edit.get("target"), score.get("before"), score.get("answer"))
    return [NOTHING if text is None else shown(text) or "(empty)" for text in given]


def _badness(score: Mapping) -> float:
    """How far an edit is from perfect: what its shares lack, and the log of its perplexity."""
    lacks = [1 - value for name, v in score.items() if name != PERPLEXITY and (value := number(v)) is not None]
    perplexity = number(score.get(PERPLEXITY))
    loud = 0.0 if perplexity is None else 0.5 * _log(perplexity)
    return (sum(lacks) / len(lacks) if lacks else 0.0) + loud


def _log(perplexity: float) -> float:
    return math.log(max(perplexity, 1.0))


def failed(runs: Sequence[Run]) -> list[Block]:
    """Edits that training did not bring to hold; those that a later edit replaced are no failures."""
    blocks: list[Block] = []
    for run in runs:
        reports = run.reports
        bad = [i for i, r in enumerate(reports) if not r.get("success") and not _superseded(r)]
        if not bad:
            continue
        columns = ["#", "prompt", "target", "steps", "loss", "note"]
        rows = []
        for i in bad[:_WORST]:
            edit, losses = reports[i].get("edit") or {}, (reports[i].get("loss_before"), reports[i].get("loss"))
            texts = [shown(edit.get("prompt", NOTHING)), shown(edit.get("target", NOTHING))]
            loss = " → ".join(map(cell, losses))
            rows.append(
                [str(i + 1), *texts, count(reports[i].get("steps")), loss, shown(reports[i].get("note") or NOTHING)]
            )
        title = f"{shown(run.name)}: {len(bad)} of {len(reports)} edits" + (
            f", the first {_WORST} shown" if len(bad) > _WORST else ""
        )
        blocks.append(Grid(columns, rows, frozenset(["#", "steps", "loss"]), title))
    return [Heading("Edits that did not hold in training"), *blocks] if blocks else []


def _superseded(report: Mapping) -> bool:
    return str(report.get("note") or "").startswith("superseded")


def settings(runs: Sequence[Run]) -> list[Block]:
    """The header of each run in a column, and the methods' own settings, folded."""
    skipped = ("format", "version", "config")
    first = [("directory", [run.directory for run in runs])]
    keys = dict.fromkeys(key for run in runs for key in _flat(run.header) if key.partition(".")[0] not in skipped)
    rows = [[name, *map(shown, values)] for name, values in first]
    rows += [
        [shown(key if "." in key else key.replace("_", " ")), *(_setting(_flat(run.header).get(key)) for run in runs)]
        for key in keys
    ]
    columns = ["", *(shown(run.name) for run in runs)]
    blocks: list[Block] = [Heading("Settings"), Grid(columns, rows)]
    for run in runs:
        config = run.header.get("config")
        if isinstance(config, Mapping) and config:
            rows = [[shown(name), _setting(value)] for name, value in _flat(config).items()]
            blocks.append(Grid(["setting", "value"], rows, title=f"Settings of {shown(run.name)}", folded=True))
    return blocks


def _flat(values: Mapping, prefix: str = "") -> dict[str, object]:
    found: dict[str, object] = {}
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            found |= _flat(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value
    return found


def missing(runs: Sequence[Run]) -> list[Block]:
    """What could not be shown, and why."""
    found = []
    for run in runs:
        found += [f"{run.name}: {note}." for note in run.notes]
        if not run.evaluations:
            found.append(f"{run.name}: there is no evaluation, so no quality is shown.")
        elif not run.last.get("routing"):
            found.append(f"{run.name}: no routing scores were recorded (a method without a router has none).")
        if not run.batches:
            found.append(f"{run.name}: the journal has no edits, so seconds, memory and failed edits are not shown.")
        elif absent := [what for what, there in _series(run).items() if not there]:
            found.append(f"{run.name}: the journal does not say {' or '.join(absent)}.")
        due, last = run.header.get("T"), run.last["t"] if run.last else 0
        if isinstance(due, int) and due > last:
            found.append(f"{run.name}: the run was to reach T = {due}; its last evaluation is at {last}.")
        absent = [name for name, v in (run.last or {"figures": {}})["figures"].items() if number(v) is None]
        if absent:
            found.append(f"{run.name}: no value of {', '.join(map(label_of, absent))} at T = {last}.")
    tasks = {(run.header.get("task"), run.header.get("model")) for run in runs}
    files = {_flat(run.header).get("edits.sha256") for run in runs}
    if len(tasks) > 1 or len(files) > 1:
        found.append("The runs differ in task, model or file of edits: compare them with care.")
    return [Heading("What is missing"), *(Paragraph(shown(text)) for text in found)] if found else []


def _series(run: Run) -> dict[str, bool]:
    """What a journal says of every batch, and whether it does."""
    return {
        "how long edits took": bool(run.seconds()),
        "what serving holds": bool(run.series("served")),
        "the peak of memory": bool(run.series("rss")),
    }


def _setting(value: object) -> str:
    if value is None:
        return NOTHING
    if isinstance(value, (list, tuple)):
        return shown(", ".join(map(str, value)) or NOTHING)
    return shown(value)
