"""The ablation: every variant is a setting that differs from the defaults, and its rows hold what decides."""

import json

import pytest

from bench import ablation, records
from tests.edited import saved_model
from wise_fast import WiseConfig

EDITS = [{"prompt": f"Who owns house {i}?", "target": f"Man {i}", "rephrases": [f"House {i} is of"]} for i in range(6)]
QUICK = ["--set", "max_steps=2", "--set", "prefixes=1", "--set", "mask_ratio=1.0"]


@pytest.mark.parametrize("what", [what for what in ablation.VARIANTS if what != "the defaults"])
def test_a_variant_changes_the_defaults(what):
    assert WiseConfig(**ablation.VARIANTS[what]) != WiseConfig()


def test_rows_of_two_variants(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("wise_fast.tasks.held_out_texts", lambda: ["A short text."])
    file = tmp_path / "edits.json"
    file.write_text(json.dumps(EDITS))
    source = saved_model(tmp_path / "model")
    arguments = ["--model", source, "--edits", str(file), "--offset", "1", "--limit", "3", "--untaught", "1", *QUICK]
    ablation.main([*arguments, "--only", "no ", "--no-generate", "--out", str(tmp_path), "--json"])
    rows = json.loads(capsys.readouterr().out)
    assert [row["what"] for row in rows] == [what for what in ablation.VARIANTS if "no " in what]
    for row in rows:
        assert row["count"] == 3 and 0 <= row["untaught_in_scope"] <= 1 and row["exact"] is None
        assert row["perplexity_before"] > 1 and row["perplexity_after"] > 1
    settings = {row["what"]: json.loads(row["settings"]) for row in rows}
    assert settings["no neighbours"]["near"] == 0 and settings["no protection of earlier edits"]["protect"] is False
    assert len(records.read(tmp_path / "ablation.csv")) == len(rows)
