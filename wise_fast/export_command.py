"""The command `wise-fast export`: saved edits in, a plain transformers checkpoint out, and what that costs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from wise_fast import display
from wise_fast.commands import Device, Dtype, Json, Model, Pack, Quiet, Verbose, command
from wise_fast.terminal import terminal


@command("export")
def export(
    context: typer.Context,
    pack: Pack,
    out: Annotated[Path, typer.Option("--out", "-o", help="Directory for the checkpoint, new or empty.")],
    model: Model = "demo",
    merge: Annotated[str, typer.Option(help="Of several memories: ties or sum.")] = "ties",
    evaluate: Annotated[
        bool, typer.Option(help="Also score the edits with the router and without (teacher-forced).")
    ] = True,
    device: Device = None,
    dtype: Dtype = "auto",
    as_json: Json = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """Fold saved edits into the weights, as a checkpoint for AutoModelForCausalLM. Routing is lost: see the scores."""
    with terminal(context, as_json, verbose, quiet) as it:
        from wise_fast import actions, dense

        dense.check(out, merge)
        editor = actions.saved_editor(it, model, dtype, device, pack)
        with it.step(f"writing {out}"):
            editor.export_dense(out, merge)
        it.kept = f"the checkpoint is written to {out}"
        found = None
        if evaluate:
            with it.step("scoring with the router and without"):
                found = {name: e.summary() for name, e in dense.cost(editor, merge=merge, generate=False).items()}
        document = {"command": "export", "model": model, "pack": str(pack), "out": str(out), "merge": merge}
        tables = [display.compared_table("with the router, and folded in", found)] if found else []
        it.emit(
            {**document, "metrics": found}, *tables, f"{len(editor.edits)} edits folded into {out}; routing is lost"
        )
