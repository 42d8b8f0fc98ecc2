"""The edits card: what a saved directory's README.md says, whose it is, and that nothing depends on it."""

import re

import pytest
import yaml

from tests.edited import FACTS, make_editor, saved_model, wide_model
from tests.test_cli import run
from tests.tiny import tiny_tokenizer
from wise_fast import WiseEditor, actions, storage
from wise_fast.card import _edits
from wise_fast.data import Edit
from wise_fast.errors import ConfigError, StorageError
from wise_fast.state import EditReport

METRICS = {"reliability": 1.0, "locality": 0.98765, "generalization": None}


@pytest.fixture(scope="module")
def editor():
    return make_editor(FACTS[:2])


@pytest.fixture
def pack(editor, tmp_path):
    editor.save_pretrained(tmp_path / "pack", METRICS)
    return tmp_path / "pack"


def card(directory):
    return (directory / storage.CARD).read_text()


def test_says_what_is_inside(pack):
    text = card(pack)
    front = yaml.safe_load(text.split("---")[1])
    assert front == {"library_name": "wise_fast", "tags": ["wise", "model-editing"]}
    for line in (
        "# 2 edits of a mistral model",
        "| family | mistral, 4 layers, float32 |",
        "| edited | layer 2, `model.layers.2.mlp.down_proj`, 128 x 512 |",
        "| edits | 2, of which 2 hold |",
        "| reliability | 1.000 |",
        "| locality | 0.988 |",
        "| mask_ratio | `0.6` |",
    ):
        assert line in text.splitlines()
    assert "generalization" not in text and "| seed |" not in text  # not measured; the default


def test_lists_the_edits_that_are_held(tmp_path):
    editor = make_editor(FACTS[:3])
    editor.edit(Edit(FACTS[0].prompt, "x"))
    editor.save_pretrained(tmp_path / "pack")
    lines = card(tmp_path / "pack").splitlines()
    listed = [line for line in lines[lines.index("## Edits") :] if line.endswith(("| yes |", "| no |"))]
    held = [report for report in editor.edits if not report.superseded]
    assert listed == [
        f"| {r.edit.prompt} | {r.edit.target} | {'yes' if r.success else 'no'} |".replace("_", "\\_") for r in held
    ]
    assert len(held) == 3 and "All of each is in `wise_edits.json`." in lines


def test_many_and_odd_edits_are_listed_safely():
    edits = [EditReport(Edit(f"a | b\n<i>{i}</i>" + "x" * 200, "*y*"), success=i % 2 == 0) for i in range(60)]
    text = _edits(edits)
    rows = text.splitlines()[2:52]
    assert all(re.fullmatch(r"\| a \\\| b \\<i\\>\d+\\</i\\>x+\.\.\. \| \\\*y\\\* \| (yes|no) \|", row) for row in rows)
    assert text.endswith("10 more, and all of each, are in `wise_edits.json`.") and _edits([]) == "None."


def test_the_code_on_it_loads_the_pack(pack, tmp_path):
    model = saved_model(tmp_path / "model")
    (code,) = re.findall(r"```python\n(.*?)```", card(pack), re.S)
    code = code.replace("'the base model'", repr(model)).replace("'this directory'", repr(str(pack)))
    names = {}
    exec(code.replace("model.generate(...)", ""), names)
    assert [report.edit for report in names["editor"].edits] == list(FACTS[:2])


def test_the_base_models_hub_id_is_named_and_a_path_is_not(editor, tmp_path):
    for name, shown in (
        ("org/model-7b", True),
        (str(tmp_path), False),
        ("/home/me/model", False),
        ("tests/tiny", True),
    ):
        editor.model.config._name_or_path = name
        editor.save_pretrained(tmp_path / "pack")
        assert (f"base_model: {name}\n" in card(tmp_path / "pack")) == (name in card(tmp_path / "pack")) == shown
    editor.model.config._name_or_path = ""


def test_a_card_without_metrics_or_changed_settings(tmp_path):
    WiseEditor(wide_model(), tiny_tokenizer()).save_pretrained(tmp_path / "pack")
    assert "All are the defaults." in card(tmp_path / "pack") and "## Metrics" not in card(tmp_path / "pack")


def test_the_same_edits_have_the_same_card(editor, pack, tmp_path):
    editor.save_pretrained(tmp_path / "elsewhere", METRICS)
    assert card(tmp_path / "elsewhere") == card(pack)


@pytest.mark.parametrize("change", ["edited", "removed"])
def test_nothing_depends_on_it_and_saving_writes_it_anew(editor, pack, change):
    before, file = card(pack), pack / storage.CARD
    file.write_text("my notes") if change == "edited" else file.unlink()
    assert len(storage.load(pack).state.reports) == 2
    actions.check_out(pack)
    editor.save_pretrained(pack, METRICS)
    assert card(pack) == before


def test_somebody_elses_readme_is_not_replaced(editor, tmp_path):
    (tmp_path / "README.md").write_text("mine")
    with pytest.raises(StorageError, match="other things.*README.md"):
        editor.save_pretrained(tmp_path)
    with pytest.raises(StorageError, match="other things.*README.md"):
        actions.check_out(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"] and card(tmp_path) == "mine"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "high", [1.0]])
def test_metrics_are_numbers(editor, tmp_path, value):
    with pytest.raises(ConfigError, match="'locality'.*finite number"):
        editor.save_pretrained(tmp_path / "pack", {"locality": value})
    assert not (tmp_path / "pack").exists()


def test_inspect_has_its_facts(pack):
    assert storage.inspect(pack)["about"] == {"metrics": {"reliability": 1.0, "locality": 0.98765}}
    shown = run("inspect", pack).stdout
    for fact in ("mistral", "model.layers.2.mlp.down_proj", "about.metrics.reliability", "0.988"):
        assert fact in shown
