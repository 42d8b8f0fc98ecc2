"""What each part is worth: `python -m bench.ablation --edits FILE --offset 200 --limit 100` (bench/README.md).

The same edits once with the defaults and once with each part left out or exchanged; rows of `bench.quality`, with the
perplexity of held-out passages and the share of prompts never taught that are in scope, in bench/results/ablation.csv.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from bench import quality, records
from bench.run import at_least, read_edits
from wise_fast import Edit, WiseEditor
from wise_fast.models import load_model
from wise_fast.routing_scores import scope_ratios
from wise_fast.settings import build_config
from wise_fast.tasks import general_ability

VARIANTS = {
    "the defaults": {},
    "scores as the paper's, the norm alone": {"route_by": "score"},
    "no protection of earlier edits": {"protect": False},
    "unrelated text is not protected": {"protect_irrelevant": None},
    "subjects are not asked for": {"by_subject": False},
    "no limit of newness": {"last_ratio": None},
    "no neighbours": {"near": 0},
    "five times as loud": {"alpha": 2.5, "beta": 10.0, "gamma": 5.0, "lr": 20.0},
    "no shortened prompts": {"dropped": 0},
    "no prefixes": {"prefixes": 0},
    "all edits in one memory": {"shard_size": None},
    "memories of 25": {"shard_size": 25},
    "memories of 25, rehearsed": {"shard_size": 25, "rehearsals": 12},
    "memories of 25, a quarter of the columns each": {"shard_size": 25, "mask_ratio": 0.25},
    "merged by TIES": {"mode": "merge", "merging": "ties"},
    "merged by covariances": {"mode": "merge", "merging": "regmean"},
    "the paper's optimiser": {"optimizer": "sgd"},
}
_OWN = ("what", "perplexity_before", "perplexity_after", "untaught_in_scope")
COLUMNS = (*quality.COLUMNS, *_OWN)
_SHOWN = ("what", *quality.SCORES, "perplexity_after", "untaught_in_scope", "steps", "successes", "memories")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run every variant, print the rows and record them."""
    records.command("bench.ablation", parse, run, _SHOWN, arguments)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.ablation", description="what each part is worth")
    quality.add_options(parser, "ablation.csv")
    parser.add_argument("--untaught", type=at_least(0), default=100, help="edits after them whose prompts are asked")
    parser.add_argument("--only", help="part of the names of the variants to run (default: all)")
    return parser.parse_args(arguments)


def run(options: argparse.Namespace, command: Sequence[str]) -> list[dict]:
    """One row a variant, recorded as soon as it is there."""
    base = build_config(None, options.set)
    chosen = {what: base.replace(**changes) for what, changes in VARIANTS.items() if (options.only or "") in what}
    edits = read_edits(options.edits, None, options.offset)
    edits, untaught = edits[: options.limit], edits[options.limit or len(edits) :][: options.untaught]
    place = records.environment(options.model, options.device or "cpu", command)
    place |= {"edits": options.edits.name if options.edits else "demo", "offset": options.offset, "count": len(edits)}
    model, tokenizer = load_model(options.model, dtype=options.dtype, device=options.device)
    rows = []
    for what, config in chosen.items():
        sys.stderr.write(f"{what}: {len(edits)} edits\n")
        editor = WiseEditor(model, tokenizer, config)
        try:
            figures = measured(editor, edits, untaught, not options.no_generate)
        finally:
            editor.unload()
        settings = json.dumps(quality.changed(config), separators=(",", ":"))
        rows.append({**place, "what": what, "settings": settings, "seed": str(config.seed), **figures})
        records.append(options.out / "ablation.csv", COLUMNS, rows[-1:])
    return rows


def measured(editor: WiseEditor, edits: Sequence[Edit], untaught: Sequence[Edit], generate: bool) -> dict:
    """Quality, general ability, and how many prompts of edits that were never taught are in some memory's scope."""
    figures = quality.score(editor, edits, generate) | general_ability(editor)
    ratios = scope_ratios(editor, [edit.prompt for edit in untaught])
    return figures | {"untaught_in_scope": sum(r > 1 for r in ratios) / len(ratios) if ratios else None}


if __name__ == "__main__":
    main()
