"""The kernels on the GPU at hand: `make bench-gpu`, or `python -m bench.gpu` (see bench/README.md). At most 8 minutes.

Every op beside plain PyTorch and torch.compile of it, as ratios, with GB/s, TFLOP/s and the share of what this device
reaches; then decoding with a whole 7B-shaped model. Appends rows to bench/results/gpu_<op>.csv and prints a markdown
table. Without a GPU it is a dry run: every case is built small on the CPU and called once; nothing is recorded.
"""

from __future__ import annotations

import argparse
import faulthandler
import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from torch import Tensor

from bench import records
from bench.gpu_banks import Place
from bench.gpu_cases import Built, Case, serving
from bench.gpu_editing import editing
from bench.gpu_timing import Arm, Ceilings, Clock, ceilings

# Seconds of a run, imports and ceilings included, and the share of each section; what one leaves goes to the next.
SECONDS, GRACE = 440.0, 30.0
SHARES = {"serving": 0.52, "editing": 0.17, "model": 0.31}
# Seconds that measuring a case takes at most, and least; torch.compile takes seconds by itself.
PER_CASE, LEAST = 1.5, 0.3
# Relative error (of norms) between the arms that says one of them computes something else.
ERROR = {torch.float32: 2e-3, torch.float16: 1e-2, torch.bfloat16: 3e-2}


@dataclass(frozen=True)
class Figure:
    """One arm of one case.

    Attributes:
        us, p20, p80: microseconds a call, median and percentiles.
        ratio: over the first arm of the case (the projection alone, the unedited model, or plain).
        speedup: the plain arm's median over this one's.
        gbs, tflops: bytes and operations that cannot be avoided over the time taken.
        bound_us: the least time for them at this device's ceilings; `share` is bound_us / us.
        target: what the ratio or the speed-up should be.
    """

    op: str
    case: str
    arm: str
    rows: int
    memories: int
    dtype: str
    us: float
    p20: float
    p80: float
    ratio: float
    speedup: float | None
    gbs: float | None
    tflops: float | None
    bound_us: float | None
    share: float | None
    target: str


COLUMNS = tuple(f.name for f in fields(Figure))
SHOWN = ("case", "arm", "us", "ratio", "speedup", "gbs", "tflops", "share", "target")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, record, print; 1 where a case failed."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    options = parse(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    began = time.perf_counter()
    found = torch.cuda.is_available()
    place = Place(torch.device("cuda" if found else "cpu"), full=found)
    torch.manual_seed(0)
    if found:
        # Whatever hangs, in Python or below it, ends here; rows are recorded case by case.
        faulthandler.dump_traceback_later(options.seconds + GRACE, exit=True)
    run = Run(place, Clock(place.device), options.out, ["python", "-m", "bench.gpu", *arguments])
    if run.clock.dry:
        logging.info("no GPU here: a dry run that builds and calls every case, small, on the CPU; no row is recorded")
    deadline = time.perf_counter()
    for name in options.only:
        deadline = min(deadline + SHARES[name] * options.seconds, began + options.seconds)
        SECTIONS[name](run, deadline)
    faulthandler.cancel_dump_traceback_later()
    sys.stdout.write(run.summary())
    return 1 if run.failed else 0


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description="measure the kernels on a GPU")
    parser.add_argument("--only", nargs="+", choices=SHARES, default=list(SHARES), help="sections (default: all)")
    parser.add_argument("--out", type=Path, default=records.RESULTS, help="directory of CSV files (bench/results)")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of the run (440); with less, fewer rounds")
    return parser.parse_args(arguments)


