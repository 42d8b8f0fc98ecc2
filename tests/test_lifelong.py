"""Lifelong runs: what is written when, resuming, refusing, damage, full disks, interrupts; and the command."""

import errno
import json
import os
import shutil

import pytest
import torch
from typer.testing import CliRunner

from tests.edited import make_editor, wide_model
from tests.killed import CONFIG, EDITS, SETTINGS
from tests.tiny import tiny_tokenizer
from wise_fast import Edit, WiseEditor, lifelong, run_command, run_settings
from wise_fast.commands import app
from wise_fast.errors import ConfigError, EditDataError, StorageError
from wise_fast.journal import Journal, read_journal
from wise_fast.lifelong import Run, RunSettings, Watcher
from wise_fast.routing_scores import routing_ratios
from wise_fast.run_settings import batches, parse_points, read_run_file
from wise_fast.tasks import TASKS, general_ability

DONE = ("journal.jsonl", "evaluations.jsonl")


def new_editor(**changes):
    return WiseEditor(wide_model(), tiny_tokenizer(), CONFIG.replace(**changes))


def new_run(out, settings=SETTINGS, resume=False, edits=EDITS, **changes):
    return Run(new_editor(**changes), edits, out, settings, resume=resume)


def lines(out, name="journal.jsonl"):
    return list(read_journal(out / name))


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


@pytest.fixture(scope="module", autouse=True)
def little_to_read():
    """One held-out sentence instead of the packaged passages."""

    def short(method, before=None):
        return general_ability(method, ["The sun rose over the hills."], before)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lifelong, "general_ability", short)
        yield


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
        reports = [r for line in lines(out) for r in line["reports"]]
        assert summary.edits == 10 and summary.failed == sum(not r["success"] for r in reports)
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
            (SETTINGS, {"mode": "merge"}, "mode"),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    def test_with_other_settings_is_refused_by_name(self, begun, settings, changes, name):
        before = (begun / "journal.jsonl").read_bytes()
        with pytest.raises(ConfigError, match=rf"begun with {name} "):
            new_run(begun, settings, resume=True, **changes)
        assert (begun / "journal.jsonl").read_bytes() == before

    def test_with_another_model_or_other_edits_is_refused(self, begun):
        other = WiseEditor(wide_model(seed=3), tiny_tokenizer(), CONFIG)
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


class TestPlan:
    def test_usual_points(self):
        assert RunSettings().points(1000) == (1, 10, 100, 300, 1000)
        assert RunSettings().points(40) == (1, 10, 40) and RunSettings().points(1) == (1,)
        assert RunSettings().points(20_000)[-4:] == (1000, 3000, 10_000, 20_000)
        assert RunSettings(evaluate_at=(7, 3, 99)).points(9) == (3, 7, 9)

    def test_batches_end_where_evaluations_are_due(self):
        assert list(batches(12, 4, (1, 10, 12))) == [(0, 1), (1, 5), (5, 9), (9, 10), (10, 12)]
        assert list(batches(3, 8, (3,))) == [(0, 3)]

    def test_parsing_points(self):
        assert parse_points("1, 10,100") == parse_points([1, 10, 100]) == (1, 10, 100) and parse_points(5) == (5,)
        for wrong in ("1;2", "", "0", [None], "ten"):
            with pytest.raises(ConfigError, match="evaluate_at"):
                parse_points(wrong)

    def test_tasks_are_those_that_can_be_scored(self):
        assert set(run_settings.TASKS) == set(TASKS)


class TestRunFile:
    def test_yaml_and_json_say_the_same(self, tmp_path):
        yaml, json_ = tmp_path / "run.yaml", tmp_path / "run.json"
        yaml.write_text("task: qa\nT: 300\nevaluate-at: [1, 10]\nout:\nsettings:\n  lr: 2.5\n")
        json_.write_text('{"task": "qa", "T": 300, "evaluate_at": [1, 10], "settings": {"lr": 2.5}}')
        assert read_run_file(yaml) == read_run_file(json_)

    @pytest.mark.parametrize(
        "text, words",
        [
            ("tasks: qa", "did you mean 'task'"),
            ("lr: 3", "under 'settings'"),
            ("- qa", "named options"),
            ("task: [", "neither YAML nor JSON"),
            ("settings: fast", "settings by name"),
            ("", "named options"),
        ],
    )
    def test_errors(self, tmp_path, text, words):
        (tmp_path / "run.yaml").write_text(text)
        with pytest.raises(ConfigError, match=words):
            read_run_file(tmp_path / "run.yaml")

    def test_no_file(self, tmp_path):
        with pytest.raises(ConfigError, match="cannot be read"):
            read_run_file(tmp_path / "none.yaml")


class TestRoutingRatios:
    @pytest.fixture(scope="class")
    @classmethod
    def editor(cls):
        editor = new_editor(max_steps=30, mask_ratio=0.6)
        editor.edit(EDITS[:8])
        return editor

    def test_are_score_over_threshold_of_each_prompt_alone(self, editor):
        found = routing_ratios(editor, EDITS[:3])
        for kind, text in (("edit", EDITS[0].prompt), ("rephrase", EDITS[0].rephrases[0]), ("unrelated", "Bread O")):
            with torch.no_grad():
                editor.model(**editor.tokenizer(text, return_tensors="pt"))
            best = max(s / m.threshold for s, m in zip(editor.routing.scores[0].tolist(), editor.memories, strict=True))
            assert found[kind][0] == pytest.approx(best, rel=1e-4)
        assert len(editor.memories) > 1 and min(found["edit"]) > 1

    def test_of_a_seeded_sample(self, editor):
        few = [routing_ratios(editor, EDITS[:8], seed=seed, most=3) for seed in (0, 0, 1)]
        assert few[0] == few[1] != few[2] and all(len(values) == 3 for values in few[0].values())
        everything = routing_ratios(editor, EDITS[:8])["edit"]
        assert len(everything) == 8 and all(
            any(r == pytest.approx(e, rel=1e-4) for e in everything) for r in few[0]["edit"]
        )

    def test_without_memories_or_router(self):
        assert routing_ratios(make_editor(), EDITS) is None and routing_ratios(object(), EDITS) is None


