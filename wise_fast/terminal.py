"""A command's dealings with the terminal: results on stdout; progress, logs and errors on stderr; exit codes."""

from __future__ import annotations

import json
import logging
import math
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout

import rich
import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from wise_fast.errors import WiseError

FINE, ERROR, FAILED_EDITS, INTERRUPTED = 0, 1, 3, 130


class Terminal:
    """What a command talks to while it runs; made by `terminal`.

    Attributes:
        as_json, verbose, quiet: the options of the same names.
        err: console of everything that is not the result.
        code: exit code of the command if nothing is raised.
        kept: what an interrupt from now on leaves behind, for its message.
    """

    def __init__(self, as_json: bool, verbose: bool, quiet: bool, stack: ExitStack):
        self.as_json, self.verbose, self.quiet = as_json, verbose, quiet
        rich.reconfigure(stderr=True)  # the global console is what the editor's own progress bar draws on
        self.err = rich.get_console()
        self.code, self.kept = FINE, "nothing was changed or saved"
        self._stdout, self._stack = sys.stdout, stack

    def emit(self, document: dict, *renderables) -> None:
        """Write the command's result: one JSON document, or the renderables."""
        if self.as_json:
            self._stdout.write(json.dumps(plain(document), indent=1, allow_nan=False) + "\n")
            return
        console = Console(file=self._stdout)
        for renderable in renderables:
            console.print(renderable, soft_wrap=isinstance(renderable, str))

    def warn(self, message: str) -> None:
        """A line on stderr that even `--quiet` shows."""
        self.err.print(escape(message), style="yellow", soft_wrap=True, highlight=False)

    @contextmanager
    def step(self, text: str) -> Iterator[None]:
        """A spinner with the elapsed time, for work of unknown length."""
        columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
        with Progress(*columns, console=self.err, transient=True, disable=self.quiet) as progress:
            progress.add_task(text, total=None)
            yield

    def bars(self) -> Progress:
        """Bars with the time left, on stderr; nothing is drawn when quiet."""
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        return Progress(*columns, console=self.err, disable=self.quiet)

    @contextmanager
    def bar(self, text: str, total: int | None = None) -> Iterator[Callable[[int, int | None], None]]:
        """A bar with the time left; yields `progress(done, total)`."""
        with self.bars() as progress:
            task = progress.add_task(text, total=total)
            yield lambda done, total=total: progress.update(task, completed=done, total=total)

    def hush_transformers(self) -> None:
        """Silence transformers' bars and advice until the command ends, unless verbose."""
        if self.verbose:
            return
        from transformers.utils import logging as hf

        level, bars = hf.get_verbosity(), hf.is_progress_bar_enabled()
        hf.set_verbosity_error()
        hf.disable_progress_bar()
        self._stack.callback(hf.set_verbosity, level)
        self._stack.callback(hf.enable_progress_bar if bars else hf.disable_progress_bar)

    def fail(self, code: int, kind: str, message: str) -> None:
        """Report an error, in JSON too, and exit."""
        if self.verbose:
            self.err.print_exception()
        self.err.print(f"[red]{kind}:[/] {escape(message)}", soft_wrap=True, highlight=False)
        if self.as_json:
            self.emit({"error": {"type": kind, "message": message}, "exit_code": code})
        raise typer.Exit(code)


@contextmanager
def terminal(context: typer.Context, as_json: bool, verbose: bool, quiet: bool) -> Iterator[Terminal]:
    """Run a command's body: errors become messages and exit codes; with JSON, stdout holds one document only."""
    wide = context.obj or {}
    verbose, quiet = verbose or wide.get("verbose", False), quiet or wide.get("quiet", False)
    if verbose and quiet:
        raise typer.BadParameter("--verbose and --quiet exclude each other")
    with ExitStack() as stack:
        it = Terminal(as_json, verbose, quiet, stack)
        stack.enter_context(_logs(it))
        if as_json:
            stack.enter_context(redirect_stdout(sys.stderr))
        if not verbose:
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
        try:
            yield it
        except WiseError as error:
            it.fail(ERROR, type(error).__name__, str(error))
        except KeyboardInterrupt:
            it.fail(INTERRUPTED, "Interrupted", it.kept)
    if it.code != FINE:
        raise typer.Exit(it.code)


@contextmanager
def _logs(it: Terminal) -> Iterator[None]:
    """The library's log on stderr: warnings, plus the slow one-time conversion of the demo model; all if verbose."""
    library, models = logging.getLogger("wise_fast"), logging.getLogger("wise_fast.models")
    before = library.level, models.level, library.propagate
    handler = RichHandler(console=it.err, show_time=it.verbose, show_path=it.verbose, show_level=it.verbose)
    library.addHandler(handler)
    library.propagate = False
    # What these say while they are imported beside transformers is no concern of ours.
    imported = [] if it.verbose else [logging.getLogger(name) for name in ("torchao", "torch.utils._pytree")]
    levels = [logger.level for logger in imported]
    for logger in imported:
        logger.setLevel(logging.ERROR)
    library.setLevel(logging.DEBUG if it.verbose else logging.ERROR if it.quiet else logging.WARNING)
    models.setLevel(logging.DEBUG if it.verbose else logging.ERROR if it.quiet else logging.INFO)
    try:
        yield
    finally:
        for logger, level in zip(imported, levels, strict=True):
            logger.setLevel(level)
        library.removeHandler(handler)
        library.setLevel(before[0])
        models.setLevel(before[1])
        library.propagate = before[2]


def plain(value):
    """`value` in JSON's types: NaN and infinity become null, what JSON does not know becomes text."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (str, int)) else str(value)
