"""The command `wise-fast serve`: saved edits behind an OpenAI-compatible HTTP server."""

from __future__ import annotations

from typing import Annotated

import typer

from wise_fast.commands import Device, Dtype, Model, Pack, Quiet, Verbose, command
from wise_fast.terminal import terminal


@command("serve")
def serve(
    context: typer.Context,
    pack: Pack,
    name: Annotated[str, typer.Option(help="What requests call the model.")] = "edited",
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on.")] = 8000,
    editable: Annotated[
        bool, typer.Option("--editable", help="Also teach what is posted to /v1/edits; nothing of it is saved.")
    ] = False,
    model: Model = "demo",
    device: Device = None,
    dtype: Dtype = "auto",
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """Serve an edited model by the OpenAI API: /v1/chat/completions and /v1/completions. Needs wise_fast[serve]."""
    with terminal(context, False, verbose, quiet) as it:
        from wise_fast.serving import application  # says what is missing, before the model is loaded

        import uvicorn  # isort: skip

        from wise_fast import actions

        editor = actions.saved_editor(it, model, dtype, device, pack)
        it.kept = "stopped serving"
        it.emit({}, f"serving {len(editor.edits)} edits of {model} as {name!r} on http://{host}:{port}")
        uvicorn.run(
            application(editor, name, editable), host=host, port=port, log_level="info" if verbose else "warning"
        )
