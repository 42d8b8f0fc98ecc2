"""What the router is worth: `python -m bench.dense --edits FILE --limit 20 --set shard_size=10` (bench/README.md).

Edits, then scores the edits and held-out text three ways: routed, and with the memories folded into the weight (TIES
merge, sum), as `export_dense` writes it. A row a figure, appended to bench/results/dense.csv.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

from bench import records
from bench.records import Row
from bench.run import add_source, at_least, read_edits
from wise_fast import Edit, WiseEditor, dense
from wise_fast.models import load_model
from wise_fast.settings import build_config
from wise_fast.tasks import evaluate, general_ability


def main(arguments: Sequence[str] | None = None) -> None:
    """Edit, score, print the rows and record them."""
    records.command("bench.dense", parse, run, ("case", "metric", "value", "ratio"), arguments)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.dense", description="routed edits beside folded ones")
    add_source(parser)
    parser.add_argument("--limit", type=at_least(1), default=20, help="edits taken from it (%(default)s)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="any setting, repeatable")
    parser.add_argument("--out", type=Path, default=records.RESULTS, help="directory of dense.csv (bench/results)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser.parse_args(arguments)


def run(options: argparse.Namespace, command: Sequence[str]) -> list[dict]:
    """All rows, recorded once they are there."""
    config, edits = build_config(None, options.set), read_edits(options.edits, options.limit)
    place = records.environment(options.model, options.device or "cpu", command)
    editor = WiseEditor(*load_model(options.model, dtype=options.dtype, device=options.device), config)
    editor.edit(edits)
    return records.record(measure(editor, edits), place, options.out)


def measure(editor: WiseEditor, edits: Sequence[Edit]) -> Iterator[Row]:
    """A row a figure and way of serving; ratios are to the routed figure."""
    memories = sum(bool(memory.edits) for memory in editor.memories)
    known = general_ability(editor)
    routed = _figures(editor, edits, known["perplexity_before"])
    for way in ("routed", *dense.MERGES):
        found = routed
        if way != "routed":
            with dense.folded(editor, way) as method:
                found = _figures(method, edits, known["perplexity_before"])
        for name, value in found.items():
            unit = "perplexity" if name.startswith("perplexity") else "share"
            ratio = value / routed[name] if routed[name] else None
            yield Row("dense", f"{len(edits)} edits, {memories} memories, {way}", name, value, unit, ratio)


def _figures(method, edits: Sequence[Edit], before: float) -> dict[str, float]:
    found = evaluate(method, edits, generate=False).summary() | general_ability(method, before=before)
    return {name: value for name, value in found.items() if value is not None}


if __name__ == "__main__":
    main()
