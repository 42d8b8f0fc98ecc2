"""The documents are true: their Python runs as it stands, their commands and options exist, and so do their files."""

import argparse
import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
from dataclasses import fields
from pathlib import Path

import pytest
import typer
from safetensors.torch import load_file
from torch.distributed.run import get_args_parser

from tests.documents import DOCUMENTS, ROOT
from tests.stored import MODES, make_editor
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
from wise_fast.state import EditReport

COMMANDS = typer.main.get_command(app).commands
BENCHES = [f"bench.{path.stem}" for path in sorted((ROOT / "bench").glob("*.py"))]
PLACES = ("", "wise_fast", "kernels", "kernels/wise_kernels", "kernels/wise_kernels/gpu", "bench", "tests")
NODE = r'\w+(?:\["[^"]*"\]|\("[^"]*"\)|\{"[^"]*"\}|\[\("[^"]*"\)\])?'
EDGE = rf'{NODE}(?: (?:-->|-\.->)(?:\|"[^"]*"\|)? {NODE})*'
DIAGRAM = re.compile(rf"flowchart (?:LR|TD)\n(?:    {EDGE}\n)+")

each_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.name)


def spellings(command):
    """All spellings of a command's options."""
    return {spelling for option in command.params for spelling in (*option.opts, *option.secondary_opts)}


def bench_options(monkeypatch):
    """All spellings of the options of `python -m bench...`."""
    found = set()

    def note(parser, *_):
        found.update(parser._option_string_actions)
        raise InterruptedError

    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", note)
        for module in map(importlib.import_module, BENCHES):
            if hasattr(module, "parse"):
                with pytest.raises(InterruptedError):
                    module.parse([])
    return found


@pytest.fixture
def demo_is_tiny(monkeypatch):
    """`load_model("demo")` gives a random model, whose weights are no download away."""

    def load_model(name_or_path):
        assert name_or_path == "demo"
        return tiny_model("gemma3", num_hidden_layers=8, layer_types=["full_attention"] * 8), tiny_tokenizer()

    monkeypatch.setattr(models, "load_model", load_model)


@each_document
def test_python_runs(document, demo_is_tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "document"}
    blocks = document.fenced("python")
    for number, code in enumerate(blocks, 1):
        exec(compile(code, f"{document.name}, Python block {number}", "exec"), names)
    printed = capsys.readouterr().out.splitlines()
    said = re.findall(r"^ *print\(.*\)  # (True|False)\b", "\n".join(blocks), re.M)
    assert [line for line in printed if line in ("True", "False")] == said  # as the comments beside them say


@each_document
def test_every_block_is_python_or_a_diagram(document):
    assert {language for language, _ in document.blocks} <= {"python", "mermaid"}
    for diagram in document.fenced("mermaid"):
        assert DIAGRAM.fullmatch(diagram), diagram


@each_document
def test_commands_parse(document):
    """As on the command line, up to where the command would begin."""
    for name, *rest in document.commands("wise-fast"):
        values = COMMANDS[name].make_context(name, rest).params
        build_config(None, values.get("settings") or ())


@each_document
def test_distributed_commands_parse(document):
    alone = document.commands("python", "-m", "wise_fast.distributed")
    for arguments in [*document.commands("torchrun"), *(["-m", "wise_fast.distributed", *rest] for rest in alone)]:
        given = get_args_parser().parse_args(arguments)
        assert given.module and given.training_script == "wise_fast.distributed"
        if not given.training_script_args:  # named in passing
            continue
        command = typer.main.get_command(distributed_command.app)
        values = command.make_context("distributed", given.training_script_args).params
        build_config(None, (), mode=values["mode"], shard_size=values["shard_size"])


