"""The ops on the CPU beside the plain PyTorch chains that they replace: `make bench-ops`.

    python -m bench.ops [--only WORD ...] [--seconds S] [--json] [--out DIR]
    python -m pytest bench/ops.py                           # the same cases under pytest-benchmark

The cases are those of `bench.gpu`, in sizes that a core can take, in fp32. Arms are called in turn, and the first of
them changes every round; what counts is CPU time, so that other processes cost cache and not time. Each case is first
checked to agree. Rows go to `ops.csv`: microseconds of a call, over plain's, the ratio within each round, and that of
the 20th percentiles, which a busy machine disturbs least.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from bench import records
from bench.gpu import compare
from bench.gpu_banks import Place, make_bank
from bench.gpu_cases import ADD, Built, decode, inputs, leverage, norms, pair_of, prefill, route, sketched, work
from bench.gpu_editing import masked_update, ties_merge
from bench.gpu_timing import Arm

FP32 = torch.float32
SMALL = "Gemma-3-270M"
PLACE = Place(torch.device("cpu"), full=True)
LAYOUTS = ("neuron", "element")
LEAST, MOST = 7, 5000
SHOWN = ("case", "metric", "value", "unit", "ratio", "p20", "p80")


def gated_add(layout: str, rows: int, memories: int, known: bool, model: str) -> Callable[[Place], Built]:
    """The gated add alone, half of the sequences in scope, from responses that are `known` or by their product."""

    def build(place: Place) -> Built:
        a, weight = inputs(place, model, rows, FP32)
        bank = make_bank(place, layout, model, memories, FP32)
        y, batch = F.linear(a, weight), 8
        choice = torch.arange(batch, device=a.device) % (2 * memories) - memories
        choice = choice.clamp_min(-1)
        side = torch.stack([bank.respond(a, j) for j in range(memories)]) if known else None
        by_row = choice.repeat_interleave(a.shape[0] // batch, output_size=a.shape[0])[:, None]

        def ours():
            ADD[layout](out := y.clone(), a, *bank.arguments, choice, side, **bank.keep)
            return out

        def plain():
            if known:
                picked = side.gather(0, by_row.clamp_min(0)[None].expand(1, *y.shape))[0]
                return torch.where(by_row >= 0, y + picked, y)
            out = y
            for j in range(memories):
                out = torch.where(by_row == j, out + bank.respond(a, j), out)
            return out

        arms = {"plain": Arm(plain), "ours": Arm(ours)}
        moved, flops = work(a, weight, bank)
        return Built(arms, moved - weight.nbytes, 0.0 if known else flops, pair_of(arms))

    return build


CASES: dict[str, Callable[[Place], Built]] = {
    **{
        f"decode, {layout}, {rows} rows, {scope}": decode(SMALL, layout, rows, 1, FP32, scope == "in scope")
        for layout in LAYOUTS
        for rows in (1, 8)
        for scope in ("in scope", "out of scope")
    },
    "decode, neuron, 8 rows, 16 memories, in scope": decode(SMALL, "neuron", 8, 16, FP32, True),
    **{f"prefill, {layout}, 256 rows": prefill(SMALL, layout, 256, 1, FP32, True) for layout in LAYOUTS},
    **{f"prefill, {layout}, 64 rows, 4 memories": prefill(SMALL, layout, 64, 4, FP32, True) for layout in LAYOUTS},
    **{
        f"norms, {layout}, 64 rows, {count} memories": norms(SMALL, layout, 64, count, FP32)
        for layout, count in (("neuron", 1), ("neuron", 16), ("element", 4))
    },
    **{
        f"gated_add, {layout}, 64 rows, 4 memories, {given}": gated_add(layout, 64, 4, given == "response known", SMALL)
        for layout in LAYOUTS
        for given in ("response known", "product")
    },
    **{
        f"sketched_route, {rows} rows, 64 memories": sketched(SMALL, "neuron", rows, 64, FP32, 16) for rows in (64, 256)
    },
    **{f"leverage, 64 rows, {count} memories": leverage(SMALL, 64, count, FP32) for count in (1, 4)},
    **{f"route, {rows} rows, {count} memories": route(rows, count) for rows, count in ((64, 1), (512, 16), (512, 64))},
    **{
        f"masked_update, {layout}, 256 tokens, {optimizer}": masked_update(layout, 256, optimizer, SMALL, FP32)
        for layout in LAYOUTS
        for optimizer in ("adam", "sgd")
    },
    **{f"ties_merge, {layout}, 2 shards": ties_merge(layout, 2, model=SMALL) for layout in LAYOUTS},
}


def measure(case: Built, seconds: float, least: int = LEAST) -> dict[str, list[float]]:
    """Seconds of CPU time of each arm's calls, a round at a time for so many seconds; two rounds warm up."""
    names = list(case.arms)
    taken: dict[str, list[float]] = {name: [] for name in names}
    began = time.perf_counter()
    for turn in range(MOST + 2):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            start = time.process_time()
            case.arms[name].call()
            taken[name].append(time.process_time() - start)
        if turn > least and time.perf_counter() - began > seconds:
            break
    return {name: values[2:] for name, values in taken.items()}


def rows_of(name: str, taken: dict[str, list[float]]) -> list[records.Row]:
    """Microseconds of each arm, their ratio to plain, and the ratios of ours within rounds and of percentiles."""
    plain = 1e6 * records.percentiles(taken["plain"])[1]
    made = [
        records.spread("ops", name, f"{arm}: CPU time of a call", [1e6 * s for s in values], "us", plain)
        for arm, values in taken.items()
    ]
    by_round = [ours / other for ours, other in zip(taken["ours"], taken["plain"])]
    made.append(records.spread("ops", name, "ours / plain, by round", by_round, "ratio"))
    fast = {arm: records.percentiles(values)[0] for arm, values in taken.items()}
    return [*made, records.Row("ops", name, "ours / plain, p20 of each", fast["ours"] / fast["plain"], "ratio")]


@torch.no_grad()
def run(options: argparse.Namespace, command: list[str]) -> list[dict]:
    place, made = records.environment("random weights", "cpu", command), []
    for name in CASES:
        if all(word in name for word in options.only):
            taken = measure(built(name), options.seconds)
            made += records.record(rows_of(name, taken), place, options.out)
    return made


def built(name: str) -> Built:
    """A case with its tensors, after ours has been compared with plain."""
    torch.manual_seed(0)
    made = CASES[name](PLACE)
    compare(*made.pair(), FP32)
    return made


@pytest.mark.parametrize("arm", ["projection", "plain", "ours"])
@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_op(benchmark, name, arm):
    arms = built(name).arms
    if arm not in arms:
        pytest.skip("no projection in this op")
    benchmark.group, benchmark.name = name, arm
    benchmark(arms[arm].call)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.ops", description="the ops on the CPU beside plain PyTorch")
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD", help="cases whose names have all these words")
    parser.add_argument("--seconds", type=float, default=3.0, help="of each case (3), at least 7 rounds")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--out", type=Path, default=records.RESULTS, help="directory of CSV files (bench/results)")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, record, print."""
    records.command("bench.ops", parse, run, SHOWN, arguments)


if __name__ == "__main__":
    sys.exit(main())
