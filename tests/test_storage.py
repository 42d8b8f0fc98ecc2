"""save_pretrained and from_pretrained: the same answers after loading; small, whole, and nothing trusted unchecked."""

import copy
import errno
import functools
import json
import logging
import os
import resource
import threading
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from tests.tiny import D_FF, HIDDEN, tiny_model, tiny_tokenizer
from wise_fast import atomic, fingerprint, storage
from wise_fast.architectures import find_architecture
from wise_fast.config import WiseConfig
from wise_fast.data import Edit, Locality
from wise_fast.editor import WiseEditor
from wise_fast.errors import ConfigError, StorageError
from wise_fast.ffn import DualMemoryLinear
from wise_fast.memory import SideMemory
from wise_fast.state import EditorState, EditReport

QUICK = WiseConfig(
    mask_ratio=0.6, max_steps=2, min_steps=1, prefixes=1, prefix_tokens=3, prefixes_per_step=1, batch_size=2
)
PROMPTS = ["The sky is", "Who wrote it?", "A much longer prompt that no edit has", "q0", "q1", "q2"]
MODES = {
    "one": {},
    "retrieve": dict(shard_size=2, route_by="score"),
    "leverage": dict(shard_size=2),
    "merge": dict(shard_size=1, shards=2, mode="merge"),
}


def edits(count):
    return [
        Edit(f"q{i}", f"a{i}", id=str(i), rephrases=("r “é”",), locality=(Locality("where", "here"), Locality("when")))
        for i in range(count)
    ]


def fresh_editor(changes):
    return WiseEditor(tiny_model("llama"), tiny_tokenizer(), QUICK.replace(**changes))


@functools.cache
def learned(count, changes):
    """The state of an editor after so many edits; nothing changes a state."""
    editor = fresh_editor(dict(changes))
    editor.edit(edits(count))
    return editor.state


def make_editor(count=3, **changes):
    editor = fresh_editor(changes)
    if count:
        editor.state = learned(count, tuple(sorted(changes.items())))
    return editor


def with_scope(editor):
    """The editor, with thresholds at which some of the prompts are in a memory's scope and the quietest is in none."""
    served(editor)
    scores, middle = editor.routing.scores, editor.routing.scores.median(0).values
    quietest = scores[(scores / middle).amax(1).argmin()]
    state, levels = editor._state, iter(torch.maximum(middle, quietest).tolist())

    def opened(memory):
        return memory.replace(**dict.fromkeys(("threshold", "z_threshold"), next(levels)))

    merged, closed = (tuple(map(opened, part)) for part in (state.merged, state.closed))
    shard = state.shard and replace(state.shard, memory=opened(state.shard.memory))
    editor._set_state(state.replace(merged=merged, closed=closed, shard=shard))
    return editor


def served(editor):
    """Logits and routing decisions on the prompts."""
    batch = editor.tokenizer(PROMPTS, return_tensors="pt", padding=True)
    with torch.no_grad():
        logits = editor.model(**batch).logits
    return logits, editor.routing.choice


def contents(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def same_memory(a, b):
    facts = [(m.layout, m.shape, m.threshold, m.z_threshold, m.edits) for m in (a, b)]
    tensors = [(a.values, b.values), (a.index, b.index)]
    if a.factor is not None or b.factor is not None:
        tensors.append((a.factor, b.factor))
    return facts[0] == facts[1] and all(torch.equal(x, y) and x.dtype == y.dtype for x, y in tensors)


def rewrite(directory, change):
    """Edit a saved directory as its writer would, with every checksum made right again."""
    files = {
        name: json.loads((directory / name).read_bytes()) if name.endswith("json") else load_file(directory / name)
        for name in (storage.CONFIG, storage.EDITS, storage.MEMORY)
    }
    header, records, tensors = files.values()
    change(header, records, tensors)
    data = {storage.EDITS: json.dumps(records).encode(), storage.MEMORY: storage.safetensors.torch.save(tensors)}
    header = {k: v for k, v in header.items() if k != "checksum"}
    header["sha256"] = {name: storage._sha256(value) for name, value in data.items()}
    data[storage.CONFIG] = storage._encode(header | {"checksum": storage._sha256(storage._encode(header))})
    for name, value in data.items():
        (directory / name).write_bytes(value)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    directory = tmp_path_factory.mktemp("saved") / "editor"
    make_editor(3, **MODES["leverage"]).save_pretrained(directory)
    return directory


@pytest.fixture
def copied(saved, tmp_path):
    directory = tmp_path / "editor"
    directory.mkdir()
    for name, data in contents(saved).items():
        (directory / name).write_bytes(data)
    return directory


@pytest.fixture(scope="module")
def plain():
    return tiny_model("llama")


def refuses(directory, match, model=None, error=StorageError):
    """Loading raises, and the model is what it was."""
    model = tiny_model("llama") if model is None else model
    modules, attributes = dict(model.named_modules()), dict(model.__dict__)
    with pytest.raises(error, match=match):
        WiseEditor.from_pretrained(model, tiny_tokenizer(), directory)
    now = dict(model.named_modules())
    assert now.keys() == modules.keys() and all(now[name] is module for name, module in modules.items())
    assert model.__dict__ == attributes and "generate" not in model.__dict__
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in now.values())