@each_document
def test_benchmarks_parse(document):
    for module, *rest in document.commands("python", "-m"):
        if module.startswith("bench."):
            importlib.import_module(module).parse(rest)


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@each_document
def test_make_would_run_what_exists(document):
    """`make -n` knows the target, and the benchmark that it would run the arguments."""
    inherited = {name: v for name, v in os.environ.items() if not name.startswith(("MAKE", "MFLAGS", "ARGS"))}
    for words in document.commands("make"):
        dry = ["make", "-n", "AT_HAND=python", *words]
        made = subprocess.run(dry, cwd=ROOT, env=inherited, capture_output=True, text=True, check=True).stdout
        for name, rest in re.findall(r"-m (bench\.\w+)(.*)", made):
            module = importlib.import_module(name)
            if hasattr(module, "parse"):
                module.parse(shlex.split(rest))


@each_document
def test_options_in_passing_exist(document, monkeypatch):
    known = set().union(*map(spellings, COMMANDS.values()), bench_options(monkeypatch))
    for words in (code.split() for code in document.passing if re.match(r"wise-fast |--\w", code)):
        here = spellings(COMMANDS[words[1]]) if words[0] == "wise-fast" else known
        assert {re.split("[= ]", word)[0] for word in words if word.startswith("--")} <= here, words


@each_document
def test_files_exist(document):
    """Modules by name, in whichever folder; result files that are there or that a run writes; what links lead to."""
    text = "\n".join([*document.passing, *document.fenced("mermaid")])
    found = re.findall(r"[\w./*-]+\.py\b", text)
    missing = {name for name in found if not any(any((ROOT / place).glob(name)) for place in PLACES)}
    written = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "bench").glob("*.py"))
    for name in re.findall(r"[\w*]+\.csv\b", text):
        if not any((ROOT / "bench" / "results").glob(name)) and f'"{name}"' not in written:
            missing.add(name)
    links = {link for link in re.findall(r"\]\(([^)#]+)\)", document.text) if not re.match(r"https?://", link)}
    missing |= {link for link in links if not (ROOT / document.name).parent.joinpath(link).exists()}
    assert not missing


def test_every_file_of_the_engine_has_its_line():
    document = next(d for d in DOCUMENTS if d.name == "wise_fast/README.md")
    named = re.findall(r"^\| `(\w+\.py)`", document.text, re.M)
    assert sorted(named) == sorted(path.name for path in Path(ROOT / "wise_fast").glob("*.py"))


def test_the_schema_of_a_pack_is_what_is_written(tmp_path):
    editor = make_editor(3, **MODES["leverage"])
    editor.model.config.name_or_path = "you/tiny"
    editor.save_pretrained(tmp_path / "pack", metrics={"reliability": 1.0})
    header = json.loads((tmp_path / "pack" / "wise_config.json").read_text())
    written = set(header) - {"base", "memories", "state", "about"}
    written |= {f"{part}.{key}" for part in ("base", "state", "about") for key in header[part]}
    written |= {f"memories[].{key}" for memory in header["memories"] for key in memory}
    document = next(d for d in DOCUMENTS if d.name == "wise_fast/README.md")
    (rows,) = re.findall(r"^\| key \| what \|\n(.*?)\n\n", document.text, re.M | re.S)
    assert {key for row in rows.splitlines() for key in re.findall("`([^`]+)`", row.split("|")[1])} == written
    tensors = load_file(tmp_path / "pack" / "wise_memory.safetensors")
    assert {name.replace(".0.", ".N.").replace(".1.", ".N.") for name in tensors} == set(
        re.findall(r"^\| (memories\.N\.\w+)", document.text, re.M)
    )
    assert {field.name for field in fields(EditReport)} <= set(document.passing)


def test_what_is_here_was_found():
    """The patterns above still fit the documents."""
    readme, _, _, bench = DOCUMENTS
    assert len(readme.commands("wise-fast")) >= 8 and len(readme.commands("python", "-m")) >= 3
    assert readme.commands("torchrun")
    assert len(bench.commands("python", "-m")) >= 15 and len(bench.commands("make")) >= 6
    assert all(document.fenced("python") for document in DOCUMENTS)
    assert readme.fenced("mermaid")
