"""A table of recorded figures: lines of Markdown with places in them, which rows of bench/results fill.

    editing = Rows("editing.csv", "fe5aa5f")(metric="time per edit")
    Table("| | seconds an edit |", line("| alone | {ours.value:.2f} |", ours=editing(case="ours, one at a time")))

A place is `{name of a row.column:format}`, with Python's formats and one more: `.3s` writes a share, three decimals and
no zero before the point (.953, 1.000). A name stands for exactly one row. Numbers typed in between places are labels
("8 rows"): one that no row of the line has in its case, or as a value, is an error, except in columns of prose.
"""

from __future__ import annotations

import re
import string
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from bench import records

NUMBER = re.compile(r"(?<![\w.,-])(?:\d+(?:\.\d+)?|\.\d+)(?!\.?\d)")


class TableError(ValueError):
    """A table cannot be made as it is described."""


@dataclass(frozen=True)
class Results:
    """A directory of CSV files, each read once."""

    directory: Path
    _read: dict[str, list[dict]] = field(default_factory=dict)

    def rows(self, file: str) -> list[dict]:
        if file not in self._read:
            path = self.directory / file
            if not path.exists() or not (rows := records.read(path)):
                raise TableError(f"no rows in {path}")
            self._read[file] = rows
        return self._read[file]


@dataclass(frozen=True)
class Rows:
    """Rows of one file at one commit ("latest": that of the file's last row).

    Attributes:
        where: what columns hold: a number, or text in which * stands for anything.
        pick: (min or max, column): the row where the column is least or greatest.
        minus: columns changed to find another row, whose numbers are taken off.
    """

    file: str
    commit: str = "latest"
    where: dict = field(default_factory=dict)
    pick: tuple | None = None
    minus: dict | None = None

    def __call__(self, **where: str | float) -> Rows:
        return replace(self, where=self.where | where)

    def least(self, column: str) -> Rows:
        return replace(self, pick=(min, column))

    def greatest(self, column: str) -> Rows:
        return replace(self, pick=(max, column))

    def less(self, **changed: str | float) -> Rows:
        return replace(self, minus=changed)

    def at(self, results: Results) -> Rows:
        """The same with the commit's name instead of "latest"."""
        return replace(self, commit=results.rows(self.file)[-1]["commit"]) if self.commit == "latest" else self

    def find(self, results: Results) -> dict:
        """The one row.

        Raises:
            TableError: no row is found, or several are; the message says what was looked for.
        """
        found = self.at(results)._all(results)
        if self.pick is not None:
            choose, column = self.pick
            if not all(isinstance(row[column], float) for row in found):
                raise TableError(f"a row of {self._said(results)} has no number as its {column}")
            found = [choose(found, key=lambda row: row[column])]
        if len(found) > 1:
            raise TableError(f"{len(found)} rows of {self._said(results)}: say more, so that one is left")
        if self.minus is None:
            return found[0]
        other = replace(self, where=self.where | self.minus, minus=None).find(results)
        both = {name for name, value in found[0].items() if isinstance(value, float) and isinstance(other[name], float)}
        return found[0] | {name: found[0][name] - other[name] for name in both}

    def _all(self, results: Results) -> list[dict]:
        rows = [row for row in results.rows(self.file) if row["commit"] == self.commit]
        if not rows:
            known = ", ".join(dict.fromkeys(row["commit"] for row in results.rows(self.file)))
            raise TableError(f"{self.file} has no row of commit {self.commit}, but of {known}")
        named = [*self.where, *(self.pick or ())[1:]]
        if unknown := [name for name in named if name not in rows[0]]:
            raise TableError(f"{self.file} has no column {unknown[0]}, but {', '.join(rows[0])}")
        found = [row for row in rows if all(_fits(row[name], wanted) for name, wanted in self.where.items())]
        if not found:
            raise TableError(f"no row of {self._said(results)}")
        return found

    def _said(self, results: Results) -> str:
        where = ", ".join(f"{name} {wanted!r}" for name, wanted in self.where.items())
        return f"{self.file}, commit {self.at(results).commit}, has {where or 'no condition'}"


