"""Tables of recorded figures: the documents' are what the rows say, and a description that is wrong is named."""

import re
import shutil

import pytest

from bench import records, tables
from bench.cells import Results, Rows, Table, TableError, line
from tests.documents import ROOT

COLUMNS = ("commit", "case", "arm", "us", "share")
ROWS = [
    dict(zip(COLUMNS, values))
    for values in (
        ("aaaaaaa", "8 rows", "plain", 38.5, ""),
        ("aaaaaaa", "8 rows", "ours", 56.25, 0.9533),
        ("aaaaaaa", "16 rows", "plain", 40.0, ""),
        ("aaaaaaa", "16 rows", "ours", 41.0, 1.0),
        ("1e10000", "8 rows", "ours", 55.5, 0.1),
    )
]
ours = Rows("gpu.csv", "aaaaaaa")(case="8 rows", arm="ours")
NAMED = f"{tables._START}one: gpu.csv aaaaaaa; written by make tables -->\n"


@pytest.fixture
def results(tmp_path):
    records.append(tmp_path / "gpu.csv", COLUMNS, ROWS)
    return Results(tmp_path)


@pytest.fixture
def copied(tmp_path):
    """The documents and the results, somewhere else."""
    for name in tables.DOCUMENTS:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    shutil.copytree(records.RESULTS, tmp_path / "results")
    return tmp_path


def made(results, text, head="| | us |", **rows):
    return Table(head, line(text, **rows)).fill(results).splitlines()[-1]


def test_the_documents_are_up_to_date():
    assert tables.refresh(ROOT, records.RESULTS, write=False) == []  # else: make tables


def test_another_figure_makes_another_table(copied, capsys):
    place = ["--root", str(copied), "--results", str(copied / "results")]
    tables.main([*place, "--check"])
    path, readme = copied / "results" / "storage.csv", copied / "README.md"
    before, rows = readme.read_text(), path.read_text()
    assert rows.count("2.924712") == 1
    path.write_text(rows.replace("2.924712", "3.524712"))
    with pytest.raises(SystemExit, match="make tables"):
        tables.main([*place, "--check"])
    said = capsys.readouterr().out
    assert said == "README.md: table headline is out of date\nbench/README.md: table storage is out of date\n"
    assert readme.read_text() == before
    tables.main(place)
    assert readme.read_text() == before.replace("| 2.9 MB |", "| 3.5 MB |")
    tables.main([*place, "--check"])


def test_a_row_that_is_gone_leaves_the_documents_alone(copied):
    path, before = copied / "results" / "lifelong.csv", (copied / "README.md").read_text()
    (commit,) = re.findall(r"table zsre-500: lifelong.csv ([^\s,;]+)", before)
    path.write_text("".join(row for row in path.read_text().splitlines(True) if f",{commit}," not in row))
    told = f"table zsre-500: line .* no row of commit {re.escape(commit)}, but of"
    with pytest.raises(SystemExit, match=f"error: README.md: {told}"):
        tables.main(["--root", str(copied), "--results", str(copied / "results")])
    assert (copied / "README.md").read_text() == before


def test_figures_are_written_as_told(results):
    assert made(results, "| a | {ours.us:.1f} us |", ours=ours) == "| a | 56.2 us |"
    assert made(results, "| a | {ours.share:.3s} of {ours.case} |", ours=ours) == "| a | .953 of 8 rows |"
    assert made(results, "| a | {ours.share:.2s}, 16 rows |", ours=ours(case="16*")) == "| a | 1.00, 16 rows |"
    assert made(results, "| a | +{more.us:.2f} |", more=ours.less(arm="plain")) == "| a | +17.75 |"
    assert made(results, "| a | {last.us:.1f} |", last=Rows("gpu.csv")) == "| a | 55.5 |"
    several = Rows("gpu.csv", "aaaaaaa")(arm="ours")
    text = "| | {low.us:.0f} to {high.us:.0f} |"
    assert made(results, text, low=several.least("us"), high=several.greatest("us")) == "| | 41 to 56 |"
    with_target = dict(head="| 3 | target | measured |", ours=ours)
    assert made(results, "| 7 | 1.25x | {ours.us:.0f} |", **with_target) == "| 7 | 1.25x | 56 |"


@pytest.mark.parametrize(
    ("text", "rows", "message"),
    [
        ("| a | {x.us:.1f} |", ours(case="9 rows"), "line '| a .* no row of gpu.csv, commit aaaaaaa, has case '9"),
        ("| a | {x.us:.1f} |", ours(arm="*"), "2 rows of gpu.csv, commit aaaaaaa, has case '8 rows', arm .*: say more"),
        ("| a | {x.us:.1f} |", ours(cas="8 rows"), "gpu.csv has no column cas, but commit, case, arm"),
        ("| a | {x.us:.1f} |", ours.least("ms"), "gpu.csv has no column ms, but"),
        ("| a | {x.us:.1f} |", ours(arm="*").least("share"), "a row of gpu.csv.* has no number as its share"),
        ("| a | {x.us:.1f} |", ours.less(arm="theirs"), "no row of gpu.csv.*'theirs'"),
        ("| a | {x.us:.1f} |", Rows("gpu.csv", "bbbbbbb"), "no row of commit bbbbbbb, but of aaaaaaa, 1e10000"),
        ("| a | {x.us:.1f} |", Rows("cpu.csv"), "no rows in .*cpu.csv"),
        ("| a | {x.ms:.1f} |", ours, "{x.ms}: no column is called ms, but commit, case"),
        ("| a | {x.us:.1f}{y.us:.1f} |", ours, "{y.us}: no rows are called y, but x"),
        ("| a | {x.share:.1f} |", ours(arm="plain"), "{x.share}: the row has no value there"),
        ("| a | {x.us} |", ours, "{x.us}: say how it is written"),
        ("| a | {x.us:.1q} |", ours, "{x.us:.1q}: "),
        ("| a | b |", ours, "no place uses the rows called x"),
        ("| a | {x.us:.1f} | b |", ours, "3 cells, expected 2"),
        ("| a | 56.2 or {x.us:.1f} |", ours, "56.2 is typed in: no row of the line has it"),
        ("| a | {x.us:.1f} at 7 rows |", ours, "7 is typed in"),
    ],
)
def test_what_is_wrong_is_said(results, text, rows, message):
    with pytest.raises(TableError, match=message):
        made(results, text, x=rows)


def test_comments_come_in_pairs_and_name_tables(results):
    known = {"one": Table("| | us |", line("| a | {ours.us:.0f} |", ours=ours))}
    body = "| | us |\n|---|---|\n| a | 56 |\n"
    bare = f"before\n\n{tables._START}one -->\n{tables._END}\nafter\n"
    whole = f"before\n\n{NAMED}{body}{tables._END}\nafter\n"
    assert tables.update(bare, known, results) == (whole, ["one"], ["one"])
    assert tables.update(whole, known, results) == (whole, ["one"], [])
    twice = whole.replace("after", whole)
    assert tables.update(twice, known, results) == (twice, ["one", "one"], [])
    for broken in (whole.replace(tables._END, ""), whole.replace(NAMED, ""), NAMED + whole):
        with pytest.raises(TableError, match="in pairs"):
            tables.update(broken, known, results)
    with pytest.raises(TableError, match="no table is called two, but one"):
        tables.update(bare.replace("one", "two"), known, results)


def test_a_table_that_no_document_shows_is_named(copied):
    more = tables.TABLES | {"unseen": Table("| |")}
    with pytest.raises(TableError, match="no document shows unseen$"):
        tables.refresh(copied, copied / "results", tables=more)
