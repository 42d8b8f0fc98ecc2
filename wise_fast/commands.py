"""The commands of `wise-fast`. Imports of torch and transformers wait until a command needs them."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Annotated

import typer

from wise_fast import display
from wise_fast.errors import WiseError
from wise_fast.settings import build_config
from wise_fast.terminal import INTERRUPTED, terminal

_TERMS = "The demo model is Gemma 3 270M, under the Gemma Terms of Use: https://ai.google.dev/gemma/terms"
_EXIT_CODES = (
    "Exit codes: 0 fine; 1 an error, told in a line on stderr; 2 wrong usage; 3 done, but some edits failed (all that "
    "was asked for is still printed and saved); 130 interrupted."
)

app = typer.Typer(
    help="Lifelong model editing with WISE: teach a language model facts, keep what it knew.",
    epilog=_EXIT_CODES,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
command = functools.partial(app.command, epilog=_EXIT_CODES)

Model = Annotated[
    str, typer.Option("--model", "-m", help="'demo', a directory, a .gguf file, or a Hugging Face hub id.")
]
Pack = Annotated[Path, typer.Option("--pack", "-p", help="Directory that `edit --out` wrote, or a hub id.")]
Device = Annotated[str | None, typer.Option(help="Where to run, such as cuda or cpu.")]
Dtype = Annotated[str, typer.Option(help="Of the weights: auto keeps the stored one; float32, bfloat16, ...")]
Irrelevant = Annotated[
    Path | None, typer.Option(help="Partner file with as many records: the edits' texts for the margin loss.")
]
Limit = Annotated[int | None, typer.Option(min=1, help="Only the first so many edits of the file.")]
Seed = Annotated[int | None, typer.Option(min=0, help="Of masks, prefixes and their order.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout, nothing else there.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Full logs and tracebacks, on stderr.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress: only results and errors.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        from wise_fast import __version__

        typer.echo(f"wise-fast {__version__}")
        raise typer.Exit()


@app.callback()
def root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    context.obj = {"verbose": verbose, "quiet": quiet}


@command()
def demo(
    context: typer.Context,
    edits: Annotated[int, typer.Option("--edits", "-n", min=1, help="How many packaged edits to teach.")] = 6,
    model: Model = "demo",
    seed: Seed = None,
    device: Device = None,
    as_json: Json = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """Teach a small model a few false facts and show its answers before and after."""
    with terminal(context, as_json, verbose, quiet) as it:
        from wise_fast import actions
        from wise_fast.data import demo_edits
        from wise_fast.models import DEMO_NAMES

        chosen = actions.spread(demo_edits(), edits)
        editor = actions.new_editor(it, model, "auto", device, build_config(None, (), seed=seed))
        before = actions.ask(it, editor, chosen, "asking the model")
        it.kept = "nothing was saved"
        reports = editor.edit(chosen, progress=not it.quiet)
        after = actions.ask(it, editor, chosen, "asking again")
        rows = actions.compare(chosen, before, after)
        metrics = actions.score(it, editor, chosen, generate=False).summary() | actions.exact(rows)
        summary = actions.summary(reports)
        terms = {"terms": _TERMS} if model in DEMO_NAMES else {}
        document = {"answers": rows, "metrics": metrics, "summary": summary}
        it.emit(
            {"command": "demo", "model": model, **document, "edits": [r.to_dict() for r in reports], **terms},
            display.demo_table(rows),
            display.metrics_table(metrics),
            f"{summary['edits']} edits, {summary['failed']} failed, {summary['seconds_per_edit']:.2f} s per edit",
            *terms.values(),
        )


@command()
def edit(
    context: typer.Context,
    edits: Annotated[Path, typer.Option("--edits", "-e", help="JSON list or JSON Lines file of edits.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Directory to save the edits in.")],
    irrelevant: Irrelevant = None,
    model: Model = "demo",
    limit: Limit = None,
    config: Annotated[
        Path | None, typer.Option("--config", "-c", help="JSON or YAML file of settings, or EasyEdit's for WISE.")
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="One setting; may be repeated.")
    ] = None,
    layer: Annotated[int | None, typer.Option(help="Decoder layer to edit.")] = None,
    seed: Seed = None,
    evaluate: Annotated[bool, typer.Option(help="Also score the edits (teacher-forced); see `eval` for more.")] = True,
    device: Device = None,
    dtype: Dtype = "auto",
    as_json: Json = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """Teach a model the edits of a file and save them. Settings: --set over --config; --layer, --seed over both."""
    with terminal(context, as_json, verbose, quiet) as it:
        from wise_fast.data import load_edits

        chosen = load_edits(edits, limit=limit, irrelevant=irrelevant)
        values = build_config(config, settings or (), layer=layer, seed=seed)
        from wise_fast import actions  # after the cheap checks

        actions.check_out(out)
        editor = actions.new_editor(it, model, dtype, device, values)
        reports = actions.edit_and_save(it, editor, chosen, out)
        done = it.code != INTERRUPTED
        metrics = actions.score(it, editor, chosen, generate=False) if evaluate and done else None
        means = metrics.summary() if metrics else None
        if means:
            editor.save_pretrained(out, means)  # once more: the edits are safe already, and their card has the metrics
        summary = actions.summary(reports) | {"given": len(chosen), "memories": len(editor.memories), "pack": str(out)}
        it.emit(
            {
                "command": "edit",
                "model": model,
                "config": values.to_dict(),
                "edits": [r.to_dict() for r in reports],
                "metrics": means,
                "summary": summary,
                "interrupted": not done,
            },
            display.edits_table(reports),
            *([display.metrics_table(means)] if means else []),
            display.pairs_table("summary", summary),
        )


@command("eval")
def evaluate(
    context: typer.Context,
    pack: Pack,
    edits: Annotated[Path | None, typer.Option("--edits", "-e", help="File of edits; else those in the pack.")] = None,
    model: Model = "demo",
    limit: Limit = None,
    generate: Annotated[bool, typer.Option(help="Also generate freely and count exact answers.")] = True,
    device: Device = None,
    dtype: Dtype = "auto",
    as_json: Json = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """Score saved edits: reliability, generalization, locality and exact free answers."""
    with terminal(context, as_json, verbose, quiet) as it:
        from wise_fast.data import load_edits

        chosen = None if edits is None else load_edits(edits, limit=limit)
        from wise_fast import actions  # after the cheap checks

        editor = actions.saved_editor(it, model, dtype, device, pack)
        if chosen is None:
            chosen = [r.edit for r in editor.edits if not r.superseded][:limit]
        if not chosen:
            raise WiseError(f"{pack} holds no edits to score; name a file of them with --edits")
        metrics = actions.score(it, editor, chosen, generate=generate)
        scores = [s.to_dict() for s in metrics.scores]
        worst = display.worst_table(metrics.scores)
        it.emit(
            {
                "command": "eval",
                "model": model,
                "pack": str(pack),
                "edits": len(chosen),
                "metrics": metrics.summary(),
                "scores": scores,
            },
            display.metrics_table(metrics.summary()),
            worst if worst is not None else f"no score of the {len(chosen)} edits is below 1",
        )


@command()
def generate(
    context: typer.Context,
    prompts: Annotated[list[str], typer.Argument(help="What to ask; several prompts are asked in turn.")],
    pack: Pack,
    model: Model = "demo",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 24,
    device: Device = None,
    dtype: Dtype = "auto",
    as_json: Json = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """Answer prompts without and with the edits, side by side. Greedy, up to the end of the line."""
    with terminal(context, as_json, verbose, quiet) as it:
        if blank := [p for p in prompts if not p.strip()]:
            raise WiseError(f"prompt {blank[0]!r} is blank, expected some text")
        from wise_fast import actions  # after the cheap checks

        editor = actions.saved_editor(it, model, dtype, device, pack)
        with it.bar("answering", len(prompts)) as progress:
            rows = list(actions.answers(editor, prompts, max_new_tokens, progress))
        it.emit(
            {"command": "generate", "model": model, "pack": str(pack), "answers": rows}, display.answers_table(rows)
        )


@command()
def inspect(
    context: typer.Context,
    pack: Annotated[Path, typer.Argument(help="Directory that `edit --out` wrote, or a hub id.")],
    as_json: Json = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """Show what a saved directory holds, without loading a model."""
    with terminal(context, as_json, verbose, quiet) as it:
        with it.step(f"reading {pack}"):
            from wise_fast import hub, storage

            found = storage.inspect(hub.local(str(pack)))
        it.emit(found, display.pack_table(str(pack), found))
