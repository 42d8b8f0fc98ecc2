"""Lifelong runs: what is written when, resuming, refusing, damage, full disks, interrupts."""

import errno
import json
import os
import shutil

import pytest

from tests.edited import make_editor
from tests.killed import CONFIG, EDITS, SETTINGS, shallow_model
from tests.running import lines, new_editor, new_run
from tests.tiny import tiny_tokenizer
from wise_fast import Edit, WiseEditor, recorded
from wise_fast.errors import ConfigError, EditDataError, StorageError
from wise_fast.journal import Journal, jsonable
from wise_fast.lifelong import Run, RunSettings, Watcher

pytestmark = pytest.mark.usefixtures("little_to_read")

DONE = ("journal.jsonl", "evaluations.jsonl")


class Stops(Watcher):
    """Interrupts once so many edits are done, or an evaluation begins."""

    def __init__(self, done=None, evaluating=None, error=KeyboardInterrupt):
        self.done, self.t, self.error, self.told = done, evaluating, error, []

    def edited(self, done, reports):
        self.told.append(done)
        if done == self.done:
            raise self.error

    def evaluating(self, t, work, total):
        if t == self.t:
            raise self.error


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(directory, summary) of a whole run."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    return out, new_run(out).run()


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """The directory of a run that failed after 9 edits, five batches, and before that batch's checkpoint."""
    out = tmp_path_factory.mktemp("runs") / "stopped"
    with pytest.raises(RuntimeError):
        new_run(out).run(Stops(done=9, error=RuntimeError))
    return out


@pytest.fixture
def begun(stopped, tmp_path):
    """A copy of it."""
    return shutil.copytree(stopped, tmp_path / "begun")


class TestWhatIsWritten:
    def test_header(self, finished):
        header = json.loads((finished[0] / "run.json").read_text())
        assert (header["format"], header["version"], header["method"]) == ("wise_fast run", 1, "wise_fast")
        assert (header["task"], header["T"], header["batch_size"], header["mode"]) == ("qa", 10, 2, "retrieve")
        assert header["evaluate_at"] == [1, 5, 10] and header["config"]["undo_depth"] == 0
        assert {"torch", "transformers", "wise_fast"} <= header["libraries"].keys() and header["edits"]["sha256"]

    def test_journal(self, finished):
        found = lines(finished[0])
        assert [line["batch"] for line in found] == [1, 2, 3, 4, 5, 6]
        assert [line["first"] for line in found] == [0, 1, 3, 5, 7, 9]  # cut where an evaluation is due
        assert [r["edit"]["prompt"] for line in found for r in line["reports"]] == [e.prompt for e in EDITS]
        assert all(line["seconds"] > 0 and line["rss"] > 2**20 and line["served"] > 0 for line in found)
        assert found[-1]["memories"] == 3 and found[-1]["digest"] == finished[1].digest

    def test_the_latest_reports(self, tmp_path):
        """Of edits that were superseded or rehearsed in a later batch than their own, too."""
        run = new_run(tmp_path / "run", RunSettings(generate=False, evaluate_at=(10,)))
        run.run()
        first = [r for line in lines(tmp_path / "run") for r in line["reports"]]
        latest, now = recorded.read_run(tmp_path / "run").reports, [r.to_dict() for r in run.method.edits]
        assert jsonable(now) == latest != first
        assert [r["edit"] for r in latest] == [r["edit"] for r in first]
        assert any(r["note"].startswith("superseded") for r in latest) and any(
            old["steps"] < new["steps"] for old, new in zip(first, latest, strict=True)
        )

    def test_a_damaged_line_leaves_the_reports_of_others(self):
        reports = []
        recorded.take(reports, {"reports": ["a"], "again": {"3": "x"}})
        recorded.take(reports, {"reports": ["b"], "again": {"0": "c"}})
        assert reports == ["c", "b"]

    def test_evaluations(self, finished):
        out, summary = finished
        found = lines(out, "evaluations.jsonl")
        assert [line["t"] for line in found] == [1, 5, 10]
        assert [len(line["scores"]) for line in found] == [1, 5, 9]  # one of ten is superseded
        last = found[-1]
        assert last["figures"] == summary.evaluations[-1]["figures"]
        assert {"reliability", "generalization", "locality", "perplexity_after"} <= last["figures"].keys()
        assert last["scores"][0]["edit"] == EDITS[1].to_dict()
        assert len(last["routing"]["edit"]) == len(last["routing"]["unrelated"]) == 9 and last["seconds"] > 0

    def test_summary(self, finished):
        out, summary = finished
        reports = recorded.read_run(out).reports
        held = [r["success"] or r["note"].startswith("superseded") for r in reports]
        assert summary.edits == 10 and summary.failed == held.count(False)
        assert sorted(os.listdir(out / "checkpoints")) == ["000005", "000006"]

    def test_nothing_is_told_before_it_is_on_the_disk(self, tmp_path):
        out = tmp_path / "run"

        class Checks(Watcher):
            def edited(self, done, reports):
                assert sum(len(line["reports"]) for line in lines(out)) == done

            def evaluated(self, t, figures):
                assert lines(out, "evaluations.jsonl")[-1]["t"] == t

        new_run(out, RunSettings(T=4, evaluate_at=(1,), generate=False)).run(Checks())

    def test_the_editor_keeps_no_earlier_states(self, tmp_path):
        run = new_run(tmp_path / "run", RunSettings(T=2, generate=False))
        run.run()
        assert run.method._undo == []


