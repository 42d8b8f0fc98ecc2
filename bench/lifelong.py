"""Methods side by side: `python -m bench.lifelong --edits FILE --T 50 --out DIR` (bench/README.md).

Every method starts from the same unedited model, learns the same edits in the same order, and is scored by the same
task at the same points. Each has a run directory of its own in DIR, of the format that `wise-fast run` writes (without
checkpoints: a side-by-side run is not resumed). A table, rows in bench/results/lifelong.csv and a report follow.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from torch import nn

from bench import memory, records
from bench.methods import NAMES, Method, digest, make_method, served
from bench.records import ENVIRONMENT_COLUMNS
from bench.run import add_source, at_least, read_edits
from wise_fast import recorded, run_header
from wise_fast.data import Edit, deduplicate
from wise_fast.errors import ConfigError, WiseError
from wise_fast.journal import Journal
from wise_fast.models import load_model
from wise_fast.plots import require_matplotlib
from wise_fast.report import write_report
from wise_fast.routing_scores import sample_prompts
from wise_fast.run_settings import OPTIONS, RunSettings, batches, method_settings, parse_points, read_run_file
from wise_fast.settings import parse_setting
from wise_fast.tasks import TASKS, general_ability

_FIGURES = (
    *("reliability", "generalization", "locality", "ood", "perplexity", "efficacy", "efficacy_rephrased"),
    *("specificity", "exact", "exact_rephrased", "perplexity_before", "perplexity_after"),
)
_COSTS = ("seconds_per_edit", "edit_seconds", "successes", "memories", "served_mb", "peak_mb")
COLUMNS = (*ENVIRONMENT_COLUMNS, "method", "task", "edits", "offset", "seed", "T", "settings", *_FIGURES, *_COSTS)
_HIDDEN = (*ENVIRONMENT_COLUMNS, "settings", "edits", "offset", "task", "seed")
_FROM_FILE = tuple(name for name in OPTIONS if name not in ("mode", "batch_size", "settings", "checkpoint_every"))
_MB = 1e6


@dataclass(frozen=True)
class Plan:
    """What all methods have in common.

    Attributes:
        edits: what is taught, in order.
        settings: of the run: task, T, evaluation points, whether to generate.
        seed: of the sample whose routing is recorded; a method's own seed is among its settings.
        model, source: names of the model and of the edits' file, for headers.
    """

    edits: Sequence[Edit]
    settings: RunSettings
    seed: int
    model: str
    source: Path | None

    @property
    def points(self) -> tuple[int, ...]:
        return self.settings.points(len(self.edits))


def run_method(plan: Plan, method: Method, out: Path) -> list[dict]:
    """One method's run directory; returns its evaluations' lines. Every edit is on the disk before the next begins."""
    out.mkdir(parents=True)
    run_header.write_header(out, _header(plan, method))
    size, made = getattr(method.config, "batch_size", 1), []
    memory.reset_peak()
    with Journal(out / "journal.jsonl") as journal, Journal(out / "evaluations.jsonl") as evaluations:
        for number, (first, end) in enumerate(batches(len(plan.edits), size, plan.points), start=1):
            start, before = time.perf_counter(), list(method.edits)
            reports = method.edit(plan.edits[first:end])
            seconds = time.perf_counter() - start
            line = {"batch": number, "first": first, **recorded.reported(reports, before, method.edits)}
            line["seconds"] = seconds
            line |= {"rss": memory.peak(), "served": served(method), "memories": method.count, "digest": digest(method)}
            journal.append(line)
            if end in plan.points:
                made.append(evaluate(plan, method, end))
                evaluations.append(made[-1])
    return made


def _header(plan: Plan, method: Method) -> dict:
    return {
        "format": recorded.FORMAT,
        "version": recorded.VERSION,
        "method": method.name,
        "model": plan.model,
        "task": plan.settings.task,
        "mode": getattr(method.config, "mode", None),
        "T": len(plan.edits),
        "batch_size": getattr(method.config, "batch_size", 1),
        "edits": run_header.describe_edits(plan.edits, plan.source),
        "evaluate_at": list(plan.points),
        "generate": plan.settings.generate,
        "config": method.settings(),
        "seed": getattr(method.config, "seed", None),
        "libraries": run_header.libraries(method.device),
    }


def evaluate(plan: Plan, method: Method, t: int) -> dict:
    """The evaluation line after `t` edits, over all of them that no later one replaces."""
    start, task, generate = time.perf_counter(), TASKS[plan.settings.task], plan.settings.generate
    edits, _ = deduplicate(plan.edits[:t])
    before = task.before(method, edits, generate)
    found = task.score(method, edits, generate, before)
    return {
        "method": method.name,
        "task": task.name,
        "t": t,
        "figures": found.summary() | general_ability(method),
        "unedited": found.summary_before(),
        "scores": [score.to_dict() for score in found.scores],
        "routing": _routing(method, edits, plan.seed),
        "seconds": time.perf_counter() - start,
    }


def _routing(method: Method, edits: Sequence[Edit], seed: int) -> dict[str, list[float]] | None:
    """Ratios to the threshold of a seeded sample of edits, of their paraphrases and of unrelated prompts."""
    found = {kind: method.ratios(texts) for kind, texts in sample_prompts(edits, seed).items()}
    return None if found["edit"] is None else found


def compare(
    plan: Plan, model: nn.Module, tokenizer, settings: dict[str, dict], out: Path, place: dict, results: Path
) -> list[dict]:
    """Run the methods of `settings` in turn, and record a row for each of their evaluations as soon as it is done.

    Raises:
        ConfigError: a method is unknown or a setting is; before anything has run.
        WiseError: `out` is there already.
    """
    for name, values in settings.items():  # all are made once, so that a wrong setting ends the run at its beginning
        make_method(name, model, tokenizer, values).unload()
    _require_new(out)
    rows: list[dict] = []
    for name, values in settings.items():
        sys.stderr.write(f"{name}: {len(plan.edits)} edits\n")
        method = make_method(name, model, tokenizer, values)
        try:
            made = run_method(plan, method, out / name)
            fresh = [_row(plan, method, line, place) for line in made]
        finally:
            method.unload()
        records.append(results / "lifelong.csv", COLUMNS, fresh)
        rows += fresh
    return rows


def _require_new(out: Path) -> None:
    if out.exists() and any(out.iterdir()):
        raise WiseError(f"{out}: is not empty; name a new directory")


def _row(plan: Plan, method: Method, line: dict, place: dict) -> dict:
    """A row of one evaluation; the costs are of the whole run, and stand at its last evaluation."""
    figures = {name: line["figures"].get(name) for name in _FIGURES}
    costs = dict.fromkeys(_COSTS)
    if line["t"] == len(plan.edits):
        seconds = [report.seconds for report in method.edits]
        costs = {
            "seconds_per_edit": median(seconds),
            "edit_seconds": sum(seconds),
            "successes": sum(report.success for report in method.edits),
            "memories": method.count,
            "served_mb": served(method) / _MB,
            "peak_mb": memory.peak() / _MB,
        }
    named = {
        "method": method.name,
        "task": line["task"],
        "T": line["t"],
        "settings": json.dumps(method.settings(), separators=(",", ":")),
    }
    return {**place, **named, "seed": str(plan.seed), **figures, **costs}


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.lifelong", description="methods side by side, over many edits"
    )
    add_source(parser)
    parser.add_argument("--T", type=at_least(1), help="edits to teach (default: all)")
    parser.add_argument("--offset", type=at_least(0), default=0, help="edits left out before them (%(default)s)")
    parser.add_argument("--methods", type=_names, default=NAMES, help=f"of {','.join(NAMES)}, in this order")
    parser.add_argument("--task", choices=tuple(TASKS), default="qa")
    parser.add_argument("--evaluate-at", help="such as 1,10,50 (default: 1,10,100,300,1000,... and the end)")
    parser.add_argument("--irrelevant", type=Path, help="partner file: the edits' texts for the margin loss")
    generate = argparse.BooleanOptionalAction
    parser.add_argument("--generate", action=generate, default=True, help="also by free generation, where tasks do")
    parser.add_argument("--seed", type=int, default=0, help="of every method that draws (%(default)s)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="METHOD.KEY=VALUE", help="such as wise.steps=20, repeatable"
    )
    parser.add_argument("--out", type=Path, help="new directory for the runs and the report")
    parser.add_argument(
        "--results", type=Path, default=records.RESULTS, help="directory of lifelong.csv (bench/results)"
    )
    parser.add_argument("--no-plots", action="store_true", help="a report without pictures")
    parser.add_argument("--config", type=Path, help="file of a `wise-fast run`; options given here come first")
    parser.set_defaults(ours={})
    options = parser.parse_args(arguments)
    if options.config is not None:
        file = read_run_file(options.config)
        ours = method_settings(file)
        own = {name: file[name] for name in _FROM_FILE if name in file}
        parser.set_defaults(**{"seed": ours.get("seed", options.seed)} | own, ours=ours)
        options = parser.parse_args(arguments)
    if options.out is None:
        parser.error("--out is missing: a new directory for the runs and the report")
    return options


def _names(text: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(text.split(",")))
    if unknown := [name for name in names if name not in NAMES]:
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: expected some of {', '.join(NAMES)}")
    return names


def settings_of(methods: Sequence[str], given: Sequence[str], seed: int, ours: dict) -> dict[str, dict]:
    """Settings by method from "method.key=value", on top of `ours`; the seed goes to every method that has one."""
    found: dict[str, dict] = {name: dict(ours) if name == "wise_fast" else {} for name in methods}
    for name in found.keys() & {"wise_fast", "wise"}:
        found[name]["seed"] = seed
    for text in given:
        key, value = parse_setting(text)
        name, dot, setting = key.partition(".")
        if not dot or name not in found:
            raise ConfigError(f"--set {text!r}: expected METHOD.KEY=VALUE, of {', '.join(methods)}")
        found[name][setting] = value
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Run, record, print the table of the last evaluations, and write the report."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    try:
        options = parse(arguments)
        points = None if options.evaluate_at is None else parse_points(options.evaluate_at)
        settings = settings_of(options.methods, options.set, options.seed, options.ours)
        run = RunSettings(task=options.task, T=options.T, evaluate_at=points, generate=options.generate)
        _require_new(options.out)
        if not options.no_plots:
            require_matplotlib()
        edits = read_edits(options.edits, options.T, options.offset, options.irrelevant)
        run.edits_of(len(edits))
        place = records.environment(
            options.model, options.device or "cpu", ["python", "-m", "bench.lifelong", *arguments]
        )
        place |= {"edits": options.edits.name if options.edits else "demo", "offset": options.offset}
        model, tokenizer = load_model(options.model, dtype=options.dtype, device=options.device)
        plan = Plan(edits, run, options.seed, options.model, options.edits)
        rows = compare(plan, model, tokenizer, settings, options.out, place, options.results)
        last = [row for row in rows if row["T"] == len(edits)]
        shown = [n for n in COLUMNS if n not in _HIDDEN and any(row[n] is not None for row in last)]
        records.show(last, shown)
        report = write_report([options.out], options.out / "report", plot=not options.no_plots)
        sys.stderr.write(f"report: {report[0]}\n")
    except WiseError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
