"""The command `wise-fast run`: options, a file of them and a begun run's own, in this order, into a lifelong run."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from wise_fast import display
from wise_fast.commands import Device, Irrelevant, Json, Quiet, Seed, Verbose, command
from wise_fast.errors import ConfigError
from wise_fast.run_settings import RunSettings, method_settings, parse_points, read_run_file
from wise_fast.settings import parse_setting
from wise_fast.terminal import FAILED_EDITS, terminal

_MODEL = "'demo' (the default), a directory, a .gguf file, or a Hugging Face hub id."
_TASK = "qa (the default), hallucination, temporal or counterfact: which figures are taken."
_POINTS = "After how many edits to evaluate, such as 1,10,100; by default 1, 10, 100, 300, 1000, 3000, ... and the end."
_FILE = "YAML or JSON file of these options, and 'settings' for those of --set; options given here come first."


@command("run")
def run(
    context: typer.Context,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Directory of the run, new or empty.")] = None,
    edits: Annotated[Path | None, typer.Option("--edits", "-e", help="JSON list or JSON Lines file of edits.")] = None,
    irrelevant: Irrelevant = None,
    model: Annotated[str | None, typer.Option("--model", "-m", help=_MODEL)] = None,
    task: Annotated[str | None, typer.Option(help=_TASK)] = None,
    T: Annotated[int | None, typer.Option("--T", min=1, help="Edits in all; by default the whole file.")] = None,
    mode: Annotated[str | None, typer.Option(help="retrieve: a bank of memories; merge: made one.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Edits trained together.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="One setting; may be repeated.")
    ] = None,
    config: Annotated[Path | None, typer.Option("--config", "-c", help=_FILE)] = None,
    evaluate_at: Annotated[str | None, typer.Option(help=_POINTS)] = None,
    generate: Annotated[bool | None, typer.Option("--generate/--no-generate", help="Also generate freely.")] = None,
    checkpoint_every: Annotated[int | None, typer.Option(min=1, help="Edits between checkpoints.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in --out, with its own options.")
    ] = False,
    seed: Seed = None,
    device: Device = None,
    dtype: Annotated[str | None, typer.Option(help="Of the weights: auto (the default), float32, ...")] = None,
    as_json: Json = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """Teach a stream of edits, evaluate on the way, and write everything down as it happens; --resume goes on.

    An interrupted or killed run loses no edit that was shown as done.
    """
    given = {
        "out": out and str(out),
        "edits": edits and str(edits),
        "irrelevant": irrelevant and str(irrelevant),
        "model": model,
        "task": task,
        "T": T,
        "evaluate_at": evaluate_at,
        "generate": generate,
        "checkpoint_every": checkpoint_every,
        "device": device,
        "dtype": dtype,
    }
    own = {"mode": mode, "batch_size": batch_size, "seed": seed}
    with terminal(context, as_json, verbose, quiet) as it:
        file = {} if config is None else read_run_file(config)
        values = file | _given(given)
        if "out" not in values:
            raise ConfigError("a run needs --out, the directory to write, here or in --config")
        from wise_fast.run_header import claim

        header = claim(Path(values["out"]), resume)
        values = _begun(header) | values
        begun = (header or {}).get("config") or {}
        changes = method_settings(file) | dict(map(parse_setting, settings or ())) | _given(own)
        _run(it, values, begun | changes, resume)


def _given(options: Mapping) -> dict:
    return {name: value for name, value in options.items() if value is not None}


def _begun(header: dict | None) -> dict:
    """The options that a begun run is to be resumed with, where no others are given."""
    if header is None:
        return {}
    named = {name: header.get(name) for name in ("model", "task", "T", "evaluate_at", "generate", "checkpoint_every")}
    base, libraries = header.get("base") or {}, header.get("libraries") or {}
    files = {"edits": header["edits"]["file"], "irrelevant": header["edits"].get("irrelevant")}
    return _given(named | files | {"dtype": base.get("dtype"), "device": libraries.get("device")})


def _run(it, values: dict, config_values: dict, resume: bool) -> None:
    """Run with these options and settings, and show what came of it."""
    from wise_fast.config import WiseConfig
    from wise_fast.data import load_edits

    if "edits" not in values:
        raise ConfigError("a run needs --edits, a file of edits, here or in --config")
    out, source, model = Path(values["out"]), Path(values["edits"]), values.get("model", "demo")
    own = {name: values[name] for name in ("task", "T", "generate", "checkpoint_every") if name in values}
    if "evaluate_at" in values:
        own["evaluate_at"] = parse_points(values["evaluate_at"])
    settings, config = RunSettings(**own), WiseConfig.from_dict(config_values)
    partner = values.get("irrelevant")
    chosen = load_edits(source, limit=settings.T, irrelevant=partner)
    T = settings.edits_of(len(chosen))
    it.kept = "the run is as it was" if resume else "no edit was finished"
    from wise_fast import actions  # after the cheap checks
    from wise_fast.lifelong import Run
    from wise_fast.run_progress import bars

    editor = actions.new_editor(it, model, values.get("dtype", "auto"), values.get("device"), config)
    with it.step("preparing"):
        run = Run(editor, chosen, out, settings, model=model, source=source, partner=partner, resume=resume)
    with bars(it, T, f"wise-fast run --resume --out {shlex.quote(str(out))}") as watcher:
        done = run.run(watcher)
    if done.failed:
        it.code = FAILED_EDITS
    summary = {
        "edits": done.edits,
        "failed": done.failed,
        "seconds": done.seconds,
        "seconds_per_edit": done.seconds / done.edits,
        "memories": len(editor.memories),
        "digest": done.digest,
        "out": str(out),
    }
    it.emit(
        {"command": "run", **run.header, "evaluations": list(done.evaluations), "summary": summary},
        display.evaluations_table(done.evaluations),
        display.pairs_table("summary", summary),
    )
