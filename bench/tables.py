"""The documents' tables of recorded figures, written from bench/results.

python -m bench.tables             # rewrite every table in place
python -m bench.tables --check     # exit 1 and name those that are out of date

A document holds a table between two comments,

    <!-- table NAME: FILE COMMIT, ...; written by make tables -->
    <!-- end of table -->

and what is between them, and after the name, is written here. What the table of a name shows is described in
`tables_cpu.py` and `tables_gpu.py`. That is Python beside the code and not text in the comment, so that a document has
each table once, what many lines share is written once, and the description needs no syntax of its own: a line is the
line of Markdown with places for figures (`cells.py`), and the rows that fill them are keyword arguments.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from bench.cells import Results, Table, TableError
from bench.records import RESULTS, ROOT
from bench.tables_cpu import CPU
from bench.tables_gpu import GPU

DOCUMENTS = ("README.md", "wise_fast/README.md", "kernels/README.md", "bench/README.md")
TABLES = CPU | GPU
_START, _END = "<!-- table ", "<!-- end of table -->"
_TABLE = re.compile(rf"^{_START}([\w-]+).*-->\n((?:(?!{_START}).*\n)*?){_END}$", re.M)


def update(text: str, tables: Mapping[str, Table], results: Results) -> tuple[str, list[str], list[str]]:
    """A document with its tables as they should be; the names of all its tables, and of those that were not so.

    Raises:
        TableError: no table has a name that the document uses, a table cannot be made, or a comment lacks its other.
    """
    names, stale = [], []

    def written(found: re.Match) -> str:
        name = found[1]
        if name not in tables:
            raise TableError(f"no table is called {name}, but {', '.join(tables)}")
        table = tables[name]
        try:
            body = table.fill(results)
        except TableError as error:
            raise TableError(f"table {name}: {error}") from error
        made = f"{_START}{name}: {table.sources(results)}; written by make tables -->\n{body}{_END}"
        names.append(name)
        stale.extend([name] if made != found[0] else [])
        return made

    made = _TABLE.sub(written, text)
    started, ended = (re.findall(rf"^{comment}.*", text, re.M) for comment in (_START, _END))
    if len(started) != len(names) or len(ended) != len(names):
        raise TableError(f"{len(started)} comments begin a table and {len(ended)} end one, {len(names)} in pairs")
    return made, names, stale


def refresh(
    root: Path, results: Path, write: bool = True, tables: Mapping[str, Table] = TABLES
) -> list[tuple[str, str]]:
    """(document, table) for every table that is out of date under `root`; rewrites the documents if told to.

    Raises:
        TableError: as `update`, with the document's name, or no document shows a table; nothing is written.
    """
    found, made, shown, stale = Results(results), {}, set(), []
    for document in DOCUMENTS:
        path = root / document
        try:
            made[path], names, changed = update(path.read_text(encoding="utf-8"), tables, found)
        except TableError as error:
            raise TableError(f"{document}: {error}") from error
        shown.update(names)
        stale += [(document, name) for name in changed]
    if unshown := [name for name in tables if name not in shown]:
        raise TableError(f"no document shows {', '.join(unshown)}")
    if write:
        for path, text in made.items():
            path.write_text(text, encoding="utf-8")
    return stale


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.tables", description="write the documents' tables")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a table is out of date")
    parser.add_argument("--results", type=Path, default=RESULTS, help=f"directory of CSV files (default: {RESULTS})")
    parser.add_argument("--root", type=Path, default=ROOT, help=f"directory of the documents (default: {ROOT})")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Write or check all tables; one line for each that was out of date."""
    options = parse(arguments)
    try:
        stale = refresh(options.root, options.results, write=not options.check)
    except TableError as error:
        sys.exit(f"error: {error}")
    for document, name in stale:
        sys.stdout.write(f"{document}: table {name} {'is out of date' if options.check else 'written'}\n")
    if options.check and stale:
        sys.exit("error: make tables writes them")


if __name__ == "__main__":
    main()
