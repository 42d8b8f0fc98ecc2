"""Quality of a lifelong run: `python -m bench.quality --edits FILE --limit 100 --set shard_size=20` (bench/README.md).

Edits with the given settings, scores every edit after the last one, prints one row a seed (and their mean) and appends
them to bench/results/quality.csv.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from bench import records
from bench.records import ENVIRONMENT_COLUMNS, percentiles
from bench.run import add_source, at_least, read_edits
from wise_fast import Edit, WiseConfig, WiseEditor, evaluate
from wise_fast.models import load_model
from wise_fast.settings import build_config

SCORES = ("reliability", "generalization", "locality", "exact", "exact_rephrased")
_COSTS = ("seconds_per_edit", "seconds_p20", "seconds_p80", "steps", "successes", "memories", "edit_wall", "score_wall")
COLUMNS = (*ENVIRONMENT_COLUMNS, "edits", "offset", "count", "settings", "seed", *SCORES, *_COSTS)
_SHOWN = (
    "edits",
    "offset",
    "count",
    "settings",
    "seed",
    *SCORES,
    "seconds_per_edit",
    "steps",
    "successes",
    "memories",
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run every seed, print the rows and record them."""
    records.command("bench.quality", parse, run, _SHOWN, arguments)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.quality", description="edit, then score all edits")
    add_options(parser, "quality.csv")
    parser.add_argument("--batch-size", type=int, help="edits trained together")
    parser.add_argument("--shard-size", type=int, help="edits in a shard before the next opens")
    parser.add_argument("--shards", type=int, help="shards merged into one memory (mode merge)")
    parser.add_argument("--mode", choices=("retrieve", "merge"))
    parser.add_argument("--seeds", type=_numbers, help="such as 0,1,2: one run each (default: the setting's seed)")
    return parser.parse_args(arguments)


def add_options(parser: argparse.ArgumentParser, file: str) -> None:
    """Options of what edits and then scores: which edits, the settings, and where the rows of `file` go."""
    add_source(parser)
    parser.add_argument("--limit", type=at_least(1), help="edits taken from it (default: all)")
    parser.add_argument("--offset", type=at_least(0), default=0, help="edits left out before them (%(default)s)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="any setting, repeatable")
    parser.add_argument("--no-generate", action="store_true", help="teacher-forced scores only")
    parser.add_argument("--out", type=Path, default=records.RESULTS, help=f"directory of {file} (bench/results)")
    parser.add_argument("--json", action="store_true", help="print JSON")


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def run(options: argparse.Namespace, command: Sequence[str]) -> list[dict]:
    """One row a seed, recorded as soon as it is there; with several seeds, their mean as a last row."""
    names = ("batch_size", "shard_size", "shards", "mode")
    config = build_config(None, options.set, **{name: getattr(options, name) for name in names})
    edits = read_edits(options.edits, options.limit, options.offset)
    place = records.environment(options.model, options.device or "cpu", command)
    place |= {"edits": options.edits.name if options.edits else "demo", "offset": options.offset, "count": len(edits)}
    place |= {"settings": json.dumps(changed(config), separators=(",", ":"))}
    model, tokenizer = load_model(options.model, dtype=options.dtype, device=options.device)
    rows = []
    for seed in options.seeds or (config.seed,):
        sys.stderr.write(f"seed {seed}: {len(edits)} edits\n")
        editor = WiseEditor(model, tokenizer, config.replace(seed=seed))
        try:
            figures = score(editor, edits, generate=not options.no_generate)
        finally:
            editor.unload()
        rows.append({**place, "seed": str(seed), **figures})
        records.append(options.out / "quality.csv", COLUMNS, rows[-1:])
    if len(rows) > 1:
        seeds = ",".join(row["seed"] for row in rows)
        rows.append({**rows[-1], "seed": f"mean of {seeds}", **mean(rows)})
        records.append(options.out / "quality.csv", COLUMNS, rows[-1:])
    return rows


def changed(config: WiseConfig) -> dict:
    """The settings that are not the defaults; the seed has a column of its own."""
    default = WiseConfig().to_dict()
    return {name: value for name, value in config.to_dict().items() if name != "seed" and value != default[name]}


def score(editor: WiseEditor, edits: Sequence[Edit], generate: bool = True) -> dict[str, float | None]:
    """Teach the edits, then score all of them: the columns `SCORES` and `_COSTS`."""
    start = time.perf_counter()
    reports = editor.edit(edits)
    edited = time.perf_counter()
    found = evaluate(editor, edits, generate=generate).summary()
    p20, p50, p80 = percentiles([report.seconds for report in reports if report.steps] or [0.0])
    return found | {
        "seconds_per_edit": p50,
        "seconds_p20": p20,
        "seconds_p80": p80,
        "steps": fmean(report.steps for report in reports),
        "successes": sum(report.success for report in reports),
        "memories": len(editor.memories),
        "edit_wall": edited - start,
        "score_wall": time.perf_counter() - edited,
    }


def mean(rows: Sequence[dict]) -> dict[str, float | None]:
    """Means of the figures over rows; None where a row has none."""
    columns = {name: [row[name] for row in rows] for name in (*SCORES, *_COSTS)}
    return {name: None if None in values else fmean(values) for name, values in columns.items()}


if __name__ == "__main__":
    main()
