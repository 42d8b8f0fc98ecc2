"""What a run directory holds, read back without a model: header, acknowledged batches, evaluations.

A run that was killed or is still going is read as far as it got: a line that is torn or damaged is left out and named
in `notes`, so that a report can say what is missing.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from wise_fast.errors import StorageError

FORMAT, VERSION = "wise_fast run", 1
OURS = "wise_fast"
HEADER, JOURNAL, EVALUATIONS = "run.json", "journal.jsonl", "evaluations.jsonl"


@dataclass(frozen=True)
class Run:
    """One method's run.

    Attributes:
        directory: where it was read from.
        name: what it is called beside others; its method, with a number or the directory where that is not enough.
        header: of `run.json`.
        batches: lines of the journal, in order.
        evaluations: one per evaluation point, by rising T; of two at one T the later.
        notes: what could not be read.
    """

    directory: Path
    name: str
    header: Mapping[str, Any]
    batches: Sequence[Mapping[str, Any]] = ()
    evaluations: Sequence[Mapping[str, Any]] = ()
    notes: Sequence[str] = field(default=())

    @property
    def reports(self) -> list[Mapping[str, Any]]:
        """The latest report of every acknowledged edit, in order."""
        found: list[Mapping[str, Any]] = []
        for batch in self.batches:
            take(found, batch)
        return found

    @property
    def last(self) -> Mapping[str, Any] | None:
        """The evaluation with the largest T."""
        return self.evaluations[-1] if self.evaluations else None

    def figure(self, name: str) -> list[tuple[int, float]]:
        """(T, value) of every evaluation that has this figure."""
        found = [(e["t"], number(e["figures"].get(name))) for e in self.evaluations]
        return [(t, value) for t, value in found if value is not None]

    def series(self, name: str) -> list[tuple[int, float]]:
        """(edits so far, value) of every batch that has this number."""
        done, found = 0, []
        for batch in self.batches:
            done += len(batch.get("reports") or ())
            if (value := number(batch.get(name))) is not None:
                found.append((done, value))
        return found

    def seconds(self) -> list[tuple[int, float]]:
        """(number of the edit from 1, its wall seconds); a batch's time is shared equally by its edits."""
        done, found = 0, []
        for batch in self.batches:
            count, wall = len(batch.get("reports") or ()), number(batch.get("seconds"))
            if wall is not None:
                found += [(done + 1 + i, wall / count) for i in range(count)]
            done += count
        return found


def reported(reports: Sequence, before: Sequence, now: Sequence) -> dict[str, Any]:
    """What a batch's line in the journal says: the `EditReport`s of its edits, and those of earlier edits that are
    others `now` than `before` it, since they were rehearsed or superseded, by their place."""
    again = {str(place): new.to_dict() for place, (old, new) in enumerate(zip(before, now)) if new != old}
    return {"reports": [report.to_dict() for report in reports]} | ({"again": again} if again else {})


def take(reports: list[Mapping[str, Any]], line: Mapping[str, Any]) -> None:
    """Bring the latest reports of all edits up to this line of the journal."""
    for place, report in (line.get("again") or {}).items():
        if int(place) < len(reports):  # less if a line before was damaged
            reports[int(place)] = report
    reports += line.get("reports") or ()


def number(value: Any) -> float | None:
    """`value` as a finite float; None for anything else. True and False are 1 and 0."""
    if not isinstance(value, (int, float)):
        return None
    return float(value) if math.isfinite(value) else None


def read_runs(directories: Iterable[Path]) -> list[Run]:
    """The runs in these directories; one without a run of its own stands for those in its subdirectories.

    Raises:
        StorageError: a directory is missing, holds no run, or one that is damaged in its header or of a newer version.
    """
    found: list[Run] = []
    for directory in map(Path, directories):
        if not directory.is_dir():
            raise StorageError(f"{directory}: no such directory, expected one that `wise-fast run --out` wrote")
        below = sorted(path.parent for path in directory.glob(f"*/{HEADER}"))
        places = [directory] if (directory / HEADER).exists() else below
        if not places:
            raise StorageError(f"{directory}: there is no {HEADER} in it or below, expected a directory of a run")
        found += [read_run(place) for place in places]
    return _named(sorted(found, key=lambda run: run.name != OURS))  # ours first, the others as they were given


def read_run(directory: Path) -> Run:
    """One run directory. Raises StorageError as `read_runs` does."""
    header = read_header(directory)
    notes: list[str] = []
    batches = [line for line in _lines(directory / JOURNAL, notes) if isinstance(line.get("reports"), list)]
    points: dict[int, dict] = {}
    for line in _lines(directory / EVALUATIONS, notes):
        if isinstance(line.get("t"), int) and isinstance(line.get("figures"), dict):
            points[line["t"]] = line
    evaluations = tuple(points[t] for t in sorted(points))
    return Run(directory, str(header.get("method", directory.name)), header, tuple(batches), evaluations, tuple(notes))


def read_header(directory: Path, kind: str = FORMAT, version: int = VERSION) -> dict:
    """What `run.json` says of the run of this kind and version in `directory`. StorageError where there is none."""
    path = directory / HEADER
    try:
        header = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise StorageError(f"{path}: cannot be read ({error.strerror}); name a directory of a run") from error
    except ValueError as error:
        raise StorageError(f"{path}: is damaged ({error}); restore it from a copy") from None
    if not isinstance(header, dict) or header.get("format") != kind:
        raise StorageError(f"{path}: is not the header of such a run: its format is not {kind!r}")
    if header.get("version") != version:
        raise StorageError(
            f"{path}: has version {header.get('version')!r}, this wise_fast reads {version}; use the one that wrote it"
        )
    return header


def _lines(path: Path, notes: list[str]) -> list[dict]:
    """The JSON objects of a file, one a line; what is wrong goes to `notes`."""
    try:
        content = path.read_bytes()
    except OSError as error:
        notes.append(f"{path.name} cannot be read ({error.strerror})")
        return []
    found = []
    for place, line in enumerate(content.split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
            if not isinstance(value, dict):
                raise ValueError("no object")
            found.append(value)
        except ValueError:
            notes.append(f"line {place} of {path.name} is torn or damaged and was left out")
    return found


def _named(runs: Sequence[Run]) -> list[Run]:
    """Runs with distinct names."""
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        doubled = {name for name in names if names.count(name) > 1}
        names = [f"{run.name} ({run.directory.name})" if run.name in doubled else run.name for run in runs]
    taken: dict[str, int] = {}
    distinct = []
    for run, name in zip(runs, names, strict=True):
        taken[name] = taken.get(name, 0) + 1
        distinct.append(replace(run, name=name if taken[name] == 1 else f"{name} {taken[name]}"))
    return distinct
