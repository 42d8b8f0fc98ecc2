"""The edits card: README.md of a saved directory, for people and for the hub.

It says what wise_config.json says, so the same edits have the same card: no time, no path. It is neither read nor
checked, so that it may be edited by hand; saving again writes it anew.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from wise_fast.config import WiseConfig
from wise_fast.errors import ConfigError
from wise_fast.state import EditReport

_LISTED, _WIDEST = 50, 120  # edits, and characters of each text

_LOADING = """```python
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from wise_fast import WiseEditor

model = AutoModelForCausalLM.from_pretrained({model}, dtype=torch.{dtype})
tokenizer = AutoTokenizer.from_pretrained({model})
editor = WiseEditor.from_pretrained(model, tokenizer, {pack})  # a directory, or an id on the Hugging Face hub
model.generate(...)  # answers with the edits
```"""


def about(model, metrics: Mapping[str, float | None] | None) -> dict:
    """What a card says beyond the edits themselves: the base model's hub id, where it has one, and metrics.

    Raises:
        ConfigError: a metric is not a number.
    """
    facts: dict = {}
    name = str(getattr(model.config, "name_or_path", ""))
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) and not Path(name).exists():  # a path is nobody else's business
        facts["model"] = name
    for key, value in (metrics or {}).items():
        number = isinstance(value, (int, float)) and math.isfinite(value)
        if value is not None and not number:
            raise ConfigError(
                f"metric {key!r} is {value!r}, expected a finite number, as Evaluation.summary() has them"
            )
    kept = {str(key): float(value) for key, value in (metrics or {}).items() if value is not None}
    return facts | ({"metrics": kept} if kept else {})


def write(header: Mapping, reports: Sequence[EditReport]) -> str:
    """The card of a directory with this wise_config.json and these edits."""
    base, facts = header["base"], header.get("about", {})
    model = facts.get("model")
    front = ["library_name: wise_fast", "tags:", "- wise", "- model-editing"]
    front += [f"base_model: {model}"] if model else []
    counts = f"{len(reports)}, of which {sum(r.success for r in reports)} hold"
    rows = {
        "base model": f"`{model}`" if model else f"a `{base['family']}` model; its fingerprint tells which",
        "family": f"{base['family']}, {base['layers']} layers, {base['dtype']}",
        "edited": f"layer {base['layer']}, `{base['projection']}`, {base['shape'][0]} x {base['shape'][1]}",
        "fingerprint of the base": f"`{base['weights'][:16]}`",
        "edits": counts,
        "side memories": f"{len(header['memories'])}, {sum(m['bytes'] for m in header['memories'])} bytes",
        "written by": f"wise_fast {header['library']}",
    }
    parts = [
        "\n".join(["---", *front, "---"]),
        f"# {len(reports)} edits of {model or 'a ' + base['family'] + ' model'}",
        "Facts taught to a language model with WISE ([arXiv 2405.14768](https://arxiv.org/abs/2405.14768)). The base "
        "model's weights are not in here.",
        _table(("", ""), rows),
        "## Edits",
        _edits(reports),
        *(["## Metrics", _table(("metric", "mean"), _spoken(facts["metrics"]))] if "metrics" in facts else []),
        "## Settings",
        "Those that are not the defaults; `wise_config.json` has them all.",
        _settings(header["config"]),
        "## How to load",
        _LOADING.format(model=repr(model or "the base model"), dtype=base["dtype"], pack=repr("this directory")),
    ]
    return "\n\n".join(parts) + "\n"


def _edits(reports: Sequence[EditReport]) -> str:
    """The first of them, superseded ones left out."""
    held = [report for report in reports if not report.superseded]
    if not held:
        return "None."
    lines = ["| prompt | target | holds |", "| --- | --- | --- |"]
    for report in held[:_LISTED]:
        shown = (_cell(report.edit.prompt), _cell(report.edit.target), "yes" if report.success else "no")
        lines.append(f"| {' | '.join(shown)} |")
    more = len(held) - _LISTED
    where = f"{more} more, and all of each, are" if more > 0 else "All of each is"
    return "\n".join(lines) + f"\n\n{where} in `wise_edits.json`."


def _cell(text: str) -> str:
    """A text as one cell of a table shows it, to the letter and on one line."""
    text = " ".join(text.split())
    text = text if len(text) <= _WIDEST else text[: _WIDEST - 3] + "..."
    return re.sub(r"([\\`*_\[\]<>|~#$&])", r"\\\1", text)


def _spoken(metrics: Mapping[str, float]) -> dict[str, str]:
    return {name.replace("_", " "): f"{value:.3f}" for name, value in metrics.items()}


def _settings(config: Mapping) -> str:
    default = WiseConfig().to_dict()
    changed = {name: f"`{json.dumps(v)}`" for name, v in config.items() if name not in default or v != default[name]}
    return _table(("setting", "value"), changed) if changed else "All are the defaults."


def _table(head: tuple[str, str], rows: Mapping[str, str]) -> str:
    lines = [head, ("---", "---"), *rows.items()]
    return "\n".join(f"| {name} | {value} |" for name, value in lines)
