"""Tables of the command line: reports, scores and answers as rich renderables."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.table import Table
from rich.text import Text

from wise_fast.config import WiseConfig

if TYPE_CHECKING:
    from wise_fast.state import EditReport

_ROWS = 20
_MEANINGS = {
    "reliability": "target tokens predicted, the edits' prompts",
    "generalization": "target tokens predicted, paraphrases",
    "locality": "tokens unchanged, unrelated prompts",
    "ood": "tokens with a probability above 0.8, out-of-distribution passages",
    "perplexity": "(no share) perplexity of the targets",
    "efficacy": "edits whose target is likelier than the truth",
    "efficacy_rephrased": "paraphrases whose target is likelier than the truth",
    "specificity": "neighbours whose own answer is likelier than the target",
    "exact": "free answers that are the target, the edits' prompts",
    "exact_rephrased": "free answers that are the target, paraphrases",
}
_MARKS = {"right": ("✓", "green"), "wrong": ("✗", "red"), "unchanged": ("=", "green"), "changed": ("≠", "red")}


def failed(reports: Iterable[EditReport]) -> list[EditReport]:
    """Reports of edits that were tried and do not hold."""
    return [r for r in reports if not r.success and not r.superseded]


def edits_table(reports: Sequence[EditReport]) -> Table:
    """One row an edit. Of a long list, the failed and noted ones first have a place, then the earliest."""
    table = _table(
        "edits",
        "#",
        "prompt",
        "target",
        "steps",
        "loss",
        "score",
        "ok",
        "seconds",
        "note",
        numbers=("#", "steps", "loss", "score", "seconds"),
    )
    order = sorted(range(len(reports)), key=lambda i: (reports[i].success and not reports[i].note, i))
    shown = sorted(order[:_ROWS])
    for i in shown:
        report = reports[i]
        loss = f"{_number(report.loss_before)} → {_number(report.loss)}"
        ok = Text("–", "dim") if report.superseded else _mark("right" if report.success else "wrong")
        texts = (Text(report.edit.prompt), Text(report.edit.target))
        seconds = _number(report.seconds)
        table.add_row(
            str(i + 1), *texts, str(report.steps), loss, _number(report.score), ok, seconds, Text(report.note)
        )
    if len(shown) < len(reports):
        table.caption = f"{len(shown)} of {len(reports)} edits shown; --json has them all"
    return table


def metrics_table(summary: Mapping[str, float | None]) -> Table:
    """The means of an evaluation, and what each one counts."""
    table = _table("metrics", "metric", "mean", "share of", numbers=("mean",))
    for name, value in summary.items():
        if value is not None:
            table.add_row(name.replace("_", " "), f"{value:.3f}", Text(_MEANINGS.get(name, ""), "dim"))
    return table


def compared_table(title: str, found: Mapping[str, Mapping[str, float | None]]) -> Table:
    """Figures beside each other, a column each; those that none has are left out."""
    table = _table(title, "metric", *found, numbers=tuple(found))
    for name in dict.fromkeys(name for figures in found.values() for name in figures):
        values = [figures.get(name) for figures in found.values()]
        if any(value is not None for value in values):
            table.add_row(name.replace("_", " "), *("–" if value is None else f"{value:.3f}" for value in values))
    return table


def evaluations_table(evaluations: Sequence[Mapping]) -> Table:
    """The means of a run's evaluations, a column each; one has `t` and `figures`."""
    table = compared_table("evaluations", {str(found["t"]): found["figures"] for found in evaluations})
    table.columns[0].header = "after edits"
    return table


def worst_table(scores: Sequence, count: int = 5) -> Table | None:
    """The edits with the lowest scores, or None when every score is perfect."""
    names = ("reliability", "generalization", "locality", "exact")

    def total(score) -> float:
        values = [float(v) for name in names if (v := getattr(score, name)) is not None]
        return sum(values) / len(values)

    worst = [score for score in sorted(scores, key=total) if total(score) < 1][:count]
    if not worst:
        return None
    table = _table("worst edits", "prompt", "target", "answer", "rel", "gen", "loc", numbers=("rel", "gen", "loc"))
    for score in worst:
        texts = (Text(t) for t in (score.edit.prompt, score.edit.target, score.answer or "–"))
        table.add_row(*texts, *(_number(getattr(score, name)) for name in names[:3]))
    return table


