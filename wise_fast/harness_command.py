"""The command `wise-fast harness`: saved edits under lm-evaluation-harness, beside the unedited model."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import typer

from wise_fast import display
from wise_fast.commands import Device, Dtype, Json, Model, Pack, Quiet, Verbose, command
from wise_fast.terminal import terminal


@command("harness")
def harness(
    context: typer.Context,
    pack: Pack,
    tasks: Annotated[str, typer.Option("--tasks", "-t", help="Tasks of lm_eval, or YAML files, with commas between.")],
    include: Annotated[Path | None, typer.Option(help="Directory with YAML files of more tasks.")] = None,
    before_after: Annotated[bool, typer.Option("--before-after", help="Ask the unedited model as well.")] = False,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first so many documents of each task.")] = None,
    num_fewshot: Annotated[int | None, typer.Option(min=0, help="Examples in front; else the task's own.")] = None,
    model: Model = "demo",
    device: Device = None,
    dtype: Dtype = "auto",
    as_json: Json = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """Run tasks of lm-evaluation-harness on an edited model. Needs the extra `eval`."""
    with terminal(context, as_json, verbose, quiet) as it:
        from wise_fast import harness as tool

        named = [task for task in tasks.split(",") if task]
        with it.step("finding the tasks"):
            tool.find_tasks(named, include)
        from wise_fast import actions  # after the cheap checks

        editor = actions.saved_editor(it, model, dtype, device, pack)
        settings = dict(include=include, before_after=before_after, limit=limit, num_fewshot=num_fewshot)
        if not it.verbose:
            logging.getLogger("lm_eval").setLevel(logging.ERROR)
        with it.step(f"asking {', '.join(named)}"):
            found = tool.evaluate_tasks(editor, named, **settings)
        it.emit(
            {"command": "harness", "model": model, "pack": str(pack), "tasks": named, "figures": found},
            display.compared_table("lm-evaluation-harness", found),
        )
