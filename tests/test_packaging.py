"""The project's files agree with each other and with what is installed."""

import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

tomllib = pytest.importorskip("tomllib", reason="in the standard library from Python 3.11 on")

ROOT = Path(__file__).resolve().parents[1]
# torch release -> the triton release it is built with (torch's own metadata says so for its CUDA builds)
TRITON_OF_TORCH = {"2.11": "3.6", "2.13": "3.7", "2.15": "3.9"}


@pytest.fixture(scope="module")
def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.fixture(scope="module")
def pins():
    lines = (line.split("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines())
    found = [Requirement(line) for line in lines if line]
    assert len({canonicalize_name(pin.name) for pin in found}) == len(found), "a package is pinned twice"
    return {canonicalize_name(pin.name): pin for pin in found}


def direct_requirements(project):
    table = project["project"]
    lines = list(table["dependencies"])
    for extra in table["optional-dependencies"].values():
        lines += extra
    return [req for req in map(Requirement, lines) if canonicalize_name(req.name) != "wise-fast"]


def pinned_version(pin):
    (clause,) = pin.specifier
    assert clause.operator == "==" and "*" not in clause.version, f"{pin} is not an exact pin"
    return clause.version


def test_every_direct_dependency_is_pinned_within_its_range_and_nothing_else_is(project, pins):
    direct = direct_requirements(project)
    assert {canonicalize_name(req.name) for req in direct} == set(pins)
    for req in direct:
        version = pinned_version(pins[canonicalize_name(req.name)])
        assert req.specifier.contains(version), f"{version} is outside {req}"


def test_torch_is_pinned_with_the_triton_it_was_built_with(pins):
    torch_version, triton_version = (Version(pinned_version(pins[name])) for name in ("torch", "triton"))
    expected = TRITON_OF_TORCH[f"{torch_version.major}.{torch_version.minor}"]
    assert f"{triton_version.major}.{triton_version.minor}" == expected


def test_the_makefile_finds_the_torch_pin(pins):
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("torch==")]
    assert lines == [str(pins["torch"])], "the Makefile greps for this one line and gives it to pip as it is"


def test_extras_named_by_extras_exist(project):
    extras = project["project"]["optional-dependencies"]
    named = {
        extra
        for lines in extras.values()
        for req in map(Requirement, lines)
        if canonicalize_name(req.name) == "wise-fast"
        for extra in req.extras
    }
    assert named <= set(extras)
    assert set(extras) == {"cli", "plot", "demo", "gguf", "eval", "serve", "quant", "bench", "dev"}


def test_installed_version_is_the_one_in_pyproject(project):
    import wise_fast

    assert wise_fast.__version__ == metadata.version("wise_fast") == project["project"]["version"]


def test_entry_point_is_declared_and_installed(project):
    target = "wise_fast.cli:main"
    assert project["project"]["scripts"] == {"wise-fast": target}
    installed = {entry.name: entry.value for entry in metadata.entry_points(group="console_scripts")}
    assert installed.get("wise-fast") == target


def test_both_packages_import_from_elsewhere(tmp_path):
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    code = "import wise_fast, wise_kernels; print(wise_fast.__file__); print(wise_kernels.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = [Path(line).resolve() for line in done.stdout.split()]
    assert found == [ROOT / "wise_fast/__init__.py", ROOT / "kernels/wise_kernels/__init__.py"]


def test_no_top_level_package_named_kernels():
    assert not (ROOT / "kernels" / "__init__.py").exists(), "it would shadow Hugging Face's `kernels` package"


def test_licence_is_apache_2(project):
    text = (ROOT / "LICENSE").read_text()
    assert project["project"]["license"] == "Apache-2.0"
    assert re.search(r"Apache License\s+Version 2\.0, January 2004", text) and "END OF TERMS AND CONDITIONS" in text


def test_ci_script_is_executable_bash():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert script.read_text().startswith("#!/usr/bin/env bash\nset -euo pipefail\n")


def test_kernel_tests_run_without_hypothesis():
    code = """
import sys, pytest
class Absent:
    def find_spec(name, *rest):
        if name.partition(".")[0] == "hypothesis":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent)
sys.exit(pytest.main(["-q", "-p", "no:hypothesispytest", "tests/kernels/test_bits.py"]))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert "needs hypothesis" in done.stdout and "passed" in done.stdout
