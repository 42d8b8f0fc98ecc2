"""What a second process is worth: `python -m bench.distributed --limit 16 --shard-size 8` (bench/README.md).

Times `wise_fast.distributed` under torchrun with each number of processes in turn, round by round, on the same edits,
and checks that all give the same pack. Rows are appended to bench/results/distributed.csv.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from bench import records
from bench.records import Row, percentiles, spread
from bench.run import add_source, at_least, read_edits
from wise_fast.errors import WiseError

_FILLING, _WHOLE = "filling the shards", "the whole command, with loading"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run, print the rows and record them."""
    records.command("bench.distributed", parse, run, ("case", "metric", "value", "unit", "ratio"), arguments)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.distributed", description="one process beside several")
    add_source(parser)
    parser.add_argument("--limit", type=at_least(1), default=16, help="edits taken from it (%(default)s)")
    parser.add_argument("--shard-size", type=at_least(1), default=8, help="edits in a shard (%(default)s)")
    parser.add_argument("--processes", type=_counts, default=(1, 2), help="how many, the first is the reference (1,2)")
    parser.add_argument("--rounds", type=at_least(1), default=3, help="runs of each (%(default)s)")
    parser.add_argument("--threads", type=at_least(1), default=1, help="of each process (%(default)s)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="any setting, repeatable")
    parser.add_argument(
        "--out", type=Path, default=records.RESULTS, help="directory of distributed.csv (bench/results)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser.parse_args(arguments)


def _counts(text: str) -> tuple[int, ...]:
    return tuple(at_least(1)(part) for part in text.split(","))


def run(options: argparse.Namespace, command: Sequence[str]) -> list[dict]:
    """All rows, recorded once they are there."""
    place = records.environment(options.model, options.device or "cpu", command) | {"threads": options.threads}
    with tempfile.TemporaryDirectory() as scratch:
        return records.record(measure(options, Path(scratch)), place, options.out)


def measure(options: argparse.Namespace, scratch: Path) -> Iterator[Row]:
    """Two rows a number of processes, and its speed-up over the first. The order alternates round by round."""
    edits = scratch / "edits.json"
    edits.write_text(json.dumps([edit.to_dict() for edit in read_edits(options.edits, options.limit)]))
    seconds = {(count, metric): [] for count in options.processes for metric in (_FILLING, _WHOLE)}
    digests = {}
    for number in range(options.rounds):
        for count in options.processes[:: -1 if number % 2 else 1]:
            summary, whole = timed(options, count, edits, scratch / f"{count}-{number}")
            seconds[count, _FILLING].append(summary["wall_seconds"])
            seconds[count, _WHOLE].append(whole)
            digests[count, number] = summary["digest"]
    if len(set(digests.values())) > 1:
        raise WiseError(f"the number of processes changes what comes out: {digests}")
    shards = f"{summary['shards']} shards of {options.shard_size} edits"
    for count in options.processes:
        case = f"{shards}, {count} process" + ("es" if count > 1 else "")
        for metric in (_FILLING, _WHOLE):
            one = percentiles(seconds[options.processes[0], metric])[1]
            yield spread("distributed", case, metric, seconds[count, metric], "s", one)
        speed_up = percentiles(seconds[options.processes[0], _FILLING])[1] / percentiles(seconds[count, _FILLING])[1]
        yield Row("distributed", case, "speed-up of filling", speed_up, "x")


def timed(options: argparse.Namespace, count: int, edits: Path, out: Path) -> tuple[dict, float]:
    """(summary of one run, seconds of the whole command)."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    command += ["-m", "wise_fast.distributed", "--model", options.model, "--dtype", options.dtype, "--json", "--quiet"]
    command += ["--edits", str(edits), "--out", str(out), "--shard-size", str(options.shard_size)]
    command += ["--device", options.device] if options.device else []
    command += [part for setting in options.set for part in ("--set", setting)]
    environment = os.environ | {"OMP_NUM_THREADS": str(options.threads)}
    start = time.perf_counter()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    whole = time.perf_counter() - start
    if done.returncode:
        raise WiseError(f"{count} processes ended with exit code {done.returncode}: {done.stderr.strip()[-2000:]}")
    return json.loads(done.stdout)["summary"], whole


if __name__ == "__main__":
    main()
