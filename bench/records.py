"""Rows of recorded figures: measured values beside where, when and with what they were measured; CSV, JSON, tables.

python -m bench.records [FILE ...]     # the latest run of each file under bench/results, as markdown
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import math
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from wise_fast.errors import WiseError

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"


@dataclass(frozen=True)
class Row:
    """One figure.

    Attributes:
        op: section of the run ("editing", "serving", "memory", "storage").
        case: what was run.
        metric, value, unit: what came out; where there are percentiles, `value` is the median.
        ratio: value over the reference's value: the baseline (editing, memory), the unedited model (serving), one
            dense copy of the edited matrix (storage); None where there is no reference.
        p20, p50, p80: percentiles over the runs, in `unit`.
    """

    op: str
    case: str
    metric: str
    value: float
    unit: str
    ratio: float | None = None
    p20: float | None = None
    p50: float | None = None
    p80: float | None = None


def spread(op: str, case: str, metric: str, values: Sequence[float], unit: str, reference: float | None = None) -> Row:
    """A row of repeated measurements; `reference` is what its median is divided by for the ratio."""
    p20, p50, p80 = percentiles(values)
    return Row(op, case, metric, p50, unit, None if reference is None else p50 / reference, p20, p50, p80)


def percentiles(values: Sequence[float], shares: Sequence[float] = (0.2, 0.5, 0.8)) -> list[float]:
    """Percentiles with linear interpolation."""
    return torch.tensor(list(values), dtype=torch.float64).quantile(torch.tensor(shares, dtype=torch.float64)).tolist()


ROW_COLUMNS = tuple(f.name for f in fields(Row))
ENVIRONMENT_COLUMNS = (
    *("date", "commit", "command", "model", "device", "threads", "load"),
    *("torch", "triton", "transformers", "python"),
)


def environment(model: str, device: torch.device | str, arguments: Sequence[str]) -> dict:
    """Where a run takes place; `load` is the machine's one-minute load average before it, `threads` torch's."""
    device = torch.device(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()
    found = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "command": shlex.join(arguments),
        "model": model,
        "device": name,
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
    }
    return found | {package: _version(package) for package in ("torch", "triton", "transformers")}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} CPUs"


def commit() -> str:
    """Short hash of the checkout, "+dirty" if it has changes (recorded results aside), "unknown" outside git.

    A copy of a tree on another machine says by WISE_FAST_COMMIT what it is a copy of.
    """
    if given := os.environ.get("WISE_FAST_COMMIT"):
        return given
    try:
        head = _git("rev-parse", "--short", "HEAD")
        changed = _git("status", "--porcelain", "--", ".", ":!bench/results")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + ("+dirty" if changed else "")


def _git(*arguments: str) -> str:
    command = ["git", "--no-optional-locks", *arguments]
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()


def record(rows: Iterable[Row], place: dict, directory: Path) -> list[dict]:
    """Append rows to `<directory>/<op>.csv`, and return them as dicts with their environment."""
    made = [{**place, **asdict(row)} for row in rows]
    for op in dict.fromkeys(row["op"] for row in made):
        append(directory / f"{op}.csv", (*ENVIRONMENT_COLUMNS, *ROW_COLUMNS), [r for r in made if r["op"] == op])
    return made


def append(path: Path, columns: Sequence[str], rows: Sequence[dict]) -> None:
    """Append rows to a CSV file of just these columns.

    Raises:
        ValueError: a row has other columns or a figure that is not finite, or the file has other columns; nothing is
            written.
    """
    for row in rows:
        if set(row) != set(columns):
            raise ValueError(f"a row has columns {sorted(row)}, expected {sorted(columns)}")
        if bad := [name for name, v in row.items() if isinstance(v, float) and not math.isfinite(v)]:
            raise ValueError(f"{bad} of a row are not finite: {row}")
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = not path.exists() or path.stat().st_size == 0
    if not fresh:
        with path.open(newline="", encoding="utf-8") as file:
            found = next(csv.reader(file))
        if found != list(columns):
            raise ValueError(f"{path} has columns {found}, expected {list(columns)}; move it away")
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        if fresh:
            writer.writeheader()
        writer.writerows(rows)


def read(path: Path) -> list[dict]:
    """The rows of a CSV file; numbers as floats, empty fields as None."""
    with path.open(newline="", encoding="utf-8") as file:
        return [{name: _parsed(name, text) for name, text in row.items()} for row in csv.DictReader(file)]


def _parsed(name: str, text: str) -> str | float | None:
    if text == "":
        return None
    if name in ("commit", "seed", "torch", "triton", "transformers", "python"):  # "6e12345" is no number
        return text
    try:
        return float(text)
    except ValueError:
        return text


def command(
    module: str,
    parse: Callable[[Sequence[str]], argparse.Namespace],
    run: Callable[[argparse.Namespace, list[str]], list[dict]],
    shown: Sequence[str],
    arguments: Sequence[str] | None,
) -> None:
    """`python -m module`: parse the arguments (of the process if None), run, print these columns of the rows.

    What a user can mend ends it with one line, not a traceback.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    options = parse(arguments)
    try:
        rows = run(options, ["python", "-m", module, *arguments])
    except WiseError as error:
        sys.exit(f"error: {error}")
    show(rows, shown, options.json)


def show(rows: Sequence[dict], columns: Sequence[str], as_json: bool = False, title: str | None = None) -> None:
    """Write rows to stdout: all of them as one JSON list, or these columns as a markdown table."""
    if as_json:
        sys.stdout.write(json.dumps(rows, indent=1, allow_nan=False) + "\n")
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.MARKDOWN, title=title, title_justify="left")
    for name in columns:
        numbers = any(isinstance(row[name], (int, float)) for row in rows)
        table.add_column(name, justify="right" if numbers else "left")
    for row in rows:
        table.add_row(*(Text(_shown(row[name])) for name in columns))
    width = None if sys.stdout.isatty() else 1000  # a file or a pipe has no width to wrap at
    console = Console(file=io.StringIO(), width=width)
    console.print(table)
    lines = (line.rstrip() for line in console.file.getvalue().splitlines())
    sys.stdout.write("\n".join(line for line in lines if line) + "\n")


def markdown(rows: Sequence[dict], columns: Sequence[str]) -> str:
    """These columns as a markdown table, without rich, which a machine with a GPU may not have."""
    cells = [list(columns), *([_shown(row[name]) for name in columns] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    lines = ["| " + " | ".join(text.ljust(width) for text, width in zip(line, widths)) + " |" for line in cells]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines) + "\n"


def _shown(value) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.records", description="show the latest recorded figures")
    parser.add_argument("files", nargs="*", type=Path, help=f"CSV files (default: all in {RESULTS})")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the latest run of each file of results."""
    options = parse(arguments)
    for path in options.files or sorted(RESULTS.glob("*.csv")):
        rows = read(path)
        latest = [row for row in rows if row["date"] == rows[-1]["date"]]
        place = latest[-1]
        title = f"{path.stem}: {place['commit']}, {place['date']}, {place['device']}, {place['threads']:.0f} threads"
        hidden = (*ENVIRONMENT_COLUMNS, "op")
        show(latest, [name for name in latest[0] if name not in hidden], options.json, title)


if __name__ == "__main__":
    main()
