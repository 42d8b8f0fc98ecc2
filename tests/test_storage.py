"""save_pretrained and from_pretrained: the same answers after loading, and small."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.stored import MODES, QUICK, contents, edits, make_editor, rewrite, same_memory, served, with_scope
from tests.tiny import D_FF, HIDDEN, tiny_model, tiny_tokenizer
from wise_fast import protection, storage
from wise_fast.config import WiseConfig
from wise_fast.data import Edit
from wise_fast.editor import WiseEditor
from wise_fast.memory import SideMemory
from wise_fast.state import EditorState, EditReport


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
    assert size == summary["bytes"] and summary["edits"] == 50 and summary["memories"][0]["rank"] == protection.RANK
    assert summary["dense_bytes"] == 640 * 2048 * 4 and size <= 0.7 * summary["dense_bytes"]


@pytest.mark.parametrize("version", [1, 2, 3])
def test_packs_of_old_versions_load(copied, version):
    """Without what came later: `names` and their setting in version 4, `last_limit` and its settings in version 3, the
    leverage factor of now in version 2."""
    before = storage.load(copied).state.memories

    def older(header, records, tensors):
        header["version"] = version
        newer = {4: ("ending_limit",), 3: ("last_limit",)}
        for number, fact in enumerate(header["memories"]):
            for name in [name for later, names in newer.items() if version < later for name in names]:
                del fact[name]
            for name in ("names", "about", "endings"):
                tensors.pop(f"memories.{number}.{name}", None)
        for name in ("by_subject", "merging", *(("last_ratio", "shard_fill") if version < 3 else ())):
            del header["config"][name]

    rewrite(copied, older)
    editor = WiseEditor.from_pretrained(tiny_model("llama"), tiny_tokenizer(), copied)
    assert editor.config.merging == "ties"  # there was no other
    for memory, old in zip(editor.memories, before, strict=True):
        assert memory.last_limit == (old.last_limit if version == 3 else float("inf"))
        assert memory.names is None and memory.threshold == old.threshold
        assert torch.equal(memory.values, old.values)
        assert (memory.factor is None) == (version == 1 or old.factor is None)
    editor.model(**tiny_tokenizer()("q0", return_tensors="pt"))
    assert editor.routing.scores.isfinite().all()
    assert editor.edit(Edit("another", "one"))[0].steps > 0
    editor.save_pretrained(copied)
    assert storage.inspect(copied)["version"] == storage.VERSION


def test_inspect_needs_no_model(saved):
    summary = storage.inspect(saved)
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary
    assert (summary["format"], summary["version"], summary["edits"]) == ("wise_fast", storage.VERSION, 3)
    assert summary["base"]["family"] == "llama" and summary["base"]["shape"] == [HIDDEN, D_FF]
    first, second = summary["memories"]
    assert (first["layout"], first["columns"], first["edits"], second["edits"]) == ("neuron", 38, 2, 1)
    assert first["bytes"] >= 38 * HIDDEN * 4 and summary["bytes"] == sum(summary["files"].values())
    assert summary["files"] == {n: len(data) for n, data in contents(saved).items() if n != storage.CARD}
