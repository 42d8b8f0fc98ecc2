"""Report of runs: one method or several side by side, as `report.md`, `report.html` and PNG plots.

Everything comes from the run directories (`wise_fast.recorded`); no model is loaded. What a run lacks is said in the
report's last section, and never stops it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median

from wise_fast import plots
from wise_fast.document import Block, Grid, Heading, Paragraph, Picture, markdown, shown
from wise_fast.errors import StorageError
from wise_fast.recorded import Run, number, read_runs
from wise_fast.report_html import html

_WORST = 15
_MB = 1e6
_ORDER = ("reliability", "generalization", "ood", "perplexity", "locality", "efficacy", "efficacy_rephrased")
# name: (title of its plot, what it is)
_MEANINGS = {
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
_SHORT = {"reliability": "Rel", "generalization": "Gen", "locality": "Loc", "ood": "OOD", "perplexity": "PPL"}
_UNPLOTTED = ("perplexity_before",)
_PERPLEXITY = "perplexity"


def write_report(directories: Iterable[str | os.PathLike], out: str | os.PathLike, plot: bool = True) -> list[Path]:
    """Write the report of these run directories to `out`, over an earlier one.

    Args:
        directories: of runs; one that holds several methods' directories stands for all of them.
        plot: draw pictures, which needs the `plot` extra.

    Returns:
        The files written, `report.md` and `report.html` first.

    Raises:
        StorageError: a directory is no run or damaged in its header, or `out` cannot be written.
        WiseError: matplotlib is missing.
    """
    runs = read_runs(map(Path, directories))
    title = _title(runs)
    blocks = report(runs, plot)
    pictures = [block for block in blocks if isinstance(block, Picture)]
    files = {"report.md": markdown(blocks).encode(), "report.html": html(title, blocks).encode()}
    files |= {f"plots/{picture.name}.png": picture.png for picture in pictures}
    out = Path(out)
    try:
        (out / "plots" if pictures else out).mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            part = out / f"{name}.part"
            part.write_bytes(content)
            part.replace(out / name)
    except OSError as error:
        raise StorageError(
            f"{out}: the report cannot be written ({error.strerror}); check the path and its space"
        ) from error
    return [out / name for name in files]


def report(runs: Sequence[Run], plot: bool = True) -> list[Block]:
    """The report's content, in order."""
    names = _figures(runs)
    blocks: list[Block] = [Heading(_title(runs), 1), *_result(runs, names)]
    if plot:
        blocks += _quality_plots(runs, names) + _routing_plots(runs) + _cost_plots(runs)
    blocks += _worst(runs, names) + _failed(runs) + _points(runs, names) + _settings(runs) + _missing(runs)
    return blocks


def _title(runs: Sequence[Run]) -> str:
    tasks = ", ".join(dict.fromkeys(shown(run.header.get("task", "unknown task")) for run in runs))
    return f"Lifelong editing: {tasks}, {max(_taught(run) for run in runs)} edits"


def _taught(run: Run) -> int:
    return max(len(run.reports), run.last["t"] if run.last else 0)


def _figures(runs: Sequence[Run]) -> list[str]:
    """Names of the figures that some run has, best known first."""
    names = dict.fromkeys(name for run in runs for e in run.evaluations for name in e["figures"])
    return sorted(names, key=lambda n: (_ORDER.index(n) if n in _ORDER else len(_ORDER), list(names).index(n)))


def _label(name: str) -> str:
    return _SHORT.get(name, name.replace("_", " "))


# -- tables -----------------------------------------------------------------------------------------------------------


def _result(runs: Sequence[Run], names: Sequence[str]) -> list[Block]:
    """One row a method: its last figures and what they cost; the unedited model's first, where it was asked."""
    columns = ["method", "T", *map(_label, names), "s per edit", "edits that hold", "memories", "served MB", "peak MB"]
    rows = []
    before = next((r.last["unedited"] for r in runs if r.last and isinstance(r.last.get("unedited"), Mapping)), None)
    if before is not None:
        rows.append(["unedited model", "–", *(_cell(before.get(name)) for name in names), *["–"] * 5])
    for run in runs:
        figures = run.last["figures"] if run.last else {}
        rows.append([shown(run.name), str(run.last["t"] if run.last else 0), *(_cell(figures.get(n)) for n in names)])
        rows[-1] += _costs(run)
    known = [f"{_label(name)}: {': '.join(_MEANINGS[name])}" for name in names if name in _MEANINGS]
    costs = "s per edit: median wall time; peak MB: resident memory of the process, the model included"
    text = Paragraph("; ".join([*known, costs]) + ".")
    return [Heading("Result"), Grid(columns, rows, frozenset(columns[1:])), text]


