"""Edits folded into the weights: the checkpoint written, what it answers, and what the loss of routing costs."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.edited import ELSEWHERE, FACTS, logits, make_editor, same, saved_model, untouched, wide_model
from tests.test_cli import run, run_json
from tests.tiny import tiny_tokenizer
from wise_fast import Edit, dense, export_command  # noqa: F401  the last registers its command
from wise_fast.data import Locality
from wise_fast.errors import ConfigError, StorageError, WiseError
from wise_fast.merging import merge_memories

TAUGHT = [
    Edit(fact.prompt, fact.target, locality=(Locality(text, "abcdef"),))
    for fact, text in zip(FACTS, ELSEWHERE, strict=True)
]


@pytest.fixture(scope="module")
def editor():
    """Two memories of two edits."""
    return make_editor(TAUGHT, shard_size=2)


def loaded(directory):
    return AutoModelForCausalLM.from_pretrained(directory).eval()


def plain_plus(family, editor, delta):
    """The unedited model with a dense delta in its projection."""
    model = wide_model(family)
    weight = model.get_submodule(editor.architecture.projection).weight
    weight.data += delta.t() if family == "gpt2" else delta
    return model


@pytest.mark.parametrize("merge", dense.MERGES)
def test_loads_as_any_checkpoint_and_is_the_model_with_the_delta(editor, tmp_path, merge):
    with untouched(editor):
        editor.export_dense(tmp_path / "out", merge)
    one, two = editor.memories
    delta = one.dense() + two.dense() if merge == "sum" else merge_memories([one, two], 0.5).dense()
    model = loaded(tmp_path / "out")
    assert same(logits(model), logits(plain_plus("mistral", editor, delta)))
    assert model.state_dict().keys() == wide_model().state_dict().keys()
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("a b")["input_ids"] == tiny_tokenizer()("a b")["input_ids"]
    assert "may\nhave changed" in (tmp_path / "out" / "README.md").read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("family, layout", [("gpt2", "neuron"), ("gemma3", "element")])
def test_one_memory_is_folded_as_it_is(tmp_path, family, layout):
    """Whatever the weight's orientation, the layout of the mask, and the head's being tied."""
    editor = make_editor(FACTS[:1], family, layout=layout, max_steps=5)
    (tmp_path / "out").mkdir()
    editor.export_dense(tmp_path / "out")
    delta = editor.memories[0].dense()
    assert delta.any() and same(logits(loaded(tmp_path / "out")), logits(plain_plus(family, editor, delta)))


def test_folding_for_a_while_is_the_export(editor, tmp_path):
    editor.export_dense(tmp_path / "out")
    with untouched(editor), dense.folded(editor) as method:
        assert same(logits(editor.model), logits(loaded(tmp_path / "out")))
        with method.disabled():
            assert same(logits(editor.model), logits(wide_model()))
        with pytest.raises(WiseError, match="cannot be edited"):
            method.edit(FACTS)


def test_what_the_router_was_worth(editor, tmp_path):
    with untouched(editor):
        found = dense.cost(editor)
    routed, folded = found["routed"].summary(), found["dense"].summary()
    assert (routed["reliability"], routed["locality"]) == (1.0, 1.0) and folded["locality"] < 0.9
    model, plain = plain_plus("mistral", editor, dense.merged(editor)), wide_model()
    rows = [tiny_tokenizer()(f"{text} abcdef", return_tensors="pt") for text in ELSEWHERE]
    with torch.no_grad():
        best = [[m(**row).logits[0, -8:-1].argmax(-1) for m in (model, plain)] for row in rows]
    assert folded["locality"] == pytest.approx(sum(float((a == b).float().mean()) for a, b in best) / len(best))


class TestRefused:
    def test_nothing_to_fold(self, tmp_path):
        with pytest.raises(WiseError, match="holds no edits"):
            make_editor().export_dense(tmp_path / "out")
        assert not any(tmp_path.iterdir())

    def test_another_merge(self, editor, tmp_path):
        with pytest.raises(ConfigError, match="'mean', expected one of ties, sum"):
            editor.export_dense(tmp_path / "out", "mean")
        assert not any(tmp_path.iterdir())

    @pytest.mark.parametrize("kind", ["file", "full"])
    def test_a_place_that_is_taken(self, editor, tmp_path, kind):
        out = tmp_path / "out"
        (out if kind == "file" else out / "notes").parent.mkdir(exist_ok=True)
        (out if kind == "file" else out / "notes").write_text("mine")
        with pytest.raises(StorageError, match="no empty directory"):
            editor.export_dense(out)
        assert [path.name for path in tmp_path.iterdir()] == ["out"]

    def test_a_write_that_fails_leaves_nothing(self, editor, tmp_path, monkeypatch):
        def full(*_, **__):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(editor.tokenizer, "save_pretrained", full)
        with untouched(editor), pytest.raises(StorageError, match="No space left"):
            editor.export_dense(tmp_path / "out")
        assert not any(tmp_path.iterdir())


def test_the_command(editor, tmp_path):
    editor.save_pretrained(tmp_path / "pack")
    words = ["export", "--model", saved_model(tmp_path / "model"), "--pack", tmp_path / "pack", "--out"]
    found = run_json(*words, tmp_path / "out")
    assert found["metrics"]["routed"]["locality"] == 1.0 > found["metrics"]["dense"]["locality"]
    editor.export_dense(tmp_path / "same")
    assert same(logits(loaded(tmp_path / "out")), logits(loaded(tmp_path / "same")))
    assert "no empty directory" in run(*words, tmp_path / "out", code=1).stderr
    assert "expected one of ties, sum" in run(*words, tmp_path / "new", "--merge", "mean", code=1).stderr
    assert not (tmp_path / "new").exists()
