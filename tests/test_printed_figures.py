"""Figures in the documents' tables were recorded: a comment `<!-- figures: FILE COMMIT, ... -->` names the rows."""

import re
from collections import defaultdict

import pytest

from bench import records
from tests.documents import DOCUMENTS

NUMBER = re.compile(r"(?<![\w.,-])(?:\d+(?:\.\d+)?|\.\d+)(?!\.?\d)")
TABLES = [(d.name, *table) for d in DOCUMENTS for table in d.tables]


def recorded(sources):
    """Every number of the rows that "FILE COMMIT, FILE COMMIT" names (a * in the file's name for several files), and
    by how much one arm of a case differs from another."""
    found, arms = set(), defaultdict(list)
    for file, commit in (source.split() for source in sources.split(", ")):
        paths = sorted(records.RESULTS.glob(file))
        rows = [row for path in paths for row in records.read(path) if row["commit"] == commit]
        assert rows, f"no row of {commit} in {file}"
        for row in rows:
            found |= {value for value in row.values() if isinstance(value, float)}
            found |= {float(text) for text in NUMBER.findall(row.get("case") or "")}
            if row.get("us"):
                arms[row["op"], row["case"]].append(row["us"])
    return found | {abs(one - other) for values in arms.values() for one in values for other in values}


def printed(rows):
    """The figures of a table: of the column that is called measured, where there is one, else of all but the first."""
    head, _, *body = rows
    columns = [i for i, name in enumerate(head) if name.startswith("measured")] or range(1, len(head))
    return [text for cells in body for i in columns for text in NUMBER.findall(cells[i].replace("**", ""))]


def unrecorded(sources, rows):
    """The figures of a table that no row of `sources` rounds to, and how many figures there are."""
    known, figures = recorded(sources), printed(rows)

    def found(text):
        half = 0.5 * 10.0 ** -len(text.partition(".")[2]) * (1 + 1e-9)
        return any(abs(value - float(text)) <= half for value in known)

    return [text for text in figures if not found(text)], len(figures)


@pytest.mark.parametrize(("document", "sources", "rows"), TABLES, ids=[" ".join(table[:2]) for table in TABLES])
def test_figures_were_recorded(document, sources, rows):
    missing, count = unrecorded(sources, rows)
    assert count and not missing


def test_a_figure_that_was_not_recorded_is_found():
    table = [["", "ours", "beside it"], ["", "", ""], ["pack of 7", "2.9 MB, 2.8 MB", ".56 of **5.24**, .57x"]]
    assert unrecorded("storage.csv 38f9401", table) == (["2.8", ".57"], 5)
    with pytest.raises(AssertionError, match="no row of 0000000 in storage.csv"):
        unrecorded("storage.csv 0000000", table)
