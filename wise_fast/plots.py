"""The pictures of a report as PNG bytes. matplotlib (the `plot` extra) is imported when the first one is drawn.

One panel a figure; a method keeps its colour, line and marker in all of them, and its name stands at the end of its
line. Shares are drawn on the whole axis from 0 to 1 and costs from 0, so that small differences look small.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from wise_fast.errors import WiseError

# Okabe and Ito's colours, told apart by all common kinds of colour blindness, and by line and marker without colour.
_STYLES = (
    ("#0072B2", "-", "o"),
    ("#D55E00", "--", "s"),
    ("#009E73", "-.", "^"),
    ("#CC79A7", (0, (5, 1, 1, 1, 1, 1)), "D"),
    ("#8C6D00", ":", "v"),
    ("#2F9AC4", (0, (7, 2)), "P"),
)
_KINDS = (("edit", "edits", "#0072B2"), ("rephrase", "paraphrases", "#D55E00"), ("unrelated", "unrelated", "#5F5F5F"))
_INK, _GRID = "#333333", "#DDDDDD"
_SIZE, _DPI, _FONT = (7.4, 4.3), 150, 11
_DECADE = 10  # a largest x this many times the smallest makes the axis logarithmic
_APART = 8  # medians this far apart make a cost axis logarithmic
_GAP = 0.062  # between names at the right edge, in heights of the axes
_FURTHEST = 3.0  # ratio at which the routing axis ends; what lies beyond is drawn at its edge


@dataclass(frozen=True)
class Curve:
    """One method's values: `points` are (x, y) by rising x; `style` is its number among the methods of the report."""

    name: str
    points: Sequence[tuple[float, float]]
    style: int = 0


