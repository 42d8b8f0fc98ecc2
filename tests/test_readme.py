"""The README is true: its Python runs as it stands, and its commands and options exist."""

import importlib
import re
import shlex
from pathlib import Path

import pytest
import typer

from tests.tiny import tiny_model, tiny_tokenizer
from wise_fast import (  # noqa: F401  most register their commands
    distributed_command,
    export_command,
    harness_command,
    models,
    report_command,
    run_command,
    serve_command,
)
from wise_fast.commands import app
from wise_fast.settings import build_config

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
PYTHON = re.findall(r"^```python\n(.*?)^```", README, re.M | re.S)
INDENTED = re.findall(r"^    (\S.*)", re.sub(r"```.*?```", "", README, flags=re.S), re.M)
SHELL = [shlex.split(line, comments=True) for line in INDENTED]
INLINE = [shlex.split(code) for code in re.findall(r"`((?:wise-fast |--)[^`]*)`", README)]
COMMANDS = typer.main.get_command(app).commands


def shell(*start):
    """Arguments of the README's commands that begin so."""
    return [words[len(start) :] for words in SHELL if tuple(words[: len(start)]) == start]


def options(name):
    """All spellings of a command's options."""
    return {spelling for option in COMMANDS[name].params for spelling in (*option.opts, *option.secondary_opts)}


@pytest.fixture
def demo_is_tiny(monkeypatch):
    """`load_model("demo")` gives a random model, whose weights are no download away."""

    def load_model(name_or_path):
        assert name_or_path == "demo"
        return tiny_model("gemma3", num_hidden_layers=8, layer_types=["full_attention"] * 8), tiny_tokenizer()

    monkeypatch.setattr(models, "load_model", load_model)


def test_python_runs(demo_is_tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "readme"}
    for number, code in enumerate(PYTHON, 1):
        exec(compile(code, f"README.md, Python block {number}", "exec"), names)
    printed = capsys.readouterr().out.splitlines()
    assert len(PYTHON) >= 2 and printed[-1] == "True"  # as the comment beside it says
    assert {file.name for file in tmp_path.iterdir()} == {"pack", "dense"}


@pytest.mark.parametrize("arguments", shell("wise-fast"), ids=" ".join)
def test_commands_parse(arguments):
    """As on the command line, up to where the command would begin."""
    name, *rest = arguments
    values = COMMANDS[name].make_context(name, rest).params
    build_config(None, values.get("settings") or ())


@pytest.mark.parametrize("arguments", shell("torchrun"), ids=" ".join)
def test_distributed_commands_parse(arguments):
    from torch.distributed.run import get_args_parser

    given = get_args_parser().parse_args(arguments)
    assert given.module and given.training_script == "wise_fast.distributed"
    command = typer.main.get_command(distributed_command.app)
    values = command.make_context("distributed", given.training_script_args).params
    build_config(None, (), mode=values["mode"], shard_size=values["shard_size"])


@pytest.mark.parametrize("words", INLINE, ids=" ".join)
def test_options_in_passing_exist(words):
    names = [words[1]] if words[0] == "wise-fast" else COMMANDS
    known = set().union(*map(options, names))
    assert {word for word in words if word.startswith("--")} <= known


@pytest.mark.parametrize("arguments", shell(".venv/bin/python", "-m"), ids=" ".join)
def test_benchmarks_parse(arguments):
    module, *rest = arguments
    importlib.import_module(module).parse(rest)


def test_make_targets_exist():
    named = re.findall(r"(?:`|^    )make ([a-z-]+)", README, re.M)
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
    assert named and set(named) <= set(targets)


def test_what_is_here_was_found():
    """The patterns above still fit the README."""
    assert (
        len(shell("wise-fast")) >= 8
        and shell("torchrun")
        and len(shell(".venv/bin/python", "-m")) >= 3
        and len(INLINE) >= 5
    )
