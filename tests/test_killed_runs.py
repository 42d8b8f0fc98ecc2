"""A run that is killed at any instant and resumed ends bit for bit as the run that was never killed."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SEED, BY_TIME, BY_CALL = 7, 10, 12

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="killed runs are forked")


def cases():
    """Kills by time and by call, one run killed again and again, and two full disks."""
    draw = random.Random(SEED)
    found = [[{"after": draw.uniform(0.05, 0.95)}] for _ in range(BY_TIME)]
    found += [[{"call": draw.random(), "when": draw.choice(["before", "within", "after"])}] for _ in range(BY_CALL)]
    found.append([{"after": draw.uniform(0.1, 0.5)} for _ in range(3)] + [{"call": 0.3, "when": "within"}])
    found += [[{"limit": 2500}], [{"limit": 100_000}]]
    return found


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    directory = tmp_path_factory.mktemp("killed")
    path = os.pathsep.join((str(ROOT), str(ROOT / "kernels")))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    command = [sys.executable, "-m", "tests.killed", str(directory), json.dumps(cases())]
    made = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=1200)
    assert made.returncode == 0, made.stderr
    return json.loads(made.stdout) | {"stderr": made.stderr}


def killed(done):
    return [case for case in done["cases"] if not any("limit" in fault for fault in case["faults"])]


def test_the_unkilled_run_is_worth_comparing_with(done):
    plain = done["plain"]
    assert [line["t"] for line in plain["evaluations"]] == [1, 5, 10]
    assert len({line["digest"] for line in plain["journal"]}) == len(plain["journal"]) == 6
    assert plain["journal"][-1]["memories"] > 1 and any("superseded" in r[3] for r in plain["result"]["reports"])


def test_runs_were_really_killed(done):
    left = [end for case in killed(done) for end in case["left"]]
    assert sum(end["killed"] for end in left) >= 20
    assert len({end["journalled"] for end in left if end["killed"]}) >= 4  # at many places of the run


def test_no_acknowledged_edit_is_lost(done):
    for case in done["cases"]:
        for end in case["left"]:
            assert end["journalled"] >= end["acknowledged"], case["faults"]


@pytest.mark.parametrize("part", ["result", "journal", "evaluations"])
def test_resumed_runs_end_as_the_unkilled_one(done, part):
    for case in killed(done):
        assert case[part] == done["plain"][part], case["faults"]


def test_a_full_disk_is_an_error_that_resuming_gets_over(done):
    full = [case for case in done["cases"] if "limit" in case["faults"][0]]
    for case in full:
        assert [end["code"] for end in case["left"]] == [7]
        assert all(case[part] == done["late"][part] for part in ("result", "journal", "evaluations"))
    assert 0 < full[0]["left"][0]["journalled"] < 10 == full[1]["left"][0]["journalled"]
    assert "journal.jsonl: " in done["stderr"] and "bytes cannot be added (File too large)" in done["stderr"]
    assert "checkpoints" in done["stderr"] and "nothing was changed" in done["stderr"]