def _fits(value: str | float | None, wanted: str | float) -> bool:
    if isinstance(wanted, str):
        return re.fullmatch(re.escape(wanted).replace(r"\*", ".*"), str(value)) is not None
    return value == wanted


@dataclass(frozen=True)
class Line:
    """One line of a table, `rows` by the names that its places use."""

    text: str
    rows: dict[str, Rows]

    def fill(self, head: Sequence[str], results: Results) -> str:
        """The line with its figures.

        Raises:
            TableError: a row is missing, a place names what is not there, the line has more or fewer cells than the
                head, or a number is typed in.
        """
        found = {name: rows.find(results) for name, rows in self.rows.items()}
        cells = split(self.text)
        if len(cells) != len(head):
            raise TableError(f"{len(cells)} cells, expected {len(head)}")
        if unused := [name for name in found if f"{{{name}." not in self.text]:
            raise TableError(f"no place uses the rows called {', '.join(unused)}")
        labels = set().union(*map(_labels, found.values()))
        measured = measured_columns(head)
        return joined(_filled(cell, found, labels if i in measured else None) for i, cell in enumerate(cells))


def line(text: str, **rows: Rows) -> Line:
    return Line(text, rows)


def measured_columns(head: Sequence[str]) -> Sequence[int]:
    """Places of the columns of figures: those called measured, where there are any, else all but the first."""
    return [i for i, name in enumerate(head) if name.startswith("measured")] or range(1, len(head))


def _labels(row: dict) -> set[float]:
    """Numbers that a line may repeat from a row: its values as they are, and those in its case."""
    values = {value for value in row.values() if isinstance(value, float)}
    return values | {float(text) for text in NUMBER.findall(row.get("case") or "")}


def _filled(cell: str, found: dict[str, dict], labels: set[float] | None) -> str:
    """The cell with its figures; numbers typed in have to be among `labels`, unless that is None."""
    made = ""
    for text, place, how, _ in string.Formatter().parse(cell):
        made += text
        if labels is not None and (typed := [n for n in NUMBER.findall(text) if float(n) not in labels]):
            raise TableError(f"{typed[0]} is typed in: no row of the line has it")
        if place is not None:
            made += _written(place, how, found)
    return made


def _written(place: str, how: str, found: dict[str, dict]) -> str:
    name, _, column = place.partition(".")
    if name not in found:
        raise TableError(f"{{{place}}}: no rows are called {name}, but {', '.join(found) or 'none at all'}")
    if column not in found[name]:
        raise TableError(f"{{{place}}}: no column is called {column}, but {', '.join(found[name])}")
    value = found[name][column]
    if value is None:
        raise TableError(f"{{{place}}}: the row has no value there")
    if not isinstance(value, float):
        return str(value)
    if not how:
        raise TableError(f"{{{place}}}: say how it is written, as in {{{place}:.2f}}")
    try:
        return _share(value, how[:-1]) if how.endswith("s") else format(value, how)
    except ValueError as error:
        raise TableError(f"{{{place}:{how}}}: {error}") from error


def _share(value: float, how: str) -> str:
    return re.sub(r"^(-?)0\.", r"\1.", format(value, how + "f"))


class Table:
    """A heading and its lines, each as a line of Markdown."""

    def __init__(self, heading: str, *lines: Line) -> None:
        self.head, self.lines = split(heading), lines

    def sources(self, results: Results) -> str:
        """The files and commits that its figures are from."""
        every = [rows.at(results) for one in self.lines for rows in one.rows.values()]
        return ", ".join(dict.fromkeys(f"{rows.file} {rows.commit}" for rows in every))

    def fill(self, results: Results) -> str:
        """The table with its figures, ending in a line break.

        Raises:
            TableError: as `Line.fill`, with the line's first words.
        """
        made = [joined(self.head), "|" + "---|" * len(self.head)]
        for one in self.lines:
            try:
                made.append(one.fill(self.head, results))
            except TableError as error:
                raise TableError(f"line '{one.text[:40]}...': {error}") from error
        return "\n".join(made) + "\n"


def split(text: str) -> list[str]:
    """The cells of a line of Markdown."""
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", text.strip())[1:-1]]


def joined(cells: Iterable[str]) -> str:
    return "|" + "|".join(f" {cell} " if cell else " " for cell in cells) + "|"
