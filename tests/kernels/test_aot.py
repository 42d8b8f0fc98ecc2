"""Every kernel in its shipped configurations, compiled by processes without interpreter. The suite takes `--quick`: on
sm_90 and gfx942 all kernels, on sm_80 and sm_100 those that promise a matrix instruction, and these in bf16 but not in
fp16. `make aot` compiles the rest: fp16, and on sm_80 and sm_100 the small kernels and the products in IEEE fp32.
"""

import ast
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

import wise_kernels  # noqa: E402
from bench.aot import SHARED, amd_resources, judge  # noqa: E402

ROOT = Path(__file__).parents[2]
GPU = Path(wise_kernels.__file__).parent / "gpu"


def run(out, *arguments):
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), str(ROOT / "tests" / "kernels")])
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": path}
    command = [sys.executable, "-m", "bench.aot", "--json", "--jobs", "2", "--out", str(out), *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout, done.stderr
    return done, json.loads(done.stdout)


@pytest.fixture(scope="module")
def builds(tmp_path_factory):
    return run(tmp_path_factory.mktemp("aot"), "--quick")


def test_no_spills_shared_memory_within_limits_matrix_instructions_as_promised(builds):
    done, rows = builds
    assert done.returncode == 0, done.stderr
    assert all(row["registers"] > 0 and not row["problem"] for row in rows)
    assert {row["target"] for row in rows} == set(SHARED)
    assert {row["module"] for row in rows} == {path.stem for path in GPU.glob("*.py") if set(kernels_of(path))}


def kernels_of(path):
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel"):
            yield node.name


def test_every_kernel_is_compiled():
    for path in sorted(GPU.glob("*.py")):
        names = set(kernels_of(path))
        if names:
            cases = importlib.import_module(f"wise_kernels.gpu.{path.stem}").aot_cases()
            assert names == {case.kernel.__name__ for case in cases}, path.stem
            assert len({case.name for case in cases}) == len(cases), f"two cases of {path.stem} have one name"


def test_what_is_wrong_is_found(tmp_path):
    done, rows = run(tmp_path, "--module", "aot_probe")
    assert done.returncode == 1
    problems = {row["case"]: row["problem"] for row in rows if row["case"] != "good"}
    assert problems.pop("spills").startswith("spills ")
    assert problems == {"no matrix instruction": "has no matrix instruction", "no wgmma": "has no wgmma"}
    good = [row for row in rows if row["case"] == "good"]
    assert [row["instructions"] for row in good] == ["mma.sync", "wgmma", "mfma"]
    assert not any(row["problem"] for row in good)


def test_too_much_shared_memory_and_amd_spills_are_found():
    found = {"registers": 1, "spills": 0, "shared": 64 << 10, "instructions": []}
    assert judge(None, "gfx942", found) == ""
    assert "gfx942 has 65536" in judge(None, "gfx942", found | {"shared": (64 << 10) + 1})
    assembly = "    .vgpr_count:     128\n    .vgpr_spill_count: 3\n"
    assert amd_resources(assembly) == {"registers": 128, "spills": 3}
    assert judge(None, "gfx942", found | amd_resources(assembly)) == "spills 3"