class Run:
    """One run: what it measures with, and what it found."""

    def __init__(self, place: Place, clock: Clock, out: Path, command: list[str]):
        self.place, self.clock, self.out = place, clock, out
        self.environment = records.environment("random weights", place.device, command)
        self.ceilings: Ceilings | None = ceilings(clock)
        self.done, self.skipped, self.failed = 0, 0, 0
        if self.ceilings is not None:
            self._record_ceilings(self.ceilings)

    def each(self, work: Iterable[tuple[str, Callable[[float], list[Figure]]]], deadline: float) -> None:
        """Run pieces of work with the seconds that each may take; a failure ends that piece only."""
        work = list(work)
        for number, (name, piece) in enumerate(work):
            left = deadline - time.perf_counter()
            if not self.clock.dry and left < LEAST:
                self.skipped += len(work) - number
                logging.info("out of time: %d cases left out, from %s on", len(work) - number, name)
                return
            try:
                figures = piece(left / (len(work) - number))
            except Exception as error:  # a case that fails must not cost the figures of the others
                self.failed += 1
                logging.error("FAILED %s: %s: %s", name, type(error).__name__, error)
                continue
            self.done += 1
            self.record(figures)

    def record(self, figures: list[Figure]) -> None:
        if not figures:
            return
        rows = [{**self.environment, **asdict(figure)} for figure in figures]
        path = self.out / f"gpu_{figures[0].op}.csv"
        records.append(path, (*records.ENVIRONMENT_COLUMNS, *COLUMNS), rows)
        if self.done == 1 or figures[0].op != getattr(self, "_op", None):
            sys.stdout.write(f"\n{figures[0].op}\n\n")
            sys.stdout.write(records.markdown(rows, SHOWN))
        else:
            sys.stdout.write(records.markdown(rows, SHOWN).split("\n", 2)[2])
        sys.stdout.flush()
        self._op = figures[0].op

    def figures(self, case: Case, built: Built, seconds: dict[str, list[float]]) -> list[Figure]:
        """What the calls of a case say; nothing in a dry run."""
        if self.ceilings is None:
            return []
        spread = {name: [1e6 * s for s in records.percentiles(taken)] for name, taken in seconds.items()}
        first, plain = next(iter(spread.values()))[1], spread.get("plain")
        bound = 1e6 * self.ceilings.seconds(built.moved, built.flops, case.dtype)
        made = []
        for name, (p20, us, p80) in spread.items():
            ours = name not in ("projection", "plain", "compiled")
            made.append(
                Figure(
                    *(case.op, case.name, name, case.rows, case.memories, str(case.dtype)[6:], us, p20, p80),
                    ratio=us / first,
                    speedup=None if plain is None else plain[1] / us,
                    gbs=built.moved / us / 1e3 if ours else None,
                    tflops=built.flops / us / 1e6 if ours and built.flops else None,
                    bound_us=bound if ours else None,
                    share=bound / us if ours else None,
                    target=case.target if ours else "",
                )
            )
        return made

    def _record_ceilings(self, found: Ceilings) -> None:
        rows = [records.Row("gpu_ceilings", "copy of 1 GiB, read and written", "rate", found.bandwidth / 1e9, "GB/s")]
        for dtype, flops in found.flops.items():
            rows.append(records.Row("gpu_ceilings", f"square product, {dtype}", "rate", flops / 1e12, "TFLOP/s"))
        made = records.record(rows, self.environment, self.out)
        sys.stdout.write(records.markdown(made, ("case", "value", "unit")))

    def summary(self) -> str:
        what = "called once" if self.clock.dry else "measured"
        return f"\n{self.done} cases {what}, {self.skipped} left out for lack of time, {self.failed} failed\n"


def _ops(cases: Callable[[], Iterator[Case]]) -> Callable[[Run, float], None]:
    def section(run: Run, deadline: float) -> None:
        run.each(((f"{c.op}: {c.name}", lambda share, c=c: _measure(run, c, share)) for c in cases()), deadline)

    return section


def _measure(run: Run, case: Case, share: float) -> list[Figure]:
    built = case.build(run.place)
    compare(*built.pair(), case.dtype)
    arms = dict(built.arms)
    # The plain chain under torch.compile takes seconds to compile, where time is short it is left out.
    if case.compiled and (run.clock.dry or share > PER_CASE):
        torch._dynamo.reset()
        compiled = torch.compile(arms["plain"].call, backend="eager" if run.clock.dry else "inductor")
        arms["compiled"] = Arm(compiled, arms["plain"].graph)
    return run.figures(case, built, run.clock.measure(arms, min(share, PER_CASE)))


def compare(expected: Tensor, got: Tensor, dtype: torch.dtype) -> None:
    """Raise ValueError where two arms computed different things."""
    if expected.shape != got.shape:
        raise ValueError(f"plain computes {tuple(expected.shape)}, ours {tuple(got.shape)}")
    expected, got = expected.double(), got.double()
    error = float((expected - got).norm() / expected.norm().clamp_min(1e-30)) if expected.numel() else 0.0
    if not error <= ERROR[dtype]:
        raise ValueError(f"ours is {error:.3g} away from plain, more than {ERROR[dtype]} of its norm")


def _model(run: Run, deadline: float) -> None:
    from bench import gpu_model

    if not run.clock.dry and deadline - time.perf_counter() < 30:
        run.skipped += len(gpu_model.CASES)
        logging.info("out of time: no whole model")
        return
    logging.info("building a 7B-shaped model")
    served = gpu_model.Served(gpu_model.seven_billion(run.place))
    moved = gpu_model.moved(served.model)

    def measure(layout: str, memories: int, batch: int, share: float) -> list[Figure]:
        name = f"{gpu_model.MODEL}, {layout}, J = {memories}, batch {batch}"
        case = Case("model_decode", name, batch, memories, torch.bfloat16, lambda place: None, target="<= 1.005x")
        arms = gpu_model.arms(served, run.place, layout, memories, batch)
        seconds = run.clock.measure(arms, min(share, 6.0))
        built = Built(arms, moved, 2 * batch * moved / 2, lambda: None)
        return run.figures(case, built, seconds)

    work = [(f"model: {given}", lambda share, given=given: measure(*given, share)) for given in gpu_model.CASES]
    run.each(work, deadline)


SECTIONS: dict[str, Callable[[Run, float], None]] = {
    "serving": _ops(serving),
    "editing": _ops(editing),
    "model": _model,
}


if __name__ == "__main__":
    sys.exit(main())