def _costs(run: Run) -> list[str]:
    seconds = [value for _, value in run.seconds()]
    reports = run.reports
    held = f"{sum(bool(r.get('success')) for r in reports)} of {len(reports)}" if reports else "–"
    memories, served, peak = (_last(run, name) for name in ("memories", "served", "rss"))
    return [
        _cell(median(seconds) if seconds else None),
        held,
        _count(memories),
        _cell(None if served is None else served / _MB),
        _cell(None if peak is None else peak / _MB),
    ]


def _last(run: Run, name: str) -> float | None:
    series = run.series(name)
    return series[-1][1] if series else None


def _points(runs: Sequence[Run], names: Sequence[str]) -> list[Block]:
    columns = ["method", "T", *map(_label, names), "seconds to score"]
    rows = [
        [shown(run.name), str(e["t"]), *(_cell(e["figures"].get(name)) for name in names), _cell(e.get("seconds"))]
        for run in runs
        for e in run.evaluations
    ]
    return [Heading("All evaluation points"), Grid(columns, rows, frozenset(columns[1:]))] if rows else []


def _worst(runs: Sequence[Run], names: Sequence[str]) -> list[Block]:
    """The edits that fare worst at the end, with what the model said before and says now."""
    blocks: list[Block] = []
    for run in runs:
        scores = [s for s in (run.last or {}).get("scores") or () if isinstance(s, Mapping)]
        ranked = sorted(range(len(scores)), key=lambda i: (-_badness(scores[i]), i))
        chosen = [i for i in ranked if _badness(scores[i]) > 1e-9][:_WORST]
        if not chosen:
            continue
        present = [n for n in names if any(number(scores[i].get(n)) is not None for i in chosen)]
        columns = ["#", "prompt", "target", "before", "after", *map(_label, present)]
        rows = [[str(i + 1), *_texts(scores[i]), *(_cell(scores[i].get(name)) for name in present)] for i in chosen]
        faulty = sum(_badness(score) > 1e-9 for score in scores)
        title = f"{shown(run.name)}: the worst {len(chosen)} of {faulty} edits that fall short of perfect"
        blocks.append(Grid(columns, rows, frozenset(["#", *columns[5:]]), title))
    return [Heading("Worst edits"), *blocks] if blocks else []


def _texts(score: Mapping) -> list[str]:
    edit = score.get("edit") or {}
    given = (edit.get("prompt"), edit.get("target"), score.get("before"), score.get("answer"))
    return ["–" if text is None else shown(text) or "(empty)" for text in given]


def _badness(score: Mapping) -> float:
    """How far an edit is from perfect: what its shares lack, and the log of its perplexity."""
    lacks = [1 - value for name, v in score.items() if name != _PERPLEXITY and (value := number(v)) is not None]
    perplexity = number(score.get(_PERPLEXITY))
    loud = 0.0 if perplexity is None else 0.5 * _log(perplexity)
    return (sum(lacks) / len(lacks) if lacks else 0.0) + loud


def _log(perplexity: float) -> float:
    import math

    return math.log(max(perplexity, 1.0))


def _failed(runs: Sequence[Run]) -> list[Block]:
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
            texts = [shown(edit.get("prompt", "–")), shown(edit.get("target", "–"))]
            loss = " → ".join(map(_cell, losses))
            rows.append(
                [str(i + 1), *texts, _count(reports[i].get("steps")), loss, shown(reports[i].get("note") or "–")]
            )
        title = f"{shown(run.name)}: {len(bad)} of {len(reports)} edits" + (
            f", the first {_WORST} shown" if len(bad) > _WORST else ""
        )
        blocks.append(Grid(columns, rows, frozenset(["#", "steps", "loss"]), title))
    return [Heading("Edits that did not hold in training"), *blocks] if blocks else []


