"""The command `wise-fast report`: run directories in, a report out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from wise_fast.commands import Json, Quiet, Verbose, command
from wise_fast.terminal import terminal


@command("report")
def report(
    context: typer.Context,
    runs: Annotated[list[Path], typer.Argument(help="Directories that `run --out` wrote, one a method.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Directory for the report; by default `report` in the first run.")
    ] = None,
    plots: Annotated[bool, typer.Option("--plots/--no-plots", help="Draw pictures; needs wise_fast[plot].")] = True,
    as_json: Json = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """Write report.md, report.html and PNG plots of runs: quality against T, routing, cost, the worst edits."""
    with terminal(context, as_json, verbose, quiet) as it:
        from wise_fast.report import write_report  # after the cheap checks

        with it.step("writing the report"):
            files = write_report(runs, runs[0] / "report" if out is None else out, plots)
        it.emit({"command": "report", "files": [str(file) for file in files]}, *map(str, files))