# -- the same editor again ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["neuron", "element"])
@pytest.mark.parametrize("mode", MODES)
def test_a_loaded_editor_answers_bit_for_bit_like_the_saved_one(tmp_path, mode, layout, dtype):
    editor = make_editor(4 if mode == "leverage" else 5, layout=layout, **MODES[mode])
    if mode == "leverage":  # every shard closed, so that all have factors
        assert editor._state.shard is None
    editor.model.to(dtype)
    editor._set_state(editor._state)
    with_scope(editor)
    editor.save_pretrained(tmp_path / "out")
    loaded = WiseEditor.from_pretrained(tiny_model("llama").to(dtype), tiny_tokenizer(), tmp_path / "out")
    (logits, choice), (logits_loaded, choice_loaded) = served(editor), served(loaded)
    assert choice.min() == -1 and choice.max() >= 0, "all or nothing is in scope: this test shows nothing"
    assert torch.equal(logits, logits_loaded) and torch.equal(choice, choice_loaded)
    assert loaded.edits == editor.edits and loaded.config == editor.config
    assert len(loaded.memories) == len(editor.memories) == {"one": 1, "retrieve": 3, "leverage": 2, "merge": 2}[mode]
    assert loaded._state.shard is None and loaded._state.opened == editor._state.opened
    assert loaded._state.merges == editor._state.merges
    if dtype == torch.float32:
        sealed = storage.sealed(editor._state, editor.config)
        assert all(same_memory(a, b) for a, b in zip(sealed.memories, loaded.memories, strict=True))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layout", ["neuron", "element"])