def _superseded(report: Mapping) -> bool:
    return str(report.get("note") or "").startswith("superseded")


def _settings(runs: Sequence[Run]) -> list[Block]:
    """The header of each run in a column, and the methods' own settings, folded."""
    skipped = ("format", "version", "config")
    first = [("directory", [run.directory for run in runs])]
    keys = dict.fromkeys(key for run in runs for key in _flat(run.header) if key.partition(".")[0] not in skipped)
    rows = [[name, *map(shown, values)] for name, values in first]
    rows += [[shown(key.replace("_", " ")), *(_setting(_flat(run.header).get(key)) for run in runs)] for key in keys]
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


def _missing(runs: Sequence[Run]) -> list[Block]:
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
        due, last = run.header.get("T"), run.last["t"] if run.last else 0
        if isinstance(due, int) and due > last:
            found.append(f"{run.name}: the run was to reach T = {due}; its last evaluation is at {last}.")
        absent = [name for name, v in (run.last or {"figures": {}})["figures"].items() if number(v) is None]
        if absent:
            found.append(f"{run.name}: no value of {', '.join(map(_label, absent))} at T = {last}.")
    tasks = {(run.header.get("task"), run.header.get("model")) for run in runs}
    files = {run.header.get("sha256") or run.header.get("edits_sha256") for run in runs}
    if len(tasks) > 1 or len(files) > 1:
        found.append("The runs differ in task, model or file of edits: compare them with care.")
    return [Heading("What is missing"), *(Paragraph(shown(text)) for text in found)] if found else []


# -- plots ------------------------------------------------------------------------------------------------------------


def _quality_plots(runs: Sequence[Run], names: Sequence[str]) -> list[Block]:
    blocks: list[Block] = []
    for name in names:
        curves = [plots.Curve(run.name, run.figure(name), i) for i, run in enumerate(runs) if run.figure(name)]
        if not curves or name in _UNPLOTTED:
            continue
        share = not name.startswith(_PERPLEXITY) and max(y for c in curves for _, y in c.points) <= 1
        title, label = _MEANINGS.get(name, (name.replace("_", " ").capitalize(), name.replace("_", " ")))
        label = f"share of {label}" if share and name in _MEANINGS and len(label) < 36 else label
        png = plots.against_t(curves, title, label, share, _reference(runs, name))
        ends = ", ".join(f"{c.name} {_cell(c.points[-1][1])} at T = {c.points[-1][0]}" for c in curves)
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


def _routing_plots(runs: Sequence[Run]) -> list[Block]:
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
        caption = (
            f"{run.name}, T = {found['t']}: routing score over its threshold, a dot a prompt; in scope are {shares}."
        )
        blocks.append(Picture(f"routing-{_slug(run.name)}", png, caption))
    return [Heading("Routing"), *blocks] if blocks else []


_KINDS = {"edit": "edits", "rephrase": "paraphrases", "unrelated": "unrelated prompts"}


def _cost_plots(runs: Sequence[Run]) -> list[Block]:
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
            plots.Curve(run.name, [(t, value / _MB) for t, value in run.series(name)], i)
            for i, run in enumerate(runs)
            if run.series(name)
        ]
        if curves:
            caption = f"{about}, in MB (1e6 bytes)."
            blocks.append(Picture(_slug(title), plots.total(curves, title, "MB"), caption))
    return [Heading("Cost"), *blocks] if blocks else []


# -- cells ------------------------------------------------------------------------------------------------------------


def _cell(value: object) -> str:
    found = number(value)
    if found is None:
        return "–"
    if abs(found) >= 1000:
        return f"{found:.0f}"
    return f"{found:.3f}" if abs(found) <= 10 else f"{found:.1f}"


def _count(value: object) -> str:
    found = number(value)
    return "–" if found is None else f"{found:.0f}"


def _setting(value: object) -> str:
    if value is None:
        return "–"
    if isinstance(value, (list, tuple)):
        return shown(", ".join(map(str, value)) or "–")
    return shown(value)


def _slug(text: str) -> str:
    kept = "".join(c if c.isascii() and c.isalnum() else "-" for c in text.lower())
    return "-".join(part for part in kept.split("-") if part) or "plot"
