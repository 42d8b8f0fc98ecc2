"""Every speed-up beside its reference in one run: `make bench`, or `python -m bench.run` (see bench/README.md).

Prints a markdown table (or JSON) and appends each row to bench/results/<section>.csv.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from bench import editing, memory, records, serving
from bench.measure import PAPER_STEPS, Setting
from wise_fast.data import Edit, demo_edits, load_edits
from wise_fast.models import load_model
from wise_fast.settings import build_config

SECTIONS = ("memory", "editing", "serving", "storage")

# Medians are the value: p50 is not printed beside it.
_SHOWN = tuple(name for name in records.ROW_COLUMNS if name != "p50")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the sections asked for, print their rows and record them."""
    records.command("bench.run", parse, run, _SHOWN, arguments)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.run", description="measure wise_fast beside its references")
    add_source(parser)
    parser.add_argument("--limit", type=at_least(1), default=10, help="edits taken from it (%(default)s)")
    parser.add_argument("--baseline-edits", type=at_least(0), default=1, help="edits the baseline learns (%(default)s)")
    parser.add_argument(
        "--baseline-steps",
        type=at_least(1),
        default=PAPER_STEPS,
        help="its steps per edit (%(default)s); with fewer its time per edit is extrapolated",
    )
    parser.add_argument("--rounds", type=at_least(1), default=21, help="runs of a serving case (%(default)s)")
    parser.add_argument("--sizes", type=_sizes, default=((1, 32), (8, 64)), help="prefills (1x32,8x64)")
    parser.add_argument("--decode", type=_sizes, default=((32, 16),), help="prompt x new tokens of decoding (32x16)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of ours, repeatable")
    parser.add_argument("--only", type=_sections, default=SECTIONS, help=f"of {','.join(SECTIONS)}")
    parser.add_argument("--out", type=Path, default=records.RESULTS, help="directory of CSV files (bench/results)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser.parse_args(arguments)


def add_source(parser: argparse.ArgumentParser) -> None:
    """Options of every benchmark: the model and the file of edits."""
    parser.add_argument("--model", default="demo", help="'demo', a model's directory or a hub id (%(default)s)")
    parser.add_argument("--dtype", default="auto", help="of the model (%(default)s: as stored)")
    parser.add_argument("--device", help="such as cuda:0 (default: the CPU; memory is CPU only)")
    parser.add_argument("--edits", type=Path, help="file of edits (default: the packaged demo set)")


def at_least(least: int) -> Callable[[str], int]:
    """An argparse type: a whole number from `least`."""

    def number(text: str) -> int:
        if int(text) < least:
            raise argparse.ArgumentTypeError(f"{text}: expected a whole number from {least}")
        return int(text)

    return number


def _sizes(text: str) -> tuple[tuple[int, int], ...]:
    try:
        sizes = tuple(tuple(int(n) for n in part.split("x")) for part in text.split(","))
    except ValueError:
        sizes = ()
    if not sizes or any(len(size) != 2 or min(size) < 1 for size in sizes):
        raise argparse.ArgumentTypeError(f"{text!r}: expected pairs such as 1x32,8x64")
    return sizes


def _sections(text: str) -> tuple[str, ...]:
    names = text.split(",")
    if unknown := [name for name in names if name not in SECTIONS]:
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: expected some of {', '.join(SECTIONS)}")
    return tuple(name for name in SECTIONS if name in names)


def read_edits(path: Path | None, limit: int | None, offset: int = 0, irrelevant: Path | None = None) -> list[Edit]:
    """Edits `offset` to `offset + limit` of a file, with the texts of its partner file, or of the packaged set.

    Raises:
        EditDataError: the file cannot be read or holds no edit there.
    """
    end = None if limit is None else offset + limit
    edits = (demo_edits()[:end] if path is None else load_edits(path, limit=end, irrelevant=irrelevant))[offset:]
    if not edits:
        sys.exit(f"error: there is no edit from number {offset + 1} on; lower --offset")
    return edits


def run(options: argparse.Namespace, command: Sequence[str]) -> list[dict]:
    """Measure, record what is done as it is done, and return all rows with their environment.

    The memory probes go first, while this process is small: they load the model a second time.
    """
    config = build_config(None, options.set)
    edits = read_edits(options.edits, options.limit)
    place = records.environment(options.model, options.device or "cpu", command)
    rows: list[dict] = []
    if "memory" in options.only:
        steps = min(options.baseline_steps, 2)  # memory peaks in the first steps
        made = memory.measure(options.model, edits, config, steps, _log, options.dtype)
        rows += records.record(made, place, options.out)
    rest = [name for name in options.only if name != "memory"]
    if not rest:
        return rows
    _log(f"loading {options.model}")
    model, tokenizer = load_model(options.model, dtype=options.dtype, device=options.device)
    setting = Setting(
        model,
        tokenizer,
        edits,
        config,
        baseline_edits=options.baseline_edits,
        baseline_steps=options.baseline_steps,
        rounds=options.rounds,
        sizes=options.sizes,
        decode=options.decode[0],
    )
    measures = {"editing": editing.measure, "serving": serving.measure, "storage": memory.storage}
    for name in rest:
        for row in measures[name](setting, _log):
            rows += records.record([row], place, options.out)
    return rows


def _log(message: str) -> None:
    sys.stderr.write(f"{message}\n")


if __name__ == "__main__":
    main()
