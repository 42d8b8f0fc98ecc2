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
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from wise_fast import gauges, recorded, run_header
from wise_fast.chat import rendered
from wise_fast.checkpoint import Checkpoints, Digester
from wise_fast.data import Edit, deduplicate
from wise_fast.errors import ConfigError, StorageError, WiseError
from wise_fast.journal import Journal, jsonable, read_journal
from wise_fast.routing_scores import routing_ratios
from wise_fast.run_settings import RunSettings, batches
from wise_fast.state import EditReport
from wise_fast.tasks import TASKS, general_ability

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
        edits, failed: how many edits were given, and how many of them do not hold by their latest report (superseded
            ones aside).
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
        source, partner: the file that the edits came from, and that of their irrelevant texts, for the header.
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
        partner: str | Path | None = None,
        resume: bool = False,
    ):
        self.method, self.name, self.out = method, name, Path(out)
        self.settings = RunSettings() if settings is None else settings
        self.T = self.settings.edits_of(len(edits))
        self.edits = rendered(method.tokenizer, edits[: self.T])
        self.points = self.settings.points(self.T)
        if method.edits:
            raise ConfigError(f"the method holds {len(method.edits)} edits already; a run needs a fresh one")
        self._stateful = hasattr(method, "state")
        if self._stateful:
            method.config = method.config.replace(undo_depth=0)
        found = run_header.claim(self.out, resume)
        if self._stateful:
            method.check(self.edits)
        header = self._header(model, *(None if path is None else Path(path) for path in (source, partner)))
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
        self._reports: list[dict] = []
        self._seconds = 0.0
        self._held_out: float | None = None
        self._at = 0  # batches that the method's state has behind it

    def _header(self, model: str | None, source: Path | None, partner: Path | None) -> dict:
        known = run_header.describe_method(self.method)
        return {
            "format": recorded.FORMAT,
            "version": recorded.VERSION,
            "method": self.name,
            "model": model,
            "task": self.settings.task,
            "mode": known.pop("mode"),
            "T": self.T,
            "batch_size": known.pop("batch_size"),
            "edits": run_header.describe_edits(self.edits, source, partner),
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
            self._at = self._restore()
            done = self._plan[self._at - 1][1] if self._at else 0
            watcher.begins(done, self.acknowledged)
            try:
                self._evaluate(done, watcher)
                for number in range(self._at, len(self._plan)):
                    self._batch(number, watcher)
                    self._evaluate(self._plan[number][1], watcher)
            except KeyboardInterrupt:
                self._leave()
                raise
        evaluations = tuple({"t": t, "figures": self._figures[t]} for t in self.points)
        failed = sum(not r["success"] and not r["note"].startswith("superseded") for r in self._reports)
        return RunSummary(self.T, failed, self._seconds, self._digests[-1], evaluations)

    def _batch(self, number: int, watcher: Watcher) -> None:
        """Learn a batch and write it down, or check it against what is written of it."""
        first, end = self._plan[number]
        start, before = time.perf_counter(), self.method.edits
        reports = self.method.edit(self.edits[first:end])
        digest = self._digester.digest(self.method.state) if self._stateful else None
        if number < len(self._digests):
            self._require_replayed(number, digest)
        else:
            line = {
                "batch": number + 1,
                "first": first,
                **recorded.reported(reports, before, self.method.edits),
                "seconds": time.perf_counter() - start,
                "rss": gauges.peak_bytes(),
                **gauges.served(self.method),
                "digest": digest,
            }
            self._journal.append(line)
            self._count(line)
        self._at = number + 1
        watcher.edited(end, reports)
        every = self.settings.checkpoint_every
        if self._stateful and (end // every > first // every or end in self.points):
            self._checkpoints.save(self._at, self.method.state)

    def _count(self, line: dict) -> None:
        """Take a line of the journal into the run's totals."""
        self._digests.append(line["digest"])
        self._seconds += line["seconds"]
        recorded.take(self._reports, line)

    def _evaluate(self, t: int, watcher: Watcher) -> None:
        """Score all edits so far that a later one does not supersede, if it is time and was not done before."""
        if t not in self.points or t in self._figures:
            return
        start = time.perf_counter()
        edits, _ = deduplicate(self.edits[:t])
        task, generate = TASKS[self.settings.task], self.settings.generate

        def told(part: int):
            return lambda work, total: watcher.evaluating(t, part * total + work, 2 * total)

        # Asked anew each time, so that an evaluation depends on nothing but the state and the edits.
        before = task.before(self.method, edits, generate, told(0))
        found = task.score(self.method, edits, generate, before, told(1))
        held_out = general_ability(self.method, before=self._held_out)
        self._held_out = held_out["perplexity_before"]
        line = {
            "method": self.name,
            "task": self.settings.task,
            "t": t,
            "figures": found.summary() | held_out,
            "unedited": found.summary_before(),
            "scores": [score.to_dict() for score in found.scores],
            "routing": routing_ratios(self.method, edits, self.header["seed"] or 0),
            "seconds": time.perf_counter() - start,
        }
        self._evaluations.append(line)
        self._figures[t] = jsonable(line["figures"])
        watcher.evaluated(t, self._figures[t])

    # -- resuming -----------------------------------------------------------------------------------------------

    def _read(self) -> None:
        """Take note of what the journals hold."""
        self._digests, self._figures, self._reports, self._seconds = [], {}, [], 0.0
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
            return len(self._plan) if len(self._digests) == len(self._plan) and not missing else 0
        number, state = self._checkpoints.latest(self._digests, most, self.method.device)
        if number:
            self.method.state = state
        return number

    def _require_replayed(self, number: int, digest: str | None) -> None:
        """Raise StorageError unless the batch gave the same state again."""
        if digest == self._digests[number]:
            return
        now = run_header.libraries(self.method.device)
        raise StorageError(
            f"{self.out}: batch {number + 1} gave another state than the journal has (digest {str(digest)[:12]}, "
            f"journal {str(self._digests[number])[:12]}), so this would not be the same run any more "
            f"({run_header.differences(self.header, now)}). Nothing was added to it. Resume with the libraries, "
            "threads and device that it was begun with"
        )

    def _leave(self) -> None:
        """Keep the state for resuming, if it is one that the journal has."""
        if not self._stateful or not self._at or self._at in self._checkpoints.numbers():
            return
        try:
            if self._digester.digest(self.method.state) == self._digests[self._at - 1]:
                self._checkpoints.save(self._at, self.method.state)
        except WiseError as error:
            logger.warning("no checkpoint could be written: %s", error)