class TestCommand:
    @pytest.fixture(scope="class")
    @classmethod
    def files(cls, tmp_path_factory):
        root = tmp_path_factory.mktemp("command")
        wide_model().save_pretrained(root / "model")
        tiny_tokenizer().save_pretrained(root / "model")
        (root / "edits.json").write_text(json.dumps([edit.to_dict() for edit in EDITS]))
        names = ("lr", "mask_ratio", "prefixes", "prefix_tokens", "max_steps", "nll", "dropped", "near", "shard_size")
        settings = {name: getattr(CONFIG.replace(near=0), name) for name in names}
        options = {"model": str(root / "model"), "edits": str(root / "edits.json"), "T": 5, "settings": settings}
        (root / "run.yaml").write_text(json.dumps(options | {"evaluate_at": "1", "generate": False, "batch_size": 2}))
        return root

    def invoke(self, *arguments, code):
        result = CliRunner().invoke(app, ["run", *map(str, arguments)])
        assert result.exit_code == code, (result.exit_code, result.stdout, result.stderr, result.exception)
        return result

    def test_from_a_file_with_options_over_it(self, files, tmp_path):
        result = self.invoke(
            "-c", files / "run.yaml", "-o", tmp_path / "r", "--T", 3, "--set", "lr=3", "--json", code=3
        )
        found = json.loads(result.stdout)
        assert found["T"] == 3 and found["config"]["lr"] == 3 and found["config"]["batch_size"] == 2
        assert [e["t"] for e in found["evaluations"]] == [1, 3] and found["summary"]["failed"] == 3
        assert "editing" in result.stderr and "after 3 edits: reliability" in result.stderr

    def test_interrupted_then_resumed_by_its_directory_alone(self, files, tmp_path, monkeypatch):
        out, real = tmp_path / "r", WiseEditor.edit

        def interrupted(self, edits, progress=False):
            if len(self.edits) >= 3:
                raise KeyboardInterrupt
            return real(self, edits, progress)

        with monkeypatch.context() as patch:
            patch.setattr(WiseEditor, "edit", interrupted)
            result = self.invoke("-c", files / "run.yaml", "-o", out, "-q", code=130)
        message = " ".join(result.stderr.split())
        assert "3 of 5 edits are kept" in message and f"wise-fast run --resume --out {out}" in message
        assert "holds a run already" in self.invoke("-c", files / "run.yaml", "-o", out, code=1).stderr
        wrong = self.invoke("--resume", "-o", out, "--set", "lr=9", code=1).stderr
        assert "begun with lr 4.0, but now lr is 9" in " ".join(wrong.split())
        table = self.invoke("--resume", "-o", out, code=3)
        assert "after edits" in table.stdout and "resuming: 3 of 5" in table.stderr
        assert [line["first"] for line in lines(out)] == [0, 1, 3]

    def test_a_partner_file_of_irrelevant_texts_is_part_of_the_run(self, files, tmp_path):
        partner, out = tmp_path / "irrelevant.json", tmp_path / "r"
        partner.write_text(
            json.dumps([{"prompt": "a", "target": "x", "irrelevant": f"Far {n}:"} for n in range(len(EDITS))])
        )
        other = tmp_path / "other.json"
        other.write_text(partner.read_text().replace("Far", "Near"))
        few = ("-c", files / "run.yaml", "--T", 1, "--set", "max_steps=2", "-o", out)
        found = json.loads(self.invoke(*few, "--irrelevant", partner, "--json", code=3).stdout)
        assert found["edits"]["irrelevant"] == str(partner)
        (edit,) = [report["edit"] for line in lines(out) for report in line["reports"]]
        assert edit["irrelevant"].startswith("Far 0:")
        self.invoke("--resume", "-o", out, code=3)
        refused = self.invoke("--resume", "-o", out, "--irrelevant", other, code=1).stderr
        assert "begun with edits" in " ".join(refused.split())

    @pytest.mark.parametrize(
        "arguments, words",
        [
            (["--edits", "x.json"], "--out"),
            (["--out", "{new}"], "--edits"),
            (["--out", "{new}", "--edits", "absent.json"], "absent.json"),
            (["--out", "{new}", "--edits", "{edits}", "--T", "11"], "only 10 edits"),
            (["--out", "{new}", "--edits", "{edits}", "--task", "maths"], "temporal"),
            (["--out", "{new}", "--edits", "{edits}", "--mode", "melt"], "retrieve"),
            (["--out", "{new}", "--edits", "{edits}", "--mode", "merge"], "shard_size"),
            (["--out", "{new}", "--edits", "{edits}", "--set", "lrr=1"], "did you mean 'lr'"),
            (["--out", "{new}", "--edits", "{edits}", "--evaluate-at", "often"], "evaluate_at"),
        ],
    )
    def test_errors_before_a_model_is_loaded(self, files, tmp_path, arguments, words):
        filled = [a.format(new=tmp_path / "r", edits=files / "edits.json") for a in arguments]
        assert words in " ".join(self.invoke(*filled, "--model", "absent", code=1).stderr.split())
        assert not (tmp_path / "r").exists()

    def test_help(self):
        text = self.invoke("--help", code=0).stdout
        assert "--resume" in text and "--evaluate-at" in text and run_command.run is not None
