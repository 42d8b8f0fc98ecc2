"""Loading: nothing that a directory holds is trusted unchecked, and a refusal leaves the model as it was."""

import copy
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.stored import QUICK, contents, edits, make_editor, refuses, rewrite, served
from tests.tiny import D_FF, HIDDEN, tiny_model, tiny_tokenizer
from wise_fast import fingerprint, storage
from wise_fast.architectures import find_architecture
from wise_fast.editor import WiseEditor
from wise_fast.errors import ConfigError, StorageError
from wise_fast.ffn import DualMemoryLinear


def test_every_byte_of_every_file_is_protected(saved, copied):
    """But for the card, which is for people."""
    for name, data in contents(saved).items():
        if name == storage.CARD:
            continue
        places = set(range(0, len(data), max(1, len(data) // 60))) | {0, 8, len(data) - 1}
        for place in sorted(places):
            for bit in (0, 5):
                (copied / name).write_bytes(data[:place] + bytes([data[place] ^ (1 << bit)]) + data[place + 1 :])
                with pytest.raises(StorageError):
                    storage.load(copied)
        (copied / name).write_bytes(data)
    storage.load(copied)


@pytest.mark.parametrize("name", [storage.CONFIG, storage.EDITS, storage.MEMORY])
def test_truncated_files(saved, copied, name):
    data = (saved / name).read_bytes()
    for length in [*range(0, len(data), max(1, len(data) // 40)), len(data) - 1]:
        (copied / name).write_bytes(data[:length])
        with pytest.raises(StorageError):
            storage.load(copied)
    (copied / name).write_bytes(data + b"\n")
    with pytest.raises(StorageError):
        storage.load(copied)
    refuses(copied, "damaged")


@pytest.mark.parametrize("name", [storage.CONFIG, storage.EDITS, storage.MEMORY])
def test_a_missing_file_is_named(copied, name):
    (copied / name).unlink()
    refuses(copied, f"has no {name}")


def test_reformatted_or_foreign_json(copied):
    config = copied / storage.CONFIG
    header = json.loads(config.read_text())
    for text in (json.dumps(header), "[]", "null", "1", "[" * 100_000, '{"format": "peft"}', "\ufeff{}", "{}\x00"):
        config.write_text(text)
        refuses(copied, storage.CONFIG)
    config.write_bytes(b"\xff\xfe")
    refuses(copied, "not JSON")


def test_a_newer_format_says_so(copied):
    rewrite(copied, lambda header, records, tensors: header.update(version=storage.VERSION + 1, library="9.0"))
    refuses(copied, f"format version {storage.VERSION + 1}, written by wise_fast 9.0.*upgrade")


UNSOUND = {
    "unknown setting": (lambda h, r, t: h["config"].update(learning_rate=1), "learning_rate"),
    "setting out of range": (lambda h, r, t: h["config"].update(lr=-1), "lr is -1"),
    "settings are no object": (lambda h, r, t: h.update(config=[1]), "did not write"),
    "no memories": (lambda h, r, t: h.pop("memories"), "did not write"),
    "unknown place": (lambda h, r, t: h["memories"][0].update(place="__class__"), "did not write"),
    "unknown layout": (lambda h, r, t: h["memories"][0].update(layout="dense"), "not sound"),
    "other shape": (lambda h, r, t: h["memories"][0].update(shape=[HIDDEN, D_FF - 1]), "not sound"),
    "threshold null": (lambda h, r, t: h["memories"][0].update(threshold=None), "not sound"),
    "threshold text": (lambda h, r, t: h["memories"][0].update(threshold="high"), "not a number"),
    "edit out of range": (lambda h, r, t: h["memories"][0].update(edits=[0, 99]), "not sound"),
    "negative count": (lambda h, r, t: h["state"].update(opened=-1), "opened"),
    "unknown base fact": (lambda h, r, t: h["base"].update(name="x"), "base model"),
    "unknown dtype": (lambda h, r, t: h["base"].update(dtype="nn"), "base model"),
    "column out of range": (lambda h, r, t: t["memories.0.index"].fill_(D_FF), "not sound"),
    "column repeated": (lambda h, r, t: t["memories.0.index"].fill_(3), "not sound"),
    "negative column": (lambda h, r, t: t["memories.0.index"][0].fill_(-1), "not sound"),
    "not finite": (lambda h, r, t: t["memories.0.values"][0].fill_(torch.nan), "not sound"),
    "too few rows": (lambda h, r, t: t.update({"memories.0.values": t["memories.0.values"][1:].clone()}), "not sound"),
    "factor of another size": (lambda h, r, t: t.update({"memories.0.factor": torch.ones(3, 2)}), "not sound"),
    "tensor missing": (lambda h, r, t: t.pop("memories.1.values"), "did not write"),
    "tensor too many": (lambda h, r, t: t.update(spare=torch.ones(1)), "left over"),
    "report without edit": (lambda h, r, t: r[0].pop("edit"), "did not write"),
    "report of another kind": (lambda h, r, t: r[0].update(colour="red"), "did not write"),
    "edit unusable": (lambda h, r, t: r[0]["edit"].update(prompt=""), "did not write"),
}


@pytest.mark.parametrize("case", UNSOUND)
def test_content_is_checked_even_when_every_checksum_holds(copied, plain, case):
    change, match = UNSOUND[case]
    rewrite(copied, change)
    refuses(copied, match, plain)


def test_element_bits_must_match_the_values(tmp_path):
    directory = tmp_path / "out"
    make_editor(1, layout="element").save_pretrained(directory)
    rewrite(directory, lambda header, records, tensors: tensors["memories.0.index"][0].fill_(-1))
    refuses(directory, "not sound")


def test_not_a_directory(tmp_path, plain):
    (tmp_path / "file").write_text("hello")
    (tmp_path / "empty").mkdir()
    refuses(tmp_path / "file", "is a file", plain)
    refuses(tmp_path / "nothing", "does not exist", plain)
    refuses(tmp_path / "nothing" / "deeper", "does not exist", plain)
    refuses(tmp_path / "file" / "below", "does not exist", plain)
    refuses(tmp_path / "empty", "has no wise_config.json", plain)
    refuses("bad\0name", "cannot be read", plain)


def fine_tuned():
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight[0, 0] += 1e-3
    return model


OTHERS = {
    "other weights": (lambda: tiny_model("llama", seed=1), "weights differ"),
    "fine-tuned": (fine_tuned, "weights differ"),
    "other family": (lambda: tiny_model("mistral"), "family is llama, this model's mistral"),
    "more layers": (lambda: tiny_model("llama", num_hidden_layers=6), "layers is 4, this model's 6"),
    "other width": (lambda: tiny_model("llama", intermediate_size=96), r"shape is \[32, 64\], this model's \[32, 96\]"),
    "other vocabulary": (lambda: tiny_model("llama", vocab_size=300), "weights differ"),
    "other dtype": (lambda: tiny_model("llama").to(torch.bfloat16), "in float32.*in bfloat16.*dtype=torch.float32"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_another_base_model_is_refused(saved, case):
    make, match = OTHERS[case]
    refuses(saved, match, make())


def test_too_few_layers_for_the_edited_one(tmp_path):
    make_editor(1, layer=3).save_pretrained(tmp_path / "out")
    refuses(tmp_path / "out", "another base model, of 4 layers", tiny_model("llama", num_hidden_layers=2))


def test_a_model_that_has_an_editor_keeps_it(saved):
    editor = make_editor(1)
    before = served(editor)
    with pytest.raises(ConfigError, match="unload"):
        WiseEditor.from_pretrained(editor.model, editor.tokenizer, saved)
    assert all(torch.equal(a, b) for a, b in zip(before, served(editor), strict=True))
    assert sum(isinstance(m, DualMemoryLinear) for m in editor.model.modules()) == 1


def test_a_failure_while_attaching_leaves_the_model_as_it_was(saved, monkeypatch):
    def fail(self, bank):
        if bank is not None:
            raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(DualMemoryLinear, "set_bank", fail)
    refuses(saved, "out of memory", error=torch.OutOfMemoryError)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_the_fingerprint_does_not_see_the_editor(family):
    model = tiny_model(family)
    before = fingerprint.describe(model, find_architecture(model))
    editor = WiseEditor(model, tiny_tokenizer(), QUICK)
    editor.edit(edits(1))
    assert fingerprint.describe(model, editor.architecture) == before
    editor.unload()
    assert fingerprint.describe(copy.deepcopy(model), find_architecture(model)) == before


@settings(max_examples=30)
@given(st.integers(0, HIDDEN - 1), st.integers(0, D_FF - 1))
def test_the_fingerprint_sees_every_weight_of_the_projection(plain, row, column):
    architecture = find_architecture(plain)
    weight = plain.get_submodule(architecture.projection).weight
    before = fingerprint.describe(plain, architecture)
    old = weight[row, column].item()
    with torch.no_grad():
        weight[row, column] = torch.nextafter(weight[row, column], torch.tensor(torch.inf))
        changed = fingerprint.describe(plain, architecture)
        weight[row, column] = old
    assert changed["weights"] != before["weights"]
    assert changed | {"weights": None} == before | {"weights": None}
