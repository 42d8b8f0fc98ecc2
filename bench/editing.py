"""Editing time: ours one at a time and in batches, beside the baseline, on one model in one process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from statistics import fmean

from bench.measure import PAPER_STEPS, Setting, requests, timed
from bench.records import Row, percentiles, spread

_BATCH = 8


def measure(setting: Setting, log: Callable[[str], None]) -> list[Row]:
    """Rows of the editing section; ratios are over the baseline's seconds per edit."""
    log("editing: ours, one at a time")
    single, rows = _ours(setting, 1)
    size = min(_BATCH, len(setting.edits))
    log(f"editing: ours, in batches of {size}")
    batched, more = _ours(setting, size)
    rows += more
    if setting.baseline_edits < 1:
        return rows
    log(f"editing: the baseline, {setting.baseline_edits} edits of {setting.baseline_steps} steps")
    per_edit, baseline_rows = _baseline(setting)
    rows = [_against(row, per_edit) for row in rows] + baseline_rows
    for case, seconds in ((_case(1), single), (_case(size), batched)):
        rows.append(Row("editing", f"ours, {case}", "speed-up over the baseline", per_edit / seconds, "x"))
    return rows


def _case(size: int) -> str:
    return "one at a time" if size == 1 else f"batches of {size}"


def _against(row: Row, per_edit: float) -> Row:
    return replace(row, ratio=row.value / per_edit) if row.metric == "time per edit" else row


def _ours(setting: Setting, size: int) -> tuple[float, list[Row]]:
    """(median seconds per edit, rows). Batches are full ones; edits left over are learned untimed."""
    editor, case = setting.editor(batch_size=size), f"ours, {_case(size)}"
    once = timed(editor.prepare, setting.device)
    whole = len(setting.edits) // size * size
    seconds = []
    for first in range(0, whole, size):
        batch = setting.edits[first : first + size]
        seconds.append(timed(lambda edits=batch: editor.edit(edits), setting.device) / len(batch))
    reports = editor.edits
    if whole < len(setting.edits):
        editor.edit(setting.edits[whole:])
    setting.edited = editor
    steps, total = fmean(report.steps for report in reports), sum(seconds) * size
    median = percentiles(seconds)[1]
    return median, [
        spread("editing", case, "time per edit", seconds, "s"),
        Row("editing", case, "time per step of one edit, all in", total / sum(r.steps for r in reports), "s"),
        Row("editing", case, "steps per edit", steps, "steps"),
        Row("editing", case, "edits that hold", sum(r.success for r in reports) / len(reports), "share"),
        Row("editing", case, "set-up, once an editor", once, "s"),
    ]


def _baseline(setting: Setting) -> tuple[float, list[Row]]:
    """(median seconds per edit, rows); of fewer steps than the paper's, per-edit seconds are extrapolated."""
    timings = setting.baseline(setting.baseline_steps).edit(requests(setting.edits[: setting.baseline_edits]))
    steps = [timing.seconds_per_step for timing in timings]
    if setting.baseline_steps < PAPER_STEPS:
        case = f"baseline, extrapolated: time per step x {PAPER_STEPS} ({setting.baseline_steps} steps run)"
        seconds = [step * PAPER_STEPS for step in steps]
    else:
        case, seconds = "baseline", [timing.seconds for timing in timings]
    return percentiles(seconds)[1], [
        spread("editing", case, "time per edit", seconds, "s"),
        spread("editing", "baseline", "time per step", steps, "s"),
    ]
