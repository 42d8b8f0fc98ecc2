"""Checkpoints: every part of a state comes back bit for bit, the last two stay, and damage is seen and passed over."""

import dataclasses
import errno
import os
import shutil

import pytest
import torch

from tests.edited import FACTS, make_editor
from wise_fast import Edit
from wise_fast.checkpoint import FACTS as FACTS_FILE
from wise_fast.checkpoint import TENSORS, Checkpoints, Digester, flatten, restore
from wise_fast.errors import StorageError
from wise_fast.state import EditorState

NEXT = Edit("My cat eats", "fish")
KINDS = {
    "open": dict(near=1),
    "retrieve": dict(shard_size=2, batch_size=2),
    "merge": dict(shard_size=1, batch_size=1, mode="merge", shards=2, merging="ties"),
    "regmean": dict(shard_size=1, batch_size=1, mode="merge", shards=2, merging="regmean", mask_ratio=1.0),
    "waiting": dict(shard_size=3, batch_size=3, mode="merge", shards=2, merging="ties"),
    "element": dict(layout="element", shard_size=2, batch_size=2),
    "unprotected": dict(protect=False),
}


def taught(kind, facts=FACTS):
    return make_editor(facts, max_steps=4, undo_depth=0, **KINDS[kind])


def same(one, other):
    """Equal in every field, tensors bit for bit and of one dtype."""
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if dataclasses.is_dataclass(one):
        names = [field.name for field in dataclasses.fields(one)]
        return type(one) is type(other) and all(same(getattr(one, n), getattr(other, n)) for n in names)
    if isinstance(one, (tuple, list)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other or (one != one and other != other)


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def editor(kind):
    return taught(kind)


@pytest.fixture(scope="module")
def open_editor():
    return taught("open")


class TestRoundTrip:
    def test_of_every_part(self, editor, tmp_path):
        checkpoints = Checkpoints(tmp_path / "checkpoints")
        checkpoints.save(3, editor.state)
        state, digest = Checkpoints(tmp_path / "checkpoints").load(3)
        assert same(state, editor.state) and digest == Digester().digest(editor.state)

    def test_an_editor_that_goes_on_from_it_learns_the_same(self, kind, editor, tmp_path):
        checkpoints = Checkpoints(tmp_path)
        checkpoints.save(1, editor.state)
        resumed, before = taught(kind, ()), editor.state
        resumed.state, _ = checkpoints.load(1)
        for one in (resumed, editor):
            one.edit([NEXT, FACTS[0]])
        straight, editor.state = editor.state, before
        assert Digester().digest(resumed.state) == Digester().digest(straight)
        steps = [[(r.steps, r.loss, r.score, r.note) for r in state.reports] for state in (resumed.state, straight)]
        assert steps[0] == steps[1]

    def test_of_nothing(self):
        assert same(restore(*flatten(EditorState())), EditorState())

    def test_what_the_model_writes_depends_on_the_seed_alone(self, open_editor):
        fresh = taught("open", ())
        fresh.state = open_editor.state  # sampled with edits in place, and without
        assert fresh.prefixes == open_editor.prefixes and fresh.unit == open_editor.unit
        assert fresh._samples == open_editor._samples != make_editor(seed=1)._samples


class TestDigest:
    def test_tells_apart_what_differs_in_one_bit(self, open_editor):
        state, shard = open_editor.state, open_editor.state.shard
        p = shard.p.clone()
        p.view(torch.int32)[0, 0] ^= 1
        values = shard.memory.values.clone()
        values.view(torch.int32)[-1, -1] ^= 1
        key = shard.keys[0][1].clone()
        key.view(torch.int32)[0, 0] ^= 1
        others = [
            state.replace(shard=shard.replace(p=p)),
            state.replace(shard=shard.replace(memory=shard.memory.replace(values=values))),
            state.replace(shard=shard.replace(memory=shard.memory.replace(threshold=1.0))),
            state.replace(shard=shard.replace(keys=((0, key), *shard.keys[1:]))),
            state.replace(shard=shard.replace(quiet=None)),
            state.replace(shard=None),
            state.replace(opened=7),
            state.replace(merges=1),
            state.replace(reports=state.reports[:-1]),
        ]
        digester = Digester()
        assert len({digester.digest(s) for s in [state, *others]}) == len(others) + 1

    def test_forgets_wall_times_and_remembers_tensors(self, open_editor, monkeypatch):
        digester, state = Digester(), open_editor.state
        digest = digester.digest(state)
        later = state.replace(reports=tuple(r.replace(seconds=99.0) for r in state.reports))
        monkeypatch.setattr("wise_fast.checkpoint._bytes", lambda tensor: pytest.fail("hashed again"))
        assert digester.digest(later) == digest


class TestKeeping:
    def test_the_last_two(self, open_editor, tmp_path):
        checkpoints = Checkpoints(tmp_path)
        for number in (1, 4, 9):
            checkpoints.save(number, open_editor.state)
        assert checkpoints.numbers() == [4, 9]
        (tmp_path / ".000009.wise-new").mkdir()  # a writer was killed
        checkpoints.save(6, open_editor.state)  # and the run goes on from before
        assert checkpoints.numbers() == [4, 6] and sorted(os.listdir(tmp_path)) == ["000004", "000006"]

    def test_a_full_disk_leaves_those_before(self, open_editor, tmp_path, monkeypatch):
        checkpoints = Checkpoints(tmp_path)
        checkpoints.save(1, open_editor.state)

        def full(handle):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        with monkeypatch.context() as patch, pytest.raises(StorageError, match="No space left"):
            patch.setattr(os, "fsync", full)
            checkpoints.save(2, open_editor.state)
        assert checkpoints.numbers() == [1] and same(checkpoints.load(1)[0], open_editor.state)


def flip(path, place):
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


DAMAGES = {
    "a bit of a tensor": lambda c: flip(c / TENSORS, -5),
    "a bit of the header": lambda c: flip(c / TENSORS, 12),
    "half the tensors": lambda c: os.truncate(c / TENSORS, 100_000),
    "no tensors": lambda c: (c / TENSORS).unlink(),
    "a fact": lambda c: (c / FACTS_FILE).write_text((c / FACTS_FILE).read_text().replace('"opened": 1', '"opened": 2')),
    "half the facts": lambda c: os.truncate(c / FACTS_FILE, 300),
    "no object": lambda c: (c / FACTS_FILE).write_text("[]"),
    "a file in its place": lambda c: (shutil.rmtree(c), c.write_text("x")),
}


class TestDamage:
    @pytest.fixture
    def checkpoints(self, open_editor, tmp_path):
        checkpoints = Checkpoints(tmp_path)
        for number in (1, 2):
            checkpoints.save(number, open_editor.state)
        return checkpoints

    @pytest.mark.parametrize("damage", DAMAGES)
    def test_is_an_error_and_the_one_before_is_taken(self, checkpoints, open_editor, tmp_path, damage, caplog):
        DAMAGES[damage](tmp_path / "000002")
        with pytest.raises(StorageError, match="000002"):
            checkpoints.load(2)
        digest = checkpoints.digester.digest(open_editor.state)
        number, state = checkpoints.latest([digest, digest], 2)
        assert number == 1 and same(state, open_editor.state) and "000002" in caplog.text

    def test_of_all_gives_the_beginning(self, checkpoints, tmp_path):
        for name in ("000001", "000002"):
            flip(tmp_path / name / TENSORS, -5)
        assert checkpoints.latest(["x", "x"], 2) == (0, EditorState())

    def test_a_state_of_another_run_is_not_taken(self, checkpoints, open_editor, caplog):
        digest = checkpoints.digester.digest(open_editor.state)
        assert checkpoints.latest([digest, "another"], 2)[0] == 1 and "not of this run" in caplog.text

    def test_one_ahead_of_the_journal_is_not_taken(self, checkpoints, open_editor):
        digest = checkpoints.digester.digest(open_editor.state)
        assert checkpoints.latest([digest], 1)[0] == 1
        assert checkpoints.latest([], 0) == (0, EditorState())

    def test_another_version_is_refused(self, checkpoints, open_editor, monkeypatch):
        monkeypatch.setattr("wise_fast.checkpoint.VERSION", 99)
        with pytest.raises(StorageError, match="version 99"):
            checkpoints.load(2)
