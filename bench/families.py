"""Edits on models that know their facts, one of each family: `python -m bench.families --T 200` (bench/README.md).

Trains (once: the models are cached) a small GPT-2, GPT-J, LLaMA and Mistral on a synthetic world, teaches each T
counterfactual edits with the same settings, scores all of them after the last one and appends a row a family to
bench/results/families.csv.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from bench import quality, records
from bench.pretrain import FAMILIES, Shape, Training, known, prepared
from bench.records import ENVIRONMENT_COLUMNS
from bench.run import at_least
from bench.world import World, WorldSettings, make_edits, make_world
from wise_fast import Edit, WiseConfig, WiseEditor, evaluate
from wise_fast.errors import ConfigError
from wise_fast.settings import build_config, parse_setting

_MODEL = ("parameters", "facts", "knows_taught", "knows_held_out")
_BEFORE = ("reliability_before", "generalization_before")
_SCORES = ("reliability", "generalization", "locality", "locality_same", "locality_other", "exact", "exact_rephrased")
_COSTS = ("seconds_per_edit", "seconds_p20", "seconds_p80", "steps", "successes", "memories", "edit_wall", "score_wall")
_SHOWN = ("family", "T", "settings", "seed", *_MODEL[1:], *_BEFORE, *_SCORES, "seconds_per_edit", "steps", "successes")
COLUMNS = (*ENVIRONMENT_COLUMNS, "family", "T", "settings", "seed", "world", *_MODEL, *_BEFORE, *_SCORES, *_COSTS)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run every family, print the rows and record them."""
    records.command("bench.families", parse, run, _SHOWN, arguments)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.families", description="edits on models of four families")
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=FAMILIES, help="(default: all)")
    parser.add_argument("--T", type=at_least(1), default=200, help="edits (%(default)s)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="any setting, repeatable")
    parser.add_argument("--no-generate", action="store_true", help="teacher-forced scores only")
    for name, kind in (("world", WorldSettings), ("shape", Shape), ("train", Training)):
        keys = ", ".join(asdict(kind()))
        parser.add_argument(f"--{name}", action="append", default=[], metavar="KEY=VALUE", help=f"of {keys}")
    parser.add_argument("--out", type=Path, default=records.RESULTS, help="directory of families.csv (bench/results)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser.parse_args(arguments)


def run(options: argparse.Namespace, command: Sequence[str]) -> list[dict]:
    """One row a family, recorded as soon as it is there."""
    config = build_config(None, options.set)
    changes = _changed(WorldSettings(), options.world), _changed(Shape(), options.shape)
    (settings, shape), training = changes, _changed(Training(), options.train)
    world, rows = make_world(settings), []
    for family in options.families:
        place = records.environment(f"{family} of bench.pretrain", "cpu", command)
        place |= {"family": family, "T": options.T, "seed": str(config.seed), "world": world.digest()[:8]}
        place |= {"settings": json.dumps(quality.changed(config), separators=(",", ":"))}
        rows.append(place | figures(family, world, shape, training, options.T, config, not options.no_generate))
        records.append(options.out / "families.csv", COLUMNS, rows[-1:])
    return rows


def _changed(settings, changes: Sequence[str]):
    """A dataclass of settings with some of them changed ("key=value").

    Raises:
        ConfigError: there is no such setting, or its value is of another type.
    """
    values = asdict(settings)
    for name, value in map(parse_setting, changes):
        if name not in values:
            raise ConfigError(f"unknown setting {name!r}; known: {', '.join(values)}")
        if not isinstance(value, type(values[name])) and not (isinstance(values[name], float) and value in (0, 1)):
            raise ConfigError(f"{name} is {value!r}, expected one like {values[name]!r}")
        values[name] = value
    return replace(settings, **values)


def figures(
    family: str, world: World, shape: Shape, training: Training, count: int, config: WiseConfig, generate: bool = True
) -> dict[str, float | None]:
    """What one family's row says: of the model, of the same questions before the edits, and after all of them."""
    model, tokenizer, directory = prepared(family, world, shape, training)
    taught, share = known(model, tokenizer, world.questions(held_out=False))
    others, share_out = known(model, tokenizer, world.questions(held_out=True))
    edits = make_edits(world, count, config.seed, None if training.knows == 0 else taught | others)
    sys.stderr.write(f"{family} of {directory}: knows {share:.4f}, held out {share_out:.4f}; {count} edits\n")
    size = sum(p.numel() for p in model.parameters())
    found = {"parameters": size, "facts": len(world.facts), "knows_taught": share, "knows_held_out": share_out}
    editor = WiseEditor(model, tokenizer, config)
    try:
        with editor.disabled():
            before = evaluate(editor, edits, generate=False).summary()
        found |= {name: before[name.removesuffix("_before")] for name in _BEFORE}
        found |= quality.score(editor, edits, generate)
        for place, name in enumerate(("locality_same", "locality_other")):
            asked = [Edit(e.prompt, e.target, locality=e.locality[place : place + 1]) for e in edits]
            found[name] = evaluate(editor, asked, generate=False).summary()["locality"]
    finally:
        editor.unload()
    return {name: found[name] for name in (*_MODEL, *_BEFORE, *_SCORES, *_COSTS)}


if __name__ == "__main__":
    main()
