"""The command line of `python -m wise_fast.distributed`: the options of `wise-fast edit`, for each of the processes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from wise_fast import display
from wise_fast.commands import Device, Dtype, Irrelevant, Json, Limit, Model, Quiet, Seed, Verbose
from wise_fast.settings import build_config
from wise_fast.terminal import Terminal, terminal

_EXIT_CODES = (
    "Exit codes: 0 fine, also where some edits failed: the summary counts them, and torchrun takes all others for a "
    "crash; 1 an error; 2 wrong usage; 130 interrupted."
)
_OUT = "Directory of the run, new, empty or with the same run: finished shards in it are taken up."
_TIMEOUT = "Seconds that a process may do nothing before the others give it up."

app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)


@app.command(epilog=_EXIT_CODES)
def distributed(
    context: typer.Context,
    edits: Annotated[Path, typer.Option("--edits", "-e", help="JSON list or JSON Lines file of edits.")],
    out: Annotated[Path, typer.Option("--out", "-o", help=_OUT)],
    irrelevant: Irrelevant = None,
    model: Model = "demo",
    limit: Limit = None,
    shard_size: Annotated[int | None, typer.Option(min=1, help="Edits in a shard, by default 50.")] = None,
    mode: Annotated[
        str | None, typer.Option(help="retrieve (the default): a bank of memories; merge: one, merged at the end.")
    ] = None,
    config: Annotated[Path | None, typer.Option("--config", "-c", help="JSON or YAML file of settings.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="One setting; may be repeated.")
    ] = None,
    layer: Annotated[int | None, typer.Option(help="Decoder layer to edit.")] = None,
    seed: Seed = None,
    device: Device = None,
    dtype: Dtype = "auto",
    timeout: Annotated[float, typer.Option(min=1, help=_TIMEOUT)] = 1800.0,
    as_json: Json = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """Teach a model the edits of a file on all processes that torchrun starts, and save them in OUT/pack.

    Started plainly, one process does it alone, with the same result.
    """
    other = int(os.environ.get("RANK", 0)) > 0
    with terminal(context, as_json and not other, verbose, (quiet or other) and not verbose) as it:
        from wise_fast.data import load_edits

        chosen = load_edits(edits, limit=limit, irrelevant=irrelevant)
        values = build_config(config, settings or (), layer=layer, seed=seed, mode=mode, shard_size=shard_size)
        from wise_fast import actions  # after the cheap checks
        from wise_fast.distributed import distribute
        from wise_fast.ranks import joined, local_device
        from wise_fast.shards import Shards, require_shard_size

        require_shard_size(values)
        with joined(local_device(device), timeout) as ranks:
            ranks.at(f"loading {model}")
            editor = actions.new_editor(it, model, dtype, str(ranks.device), values)
            with it.step("preparing"):
                shards = Shards(editor, chosen, out, edits, irrelevant)
            if ranks.first and ranks.size > shards.count:
                it.warn(f"{ranks.size} processes, but only {shards.count} shards: a smaller --shard-size makes more")
            it.kept = "finished shards are kept, and the same command goes on from there"
            with it.bar("editing", len(shards.edits)) as watch:
                outcome = distribute(shards, ranks, watch)
        if outcome is not None:
            processes = {"given": len(chosen), "superseded": shards.superseded, "processes": ranks.size}
            _show(it, outcome, {"model": model, "config": values.to_dict()}, processes | {"shards": shards.count})


def _show(it: Terminal, outcome, run: dict, counts: dict) -> None:
    """What came of a run, whose settings and counts these are."""
    from wise_fast import actions

    summary = actions.summary(outcome.reports) | counts
    summary |= {name: getattr(outcome, name) for name in ("taken_up", "carried", "memories", "digest")}
    summary |= {"wall_seconds": outcome.seconds, "pack": str(outcome.pack)}
    it.emit(
        {"command": "distributed", **run, "edits": [r.to_dict() for r in outcome.reports], "summary": summary},
        display.edits_table(outcome.reports),
        display.pairs_table("summary", summary),
    )