def demo_table(rows: Sequence[Mapping]) -> Table:
    """Answers before and after editing; a row has kind, prompt, target, before, after and verdict."""
    table = _table("before and after", "", "prompt", "before", "after", "")
    for row in rows:
        symbol, colour = _MARKS[row["verdict"]]
        first = row["kind"] == "prompt"
        if first:
            table.add_section()
        prompt = Text(row["prompt"], "bold" if first else "")
        if first:
            prompt.append(f"\n→ {row['target']}", "cyan")
        kind = Text(row["kind"], "dim")
        table.add_row(kind, prompt, Text(row["before"], "dim"), Text(row["after"], colour), Text(symbol, colour))
    table.caption = "✓ the new answer   ✗ another answer   = unrelated, unchanged   ≠ unrelated, changed"
    return table


def answers_table(rows: Sequence[Mapping]) -> Table:
    """Answers without and with the edits; a row has prompt, before, after, memory, score and threshold."""
    table = _table(
        "without and with the edits",
        "prompt",
        "without",
        "with",
        "answered by",
        "score / threshold",
        numbers=("score / threshold",),
        fixed="answered by",
    )
    for row in rows:
        inside = row["memory"] is not None
        by = f"side memory {row['memory']}" if inside else "main memory"
        scores = f"{_number(row['score'])} / {_number(row['threshold'])}"
        after = Text(row["after"], "cyan" if row["after"] != row["before"] else "")
        table.add_row(Text(row["prompt"]), Text(row["before"], "dim"), after, by, scores)
    return table


def pack_table(title: str, found: Mapping) -> Table:
    """What `storage.inspect` found; of the settings those that differ from the defaults."""
    default = WiseConfig().to_dict()
    changed = {k: v for k, v in found.get("config", {}).items() if k not in default or v != default[k]}
    shown = {name: value for name, value in found.items() if value != {}}
    return pairs_table(title, {**shown, "config": changed or "the defaults"})


def pairs_table(title: str, values: Mapping) -> Table:
    """Names and values, nested dicts flattened to dotted names."""
    table = _table(title, "name", "value")
    table.show_header = False
    for name, value in _flat(values):
        spoken = name if "." in name else name.replace("_", " ")  # what is dotted names files, settings, packages
        table.add_row(Text(spoken, "dim"), Text(_shown(value)))
    return table


def _flat(values: Mapping, prefix: str = "") -> Iterable[tuple[str, object]]:
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{name}.")
        elif isinstance(value, (list, tuple)) and value and all(isinstance(item, Mapping) for item in value):
            for place, item in enumerate(value[:_ROWS]):
                yield from _flat(item, f"{prefix}{name}[{place}].")
            if len(value) > _ROWS:
                yield f"{prefix}{name}", f"... {len(value) - _ROWS} more; --json has them all"
        else:
            yield f"{prefix}{name}", value


def _shown(value: object) -> str:
    if isinstance(value, float):
        return _number(value)
    if isinstance(value, (list, tuple)):
        return ", ".join(_shown(item) for item in value[:_ROWS]) + (", ..." if len(value) > _ROWS else "")
    return "–" if value is None else str(value)


def _table(title: str, *columns: str, numbers: Sequence[str] = (), fixed: str = "") -> Table:
    table = Table(title=Text(title), title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for name in columns:
        number = name in numbers
        table.add_column(name, justify="right" if number else "left", no_wrap=number or name == fixed, overflow="fold")
    return table


def _mark(verdict: str) -> Text:
    return Text(*_MARKS[verdict])


def _number(value: float | None) -> str:
    if value is None or math.isnan(value):
        return "–"
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