class TestResume:
    def test_ends_as_the_whole_run(self, begun, finished):
        watcher = Stops()
        summary = new_run(begun, resume=True).run(watcher)
        assert watcher.told == [7, 9, 10]  # the checkpoint after 5 edits, and what the journal has beyond it
        assert (summary.digest, summary.evaluations) == (finished[1].digest, finished[1].evaluations)

    def test_a_finished_run_is_left_alone(self, finished):
        out, summary = finished
        before = {name: (out / name).read_bytes() for name in DONE}
        run = new_run(out, resume=True)
        again = run.run()
        assert again.digest == summary.digest and {name: (out / name).read_bytes() for name in DONE} == before
        assert len(run.method.edits) == 10

    def test_where_nothing_was_begun(self, tmp_path, finished):
        settings = RunSettings(T=2, generate=False)
        assert new_run(tmp_path / "run", settings, resume=True).run().edits == 2
        (tmp_path / "torn").mkdir()
        (tmp_path / "torn" / ".run.json.wise-new").write_text("{")  # killed while the header was written
        assert new_run(tmp_path / "torn", settings).run().edits == 2

    def test_all_checkpoints_damaged_replays_from_the_start(self, begun, finished, caplog):
        for path in (begun / "checkpoints").glob("*/state.safetensors"):
            path.write_bytes(path.read_bytes()[:-1] + b"x")
        watcher = Stops()
        summary = new_run(begun, resume=True).run(watcher)
        assert watcher.told == [1, 3, 5, 7, 9, 10] and "damaged" in caplog.text
        assert (summary.digest, summary.evaluations) == (finished[1].digest, finished[1].evaluations)
        assert [line["batch"] for line in lines(begun)] == [1, 2, 3, 4, 5, 6]

    def test_the_newest_checkpoint_damaged_goes_on_from_the_one_before(self, begun, finished):
        newest = max((begun / "checkpoints").iterdir())
        (newest / "state.json").unlink()
        watcher = Stops()
        assert new_run(begun, resume=True).run(watcher).digest == finished[1].digest
        assert watcher.told == [3, 5, 7, 9, 10]

    def test_a_lost_evaluation_is_made_up_for(self, begun, finished):
        text = (begun / "evaluations.jsonl").read_bytes()
        (begun / "evaluations.jsonl").write_bytes(text[: len(text) // 2])  # the one after 5 edits is torn
        new_run(begun, resume=True).run()
        found, whole = lines(begun, "evaluations.jsonl"), lines(finished[0], "evaluations.jsonl")
        for line in [*found, *whole]:
            del line["seconds"]
        assert found == whole

    def test_another_state_than_the_journals_is_told(self, begun, monkeypatch):
        text = lines(begun)
        (begun / "journal.jsonl").unlink()
        with Journal(begun / "journal.jsonl") as journal:
            for line in text:
                journal.append(line | ({"digest": "0" * 64} if line["batch"] == 5 else {}))
        with pytest.raises(StorageError, match="batch 5 gave another state"):
            new_run(begun, resume=True).run()

    def test_a_journal_of_another_plan_is_told(self, begun):
        data = (begun / "journal.jsonl").read_bytes().splitlines(keepends=True)
        (begun / "journal.jsonl").write_bytes(b"".join(data[1:]))
        with pytest.raises(StorageError, match="is not batch 1"):
            new_run(begun, resume=True).run()

    @pytest.mark.parametrize(
        "settings, changes, name",
        [
            (RunSettings(T=9, evaluate_at=(1, 5), generate=False), {}, "T"),
            (RunSettings(task="temporal", evaluate_at=(1, 5), generate=False), {}, "task"),
            (RunSettings(evaluate_at=(1, 6), generate=False), {}, "evaluate_at"),
            (RunSettings(evaluate_at=(1, 5)), {}, "generate"),
            (SETTINGS, {"batch_size": 3}, "batch_size"),
            (SETTINGS, {"lr": 3.0}, "lr"),
            (SETTINGS, {"seed": 5}, "seed"),
            (SETTINGS, {"mode": "merge", "merging": "ties"}, "mode"),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    def test_with_other_settings_is_refused_by_name(self, begun, settings, changes, name):
        before = (begun / "journal.jsonl").read_bytes()
        with pytest.raises(ConfigError, match=rf"begun with {name} "):
            new_run(begun, settings, resume=True, **changes)
        assert (begun / "journal.jsonl").read_bytes() == before

    def test_with_another_model_or_other_edits_is_refused(self, begun):
        other = WiseEditor(shallow_model(seed=3), tiny_tokenizer(), CONFIG)
        with pytest.raises(ConfigError, match="model's weights"):
            Run(other, EDITS, begun, SETTINGS, resume=True)
        with pytest.raises(ConfigError, match="edits"):
            new_run(begun, resume=True, edits=EDITS[::-1])

    def test_checkpoints_may_be_rarer(self, begun, finished):
        settings = RunSettings(evaluate_at=(1, 5), generate=False, checkpoint_every=1000)
        assert new_run(begun, settings, resume=True).run().digest == finished[1].digest


class TestRefusals:
    def test_a_directory_with_a_run(self, finished):
        with pytest.raises(StorageError, match="--resume"):
            new_run(finished[0])

    @pytest.mark.parametrize("resume", [False, True])
    def test_a_directory_with_other_things(self, tmp_path, resume):
        (tmp_path / "photo.png").write_text("x")
        with pytest.raises(StorageError, match=r"photo\.png"):
            new_run(tmp_path, resume=resume)

    @pytest.mark.parametrize(
        "content", ["{", "[]", '{"format": "another"}', '{"format": "wise_fast run", "version": 2}']
    )
    def test_a_header_that_is_none(self, tmp_path, content):
        (tmp_path / "run.json").write_text(content)
        with pytest.raises(StorageError, match=r"run\.json"):
            new_run(tmp_path, resume=True)

    def test_an_editor_with_edits(self, tmp_path):
        with pytest.raises(ConfigError, match="fresh"):
            Run(make_editor(EDITS[:1], max_steps=1), EDITS, tmp_path / "run")

    def test_too_few_edits(self, tmp_path):
        with pytest.raises(ConfigError, match="T is 11, but only 10"):
            new_run(tmp_path / "run", RunSettings(T=11))

    def test_an_edit_that_cannot_be_learned_is_told_at_once(self, tmp_path):
        with pytest.raises(EditDataError, match="edit 3"):
            new_run(tmp_path / "run", edits=[*EDITS[:2], Edit("long " * 120, "x")])
        assert not (tmp_path / "run").exists()

    @pytest.mark.parametrize("given", [dict(task="maths"), dict(T=0), dict(evaluate_at=(0,)), dict(checkpoint_every=0)])
    def test_settings_out_of_range(self, given):
        with pytest.raises(ConfigError, match=next(iter(given))):
            RunSettings(**given)


class TestTrouble:
    @pytest.mark.parametrize("stop", [dict(done=7), dict(evaluating=10), dict(done=1)])
    def test_an_interrupt_leaves_a_checkpoint_of_all_that_was_acknowledged(self, tmp_path, finished, stop):
        out = tmp_path / "run"
        with pytest.raises(KeyboardInterrupt):
            new_run(out).run(Stops(**stop))
        newest = max((out / "checkpoints").iterdir()).name
        assert int(newest) == len(lines(out))
        watcher = Stops()
        assert new_run(out, resume=True).run(watcher).digest == finished[1].digest
        assert watcher.told == [t for t in (1, 3, 5, 7, 9, 10) if t > (stop.get("done") or 10)]

    @pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
    def test_a_full_disk_is_an_error_and_nothing_is_lost(self, tmp_path, finished, monkeypatch, share):
        out, real, calls = tmp_path / "run", os.fsync, []

        def full(handle):
            calls.append(handle)
            if len(calls) > share * 31:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            real(handle)

        watcher = Stops()
        with monkeypatch.context() as patch, pytest.raises(StorageError, match="No space left"):
            patch.setattr(os, "fsync", full)
            new_run(out).run(watcher)
        assert sum(len(line["reports"]) for line in lines(out)) >= max(watcher.told, default=0)
        summary = new_run(out, resume=True).run()
        assert (summary.digest, summary.evaluations) == (finished[1].digest, finished[1].evaluations)

    def test_two_processes_at_once(self, begun):
        pytest.importorskip("fcntl")

        class Nested(Watcher):
            def begins(self, done, acknowledged):
                with pytest.raises(StorageError, match="another process"):
                    new_run(begun, resume=True).run()
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            new_run(begun, resume=True).run(Nested())


class Plain:
    """A method without states: the editor behind the protocol alone."""

    def __init__(self):
        self.editor = new_editor()
        for name in ("model", "tokenizer", "stop", "device", "edit", "disabled", "asking", "head_at"):
            setattr(self, name, getattr(self.editor, name))

    @property
    def edits(self):
        return self.editor.edits


def test_any_method_can_run_and_resume(tmp_path):
    settings = RunSettings(T=4, evaluate_at=(2,), generate=False)
    whole = Run(Plain(), EDITS, tmp_path / "whole", settings, name="plain").run()
    with pytest.raises(KeyboardInterrupt):
        Run(Plain(), EDITS, tmp_path / "run", settings, name="plain").run(Stops(done=3))
    again = Run(Plain(), EDITS, tmp_path / "run", settings, name="plain", resume=True).run()
    assert again.evaluations == whole.evaluations and whole.digest is None
    found = lines(tmp_path / "run", "evaluations.jsonl")
    assert found[0]["method"] == "plain" and found[0]["routing"] is None
    assert [line["digest"] for line in lines(tmp_path / "run")] == [None] * 4
    assert not (tmp_path / "run" / "checkpoints").exists()