def test_saving_a_loaded_editor_writes_the_same_bytes(tmp_path, mode, layout):
    make_editor(3, layout=layout, **MODES[mode]).save_pretrained(tmp_path / "a")
    loaded = WiseEditor.from_pretrained(tiny_model("llama"), tiny_tokenizer(), str(tmp_path / "a"))
    loaded.save_pretrained(tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_several_memories_with_an_open_shard_are_told_apart_alike_before_and_after(tmp_path):
    editor = with_scope(make_editor(5, **MODES["leverage"]))
    editor.save_pretrained(tmp_path / "out")
    loaded = WiseEditor.from_pretrained(tiny_model("llama"), tiny_tokenizer(), tmp_path / "out")
    assert (loaded.projection.factors is None) == (editor.projection.factors is None)
    assert torch.equal(served(editor)[1], served(loaded)[1])


def test_a_loaded_editor_opens_a_fresh_shard_for_the_next_edit(tmp_path):
    editor = make_editor(1)
    editor.save_pretrained(tmp_path / "out")
    loaded = WiseEditor.from_pretrained(tiny_model("llama"), tiny_tokenizer(), tmp_path / "out")
    old = loaded.memories[0]
    loaded.edit(Edit("q9", "a9"))
    assert len(loaded.edits) == 2 and loaded.memories[1].edits == (1,) and loaded._state.opened == 2
    assert same_memory(loaded.memories[0], old) and not torch.equal(loaded.memories[1].index, old.index)


def test_a_merge_waits_until_the_next_shard_closes(tmp_path):
    editor = make_editor(3, **MODES["merge"] | {"shard_size": 2})
    editor.save_pretrained(tmp_path / "out")
    loaded = WiseEditor.from_pretrained(tiny_model("llama"), tiny_tokenizer(), tmp_path / "out")
    assert (len(loaded._state.closed), loaded._state.merges) == (2, 0)
    loaded.edit(edits(5)[3:])
    assert (len(loaded._state.merged), len(loaded._state.closed), loaded._state.merges) == (1, 0, 1)
    assert loaded._state.merged[0].edits == (0, 1, 2, 3, 4)


def test_an_editor_without_edits(tmp_path):
    make_editor(0).save_pretrained(tmp_path / "out")
    loaded = WiseEditor.from_pretrained(tiny_model("llama"), tiny_tokenizer(), tmp_path / "out")
    assert loaded.edits == [] and loaded.memories == [] and loaded.projection.memories == 0


def test_gpt2_whose_projection_is_stored_transposed(tmp_path):
    editor = WiseEditor(tiny_model("gpt2"), tiny_tokenizer(), QUICK)
    editor.edit(edits(1))
    editor.save_pretrained(tmp_path / "out")
    loaded = WiseEditor.from_pretrained(tiny_model("gpt2"), tiny_tokenizer(), tmp_path / "out")
    assert torch.equal(served(editor)[0], served(loaded)[0])


def test_saving_changes_nothing_in_the_editor(tmp_path):
    editor = make_editor(3, **MODES["leverage"])
    state, before = editor._state, served(editor)
    editor.save_pretrained(tmp_path / "out")
    assert editor._state is state and all(torch.equal(a, b) for a, b in zip(before, served(editor), strict=True))


numbers = st.floats(allow_nan=False) | st.integers(0, 100).map(float)


@settings(max_examples=30)
@given(
    threshold=st.floats(min_value=0),
    z_threshold=st.floats(min_value=0),
    loss=numbers,
    seconds=numbers,
    score=numbers,
    text=st.text(max_size=20),
)
def test_numbers_and_texts_round_trip_exactly(tmp_path_factory, threshold, z_threshold, loss, seconds, score, text):
    text = "p" + text.encode("utf-8", "ignore").decode()
    report = EditReport(Edit(text, text), 3, loss, loss, score, True, seconds, text)
    memory = SideMemory("neuron", torch.randn(2, 3), torch.tensor([1, 4]), (3, 5), threshold, z_threshold, edits=(0,))
    base = dict.fromkeys(("family", "projection", "weights"), "x") | dict(layers=1, layer=0, shape=[3, 5])
    directory = tmp_path_factory.mktemp("numbers") / "out"
    state = EditorState((memory,), opened=1, reports=(report,))
    storage.save(directory, base | {"dtype": "float32"}, WiseConfig(), state)
    loaded = storage.load(directory).state
    assert loaded.reports == (report,) and same_memory(loaded.merged[0], memory)


def test_nan_is_null(tmp_path):
    base = dict.fromkeys(("family", "projection", "weights"), "x") | dict(layers=1, layer=0, shape=[3, 5])
    state = EditorState(reports=(EditReport(Edit("p", "t"), note="never trained"),))
    storage.save(tmp_path / "out", base | {"dtype": "float32"}, WiseConfig(), state)
    assert json.loads((tmp_path / "out" / storage.EDITS).read_text())[0]["loss"] is None
    (report,) = storage.load(tmp_path / "out").state.reports
    assert report.loss != report.loss and report.note == "never trained"


def test_fifty_edits_take_at_most_seven_tenths_of_the_dense_matrix(tmp_path):
    shape = dict(hidden_size=640, intermediate_size=2048)  # those of Gemma 3 270M
    model = tiny_model("llama", num_hidden_layers=2, **shape)
    editor = WiseEditor(model, tiny_tokenizer(), QUICK.replace(max_steps=1, prefixes=0, batch_size=50))
    editor.edit([Edit(f"Who is number {i}?", f"It is {i}", rephrases=("And so?" * 10,)) for i in range(50)])
    editor.save_pretrained(tmp_path / "out")
    size = sum(len(data) for name, data in contents(tmp_path / "out").items() if name != storage.CARD)
    summary = storage.inspect(tmp_path / "out")
    assert size == summary["bytes"] and summary["edits"] == 50 and summary["memories"][0]["rank"] == 64
    assert summary["dense_bytes"] == 640 * 2048 * 4 and size <= 0.7 * summary["dense_bytes"]


def test_inspect_needs_no_model(saved):
    summary = storage.inspect(saved)
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary
    assert (summary["format"], summary["version"], summary["edits"]) == ("wise_fast", storage.VERSION, 3)
    assert summary["base"]["family"] == "llama" and summary["base"]["shape"] == [HIDDEN, D_FF]
    first, second = summary["memories"]
    assert (first["layout"], first["columns"], first["edits"], second["edits"]) == ("neuron", 38, 2, 1)
    assert first["bytes"] >= 38 * HIDDEN * 4 and summary["bytes"] == sum(summary["files"].values())
    assert summary["files"] == {n: len(data) for n, data in contents(saved).items() if n != storage.CARD}


# -- refusals -------------------------------------------------------------------------------------------------------


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


# -- writing whole or not at all ------------------------------------------------------------------------------------


def test_overwriting_replaces_everything_and_leaves_no_trace(tmp_path):
    one, two = make_editor(1), make_editor(3, **MODES["retrieve"])
    one.save_pretrained(tmp_path / "out")
    two.save_pretrained(tmp_path / "out")
    assert os.listdir(tmp_path) == ["out"] and {*os.listdir(tmp_path / "out")} == {*storage._FILES, storage.CARD}
    assert storage.load(tmp_path / "out").state.reports == tuple(two.edits)


def test_parents_are_made_and_an_empty_directory_or_a_link_to_one_is_filled(tmp_path):
    editor = make_editor(1)
    editor.save_pretrained(tmp_path / "a" / "b" / "out")
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    editor.save_pretrained(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert contents(tmp_path / "empty") == contents(tmp_path / "a" / "b" / "out")


@pytest.mark.parametrize("name", ["notes.txt", "config.json", ".hidden"])
def test_a_directory_with_other_things_is_not_replaced(copied, name):
    (copied / name).write_text("mine")
    before = contents(copied)
    with pytest.raises(StorageError, match=f"other things.*{name}"):
        make_editor(1).save_pretrained(copied)
    assert contents(copied) == before and os.listdir(copied.parent) == ["editor"]


@pytest.mark.parametrize("path", ["file", "file/below", "file/below/deeper", "new/" + "n" * 300, "bad\0name"])
def test_places_that_cannot_be_written(tmp_path, path):
    (tmp_path / "file").write_text("mine")
    editor = make_editor(1)
    state, before = editor._state, served(editor)
    with pytest.raises(StorageError):
        editor.save_pretrained(tmp_path / path)
    assert os.listdir(tmp_path) == ["file"] and (tmp_path / "file").read_text() == "mine"
    assert editor._state is state and all(torch.equal(a, b) for a, b in zip(before, served(editor), strict=True))


CALLS = [(atomic, "_write"), (atomic, "sync_directory"), (os, "rename"), (os, "fsync"), (atomic.Path, "mkdir")]


def failing_after(call, count, error):
    """`call`, but the `count`-th time from 0 it raises; `.calls` tells how often it was called."""

    def wrapped(*args, **kwargs):
        wrapped.calls += 1
        if wrapped.calls == count + 1:
            raise error[0](*error[1:])
        return call(*args, **kwargs)

    wrapped.calls = 0
    return wrapped


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("where", CALLS, ids=lambda where: where[1])
@pytest.mark.parametrize("error", [(OSError, errno.ENOSPC, "No space left on device"), (KeyboardInterrupt,)])
def test_a_failure_at_any_step_leaves_the_old_or_the_new_whole(saved, tmp_path, monkeypatch, where, old, error):
    target = tmp_path / "deep" / "editor"
    pack = storage.load(saved)
    if old:
        storage.save(target, pack.base, pack.config, EditorState())
    before = contents(target) if old else None
    for count in range(20):
        module, name = where
        with monkeypatch.context() as patch:
            wrapped = failing_after(getattr(module, name), count, error)
            patch.setattr(module, name, wrapped)
            try:
                storage.save(target, pack.base, pack.config, pack.state)
            except (StorageError, KeyboardInterrupt) as raised:
                assert isinstance(raised, KeyboardInterrupt) or error[2] in str(raised)
                if old:
                    assert contents(target) in (before, contents(saved)) and os.listdir(target.parent) == ["editor"]
                else:
                    assert os.listdir(tmp_path) == [] or contents(target) == contents(saved)
            else:
                assert contents(target) == contents(saved) and os.listdir(target.parent) == ["editor"]
                if wrapped.calls <= count:
                    return
    pytest.fail(f"{name} was called 20 times")


def test_a_read_only_file_system(saved, tmp_path, monkeypatch):
    pack = storage.load(saved)
    monkeypatch.setattr(atomic.Path, "mkdir", failing_after(None, 0, (OSError, errno.EROFS, "Read-only file system")))
    with pytest.raises(StorageError, match="Read-only file system.*nothing was changed"):
        storage.save(tmp_path / "out", pack.base, pack.config, pack.state)
    assert os.listdir(tmp_path) == []


def test_a_file_that_the_system_cuts_short(saved, copied):
    """A real error of the system: no file may grow beyond 3000 bytes."""
    editor = make_editor(3)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, limits[1]))
    try:
        with pytest.raises(StorageError, match="File too large"):
            editor.save_pretrained(copied)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert contents(copied) == contents(saved) and os.listdir(copied.parent) == ["editor"]


