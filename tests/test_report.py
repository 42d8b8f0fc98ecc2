"""The report of run directories: its numbers, its escaping, and that nothing missing stops it."""

import json
import re
from html.parser import HTMLParser

import pytest
from typer.testing import CliRunner

from wise_fast import commands, report_command
from wise_fast.document import Grid, Heading, Paragraph, Picture, escaped, markdown, shown
from wise_fast.errors import StorageError
from wise_fast.recorded import number, read_run, read_runs
from wise_fast.report import write_report
from wise_fast.report_html import html

assert report_command  # importing it registers the command
NASTY = "a|b <script>alert('x')</script>\r\n`code` *x* _y_ [l](u) $z$ & \\ 👩‍🚀\u202eabc\x00"


def edit(number, prompt=None, target=None):
    return {"prompt": prompt or f"Question {number}?", "target": target or f"answer {number}"}


def report_of(made, success=True, **more):
    return {
        "edit": made,
        "steps": 7,
        "loss_before": 5.0,
        "loss": 0.1,
        "success": success,
        "seconds": 1.0,
        "note": "",
    } | more


def score_of(made, reliability=1.0, **more):
    figures = {"reliability": reliability, "generalization": 1.0, "locality": 1.0, "exact": True}
    return {"edit": made, **figures, "answer": made["target"], "before": "old"} | more


def point(t, scores, routing=None, **figures):
    values = {
        "reliability": 0.987,
        "generalization": 0.9,
        "locality": 1.0,
        "exact": 0.5,
        "exact_rephrased": None,
    } | figures
    unedited = {"reliability": 0.123, "generalization": None, "locality": 1.0}
    line = {"method": "wise_fast", "task": "qa", "t": t, "figures": values, "unedited": unedited, "scores": scores}
    return line | {"routing": routing, "seconds": 2.5}


