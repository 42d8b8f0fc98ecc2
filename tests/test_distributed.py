"""Edits on several processes: the same result for any number of them, and for one editor that learns all in turn."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from tests import killed
from tests.edited import saved_model
from tests.killed import EDITS
from wise_fast import Edit, WiseEditor, merging, rehearsal, storage
from wise_fast.checkpoint import Digester
from wise_fast.distributed import distribute
from wise_fast.distributed_command import app
from wise_fast.models import load_model
from wise_fast.ranks import Ranks
from wise_fast.shards import PACK, SHARDS, Shards

ROOT = Path(__file__).resolve().parents[1]
CONFIG = killed.CONFIG.replace(rehearsals=12)  # enough for a shard to keep all of its edits
STREAM = [*EDITS, Edit("River of Milan:", "J"), Edit("River of Kiel:", "K", irrelevant="River of Oslo:")]
SIZE, COUNT = 3, 4  # a batch that ends with its shard, and a last shard that is not full
MODES = {
    "retrieve": {"mode": "retrieve"},
    "merge": {"mode": "merge", "merging": "ties"},
    "regmean": {"mode": "merge", "merging": "regmean", "mask_ratio": 1.0},
    "rehearsed": {"mode": "merge", "merging": "regmean", "mask_ratio": 1.0, "rehearsals": 2},
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A directory with a model and edits, and the options for them."""
    root = tmp_path_factory.mktemp("distributed")
    saved_model(root / "model")
    (root / "edits.json").write_text(json.dumps([edit.to_dict() for edit in STREAM]))
    (root / "settings.json").write_text(json.dumps(CONFIG.to_dict()))
    named = {"model": "model", "edits": "edits.json", "config": "settings.json"}
    options = [part for name, file in named.items() for part in (f"--{name}", root / file)] + ["--shard-size", SIZE]
    return root, [str(option) for option in options]


@pytest.fixture(scope="module")
def alone(files):
    """Directories of runs by one process, by mode, and what they printed."""
    root, options = files
    found = {}
    for mode, changes in MODES.items():
        out = root / f"alone-{mode}"
        changed = [part for name, value in changes.items() for part in ("--set", f"{name}={value}")]
        result = CliRunner().invoke(app, [*options, *changed, "--out", str(out), "--json"])
        assert result.exit_code == 0, (result.stdout, result.stderr, result.exception)
        found[mode] = out, json.loads(result.stdout)
    return found


def torchrun(fault, *options, cwd=ROOT):
    """(exit code, stdout, stderr) of two ranks with this fault."""
    path = os.pathsep.join((str(ROOT), str(ROOT / "kernels")))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "tests.faulty", json.dumps(fault), *map(str, options)]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300, check=False)
    return done.returncode, done.stdout, " ".join(done.stderr.split())


def memories(out):
    """A pack's tensors, and what is told of them."""
    header = json.loads((out / PACK / storage.CONFIG).read_text())
    return (out / PACK / storage.MEMORY).read_bytes(), header["memories"], header["state"]


def reports(out):
    """What a pack's reports say, but for the time they took."""
    return [{**report, "seconds": 0} for report in json.loads((out / PACK / storage.EDITS).read_text())]


def finished(out):
    """Names of the shards that are on the disk."""
    return sorted({path.parts[-3] for path in (out / SHARDS).glob("*/[0-9]*/*")})


@pytest.mark.parametrize("mode", MODES)
def test_one_process_gives_what_one_editor_gives_in_turn(mode, files, alone, tmp_path):
    out, printed = alone[mode]
    editor = WiseEditor(*load_model(files[0] / "model"), CONFIG.replace(shard_size=SIZE, shards=99, **MODES[mode]))
    editor.edit(STREAM)
    state = merging.close_shard(editor.state, editor.config)
    if mode != "retrieve":
        state = rehearsal.merge_closed(editor, state)
    editor.state = state
    editor.save_pretrained(tmp_path / PACK)
    assert memories(tmp_path) == memories(out) and reports(tmp_path) == reports(out)
    assert printed["summary"]["digest"] == Digester().digest(state)
    assert printed["summary"]["memories"] == (COUNT if mode == "retrieve" else 1)
    assert printed["summary"]["shards"] == COUNT and printed["summary"]["superseded"] == 1
    assert len(load_file(out / PACK / storage.MEMORY)) > 1 and finished(out) == [f"00000{n}" for n in (1, 2, 3, 4)]


