"""Plots: that they are drawn of whatever a run holds, the same every time, and that their names do not overlap."""

import sys
import zlib
from itertools import pairwise

import pytest

from tests.test_report import edit, point, report_of, run, score_of, write  # noqa: F401  run is a fixture
from wise_fast import plots
from wise_fast.errors import WiseError
from wise_fast.plots import Curve, against_t, per_edit, routing, running_median, spread_out, total
from wise_fast.report import write_report

pytest.importorskip("matplotlib")


def size(png):
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    return int.from_bytes(png[16:20], "big"), int.from_bytes(png[20:24], "big")


def distinct_bytes(png):
    """Bytes that the picture needs: an empty one needs far less."""
    return len(zlib.compress(png))


def test_pictures_are_wide_enough_to_read_and_always_the_same():
    curves = [Curve("wise_fast", [(1, 1.0), (10, 0.99), (100, 0.97)], 0), Curve("ft-l", [(1, 1.0), (100, 0.3)], 1)]
    png = against_t(curves, "Reliability", "share", share=True, reference=("unedited", 0.16))
    assert size(png)[0] >= 900 and size(png)[1] >= 500
    assert png == against_t(curves, "Reliability", "share", share=True, reference=("unedited", 0.16))


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("points", [[(1, 1.0)], [(500, 0.0)], [(1, 1.0), (2, 0.9)], [(t, 1.0) for t in range(1, 400)]])
def test_any_points(points, share):
    size(against_t([Curve("a $ name", points)], "t", "y", share))


def test_large_perplexities_and_equal_lines():
    curves = [Curve(name, [(1, 1e12), (10, 2.0)], i) for i, name in enumerate("abcdefgh")]
    size(against_t(curves, "t", "y", share=False))


def test_costs():
    size(per_edit([Curve("a", [(1, 0.0)])], "t", "s"))
    size(per_edit([Curve("a", [(i, 1.0) for i in range(1, 30)]), Curve("b", [(1, 200.0)], 1)], "t", "s"))
    size(total([Curve("a", [(1, 0.0), (2, 0.0)])], "t", "MB"))


@pytest.mark.parametrize(
    "ratios",
    [
        {"edit": [1.2], "rephrase": [], "unrelated": None},
        {"edit": [1e6] * 50, "rephrase": [0.0, 1.0], "unrelated": [0.1] * 500},
        {"unrelated": [0.3, 0.4]},
    ],
)
def test_routing_of_any_kinds(ratios):
    size(routing(ratios, "t"))


def test_the_routing_axis_ends_where_dots_can_be_told_apart(monkeypatch):
    seen = {}
    monkeypatch.setattr(plots, "_png", lambda figure: seen.setdefault("axes", figure.axes[0]))
    routing({"edit": [1.5, 900.0], "rephrase": [1.1, 0.2], "unrelated": [0.2]}, "t")
    axes = seen["axes"]
    assert axes.get_xlim()[0] == 0 and axes.get_xlim()[1] < 3.2
    dots = [x for collection in axes.collections for x, _ in collection.get_offsets()]
    assert sorted(dots) == pytest.approx([0.2, 0.2, 1.1, 1.5, 3.0])
    assert any(line.get_xdata()[0] == 1 == line.get_xdata()[1] for line in axes.lines)  # the threshold
    texts = [text.get_text() for text in axes.texts]
    assert any("1 beyond the edge" in text for text in texts) and any("50.0% in scope" in text for text in texts)


def axes_of(monkeypatch, draw):
    found = {}
    monkeypatch.setattr(plots, "_png", lambda figure: found.setdefault("axes", figure.axes[0]))
    draw()
    return found["axes"]


def test_shares_are_drawn_on_the_whole_axis_and_costs_from_zero(monkeypatch):
    curves = [Curve("a", [(1, 0.99), (100, 0.98)])]
    axes = axes_of(monkeypatch, lambda: against_t(curves, "t", "y", share=True))
    assert axes.get_ylim()[0] <= 0 and axes.get_ylim()[1] >= 1 and axes.get_xscale() == "log"
    assert {label.get_text() for label in axes.get_xticklabels()} == {"1", "100"}
    monkeypatch.undo()
    axes = axes_of(monkeypatch, lambda: total([Curve("a", [(1, 990.0), (2, 1000.0)])], "t", "MB"))
    assert axes.get_ylim()[0] == 0
    monkeypatch.undo()
    axes = axes_of(monkeypatch, lambda: per_edit([Curve("a", [(1, 1.0), (2, 1.1)])], "t", "s"))
    assert axes.get_ylim()[0] == 0 and axes.get_yscale() == "linear"


def test_a_count_axis_below_a_decade_is_linear(monkeypatch):
    axes = axes_of(monkeypatch, lambda: against_t([Curve("a", [(10, 1.0), (50, 1.0)])], "t", "y", share=True))
    assert axes.get_xscale() == "linear"


@pytest.mark.parametrize(
    "wanted", [[0.5, 0.5, 0.5], [1.0, 0.99, 0.98, 0.2], [0.0, 0.0], [0.3], [], [-0.1, 1.2], [0.7, 0.1, 0.69]]
)
def test_names_keep_their_distance_and_order(wanted):
    found = spread_out(wanted, 0.06)
    ordered = sorted(found)
    assert all(b - a >= 0.06 - 1e-9 for a, b in pairwise(ordered)) and all(-1e-9 <= h <= 1 + 1e-9 for h in found)
    by_height = sorted(range(len(found)), key=lambda i: found[i])
    assert all(wanted[i] <= wanted[j] for i, j in pairwise(by_height))


def test_medians_run_along():
    points = [(i, 1.0) for i in range(1, 50)] + [(50, 900.0)] + [(i, 1.0) for i in range(51, 100)]
    assert running_median(points) == [(i, 1.0) for i in range(1, 100)]
    assert running_median([(1, 5.0)]) == [(1, 5.0)]


def test_without_matplotlib_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(WiseError, match=r"pip install 'wise_fast\[plot\]'"):
        total([Curve("a", [(1, 1.0)])], "t", "MB")


def test_a_report_with_pictures_inlines_them(run, tmp_path):  # noqa: F811
    files = write_report([run], tmp_path / "out")
    names = [path.name for path in files if path.suffix == ".png"]
    assert {"reliability.png", "locality.png", "routing-wise-fast.png", "seconds.png", "memory-served.png"} <= set(
        names
    )
    page, text = (tmp_path / "out" / "report.html").read_text(), (tmp_path / "out" / "report.md").read_text()
    assert page.count("data:image/png;base64,") == len(names)
    assert all(f"(plots/{name})" in text and (tmp_path / "out" / "plots" / name).exists() for name in names)


def test_a_single_point_and_methods_without_router(tmp_path):
    for i, name in enumerate(("wise_fast", "ft-l")):
        batch = {"reports": [report_of(edit(1))], "seconds": 1.0, "served": i * 0, "rss": 10}
        write(tmp_path / "all" / name, [batch], [point(1, [score_of(edit(1))])], method=name)
    files = write_report([tmp_path / "all"], tmp_path / "out")
    assert not any("routing" in path.name for path in files)
    assert "no routing scores were recorded" in files[0].read_text()
