"""A run on the terminal: bars with the time left while it goes on, and a line for every evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.progress import Progress

from wise_fast.lifelong import Watcher
from wise_fast.state import EditReport
from wise_fast.terminal import Terminal

_SHOWN = 4  # figures on an evaluation's line


class Bars(Watcher):
    """Draws one bar for the edits and one for the evaluation at hand, and says what an interrupt would leave.

    Args:
        it: the command's terminal.
        progress: where the bars are drawn.
        T: edits in all.
        resume: the command that goes on with this run.
    """

    def __init__(self, it: Terminal, progress: Progress, T: int, resume: str):
        self.it, self.progress, self.T, self.resume = it, progress, T, resume
        self.editing = progress.add_task("editing", total=T, start=False)
        self.scoring = progress.add_task("evaluating", total=None, visible=False, start=False)
        self.acknowledged = 0

    def begins(self, done: int, acknowledged: int) -> None:
        self.acknowledged = acknowledged
        again = f", {acknowledged - done} of them edited again" if acknowledged > done else ""
        if acknowledged and not self.it.quiet:
            self.progress.console.print(f"resuming: {acknowledged} of {self.T} edits are kept{again}", highlight=False)
        self.progress.update(self.editing, completed=done)
        self.progress.start_task(self.editing)
        self._keep()

    def edited(self, done: int, reports: Sequence[EditReport]) -> None:
        self.acknowledged = max(done, self.acknowledged)
        self.progress.update(self.editing, completed=done)
        self._keep()

    def evaluating(self, t: int, work: int, total: int) -> None:
        if not self.progress.tasks[self.scoring].visible:
            self.progress.reset(self.scoring, visible=True, description=f"evaluating {t} edits")
        self.progress.update(self.scoring, completed=work, total=total)

    def evaluated(self, t: int, figures: dict[str, float | None]) -> None:
        self.progress.update(self.scoring, visible=False)
        shown = [f"{name} {value:.3f}" for name, value in figures.items() if value is not None][:_SHOWN]
        if not self.it.quiet:
            self.progress.console.print(f"after {t} edits: {', '.join(shown)}", highlight=False)

    def _keep(self) -> None:
        kept = f"{self.acknowledged} of {self.T} edits are kept"
        self.it.kept = f"{kept}; go on with: {self.resume}"


@contextmanager
def bars(it: Terminal, T: int, resume: str) -> Iterator[Bars]:
    """`Bars` on stderr; nothing is drawn when the terminal is quiet."""
    with it.bars() as progress:
        yield Bars(it, progress, T, resume)