def against_t(
    curves: Sequence[Curve], title: str, label: str, share: bool, reference: tuple[str, float] | None = None
) -> bytes:
    """A figure of quality against the number of edits T.

    Args:
        share: it lies between 0 and 1, all of which is shown; else (perplexity) the axis begins at 1.
        reference: name and value of a level line, such as the unedited model's.
    """
    figure, axes = _panel(title, "edits so far (T)", label)
    points = sorted({x for curve in curves for x, _ in curve.points})
    _count_axis(axes, points)
    for curve in curves:
        _line(axes, curve, marker=True)
    if share:
        axes.set_ylim(-0.02, 1.03)
        axes.set_yticks([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    else:
        levels = [y for curve in curves for _, y in curve.points] + ([reference[1]] if reference else [])
        _from_one(axes, levels)
    if reference is not None:
        axes.axhline(reference[1], color=_INK, linewidth=1, linestyle=(0, (1, 2)), zorder=1)
    ends = [(f"{c.name}  {_value(c.points[-1][1], share)}", c.points[-1], _style(c)[0]) for c in curves if c.points]
    if reference is not None:
        ends.append((f"{reference[0]}  {_value(reference[1], share)}", (axes.get_xlim()[1], reference[1]), _INK))
    _name_lines(axes, ends)
    return _png(figure)


def per_edit(curves: Sequence[Curve], title: str, label: str) -> bytes:
    """A cost of every edit: each as a dot, and the running median as a line."""
    figure, axes = _panel(title, "edit", label)
    axes.xaxis.get_major_locator().set_params(integer=True)
    medians = [running_median(curve.points) for curve in curves]
    middle = [median(y for _, y in curve.points) for curve in curves]
    apart = min(middle) > 0 and max(middle) / min(middle) >= _APART
    for curve, line in zip(curves, medians, strict=True):
        colour = _style(curve)[0]
        xs, ys = zip(*curve.points, strict=True)
        axes.scatter(xs, ys, s=9, color=colour, alpha=0.25, linewidths=0, zorder=2)
        _line(axes, Curve(curve.name, line, curve.style), marker=False)
    every = sorted(y for curve in curves for _, y in curve.points)
    if apart and every[0] > 0:
        axes.set_yscale("log")
        _plain_ticks(axes.yaxis)
    else:
        high = max(max(y for _, y in line) for line in medians)
        # A few outliers of many may lie outside; every one of a few is seen.
        far = every[int(0.98 * (len(every) - 1))] if len(every) >= 100 else every[-1]
        axes.set_ylim(0, 1.15 * max(high, far, 1e-9))
    _name_lines(
        axes, [(f"{c.name}  {_value(m)}", line[-1], _style(c)[0]) for c, m, line in zip(curves, middle, medians)]
    )
    return _png(figure)


def total(curves: Sequence[Curve], title: str, label: str) -> bytes:
    """A cost so far, from 0."""
    figure, axes = _panel(title, "edits so far (T)", label)
    for curve in curves:
        _line(axes, curve, marker=len(curve.points) < 12)
    high = max(y for curve in curves for _, y in curve.points)
    axes.set_ylim(0, 1.1 * high if high > 0 else 1)
    _name_lines(axes, [(f"{c.name}  {_value(c.points[-1][1])}", c.points[-1], _style(c)[0]) for c in curves])
    return _png(figure)


def routing(ratios: Mapping[str, Sequence[float]], title: str) -> bytes:
    """Routing scores over their threshold, one dot a prompt, by kind of prompt (the paper's figure 3)."""
    figure, axes = _panel(title, "routing score / threshold", "")
    rows = [(name, colour, sorted(ratios[key])) for key, name, colour in _KINDS if ratios.get(key)]
    high = min(max([1.6, *(values[-1] * 1.08 for *_, values in rows)]), _FURTHEST)
    axes.axvspan(1, high, color="#F1F5F8", zorder=0)
    axes.axvline(1, color=_INK, linewidth=1.4, zorder=1)
    for place, (_, colour, values) in enumerate(rows):
        _strip(axes, len(rows) - 1 - place, values, colour, high)
    axes.set_xlim(0, high * 1.02)
    axes.set_ylim(-0.6, len(rows) - 0.15)
    names = [f"{name}\n({len(values)})" for name, _, values in rows]
    axes.set_yticks(range(len(rows) - 1, -1, -1), names, fontsize=_FONT, color=_INK)
    axes.grid(False, axis="y")
    axes.grid(True, axis="x", color=_GRID, linewidth=0.8)
    top = len(rows) - 0.3
    axes.text(0.97, top, "out of scope", ha="right", va="center", fontsize=_FONT - 1.5, color="#555555")
    axes.text(1.03, top, "in scope", ha="left", va="center", fontsize=_FONT - 1.5, color="#555555")
    return _png(figure)


def _strip(axes, place: int, values: Sequence[float], colour: str, high: float) -> None:
    """One kind's dots around the level `place`, its median, and its share in scope at the right."""
    inside = [min(v, high) for v in values]
    # Steps of the golden ratio: even at any count, and the same every time.
    levels = [place + 0.46 * ((i * 0.618034) % 1 - 0.5) for i in range(len(values))]
    axes.scatter(
        inside, levels, s=16, color=colour, alpha=max(0.25, min(0.7, 60 / len(values))), linewidths=0, zorder=3
    )
    middle = min(median(values), high)
    axes.plot([middle] * 2, [place - 0.33, place + 0.33], color="white", linewidth=4.5, zorder=4)
    axes.plot([middle] * 2, [place - 0.33, place + 0.33], color=colour, linewidth=2.2, zorder=5)
    beyond = sum(v > high for v in values)
    text = f"{_percent(sum(v > 1 for v in values) / len(values))} in scope"
    text += f"\nmedian {_value(middle)}" if middle < high else f"\nmedian beyond {_value(high)}"
    text += f"\n{beyond} beyond the edge" if beyond else ""
    axes.annotate(
        text, (1.02, place), xycoords=("axes fraction", "data"), va="center", fontsize=_FONT - 1, color=colour
    )


def running_median(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Medians of windows of a tenth of the points, at least 5, centred where there is room."""
    half = max(5, len(points) // 10) // 2
    values = [y for _, y in points]
    return [(x, median(values[max(0, i - half) : i + half + 1])) for i, (x, _) in enumerate(points)]


def require_matplotlib() -> tuple[Any, Any]:
    """Its canvas and figure. Raises WiseError where it is not installed."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise WiseError("plots need matplotlib, not installed here: pip install 'wise_fast[plot]'") from error
    return FigureCanvasAgg, Figure


def _panel(title: str, x: str, y: str) -> tuple[Any, Any]:
    FigureCanvasAgg, Figure = require_matplotlib()
    figure = Figure(figsize=_SIZE, dpi=_DPI, facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.11, 0.13, 0.62, 0.74))
    axes.set_title(title, fontsize=_FONT + 2, loc="left", color=_INK, pad=12, parse_math=False)
    axes.set_xlabel(x, fontsize=_FONT, color=_INK)
    axes.set_ylabel(y, fontsize=_FONT, color=_INK, parse_math=False)
    axes.tick_params(labelsize=_FONT - 1, colors=_INK)
    axes.grid(True, axis="y", color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure, axes


def _count_axis(axes, points: Sequence[float]) -> None:
    """A logarithmic axis where the counts span a decade; ticks at the counts, as far as their numbers have room."""
    log = len(points) > 1 and points[-1] >= _DECADE * points[0]
    if log:
        axes.set_xscale("log")
        axes.set_xlim(points[0] / 1.15, points[-1] * 1.15)
    elif len(points) == 1:
        axes.set_xlim(0, 2 * points[0])
    span = (math.log(points[-1] / points[0]) if log else points[-1] - points[0]) or 1
    ticks = [points[-1]]
    for point in reversed(points[:-1]):
        gap = math.log(ticks[-1] / point) if log else ticks[-1] - point
        if gap / span >= 0.09:
            ticks.append(point)
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()


def _from_one(axes, values: Sequence[float]) -> None:
    """The axis of a perplexity, whose least value is 1."""
    high = max([*values, 1.0])
    if high > 20:
        axes.set_yscale("log")
        axes.set_ylim(0.9, high * 1.4)
        _plain_ticks(axes.yaxis)
    else:
        axes.set_ylim(1, max(2.0, 1 + 1.12 * (high - 1)))


def _plain_ticks(axis) -> None:
    """1, 10, 100 instead of powers of ten, with what lies between where a decade is not full."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())


def _style(curve: Curve) -> tuple[str, Any, str]:
    return _STYLES[curve.style % len(_STYLES)]


def _line(axes, curve: Curve, marker: bool) -> None:
    if not curve.points:
        return
    colour, line, shape = _style(curve)
    xs, ys = zip(*curve.points, strict=True)
    look = dict(marker=shape, markersize=6, markeredgecolor="white", markeredgewidth=0.8) if marker else {}
    axes.plot(xs, ys, color=colour, linestyle=line, linewidth=2, zorder=3, clip_on=False, **look)


def _name_lines(axes, ends: Sequence[tuple[str, tuple[float, float], str]]) -> None:
    """Write each name right of the axes, near the end of its line and with a thin one to it; names keep a distance."""
    to_axes = axes.transData + axes.transAxes.inverted()
    wanted = [tuple(to_axes.transform(point)) for _, point, _ in ends]
    heights = spread_out([y for _, y in wanted], _GAP)
    for (text, _, colour), (x, y), height in zip(ends, wanted, heights, strict=True):
        axes.annotate(
            text,
            xy=(min(x, 1.0), y),
            xytext=(1.035, height),
            xycoords="axes fraction",
            textcoords="axes fraction",
            va="center",
            fontsize=_FONT,
            color=colour,
            parse_math=False,
            annotation_clip=False,
            arrowprops=dict(
                arrowstyle="-", color=colour, linewidth=0.8, alpha=0.6, shrinkA=1, shrinkB=4, relpos=(0, 0.5)
            ),
        )


def spread_out(wanted: Sequence[float], gap: float) -> list[float]:
    """Places in the order of those wanted, at least `gap` apart: names that would touch stand around their mean.

    All lie within 0 to 1 if they fit.
    """
    order = sorted(range(len(wanted)), key=lambda i: (wanted[i], -i))
    groups: list[list[float]] = []  # of neighbours: [count, mean of the places wanted]
    for i in order:
        groups.append([1, wanted[i]])
        while len(groups) > 1 and groups[-1][1] - groups[-2][1] < gap * (groups[-1][0] + groups[-2][0]) / 2:
            (m, one), (n, other) = groups[-2:]
            groups[-2:] = [[m + n, (m * one + n * other) / (m + n)]]
    placed = [mean + gap * (k - (count - 1) / 2) for count, mean in groups for k in range(int(count))]
    for k in range(len(placed)):  # up from the lower edge, then down from the upper
        placed[k] = max(placed[k], k * gap)
    for k in range(len(placed)):
        placed[-1 - k] = min(placed[-1 - k], 1 - k * gap)
    heights = [0.0] * len(wanted)
    for i, height in zip(order, placed, strict=True):
        heights[i] = height
    return heights


def _value(value: float, share: bool = False) -> str:
    if share:
        return f"{value:.3f}"
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _percent(share: float) -> str:
    """Never rounded to all or none where it is neither."""
    text = f"{share:.1%}" if 0 < share < 1 else f"{share:.0%}"
    return {"100.0%": "over 99.9%", "0.0%": "below 0.1%"}.get(text, text)


def _png(figure) -> bytes:
    buffer = io.BytesIO()
    # No version or date in the file: the same run gives the same bytes.
    figure.savefig(buffer, format="png", dpi=_DPI, bbox_inches="tight", pad_inches=0.12, metadata={"Software": None})
    return buffer.getvalue()
