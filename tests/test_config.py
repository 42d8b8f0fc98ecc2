"""Settings are checked when made, and survive a dict and JSON."""

import dataclasses
import json
import math
import re

import pytest

from wise_fast import WiseConfig
from wise_fast.errors import ConfigError, WiseError

SHARES = ("mask_ratio", "density", "act_ratio", "z_ratio")
POSITIVE = ("lr", "protect_lambda", "protect_irrelevant", "near_limit", "first_token", "clamp", "last_ratio")
NOT_NEGATIVE = ("alpha", "beta", "gamma", "margin_weight", "nll", "momentum", "weight_decay", "drop_rate")
COUNTS = (
    "max_steps",
    "min_steps",
    "shards",
    "batch_size",
    "wave",
    "prefix_tokens",
    "prefixes_per_step",
    "shard_size",
)
COUNTS_OR_0 = ("prefixes", "dropped", "near", "rehearsals", "undo_depth", "seed")
CHOICES = {
    "layout": ("neuron", "element"),
    "optimizer": ("adam", "sgd"),
    "mode": ("retrieve", "merge"),
    "merging": ("ties", "regmean"),
    "route_by": ("leverage", "score"),
    "reduction": ("mean", "max"),
    "stop": ("auto", "eos", "newline", "none"),
    "units": ("relative", "absolute"),
}
BAD = [
    *((name, value) for name in SHARES for value in (0, -0.1, 1.01, math.nan)),
    *((name, value) for name in POSITIVE for value in (0, -1.0, math.inf)),
    *((name, value) for name in NOT_NEGATIVE for value in (-0.01, math.nan, math.inf)),
    *((name, value) for name in ("momentum", "drop_rate") for value in (1, 1.5)),
    *((name, value) for name in COUNTS for value in (0, -1, 1.5, 2.0, True)),
    *((name, value) for name in COUNTS_OR_0 for value in (-1, 0.5, False)),
    *((name, value) for name in (*SHARES, *POSITIVE, *NOT_NEGATIVE, *COUNTS, *COUNTS_OR_0) for value in ("1", [1])),
    *((name, None) for name in (*SHARES, *NOT_NEGATIVE, *COUNTS_OR_0, *CHOICES, "lr", "max_steps", "protect")),
    *((name, value) for name in CHOICES for value in ("", "Neuron", 1, ["neuron"])),
    *(("layer", value) for value in (1.0, "3", True)),
    *((name, value) for name in ("protect", "by_subject") for value in ("false", 1, 0)),
    *(("shard_fill", value) for value in (0, -0.1, 1.01, math.nan, "1", [1])),
    *(("last_dropout", value) for value in (-0.1, 1.01, math.nan, None, "1", [1])),
]


@pytest.mark.parametrize("name, value", BAD, ids=lambda item: str(item))
def test_a_bad_value_is_refused_with_its_name_what_it_was_and_what_it_should_be(name, value):
    with pytest.raises(ConfigError) as caught:
        WiseConfig(**{name: value})
    assert re.match(rf"{name} is {re.escape(repr(value))}, expected \S", str(caught.value))
    assert isinstance(caught.value, (WiseError, ValueError))


@pytest.mark.parametrize("name", CHOICES)
def test_every_choice_is_taken_and_named_in_the_error(name):
    for value in CHOICES[name]:
        assert getattr(WiseConfig(**{name: value}, shard_size=3), name) == value
    with pytest.raises(ConfigError, match=", ".join(CHOICES[name])):
        WiseConfig(**{name: "other"})


@pytest.mark.parametrize(
    "name, value",
    [
        *((name, 1) for name in SHARES),
        *((name, 0) for name in (*NOT_NEGATIVE, *COUNTS_OR_0, "layer")),
        *((name, 1) for name in COUNTS),
        *((name, None) for name in ("layer", "shard_size", "shard_fill", "clamp", "protect_irrelevant", "last_ratio")),
        ("layer", -1),
        ("shard_fill", 1),
        *(("last_dropout", value) for value in (0, 1)),
    ],
)
def test_the_bounds_themselves_are_fine(name, value):
    assert getattr(WiseConfig(**{name: value}), name) == value


def test_every_setting_is_checked_somewhere():
    listed = {*SHARES, *POSITIVE, *NOT_NEGATIVE, *COUNTS, *COUNTS_OR_0, *CHOICES, "layer", "shard_fill"}
    listed |= {"protect", "by_subject", "last_dropout"}
    assert {field.name for field in dataclasses.fields(WiseConfig)} == listed


def test_every_setting_is_described():
    for field in dataclasses.fields(WiseConfig):
        assert re.search(rf"\b{field.name}\b[^:\n]*:", WiseConfig.__doc__), field.name


def test_merging_needs_to_know_when():
    with pytest.raises(ConfigError, match="shard_size"):
        WiseConfig(mode="merge", shard_size=None)
    assert WiseConfig(mode="merge").merging == "regmean"


@pytest.mark.parametrize("setting", [{"layout": "element"}, {"protect": False}, {"mask_ratio": 0.2}])
def test_merging_by_covariances_needs_them(setting):
    with pytest.raises(ConfigError, match="mask_ratio .*; or set merging 'ties'"):
        WiseConfig(mode="merge", **setting)
    assert WiseConfig(**setting).mode == "retrieve"
    assert WiseConfig(mode="merge", merging="ties", **setting).merging == "ties"


def test_a_config_does_not_change_and_replace_checks_too():
    config = WiseConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.lr = 2.0
    assert config.replace(max_steps=7).max_steps == 7 and config.replace() == config
    with pytest.raises(ConfigError, match="max_steps is 0"):
        config.replace(max_steps=0)


@pytest.mark.parametrize("config", [WiseConfig(), WiseConfig.paper(), WiseConfig(layer=2, clamp=0.5, shard_size=9)])
def test_round_trip(config):
    assert WiseConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert set(config.to_dict()) == {field.name for field in dataclasses.fields(WiseConfig)}


def test_unknown_settings():
    with pytest.raises(ConfigError, match="unknown setting 'max_step'; did you mean 'max_steps'"):
        WiseConfig.from_dict({"max_step": 3})
    with pytest.raises(ConfigError, match="unknown setting 'qqq'; known: .*mask_ratio"):
        WiseConfig.from_dict({"lr": 1.0, "qqq": 3})
    with pytest.raises(ConfigError, match="seed is -1"):
        WiseConfig.from_dict({"seed": -1})


def test_the_papers_values():
    paper = WiseConfig.paper()
    assert (paper.alpha, paper.beta, paper.gamma, paper.units, paper.act_ratio) == (5.0, 20.0, 10.0, "absolute", 1.0)
    assert (paper.layout, paper.mask_ratio, paper.optimizer, paper.lr) == ("element", 0.2, "sgd", 1.0)
    assert (paper.max_steps, paper.momentum, paper.weight_decay, paper.clamp) == (70, 0.0, 0.0, None)
    assert (paper.prefixes, paper.prefixes_per_step, paper.prefix_tokens, paper.shards) == (10, 10, 10, 2)
    assert (paper.nll, paper.protect, paper.route_by, paper.batch_size, paper.stop) == (0.0, False, "score", 1, "none")
    assert WiseConfig.paper(mode="merge", shard_size=4).merging == "ties"
    with pytest.raises(ConfigError):
        WiseConfig.paper(lr=-1)
