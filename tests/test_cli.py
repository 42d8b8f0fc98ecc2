"""The command line: what is printed where, exit codes, and the round trip edit, eval, generate, inspect."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import wise_fast
from tests.tiny import tiny_model, tiny_tokenizer
from wise_fast import WiseConfig, actions, display
from wise_fast.commands import app
from wise_fast.data import Edit, demo_edits
from wise_fast.editor import WiseEditor
from wise_fast.state import EditReport

ROOT = Path(__file__).resolve().parents[1]
EDITS = [
    {
        "prompt": f"The river of {name} is",
        "target": target,
        "rephrases": [f"{name}'s river:"],
        "locality": [{"prompt": f"Bread and {name[0]}", "answer": "oil"}],
        "id": f"river-{name}",
    }
    for name, target in (("Oslo", "P"), ("Kyoto", "E"), ("Lima", "D"))
]
FAST = ["--set", "prefixes=1", "--set", "prefixes_per_step=1", "--set", "prefix_tokens=3"]
LEARN = [*FAST, "--set", "mask_ratio=1.0", "--layer", 1, "--set", "lr=10", "--set", "max_steps=200", "--set", "nll=0.1"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    tiny_model("llama", intermediate_size=512, hidden_size=64, num_hidden_layers=2).save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return str(directory)


@pytest.fixture(scope="module")
def edits(tmp_path_factory):
    file = tmp_path_factory.mktemp("edits") / "edits.json"
    file.write_text(json.dumps(EDITS))
    return str(file)


@pytest.fixture(scope="module")
def pack(tmp_path_factory, model, edits):
    out = tmp_path_factory.mktemp("packs") / "pack"
    run("edit", "-m", model, "-e", edits, "-o", out, *LEARN, "--no-evaluate")
    return out


@pytest.fixture
def unsaved(monkeypatch):
    """Saving replaced by an empty directory, for tests of everything else; the metrics it was given."""
    given = []

    def save(self, out, metrics=None):
        Path(out).mkdir(exist_ok=True)
        given.append(metrics)

    monkeypatch.setattr(WiseEditor, "save_pretrained", save)
    return given


def run(*arguments, code=0):
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == code, (result.exit_code, result.stdout, result.stderr, result.exception)
    return result


def run_json(*arguments, code=0):
    return json.loads(run(*arguments, "--json", code=code).stdout)


def strict(text):
    """Parse JSON, refusing the NaN and Infinity that Python adds to it."""
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


class TestHelp:
    @pytest.mark.parametrize("command", ["demo", "edit", "eval", "generate", "inspect"])
    def test_of_every_command(self, command):
        text = run(command, "--help").stdout
        assert "Exit codes" in text and "--json" in text

    def test_lists_commands_and_exit_codes(self):
        text = run("--help").stdout
        assert all(word in text for word in ("demo", "edit", "eval", "generate", "inspect", "130"))

    def test_version(self):
        assert run("--version").stdout == f"wise-fast {wise_fast.__version__}\n"

    def test_no_import_of_torch(self):
        """With the package's own __init__ aside, which is not this module's business."""
        code = (
            "import sys, types; p = types.ModuleType('wise_fast'); p.__path__ = ['wise_fast']; "
            "sys.modules['wise_fast'] = p; import wise_fast.commands; "
            "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules), 'heavy import'"
        )
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


class TestUsage:
    @pytest.mark.parametrize(
        "arguments",
        [
            [],
            ["fly"],
            ["edit", "--out", "x"],
            ["demo", "--edits", "0"],
            ["generate", "--pack", "x"],
            ["eval", "--pack", "x", "--limit", "many"],
            ["inspect", "x", "--quiet", "--verbose"],
        ],
    )
    def test_wrong_usage_is_2(self, arguments):
        assert run(*arguments, code=2).exception

    def test_as_a_process(self, tmp_path):
        environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(ROOT / "kernels"), str(ROOT)))}
        arguments = ["edit", "--edits", "absent.json", "--out", "pack", "--json"]
        done = subprocess.run(
            [sys.executable, "-m", "wise_fast.cli", *arguments],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 1, done.stderr
        assert "absent.json" in done.stderr and "Traceback" not in done.stderr
        assert strict(done.stdout)["error"]["type"] == "EditDataError"

    @pytest.mark.parametrize("absent", ["typer", "rich"])
    def test_missing_extra_says_how_to_install(self, absent, monkeypatch, capsys):
        from wise_fast import cli

        for name in [m for m in sys.modules if m in ("wise_fast.commands", "wise_fast.display", "wise_fast.terminal")]:
            monkeypatch.delitem(sys.modules, name)
        for name in [m for m in sys.modules if m == absent or m.startswith(absent + ".")]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setitem(sys.modules, absent, None)
        with pytest.raises(SystemExit) as exit:
            cli.main()
        assert exit.value.code == 1
        captured = capsys.readouterr()
        assert "pip install 'wise_fast[cli]'" in captured.err and captured.out == ""


class TestErrors:
    def test_bad_file_is_1_with_a_short_message(self, tmp_path, model):
        bad = tmp_path / "bad.json"
        bad.write_text('[{"prompt": "x"}]')
        result = run("edit", "-m", model, "-e", bad, "-o", tmp_path / "pack", code=1)
        assert "record 1" in result.stderr and len(result.stderr.strip().splitlines()) <= 2
        assert result.stdout == "" and not (tmp_path / "pack").exists()

    def test_unknown_setting_suggests(self, tmp_path, model, edits):
        result = run("edit", "-m", model, "-e", edits, "-o", tmp_path / "p", "--set", "max_step=3", code=1)
        assert "did you mean 'max_steps'" in result.stderr

    def test_traceback_only_when_verbose(self, tmp_path, edits):
        arguments = ["edit", "-m", tmp_path / "none", "-e", edits, "-o", tmp_path / "p"]
        assert "Traceback" not in run(*arguments, code=1).stderr
        assert "Traceback" in run(*arguments, "--verbose", code=1).stderr
        assert "Traceback" in run("--verbose", *arguments, code=1).stderr

    def test_out_is_checked_before_editing(self, tmp_path, edits):
        taken = tmp_path / "taken"
        taken.write_text("x")
        for out in (taken, taken / "below", tmp_path):
            assert "taken" in run("edit", "-m", "absent", "-e", edits, "-o", out, code=1).stderr

    @pytest.mark.parametrize("command", [["eval"], ["generate", "hello"]])
    def test_pack_that_is_not_there(self, tmp_path, model, command):
        result = run(*command, "-m", model, "-p", tmp_path / "none", code=1)
        assert "does not exist" in result.stderr

    def test_blank_prompt(self, tmp_path):
        assert "blank" in run("generate", "-p", tmp_path, " ", code=1).stderr

    def test_brackets_in_a_message_survive(self, tmp_path):
        assert "[red]x.json" in run("edit", "-e", "[red]x.json", "-o", tmp_path / "p", code=1).stderr


class TestEdit:
    def test_failed_edits_are_3_and_still_reported_and_saved(self, tmp_path, model, edits, unsaved):
        out = tmp_path / "pack"
        found = run_json("edit", "-m", model, "-e", edits, "-o", out, *FAST, "--set", "max_steps=1", code=3)
        assert found["summary"]["failed"] == len(found["edits"]) == 3 and out.is_dir()
        assert found["config"]["max_steps"] == 1 and set(found["metrics"]) >= {"reliability", "locality"}
        assert unsaved == [None, found["metrics"]]  # at once, and again with what the card is to say

    def test_tables_on_stdout_and_progress_on_stderr(self, tmp_path, model, edits, unsaved):
        arguments = ["edit", "-m", model, "-e", edits, "-o", tmp_path / "p", *FAST, "--set", "max_steps=1"]
        result = run(*arguments, "--limit", 1, code=3)
        assert "seconds per edit" in result.stdout.replace("_", " ") and "editing" not in result.stdout
        assert "editing" in result.stderr and "evaluating" in result.stderr

    def test_quiet_is_silent_on_stderr(self, tmp_path, model, edits, unsaved):
        arguments = ["edit", "-m", model, "-e", edits, "-o", tmp_path / "p", *FAST, "--set", "max_steps=1", "-q"]
        assert run(*arguments, "--no-evaluate", "--limit", 1, code=3).stderr.strip() == ""

    def test_duplicates_are_no_failures(self):
        edit = Edit("a", "b")
        reports = [EditReport(edit, note="superseded by edit 2 of this call, a duplicate"), EditReport(edit, 3)]
        assert display.failed(reports) == [reports[1]]
        assert actions.summary(reports) == actions.summary(reports[1:]) | {"superseded": 1}

    def test_interrupt_saves_what_is_whole(self, tmp_path, model, edits, unsaved, monkeypatch):
        learn, calls = WiseEditor._edit_batch, []

        def interrupted(self, *arguments):
            calls.append(1)
            if len(calls) == 2:
                raise KeyboardInterrupt
            return learn(self, *arguments)

        monkeypatch.setattr(WiseEditor, "_edit_batch", interrupted)
        few = [*FAST, "--set", "max_steps=1", "--set", "batch_size=2"]
        result = run("edit", "-m", model, "-e", edits, "-o", tmp_path / "p", *few, "--json", code=130)
        found = strict(result.stdout)
        assert found["interrupted"] and len(found["edits"]) == 2 and found["metrics"] is None
        assert "first 2 of 3 edits are kept" in " ".join(result.stderr.split()) and (tmp_path / "p").is_dir()

    def test_interrupt_before_anything_is_learned(self, tmp_path, model, edits, unsaved, monkeypatch):
        def interrupted(self, *arguments, **options):
            raise KeyboardInterrupt

        monkeypatch.setattr(WiseEditor, "edit", interrupted)
        result = run("edit", "-m", model, "-e", edits, "-o", tmp_path / "p", "--json", code=130)
        assert strict(result.stdout)["exit_code"] == 130
        assert "no edit was finished" in result.stderr and not (tmp_path / "p").exists()

    def test_nothing_but_json_on_stdout(self, tmp_path, model, edits, monkeypatch):
        """Not even when something below prints; and NaN, which JSON does not have, becomes null."""

        def save(self, out):
            print("chatter")

        twice = tmp_path / "twice.json"
        twice.write_text(json.dumps([EDITS[0], EDITS[0]]))
        monkeypatch.setattr(WiseEditor, "save_pretrained", save, raising=False)
        few = [*FAST, "--set", "max_steps=1", "--no-evaluate", "--json"]
        result = run("edit", "-m", model, "-e", twice, "-o", tmp_path / "p", *few, code=3)
        found = strict(result.stdout)
        assert found["edits"][0]["loss"] is None and "superseded" in found["edits"][0]["note"]
        assert found["summary"]["failed"] == 1 and "chatter" in result.stderr


class TestDemo:
    def test_json(self, model, monkeypatch):
        monkeypatch.setattr("wise_fast.commands.build_config", lambda *_, **__: WiseConfig(max_steps=1))
        found = run_json("demo", "-m", model, "-n", 2, "--seed", 1)
        assert [row["kind"] for row in found["answers"]] == ["prompt", "paraphrase", "unrelated"] * 2
        assert found["metrics"]["locality"] is not None and found["summary"]["edits"] == 2
        assert found["summary"]["failed"] > 0  # a demo that shows a failed edit has done its work: exit code 0

    def test_tables(self, model):
        text = run("demo", "-m", model, "-n", 2, "--seed", 1).stdout
        assert "before and after" in text and "reliability" in text and "s per edit" in text

    def test_edits_are_spread_over_relations(self):
        relations = [edit.id.rpartition("-")[0] for edit in actions.spread(demo_edits(), 20)]
        assert len(set(relations[:15])) == 15 and len(set(relations[15:])) == 5

    def test_verdicts(self):
        edit = Edit("p", "new", rephrases=("q",))
        before = [("prompt", "p", "old"), ("paraphrase", "q", "old"), ("unrelated", "r", "same")]
        after = [("prompt", "p", "new"), ("paraphrase", "q", "old"), ("unrelated", "r", "other")]
        assert [r["verdict"] for r in actions.compare([edit], before, after)] == ["right", "wrong", "changed"]
        assert actions.exact(actions.compare([edit], before, after)) == {"exact": 1.0, "exact_rephrased": 0.0}
        assert actions.exact([]) == {"exact": None, "exact_rephrased": None}
        assert actions.compare([edit], before, before)[2]["verdict"] == "unchanged"


class TestRoundTrip:
    def test_eval(self, model, edits, pack):
        found = run_json("eval", "-m", model, "-e", edits, "-p", pack)
        assert found["metrics"]["reliability"] == 1.0 and len(found["scores"]) == 3
        assert found["scores"][0]["answer"] is not None
        text = run("eval", "-m", model, "-e", edits, "-p", pack).stdout
        assert "reliability" in text and "generalization" in text

    def test_eval_of_what_the_pack_holds_without_generating(self, model, pack):
        found = run_json("eval", "-m", model, "-p", pack, "--no-generate", "--limit", 2)
        assert found["edits"] == 2 and found["metrics"]["exact"] is None

    def test_generate(self, model, pack):
        prompts = [EDITS[0]["prompt"], "zzzz"]
        found = run_json("generate", "-m", model, "-p", pack, *prompts, "--max-new-tokens", 6)
        edited, other = found["answers"]
        assert edited["after"] == EDITS[0]["target"] != edited["before"] and edited["memory"] == 1
        assert edited["score"] > edited["threshold"] and other["prompt"] == "zzzz"
        assert "side memory 1" in run("generate", "-m", model, "-p", pack, prompts[0]).stdout

    def test_inspect(self, pack):
        found = run_json("inspect", pack)
        assert found["edits"] == found["successful"] == 3
        assert "successful" in run("inspect", pack).stdout

    def test_inspect_of_what_is_no_pack(self, tmp_path):
        assert run("inspect", tmp_path / "none", code=1).stdout == ""