@pytest.mark.parametrize("mode", MODES)
def test_a_shard_that_is_full_before_its_time_comes_to_several_memories(mode, files, tmp_path):
    config = CONFIG.replace(shard_size=SIZE, shard_fill=1e-6, batch_size=1, **MODES[mode])
    editor = WiseEditor(*load_model(files[0] / "model"), config)
    shards = Shards(editor, STREAM, tmp_path)
    shards.claim()
    for number in range(shards.count):
        shards.fill(number, lambda count: None)
    states = [shards.load(number) for number in range(shards.count)]
    assert [len(state.memories) for state in states] == [len(shards.edits_of(n)) for n in range(shards.count)]
    shards.save(states)
    assert sorted(e for m in editor.memories for e in m.edits) == list(range(len(shards.edits)))
    assert len(editor.memories) == (len(shards.edits) if mode == "retrieve" else 1)
    assert editor.state.opened == len(shards.edits)


def test_who_waits_hears_of_a_shard_that_is_rehearsed(files, tmp_path):
    editor = WiseEditor(*load_model(files[0] / "model"), CONFIG.replace(shard_size=SIZE, batch_size=SIZE, rehearsals=4))
    shards, heard = Shards(editor, STREAM, tmp_path), []
    shards.claim()
    shards.fill(0, heard.append)
    rounds, rest = divmod(len(heard) - 1, 5)
    assert heard == [0] * (5 * rounds) + [SIZE] and 1 <= rounds <= 3 and not rest  # 4 passes of a step, to judge; batch


def test_who_waits_hears_of_a_merge_that_is_rehearsed(files, tmp_path, monkeypatch):
    editor = WiseEditor(*load_model(files[0] / "model"), CONFIG.replace(shard_size=SIZE, **MODES["rehearsed"]))
    ranks, heard, at = Ranks(0, 1, None, editor.device, 1.0), [], Ranks.at
    monkeypatch.setattr(Ranks, "at", lambda self, place, *more: (heard.append(place), at(self, place, *more)))
    assert distribute(Shards(editor, STREAM, tmp_path), ranks).memories == 1
    joining = [place for place in heard if place == f"joining the shards in {tmp_path / PACK}"]
    rounds, rest = divmod(len(joining) - 1, 3)
    assert heard[-len(joining) :] == joining and 1 <= rounds <= 3 and not rest  # it begins; two passes, to judge


def test_a_pack_is_loaded_and_answers(files, alone):
    out, printed = alone["retrieve"]
    model, tokenizer = load_model(files[0] / "model")
    editor = WiseEditor.from_pretrained(model, tokenizer, out / PACK)
    assert [report.edit.prompt for report in editor.edits] == [r["edit"]["prompt"] for r in printed["edits"]]
    assert [m.edits for m in editor.memories] == [(0, 1, 2), (3, 4, 5), (6, 7, 8), (9, 10)]
    assert torch.isfinite(model(**tokenizer("River of Lima:", return_tensors="pt")).logits).all()


def test_failed_and_killed_ranks_leave_what_the_next_run_takes_up(files, alone, tmp_path):
    options = [*files[1], "--mode", "merge", "--set", "merging=ties", "--out", tmp_path / "two", "--json"]
    code, _, told = torchrun({"rank": 1, "shard": 1, "how": "raise"}, *options)
    cause = "rank 1 failed at shard 2 of 4, edits 4 to 6: MemoryError: no room for a matrix; finished shards are kept"
    assert code and f"RankError: {cause}" in told and "000002" not in finished(tmp_path / "two")

    code, _, told = torchrun({"rank": 1, "shard": 3, "how": "kill"}, *options)
    assert code and "SIGKILL" in told and "rank 0 was ended from outside (SIGTERM)" in told
    assert "the same command goes on from there" in told and "000002" in finished(tmp_path / "two")
    assert not (tmp_path / "two" / PACK).exists() and "000004" not in finished(tmp_path / "two")

    before = len(finished(tmp_path / "two"))
    code, printed, told = torchrun({}, *options)
    assert code == 0, told
    summary = json.loads(printed)["summary"]
    assert summary["taken_up"] == before >= 1 and summary["processes"] == 2 and summary["carried"] == 0
    out, one = alone["merge"]
    assert memories(tmp_path / "two") == memories(out) and reports(tmp_path / "two") == reports(out)
    assert summary["digest"] == one["summary"]["digest"]


