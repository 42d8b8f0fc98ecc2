"""What the package as a whole promises: it cannot shadow `kernels`, knows tensors only, and does not call its spec."""

import ast
from pathlib import Path

import pytest

import wise_kernels

KERNELS = Path(wise_kernels.__file__).parents[1]
FILES = sorted(Path(wise_kernels.__file__).parent.rglob("*.py"))


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or "")


def test_there_is_no_kernels_package():
    assert not (KERNELS / "__init__.py").exists()


def test_everything_public_is_exported():
    assert all(callable(getattr(wise_kernels, name)) for name in wise_kernels.__all__)


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_a_file_knows_tensors_only_and_stays_short(path):
    names = set(imported(path))
    assert not any(name.split(".")[0] in {"transformers", "wise_fast"} for name in names)
    assert path.parent.name == "gpu" or not any(name.split(".")[0] == "triton" for name in names)
    assert not any(name.endswith(".reference") for name in names)
    assert len(path.read_text().splitlines()) <= 300


def test_a_definition_is_at_most_forty_lines():
    tree = ast.parse((Path(wise_kernels.__file__).parent / "reference.py").read_text())
    lengths = {f.name: f.end_lineno - f.lineno + 1 for f in tree.body if isinstance(f, ast.FunctionDef)}
    assert max(lengths.values()) <= 40, lengths
