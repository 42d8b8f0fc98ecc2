"""Lifelong runs: a stream of edits, evaluated on the way, of which nothing that was acknowledged is ever lost.

    editor = WiseEditor(model, tokenizer)
    run = Run(editor, load_edits("zsre.json"), "runs/zsre", RunSettings(task="qa", T=300))
    run.run()                           # after a crash the same with Run(..., resume=True), on a fresh editor

The directory holds

    run.json            what the run is; resuming with anything else is refused
    journal.jsonl       a line for every batch, on the disk before the batch counts as done
    evaluations.jsonl   a line for every evaluation, of all edits so far
    checkpoints/        the editor's complete state, the last two

Resuming takes the newest good checkpoint and edits what the journal has beyond it once more. Editing is deterministic:
the digest of the state after each batch must be the journal's, or the run stops and says so.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from wise_fast import run_header
from wise_fast.checkpoint import Checkpoints, Digester
from wise_fast.data import Edit, deduplicate
from wise_fast.errors import ConfigError, StorageError, WiseError
from wise_fast.journal import Journal, jsonable, read_journal
from wise_fast.routing_scores import routing_ratios
from wise_fast.run_settings import RunSettings, batches
from wise_fast.state import EditReport
from wise_fast.tasks import TASKS, general_ability

try:
    import resource
except ImportError:  # not a POSIX system
    resource = None

logger = logging.getLogger(__name__)

JOURNAL, EVALUATIONS, CHECKPOINTS = "journal.jsonl", "evaluations.jsonl", "checkpoints"


class Watcher:
    """What a run tells while it goes on; does nothing itself."""

    def begins(self, done: int, acknowledged: int) -> None:
        """The run goes on behind `done` edits, of `acknowledged` that the journal holds."""

    def edited(self, done: int, reports: Sequence[EditReport]) -> None:
        """`done` edits are learned, the last of them with these reports; their batch is on the disk."""

    def evaluating(self, t: int, work: int, total: int) -> None:
        """So much work of the evaluation after `t` edits is done."""

    def evaluated(self, t: int, figures: dict[str, float | None]) -> None:
        """The evaluation after `t` edits is on the disk."""


@dataclass(frozen=True)
class RunSummary:
    """What a finished run has in its directory.

    Attributes:
        edits, failed: how many edits were given, and how many of them do not hold right after being learned
            (superseded ones aside).
        seconds: spent editing, in all sessions.
        digest: of the final state; None of a method without one.
        evaluations: per evaluation point `t` and `figures`.
    """

    edits: int
    failed: int
    seconds: float
    digest: str | None
    evaluations: tuple[dict, ...]


class Run:
    """One run of one method over a list of edits, in a directory.

    Args:
        method: a fresh `WiseEditor`, or any `wise_fast.metrics.Method`; one whose `state` cannot be saved has no
            checkpoints, and resuming edits everything again. An editor is told to keep no earlier states.
        edits: the stream; the first `settings.T` of it are taken.
        out: the run's directory: new or empty, unless the run is resumed.
        settings: `RunSettings()` when None.
        name: of the method, in the evaluations.
        model: of the model, for the header.
        source: the file that the edits came from, for the header.
        resume: go on with the run in `out`; where none was begun yet, begin it.

    Raises:
        StorageError: `out` holds a run that is not resumed, or other things, or cannot be written.
        ConfigError: a setting is out of range or another than the run was begun with; the method holds edits already.
        EditDataError: one of the edits cannot be learned.
    """

    def __init__(
        self,
        method,
        edits: Sequence[Edit],
        out: str | Path,
        settings: RunSettings | None = None,
        *,
        name: str = "wise_fast",
        model: str | None = None,
        source: str | Path | None = None,
        resume: bool = False,
    ):
        self.method, self.name, self.out = method, name, Path(out)
        self.settings = RunSettings() if settings is None else settings
        self.T = self.settings.edits_of(len(edits))
        self.edits = list(edits[: self.T])
        self.points = self.settings.points(self.T)
        if method.edits:
            raise ConfigError(f"the method holds {len(method.edits)} edits already; a run needs a fresh one")
        self._stateful = hasattr(method, "state")
        if self._stateful:
            method.config = method.config.replace(undo_depth=0)
        found = run_header.claim(self.out, resume)
        if self._stateful:
            method.check(self.edits)
        header = self._header(model, None if source is None else Path(source))
        if found is None:
            run_header.write_header(self.out, header)
            found = header
        run_header.require_same(found, header)
        self.header = found
        self._digester = Digester()
        self._checkpoints = Checkpoints(self.out / CHECKPOINTS, self._digester)
        self._plan = list(batches(self.T, header["batch_size"], self.points))
        self._digests: list[str | None] = []
        self._figures: dict[int, dict] = {}
        self._failed, self._seconds = 0, 0.0

    def _header(self, model: str | None, source: Path | None) -> dict:
        known = run_header.describe_method(self.method)
        return {
            "format": run_header.FORMAT,
            "version": run_header.VERSION,
            "method": self.name,
            "model": model,
            "task": self.settings.task,
            "mode": known.pop("mode"),
            "T": self.T,
            "batch_size": known.pop("batch_size"),
            "edits": run_header.describe_edits(self.edits, source),
            "evaluate_at": list(self.points),
            "generate": self.settings.generate,
            "checkpoint_every": self.settings.checkpoint_every,
            **known,
            "libraries": run_header.libraries(self.method.device),
        }

    @property
    def acknowledged(self) -> int:
        """Edits whose batch is in the journal, once `run` has read it."""
        return self._plan[len(self._digests) - 1][1] if self._digests else 0

    def run(self, watcher: Watcher | None = None) -> RunSummary:
        """Edit and evaluate until the end. An interrupt leaves a checkpoint, where there was time for one.

        Raises:
            StorageError: the disk refuses, the journal is damaged, or replayed edits gave another state than they did
                at first. What was acknowledged stays.
            KeyboardInterrupt: as it came.
        """
        watcher = Watcher() if watcher is None else watcher
        with ExitStack() as stack:
            self._journal = stack.enter_context(Journal(self.out / JOURNAL))
            self._evaluations = stack.enter_context(Journal(self.out / EVALUATIONS))
            self._read()
            start = self._restore()
            watcher.begins(self._plan[start - 1][1] if start else 0, self.acknowledged)
            try:
                for number in range(start, len(self._plan)):
                    self._batch(number, watcher)
                    self._evaluate(self._plan[number][1], watcher)
            except KeyboardInterrupt:
                self._leave()
                raise
        evaluations = tuple({"t": t, "figures": self._figures[t]} for t in self.points)
        return RunSummary(self.T, self._failed, self._seconds, self._digests[-1], evaluations)

    # -- resuming -----------------------------------------------------------------------------------------------

    def _read(self) -> None:
        """Take note of what the journals hold."""
        self._digests, self._figures, self._failed, self._seconds = [], {}, 0, 0.0
        for number, line in enumerate(read_journal(self.out / JOURNAL)):
            first = self._plan[number][0] if number < len(self._plan) else None
            if line.get("batch") != number + 1 or line.get("first") != first:
                raise StorageError(
                    f"{self.out / JOURNAL}: line {number + 1} is not batch {number + 1} of this run (it says batch "
                    f"{line.get('batch')}, first edit {line.get('first')}); restore the file from a copy, or delete "
                    "this line and all after it: resuming makes up for them"
                )
            self._count(line)
        for line in read_journal(self.out / EVALUATIONS):
            self._figures[line["t"]] = line["figures"]

    def _restore(self) -> int:
        """Bring the method to where the run goes on; says how many batches are behind that."""
        missing = [t for t in self.points if t <= self.acknowledged and t not in self._figures]
        ends = [end for _, end in self._plan]
        most = ends.index(missing[0]) + 1 if missing else len(self._digests)
        if not self._stateful:
            return most if most == len(self._plan) and not missing else 0
        number, state = self._checkpoints.latest(self._digests, most, self.method.device)
        if number:
            self.method.state = state
        if missing and number and ends[number - 1] == missing[0]:
            self._evaluate_missing = missing[0]
        return number