def test_ranks_without_a_common_file_system_send_their_shards(files, alone, tmp_path):
    code, printed, told = torchrun({"apart": True}, *files[1], "--out", "run", "--json", cwd=tmp_path)
    assert code == 0, told
    assert json.loads(printed)["summary"]["carried"] == 2
    assert memories(tmp_path / "rank0" / "run") == memories(alone["retrieve"][0])
    assert finished(tmp_path / "rank1" / "run") == ["000002", "000004"]
    assert len(finished(tmp_path / "rank0" / "run")) == COUNT


class TestAgain:
    """Runs over the directory of a finished one."""

    def run(self, code, *options):
        result = CliRunner().invoke(app, list(map(str, options)))
        assert result.exit_code == code, (result.stdout, result.stderr, result.exception)
        return " ".join((result.stdout if code == 0 else result.stderr).split())

    def test_takes_up_all_shards_and_fills_a_damaged_one_again(self, files, alone, tmp_path):
        out, _ = alone["merge"]
        before = memories(out)
        victim = next((out / SHARDS / "000003").glob("*/state.safetensors"))
        victim.write_bytes(victim.read_bytes()[:-4])
        printed = self.run(0, *files[1], "--mode", "merge", "--set", "merging=ties", "--out", out, "--json")
        assert '"taken_up": 4' in printed and memories(out) == before

    @pytest.mark.parametrize(
        "change, words",
        [
            (("--shard-size", "4"), "begun with shard_size 3, but now shard_size is 4"),
            (("--seed", "5"), "begun with seed 0, but now seed is 5"),
            (("--limit", "5"), "begun with T 11, but now T is 5"),
        ],
    )
    def test_of_another_run_is_refused(self, change, words, files, alone):
        assert words in self.run(1, *files[1], *change, "--out", alone["retrieve"][0])

    def test_as_many_edits_that_are_others_are_refused(self, files, tmp_path):
        """One record more, which supersedes an earlier one, comes to as many edits."""
        edits = [*STREAM[:2], Edit(STREAM[0].prompt, "Q")]
        (tmp_path / "edits.json").write_text(json.dumps([edit.to_dict() for edit in edits]))
        given = (*files[1], "--edits", tmp_path / "edits.json", "--out", tmp_path / "run")
        self.run(0, *given, "--limit", "2")
        assert "edits (kept)" in self.run(1, *given, "--limit", "3")

    def test_a_run_of_another_kind_is_refused(self, files, tmp_path):
        (tmp_path / "run.json").write_text('{"format": "wise_fast run", "version": 1}')
        assert "its format is not 'wise_fast distributed run'" in self.run(1, *files[1], "--out", tmp_path)

    @pytest.mark.parametrize(
        "options, words",
        [
            (("--set", "shard_size=null"), "--shard-size 50"),
            (("--mode", "melt"), "retrieve"),
            (("--edits", "absent.json"), "absent.json"),
            (("--set", "lrr=1"), "did you mean 'lr'"),
            (("--device", "gpu"), "expected something like 'cpu'"),
        ],
    )
    def test_wrong_use_is_told_before_a_model_is_loaded(self, options, words, files, tmp_path):
        given = ["--model", "absent", "--edits", files[0] / "edits.json", "--out", tmp_path / "new", *options]
        assert words in self.run(1, *given)
        assert not (tmp_path / "new").exists()

    def test_a_rank_needs_a_place_to_meet(self, files, tmp_path, monkeypatch):
        monkeypatch.setenv("RANK", "0")
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.delenv("MASTER_ADDR", raising=False)
        assert "MASTER_ADDR" in self.run(1, *files[1], "--out", tmp_path / "new")
