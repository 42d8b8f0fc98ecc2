"""The command `wise-fast serve`: saved edits behind an OpenAI-compatible HTTP server."""

from __future__ import annotations

from typing import Annotated

import typer

from wise_fast.commands import Device, Dtype, Model, Pack, Quiet, Verbose, command
from wise_fast.terminal import terminal


def _named(given: list[str] | None) -> list[str]:
    for words in given or []:
        name, _, directory = words.partition("=")
        if not (name and directory):
            raise typer.BadParameter(f"{words!r} is not NAME=PACK, such as legal=packs/legal")
    return given or []


@command("serve")
def serve(
    context: typer.Context,
    pack: Pack,
    name: Annotated[str, typer.Option(help="What requests call the model.")] = "edited",
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on.")] = 8000,
    also: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=PACK", callback=_named, help="One more pack; requests for the model 'edited:NAME' ask for it."
        ),
    ] = None,
    editable: Annotated[
        bool, typer.Option("--editable", help="Also teach what is posted to /v1/edits; nothing of it is saved.")
    ] = False,
    model: Model = "demo",
    device: Device = None,
    dtype: Dtype = "auto",
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """Serve an edited model by the OpenAI API: /v1/chat/completions and /v1/completions. Needs the extra `serve`."""
    with terminal(context, False, verbose, quiet) as it:
        from wise_fast.serving import application  # says what is missing, before the model is loaded

        import uvicorn  # isort: skip

        from wise_fast import actions

        editor = actions.saved_editor(it, model, dtype, device, pack)
        for other, _, directory in (words.partition("=") for words in also or ()):
            with it.step(f"loading {directory}"):
                editor.load_pack(directory, other)
        it.kept = "stopped serving"
        served = " and ".join(f"{len(reports)} edits as {_asked(name, of)!r}" for of, reports in editor.packs.items())
        it.emit({}, f"serving {served}, of {model}, on http://{host}:{port}")
        uvicorn.run(
            application(editor, name, editable), host=host, port=port, log_level="info" if verbose else "warning"
        )


def _asked(name: str, pack: str) -> str:
    """What requests for a pack call the model."""
    return name if pack == "default" else f"{name}:{pack}"
