"""Entry point of the `wise-fast` command; the commands themselves are in `wise_fast.commands`."""

from __future__ import annotations

import sys
from collections.abc import Callable


def main() -> None:
    """Run the command line and exit with its code (see `wise-fast --help`); 1 when the `cli` extra is missing."""
    start(_commands, "wise-fast")


def start(load: Callable[[], Callable], name: str) -> None:
    """Import a command line by `load`, run it under this name, and exit with its code."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a model may say anything, a terminal may not show everything
            stream.reconfigure(errors="replace")
    try:
        app = load()
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("typer", "rich"):
            raise
        sys.stderr.write(f"{name} needs {error.name}, not installed here: pip install 'wise_fast[cli]'\n")
        sys.exit(1)
    except KeyboardInterrupt:  # while importing; later ones are the commands' business
        sys.exit(130)
    app(prog_name=name)


def _commands() -> Callable:
    from wise_fast import (  # noqa: F401  register their commands
        export_command,
        harness_command,
        report_command,
        run_command,
        serve_command,
    )
    from wise_fast.commands import app

    return app


if __name__ == "__main__":
    main()
