"""What users of EasyEdit bring: the hyper-parameter file of its WISE, and the columns of its `edit` call.

Request lists (records with `prompt` and `target_new`) need nothing from here: `load_edits` and `as_edits` read them.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from wise_fast.config import WiseConfig
from wise_fast.data import Edit, as_edits
from wise_fast.errors import ConfigError, EditDataError
from wise_fast.formats import suggestion
from wise_fast.value_files import read_values

_PROJECTIONS = ("down_proj", "c_proj", "fc_out", "fc2", "dense_4h_to_h", "w2")
# Settings without a counterpart: what to do instead. Those with None matter only where they are on.
_ELSEWHERE = {
    "model_name": "name the model when it is loaded (--model)",
    "device": "name the device when the model is loaded (--device)",
    "max_length": "no text is cut; one that does not fit the model's context is an error",
    "evaluation_type": "figures are those of the task that scores (--task)",
}
_ONLY_WHEN_ON = {
    "model_parallel": "load the model over several devices yourself and pass it to WiseEditor",
    "use_chat_template": "prompts are taken as they are; apply the tokenizer's chat template to them first",
    "replay": "earlier edits are not replayed; `protect` and the shard's thresholds keep them",
    "save_path": "save with save_pretrained or --out",
    "load_path": "load with WiseEditor.from_pretrained or --pack",
    "padding_side": "either side is handled",
    "enable_thinking": "prompts are taken as they are",
    "attn_implementation": "choose it when the model is loaded",
    "language_model_only": "only causal language models are edited",
}
_NUMBERS = {
    "mask_ratio": "mask_ratio",
    "edit_lr": "lr",
    "n_iter": "max_steps",
    "act_ratio": "act_ratio",
    "batch_size": "batch_size",
}
_READ = (
    "alg_name",
    *_NUMBERS,
    "norm_constraint",
    "act_margin",
    "alpha",
    "beta",
    "gamma",
    "save_freq",
    "merge_freq",
    "merge_alg",
    "retrieve",
    "objective_optimization",
    "inner_params",
    "densities",
    "weights",
)
_KNOWN = (*_READ, *_ELSEWHERE, *_ONLY_WHEN_ON)


def config_from_yaml(path: str | os.PathLike) -> tuple[WiseConfig, list[str]]:
    """The settings of EasyEdit's WISE hyper-parameter file, on top of `WiseConfig.paper()`.

    Returns:
        The config, and one note for every setting that has no counterpart here: which, and what to do instead.

    Raises:
        ConfigError: the file cannot be read, is not for WISE, or a setting is unknown, of the wrong kind, out of range
            or asks for what this engine does not do.
    """
    return config_from_hparams(read_values(Path(path)), str(path))


def config_from_hparams(values: Mapping[str, Any], source: str = "hparams") -> tuple[WiseConfig, list[str]]:
    """`config_from_yaml` for hyper-parameters that have been read already; `source` names them in errors."""
    try:
        return _converted(values)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from None


def _converted(values: Mapping[str, Any]) -> tuple[WiseConfig, list[str]]:
    if (name := values.get("alg_name")) != "WISE":
        raise ConfigError(f"alg_name is {name!r}, expected 'WISE'; only its hyper-parameters have a counterpart here")
    for key in values:
        if key not in _KNOWN:
            raise ConfigError(
                f"unknown setting {key!r}{suggestion(str(key), _KNOWN)}; this engine has no counterpart and does not "
                "know what it asks for; drop it"
            )
    given = {key: value for key, value in values.items() if value is not None}
    changes: dict[str, Any] = {ours: _number(given, name) for name, ours in _NUMBERS.items() if name in given}
    for name in ("max_steps", "batch_size"):
        if name in changes:
            changes[name] = _whole(changes[name])
    changes |= _margins(given)
    if "norm_constraint" in given and given["norm_constraint"] is not False:
        changes["clamp"] = _number(given, "norm_constraint")
    notes: list[str] = []
    changes |= _layer(given, notes) | _memories(given, notes)
    if (objective := given.get("objective_optimization", "only_label")) != "only_label":
        raise ConfigError(
            f"objective_optimization is {objective!r}, expected 'only_label': the loss is over the target's tokens"
        )
    notes += [f"{key} {given[key]!r} is not used: {why}" for key, why in _ELSEWHERE.items() if key in given]
    notes += [f"{key} {given[key]!r} is not used: {why}" for key, why in _ONLY_WHEN_ON.items() if given.get(key)]
    return WiseConfig.paper(**changes), notes


def _margins(given: Mapping[str, Any]) -> dict[str, float]:
    names = ("alpha", "beta", "gamma")
    margins = given.get("act_margin")
    if margins is None:
        return {name: _number(given, name) for name in names if name in given}
    if not isinstance(margins, (list, tuple)) or len(margins) != 3:
        raise ConfigError(f"act_margin is {margins!r}, expected three numbers: [alpha, beta, gamma]")
    return {name: _number({"act_margin": value}, "act_margin") for name, value in zip(names, margins, strict=True)}


def _layer(given: Mapping[str, Any], notes: list[str]) -> dict[str, int]:
    """The layer of `inner_params`, such as ["model.layers[27].mlp.down_proj.weight"]."""
    if "inner_params" not in given:
        return {}
    names = given["inner_params"]
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str):
        raise ConfigError(f"inner_params is {names!r}, expected a list of one parameter's name: one layer is edited")
    number = re.search(r"(?:\[|\.)(\d+)(?:\]|\.)", names[0])
    if number is None:
        raise ConfigError(
            f"inner_params names {names[0]!r}, which has no layer number; expected such as "
            "'model.layers[27].mlp.down_proj.weight'"
        )
    parts = re.split(r"[.\[\]]+", names[0])
    if not any(part in _PROJECTIONS for part in parts) or any("attn" in part for part in parts):
        notes.append(
            f"inner_params names {names[0]!r}: this engine edits the FFN's last matrix (the value projection) of layer "
            f"{number[1]} instead"
        )
    return {"layer": int(number[1])}


def _memories(given: Mapping[str, Any], notes: list[str]) -> dict[str, Any]:
    """Mode, shard size, shards of a merge and density."""
    retrieve = given.get("retrieve", False)
    if not isinstance(retrieve, bool):
        raise ConfigError(f"retrieve is {retrieve!r}, expected true or false")
    save, merge = (_whole(_number(given, key)) if key in given else None for key in ("save_freq", "merge_freq"))
    for key, value in (("save_freq", save), ("merge_freq", merge)):
        if value is not None and (not isinstance(value, int) or value < 1):
            raise ConfigError(f"{key} is {given[key]!r}, expected a whole number from 1")
    save = merge if save is None else save
    if save is not None and merge is not None and merge % save:
        raise ConfigError(f"merge_freq is {merge}, expected a multiple of save_freq, which is {save}")
    changes: dict[str, Any] = {"shard_size": save, "mode": "retrieve" if retrieve else "merge"}
    if save is not None and merge is not None:
        changes["shards"] = merge // save
    if "densities" in given:
        changes["density"] = _number({"densities": _only(given["densities"], "densities")}, "densities")
    if retrieve:
        if merge is not None and merge != save:
            notes.append(
                f"merge_freq {merge} is not used: with retrieve, every shard of save_freq {save} edits stays a memory "
                "of its own"
            )
    elif save is None:
        raise ConfigError("save_freq and merge_freq are missing, expected them where retrieve is false; add them")
    elif (algorithm := given.get("merge_alg", "ties")) != "ties":
        raise ConfigError(f"merge_alg is {algorithm!r}, expected 'ties'")
    weights = _only(given.get("weights", 1.0), "weights")
    if _number({"weights": weights}, "weights") != 1.0:
        notes.append(f"weights {given['weights']!r} is not used: shards are merged with equal weights that sum to 1")
    return changes


def _only(value: Any, name: str) -> Any:
    """A number, or the one number that a list holds; lists of different ones have no counterpart."""
    if not isinstance(value, list):
        return value
    if len({repr(item) for item in value}) != 1:
        raise ConfigError(f"{name} is {value!r}, expected one number: all shards are treated alike")
    return value[0]


def _number(given: Mapping[str, Any], name: str) -> float:
    """A number, also one that YAML leaves as text (1e-3)."""
    value = given[name]
    if isinstance(value, str):
        with suppress(ValueError):
            value = float(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ConfigError(f"{name} is {given[name]!r}, expected a number")
    return value


def _whole(value: float) -> float | int:
    return int(value) if float(value).is_integer() else value


def _kind(value: Any) -> str:
    return "nothing" if value is None else f"a {type(value).__name__}"


def requests(
    prompts: str | Sequence[str],
    target_new: str | Sequence[str],
    *,
    ground_truth: str | Sequence | None = None,
    rephrase_prompts: str | Sequence | None = None,
    locality_inputs: Mapping[str, Mapping] | None = None,
    portability_inputs: Mapping[str, Mapping] | None = None,
    subject: str | Sequence | None = None,
    loc_prompts: str | Sequence | None = None,
    ood_rephrase: str | Sequence | None = None,
) -> list[Edit]:
    """Edits from the columns of EasyEdit's `edit` call; a single text is a column of one.

    Args:
        prompts, target_new: what is asked, and the answer to teach.
        ground_truth: the old answers.
        rephrase_prompts: of each edit a paraphrase, a list of them, or None.
        locality_inputs: by name {"prompt": [...], "ground_truth": [...]}, an entry an edit; None where it has none.
        portability_inputs: taken for the call's sake and left out, as no task here scores them.
        subject: what each edit is about.
        loc_prompts: irrelevant texts for the margin loss; fewer than there are edits are used over again.
        ood_rephrase: out-of-distribution passages (temporal task).

    Raises:
        EditDataError: a column has not as many entries as there are prompts, or an entry is unusable.
    """
    asked = _column(prompts, "prompts", None)
    count = len(asked)
    if isinstance(loc_prompts, (str, list, tuple)) and len(loc_prompts):
        texts = _column(loc_prompts, "loc_prompts", None)
        loc_prompts = [texts[i % len(texts)] for i in range(max(count, len(texts)))]
    columns = {
        "prompt": asked,
        "target_new": _column(target_new, "target_new", count),
        "ground_truth": _column(ground_truth, "ground_truth", count),
        "rephrase_prompt": _column(rephrase_prompts, "rephrase_prompts", count),
        "subject": _column(subject, "subject", count),
        "loc_prompt": _column(loc_prompts, "loc_prompts", count),
        "ood_rephrase": _column(ood_rephrase, "ood_rephrase", count),
    }
    records: list[dict] = [{name: column[i] for name, column in columns.items()} for i in range(count)]
    for record in records:
        record["locality"] = {}
    for name, places in (locality_inputs or {}).items():
        where = f"locality_inputs[{name!r}]"
        if not isinstance(places, Mapping) or "prompt" not in places:
            raise EditDataError(f"{where}: expected {{'prompt': [...], 'ground_truth': [...]}}, got {places!r:.60}")
        questions = _column(places["prompt"], f"{where}['prompt']", count)
        answers = _column(places.get("ground_truth"), f"{where}['ground_truth']", count)
        for record, question, answer in zip(records, questions, answers, strict=True):
            if question is not None:
                record["locality"][name] = {"prompt": question, "ground_truth": answer}
    return as_edits(records)


def _column(values: str | Sequence | None, name: str, count: int | None) -> list:
    """A column as a list; None is a column of nothing."""
    if values is None and count is not None:
        return [None] * count
    values = [values] if isinstance(values, str) else values
    if not isinstance(values, (list, tuple)):
        raise EditDataError(f"{name}: expected a list with an entry an edit, got {_kind(values)}; give a list")
    if count is not None and len(values) != count:
        raise EditDataError(f"{name}: has {len(values)} entries, expected {count}, as many as there are prompts")
    return list(values)