def test_a_writer_killed_between_the_renames_loses_nothing(saved, copied, caplog):
    aside = copied.parent / ".editor.wise-old"
    copied.rename(aside)
    (copied.parent / ".editor.wise-new").mkdir()
    with caplog.at_level(logging.WARNING):
        assert storage.inspect(copied)["edits"] == 3
    assert "interrupted" in caplog.text and not copied.exists()
    with pytest.raises(StorageError):
        storage.save(copied, {"shape": (1, 1), "dtype": "float32"}, WiseConfig(), storage.load(copied).state)
    assert storage.inspect(copied)["edits"] == 3
    make_editor(1).save_pretrained(copied)
    assert os.listdir(copied.parent) == ["editor"] and storage.inspect(copied)["edits"] == 1


def test_a_writer_killed_after_the_renames_leaves_the_new(saved, copied):
    aside = copied.parent / ".editor.wise-old"
    aside.mkdir()
    (aside / storage.CONFIG).write_text("old")
    assert storage.inspect(copied)["edits"] == 3
    make_editor(1).save_pretrained(copied)
    assert os.listdir(copied.parent) == ["editor"]


def test_readers_and_writers_at_once_see_whole_directories(tmp_path):
    packs = []
    for count in (1, 2):
        make_editor(count).save_pretrained(tmp_path / "out")
        packs.append(storage.load(tmp_path / "out"))
    failures = []

    def repeat(action):
        try:
            for _ in range(15):
                action()
        except Exception as error:  # noqa: BLE001 - a thread's failure is reported by the test
            failures.append(error)

    actions = [lambda p=p: storage.save(tmp_path / "out", p.base, p.config, p.state) for p in packs]
    threads = [threading.Thread(target=repeat, args=(a,)) for a in [*actions, lambda: storage.load(tmp_path / "out")]]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures and os.listdir(tmp_path) == ["out"]


def test_a_directory_that_another_writer_is_replacing_is_looked_at_under_the_lock(tmp_path, monkeypatch):
    """Looked at before, its files seem to be no files while the other writer renames it."""
    editor, locked, seen = make_editor(1), atomic._locked, []
    editor.save_pretrained(tmp_path / "out")
    look = atomic._require_replaceable

    @contextmanager
    def watched(*given, **more):
        with locked(*given, **more):
            seen.append("locked")
            yield

    monkeypatch.setattr(atomic, "_locked", watched)
    monkeypatch.setattr(atomic, "_require_replaceable", lambda *given: seen.append("looked") or look(*given))
    editor.save_pretrained(tmp_path / "out")
    assert seen == ["locked", "looked"]


def test_state_that_could_not_be_loaded_again_is_not_written(tmp_path):
    editor = make_editor(1)
    memory = editor._state.shard.memory
    broken = memory.replace(values=memory.values.clone().fill_(torch.inf))
    editor._state = editor._state.replace(merged=(broken,))
    with pytest.raises(StorageError, match="not sound"):
        editor.save_pretrained(tmp_path / "out")
    assert os.listdir(tmp_path) == []