def write(directory, batches=(), points=(), **header):
    directory.mkdir(parents=True, exist_ok=True)
    known = {"format": "wise_fast run", "version": 1, "method": "wise_fast", "model": "demo", "task": "qa", "T": 2}
    known |= {"edits": {"file": "zsre.json", "sha256": "ab"}, "config": {"lr": 0.02, "odd|name": "<b>"}}
    (directory / "run.json").write_text(json.dumps(known | header))
    (directory / "journal.jsonl").write_text("".join(json.dumps(line) + "\n" for line in batches))
    (directory / "evaluations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in points))
    return directory


@pytest.fixture
def run(tmp_path):
    edits = [edit(1), edit(2, NASTY, "x | y\nz")]
    batches = [
        {"batch": n, "first": n - 1, "reports": [report_of(e, n == 1)], "seconds": n * 1.5}
        | {"served": n * 3_000_000, "rss": 2_000_000_000, "memories": n}
        for n, e in enumerate(edits, start=1)
    ]
    scores = [score_of(edits[0]), score_of(edits[1], 0.25, answer=NASTY, exact=False)]
    routing = {"edit": [1.2, 1.3], "rephrase": [0.9, 1.1], "unrelated": [0.4, None]}
    return write(tmp_path / "run", batches, [point(1, scores[:1]), point(2, scores, routing)])


class Page(HTMLParser):
    """The cells of every table, the other texts, and every tag with its attributes."""

    def __init__(self, text):
        super().__init__()
        self.tables, self.tags, self.texts, self.inside = [], [], [], False
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")
            self.inside = True

    def handle_endtag(self, tag):
        self.inside = self.inside and tag not in ("td", "th")

    def handle_data(self, data):
        if self.inside:
            self.tables[-1][-1][-1] += data
        self.texts.append(data)


def made(directory, *runs, plot=False):
    write_report(runs, directory, plot)
    return (directory / "report.md").read_text(), Page((directory / "report.html").read_text())


def md_tables(text):
    """Tables as lists of rows of cells, split where Markdown splits them, escapes undone."""
    tables, before = [], ""
    for line in text.splitlines():
        if line.startswith("|"):
            cells = re.split(r"(?<!\\)(?:\\\\)*\|", line)[1:-1]
            row = [re.sub(r"\\(.)", r"\1", c.strip()) for c in cells]
            row = [c.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&") for c in row]
            if not before.startswith("|"):
                tables.append([])
            tables[-1].append(row)
        before = line
    return [[table[0], *table[2:]] for table in tables]


def table_with(tables, column):
    return next(table for table in tables if column in table[0])


def test_numbers_are_those_of_the_run_in_both_forms(run, tmp_path):
    text, page = made(tmp_path / "out", run)
    assert text.startswith("# Lifelong editing: qa, 2 edits")
    for tables in (md_tables(text), page.tables):
        result = table_with(tables, "s per edit")
        unedited, ours = (dict(zip(result[0], row)) for row in result[1:])
        assert unedited["method"] == "unedited model" and unedited["Rel"] == "0.123" and unedited["Gen"] == "–"
        assert (ours["method"], ours["T"], ours["Rel"], ours["Gen"], ours["Loc"]) == (
            *("wise_fast", "2"),
            *("0.987", "0.900", "1.000"),
        )
        assert (ours["s per edit"], ours["edits that hold"], ours["memories"]) == ("2.250", "1 of 2", "2")
        assert (ours["served MB"], ours["peak MB"]) == ("6.000", "2000")
        assert "exact rephrased" not in ours  # asked for and never said
        points = table_with(tables, "seconds to score")
        assert [row[:3] for row in points[1:]] == [["wise_fast", "1", "0.987"], ["wise_fast", "2", "0.987"]]
        header = {row[0]: row[1] for row in next(t for t in tables if t[1][0] == "directory")[1:]}
        assert header["task"] == "qa" and header["edits.file"] == "zsre.json"
        assert ["odd|name", "<b>"] in table_with(tables, "setting")
    legend = "Rel: reliability (target tokens right, edited prompts); Gen: generalization (target tokens"
    for found in (text, "".join(page.texts)):
        assert legend in found and "peak MB: resident memory of the process, the model included." in found
        assert "exact rephrased: " not in found and "does not say" not in found


def test_every_table_has_cells_for_its_columns(run, tmp_path):
    text, page = made(tmp_path / "out", run)
    assert [len(t) for t in md_tables(text)] == [len(t) for t in page.tables]
    for table in [*md_tables(text), *page.tables]:
        assert {len(row) for row in table} == {len(table[0])}


def test_texts_of_edits_are_text(run, tmp_path):
    text, page = made(tmp_path / "out", run)
    for tables in (md_tables(text), page.tables):
        worst = table_with(tables, "before")
        assert len(worst) == 2  # the perfect edit is not in it
        row = dict(zip(worst[0], worst[1]))
        expected = "a|b <script>alert('x')</script> ⏎ `code` *x* _y_ [l](u) $z$ & \\ 👩‍🚀\\u202eabc\\u0000"
        assert row["prompt"] == row["after"] == expected
        assert (row["#"], row["target"], row["before"], row["Rel"], row["exact"]) == (
            "2",
            "x | y ⏎ z",
            "old",
            "0.250",
            "0.000",
        )
        failed = table_with(tables, "note")
        assert [r[:3] for r in failed[1:]] == [["2", expected, "x | y ⏎ z"]]
    assert "<script" not in text and not any(tag == "script" for tag, _ in page.tags)


def test_the_page_fetches_nothing(run, tmp_path):
    _, page = made(tmp_path / "out", run)
    content = (tmp_path / "out" / "report.html").read_text()
    assert not re.search(r"https?://|//\w+\.|@import|url\(", content)
    assert not any(tag in ("script", "link", "iframe", "object") for tag, _ in page.tags)
    assert {"charset": "utf-8"} in [attributes for tag, attributes in page.tags if tag == "meta"]


def test_several_methods_side_by_side_ours_first(run, tmp_path):
    for name in ("grace", "wise_fast", "ft-l"):
        write(tmp_path / "all" / name, [], [point(2, [], reliability=0.5)], method=name)
    text, _ = made(tmp_path / "out", tmp_path / "all")
    result = md_tables(text)[0]
    assert [row[0] for row in result[2:]] == ["wise_fast", "ft-l", "grace"]
    names = [found.name for found in read_runs([run, tmp_path / "all" / "wise_fast", tmp_path / "all" / "grace"])]
    assert names == ["wise_fast (run)", "wise_fast (wise_fast)", "grace"]
    assert len({found.name for found in read_runs([run, run, run])}) == 3


@pytest.mark.parametrize("missing", ["journal.jsonl", "evaluations.jsonl", "both"])
def test_what_is_missing_is_said(run, tmp_path, missing):
    for name in ("journal.jsonl", "evaluations.jsonl"):
        if missing in (name, "both"):
            (run / name).unlink()
    text, page = made(tmp_path / "out", run)
    assert "What is missing" in text and "What is missing" in page.texts
    assert ("journal has no edits" in text) == (missing != "evaluations.jsonl")
    assert ("no evaluation" in text) == (missing != "journal.jsonl")


def test_a_run_that_is_not_done_is_read_as_far_as_it_got(run, tmp_path):
    header = json.loads((run / "run.json").read_text()) | {"T": 300}
    (run / "run.json").write_text(json.dumps(header))
    for name in ("journal.jsonl", "evaluations.jsonl"):
        with (run / name).open("a") as file:
            file.write('{"batch": 3, "repor')
    text, _ = made(tmp_path / "out", run)
    assert "was to reach T = 300; its last evaluation is at 2" in text
    assert "line 3 of journal.jsonl is torn" in text and "line 3 of evaluations.jsonl is torn" in text
    assert "no value of exact rephrased at T = 2" in text


def test_odd_values_do_not_stop_it(run, tmp_path):
    lines = [
        *({"t": 1, "figures": {"reliability": None, "perplexity": 1e30}, "scores": None, "routing": {"edit": None}},),
        *({"t": 2, "figures": {"new_figure": 3.5, "reliability": float("nan")}, "routing": {"edit": [float("inf")]}},),
        *({"t": "x", "figures": {}}, {"figures": {"reliability": 1.0}}, [1], 7),
    ]
    (run / "evaluations.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (run / "journal.jsonl").write_text(json.dumps({"reports": [report_of({}, False, loss=None, note=None)]}))
    text, _ = made(tmp_path / "out", run)
    result = table_with(md_tables(text), "edits that hold")
    row = dict(zip(result[0], result[1]))
    assert (row["T"], row["new figure"], row.get("Rel"), row.get("s per edit")) == ("2", "3.500", None, None)
    assert "no value of Rel at T = 2" in text
    assert "does not say how long edits took or what serving holds or the peak of memory" in text
    assert "s per edit" not in text and "peak MB" not in text  # nor what those would mean


def test_of_two_evaluations_at_one_t_the_later_counts(run):
    with (run / "evaluations.jsonl").open("a") as file:
        file.write(json.dumps(point(1, [], reliability=0.5)) + "\n")
    found = read_run(run)
    assert found.figure("reliability") == [(1, 0.5), (2, 0.987)] and [e["t"] for e in found.evaluations] == [1, 2]
    assert found.seconds() == [(1, 1.5), (2, 3.0)] and found.series("served") == [(1, 3e6), (2, 6e6)]


def test_superseded_edits_are_no_failures(run, tmp_path):
    line = {"reports": [report_of(edit(1), False, note="superseded by a later edit")], "seconds": 1.0}
    (run / "journal.jsonl").write_text(json.dumps(line) + "\n")
    assert "did not hold" not in made(tmp_path / "out", run)[0]


def test_what_is_no_run_is_refused(run, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    for path, message in ((tmp_path / "none", "no such directory"), (empty, "no run.json")):
        with pytest.raises(StorageError, match=message):
            write_report([path], tmp_path / "out")
    for content, message in (("{", "damaged"), ('{"format": "x"}', "not the header"), ("[]", "not the header")):
        (run / "run.json").write_text(content)
        with pytest.raises(StorageError, match=message):
            write_report([run], tmp_path / "out")
    (run / "run.json").write_text('{"format": "wise_fast run", "version": 2}')
    with pytest.raises(StorageError, match="version 2, this wise_fast reads 1"):
        write_report([run], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_place_that_cannot_be_written_is_an_error(run, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be written"):
        write_report([run], tmp_path / "file" / "out", plot=False)


def test_a_report_is_written_over_an_earlier_one(run, tmp_path):
    first = write_report([run], tmp_path / "out", plot=False)
    before = [path.read_bytes() for path in first]
    assert write_report([run], tmp_path / "out", plot=False) == first
    assert [path.read_bytes() for path in first] == before
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["report.html", "report.md"]


def test_the_command(run, tmp_path):
    arguments = ["report", str(run), "--out", str(tmp_path / "out"), "--no-plots", "--json"]
    result = CliRunner().invoke(commands.app, arguments)
    assert result.exit_code == 0, result.stderr
    files = json.loads(result.stdout)["files"]
    assert files == [str(tmp_path / "out" / name) for name in ("report.md", "report.html")]
    assert CliRunner().invoke(commands.app, ["report", str(run), "--no-plots"]).exit_code == 0
    assert (run / "report" / "report.md").exists()
    result = CliRunner().invoke(commands.app, ["report", str(tmp_path / "none")])
    assert result.exit_code == 1 and "no such directory" in result.stderr


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("  a \n\n b\tc  ", "a ⏎ b c"),
        ("x" * 300, "x" * 239 + "…"),
        ("\ud800 \x1b[31m", "\\ud800 \\u001b[31m"),
        ("👩‍🚀 é ا", "👩‍🚀 é ا"),
        (3, "3"),
    ],
)
def test_texts_become_one_visible_line(text, line):
    assert shown(text) == line
    shown(text).encode()


def test_a_column_without_a_value_is_left_out():
    grid = Grid(["a", "b", "c"], [["1", "–", "–"], ["2", "–", "3"]], frozenset(["b", "c"]), "t").told()
    assert (grid.columns, grid.rows, grid.title) == (["a", "c"], [["1", "–"], ["2", "3"]], "t")
    assert markdown([grid]).splitlines()[2:4] == ["| a | c |", "| --- | --: |"]


def test_pictures_that_follow_each_other_stand_side_by_side():
    one, two = Picture("one", b"1", "first"), Picture("two", b"2", "second")
    page = html("t", [Heading("h"), one, two, Paragraph("p"), one])
    parts = page.split('<div class="pictures">')[1:]
    assert [part.split("</div>")[0].count("<figure>") for part in parts] == [2, 1]
    assert page.count("<figure>") == 3 and page.index("first") < page.index("second") < page.index("<p>p</p>")


def test_markup_in_headings_paragraphs_and_titles_is_text():
    blocks = [Heading("a <b> # c"), Paragraph("x & *y*\n"), Grid(["a|b"], [["1|2"]], title="<t>", folded=True)]
    text, page = markdown(blocks), html("<title>", blocks)
    assert escaped("a|<b>&") == "a\\|&lt;b&gt;&amp;" and "| a\\|b |" in text and "&lt;b&gt; \\# c" in text
    assert "<b>" not in page and "&lt;t&gt;" in page and "<title>&lt;title&gt;</title>" in page


def test_only_finite_numbers_are_numbers():
    values = (1, 0.5, True, None, "1", float("nan"), float("inf"), [])
    assert [number(value) for value in values] == [1.0, 0.5, 1.0, None, None, None, None, None]
