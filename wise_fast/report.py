"""Report of runs: one method or several side by side, as `report.md`, `report.html` and PNG plots.

Everything comes from the run directories (`wise_fast.recorded`); no model is loaded. What a run lacks is said in the
report's last section, and never stops it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from wise_fast import report_pictures, report_tables
from wise_fast.document import Block, Heading, Picture, markdown, shown
from wise_fast.errors import StorageError
from wise_fast.figures import figures_of
from wise_fast.recorded import Run, read_runs
from wise_fast.report_html import html


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
    names = figures_of(runs)
    blocks: list[Block] = [Heading(_title(runs), 1), *report_tables.result(runs, names)]
    if plot:
        blocks += report_pictures.quality(runs, names) + report_pictures.routing(runs) + report_pictures.cost(runs)
    blocks += (
        report_tables.worst(runs, names)
        + report_tables.failed(runs)
        + report_tables.points(runs, names)
        + report_tables.settings(runs)
        + report_tables.missing(runs)
    )
    return blocks


def _title(runs: Sequence[Run]) -> str:
    tasks = ", ".join(dict.fromkeys(shown(run.header.get("task", "unknown task")) for run in runs))
    return f"Lifelong editing: {tasks}, {max(_taught(run) for run in runs)} edits"


def _taught(run: Run) -> int:
    return max(len(run.reports), run.last["t"] if run.last else 0)
