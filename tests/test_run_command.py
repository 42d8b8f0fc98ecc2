"""`wise-fast run`: files of options, interrupts, resuming, partner files, errors."""

import json

import pytest
from typer.testing import CliRunner

from tests.edited import wide_model
from tests.killed import CONFIG, EDITS
from tests.running import lines
from tests.tiny import tiny_tokenizer
from wise_fast import WiseEditor, run_command
from wise_fast.commands import app

pytestmark = pytest.mark.usefixtures("little_to_read")


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
            (["--out", "{new}", "--edits", "{edits}", "--mode", "merge", "--set", "shard_size=null"], "shard_size"),
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
