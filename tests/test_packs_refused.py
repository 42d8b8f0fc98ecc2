"""Wrong use of packs is told before anything changes: names, batches, other bases, and moments at which nothing may."""

from dataclasses import replace

import pytest
import torch
from transformers import TextStreamer

from tests.edited import FACTS, untouched, wide_model
from tests.packs import NAMES, OWN, PROMPTS, generated, new_editor, save_packs, with_packs
from tests.stored import rewrite
from tests.tiny import tiny_tokenizer
from wise_fast import Edit, WiseEditor
from wise_fast.errors import ConfigError, PackError, StorageError, WiseError
from wise_fast.ffn import DualMemoryLinear
from wise_fast.training import Trainer


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return save_packs(tmp_path_factory.mktemp("packs"))


@pytest.fixture(scope="module")
def editor(saved):
    """Tests leave it as it is."""
    return with_packs(saved)


def refuses(editor, match, call, error=PackError):
    """The call raises, and packs, what is active, edits, tensors and answers are what they were."""
    packs, active, order = editor._packs, editor.active, editor._order
    names, numbering = dict(editor.routing.packs.names), editor.routing.numbering
    limits = None if editor.projection.limits is None else editor.projection.limits.clone()
    with untouched(editor), pytest.raises(error, match=match):
        call()
    assert (editor._packs, editor.active, editor._order) == (packs, active, order)
    assert (editor.routing.packs.names, editor.routing.numbering) == (names, numbering)
    assert editor.routing.packs.asked is None and editor.routing.rows is None
    assert editor.routing.turn.change is None and not editor.routing.generating
    assert limits is None or torch.equal(editor.projection.limits, limits)


class TestNames:
    def test_unknown(self, editor):
        there = "no pack 'finance'; there are: '__base__', 'default', 'legal', 'medical'"
        refuses(editor, there, lambda: editor.set_active(["legal", "finance"]))
        refuses(editor, there, lambda: generated(editor, PROMPTS[:2], pack_names=["legal", "finance"]))
        refuses(editor, there, lambda: editor.packs_for(["finance"]).__enter__())
        refuses(editor, "no pack 'finance'; there are: 'legal', 'medical'", lambda: editor.delete_pack("finance"))
        refuses(editor, "no loaded pack", lambda: editor.delete_pack("default"))
        refuses(editor, "no loaded pack", lambda: editor.delete_pack("__base__"))

    def test_of_another_kind(self, editor, saved):
        refuses(editor, r"write \['legal'\]", lambda: editor.set_active("legal"))
        refuses(editor, "list of strings", lambda: generated(editor, PROMPTS[:2], pack_names="legal"))
        refuses(editor, "list of strings", lambda: generated(editor, PROMPTS[:2], pack_names=["legal", None]))
        for name in ("", "  ", None, 3):
            refuses(editor, "not empty", lambda name=name: editor.load_pack(saved["legal"], name))

    def test_taken(self, editor, saved):
        refuses(editor, "already; delete_pack", lambda: editor.load_pack(saved["medical"], "legal"))
        refuses(editor, "the edits made here", lambda: editor.load_pack(saved["medical"], "default"))
        refuses(editor, "asks for no pack", lambda: editor.load_pack(saved["medical"], "__base__"))


class TestBatches:
    @pytest.mark.parametrize("names", [[], ["legal"], ["legal", "medical", "__base__"], NAMES])
    def test_other_than_the_names(self, editor, names):
        match = f"{len(names)} pack names for 2 sequences"
        given = editor.tokenizer([PROMPTS[0]] * 2, return_tensors="pt")

        def forward():
            with editor.packs_for(names):
                editor.model(**given)

        def generation():
            with editor.packs_for(names):
                editor.model.generate(**given, max_new_tokens=1)

        for call in (forward, generation, lambda: editor.model.generate(**given, pack_names=names, max_new_tokens=1)):
            refuses(editor, match, call)

    def test_names_of_beams(self, editor):
        """Of sequences, not of the rows they become."""
        match = "4 pack names for 2 sequences"
        names = ["legal", "legal", "medical", "medical"]
        refuses(editor, match, lambda: generated(editor, PROMPTS[:2], pack_names=names, num_beams=2))


class TestPacks:
    def test_of_another_base_model(self, editor, saved):
        other = new_editor(family="llama")
        refuses(
            other, "family is mistral, this model's llama", lambda: other.load_pack(saved["legal"], "x"), StorageError
        )
        other = WiseEditor(wide_model(seed=1), tiny_tokenizer(), editor.config)
        refuses(other, "weights differ", lambda: other.load_pack(saved["legal"], "x"), StorageError)
        other = WiseEditor(wide_model().to(torch.bfloat16), tiny_tokenizer(), editor.config)
        refuses(other, "dtype=torch.float32", lambda: other.load_pack(saved["legal"], "x"), StorageError)

    def test_of_another_layer_layout_or_reduction(self, saved):
        for changes, match, error in (
            (dict(layer=1), r"of layer 2, this editor's of layer 1.*layer=2", StorageError),
            (dict(layout="element"), "layout 'neuron' and this editor 'element'.*layout='neuron'", PackError),
            (dict(reduction="max"), "reduction 'mean' and this editor 'max'.*reduction='mean'", PackError),
        ):
            editor = new_editor(**changes)
            refuses(editor, match, lambda e=editor: e.load_pack(saved["legal"], "x"), error)

    def test_that_are_no_pack(self, editor, tmp_path):
        refuses(editor, "does not exist", lambda: editor.load_pack(tmp_path / "none", "x"), StorageError)
        new_editor(OWN[:1]).save_pretrained(tmp_path / "pack")
        rewrite(tmp_path / "pack", lambda header, records, tensors: header["config"].update(lr=-1))
        refuses(editor, "lr is -1", lambda: editor.load_pack(tmp_path / "pack", "x"), StorageError)

    def test_that_do_not_fit_the_memory(self, editor, saved, monkeypatch):
        def fail(*_):
            raise torch.OutOfMemoryError("out of memory")

        for call in (lambda: editor.load_pack(saved["legal"], "x"), lambda: editor.delete_pack("legal")):
            with monkeypatch.context() as patch:
                patch.setattr(DualMemoryLinear, "set_bank", fail)
                packs, order = editor._packs, editor._order
                with pytest.raises(torch.OutOfMemoryError):
                    call()
            assert editor._packs is packs and editor._order is order and len(editor.routing.packs.names) == 4

    def test_an_editor_without_a_model(self, saved):
        editor = new_editor()
        editor.unload()
        for call in (
            lambda: editor.load_pack(saved["legal"], "x"),
            lambda: editor.set_active([]),
            lambda: editor.packs_for(["default"]).__enter__(),
        ):
            with pytest.raises(WiseError, match="unloaded"):
                call()
        assert editor.active == ["default"]

    def test_a_bank_set_by_hand_has_none(self, saved):
        editor = with_packs(saved)
        projection = editor.projection
        projection.load_state_dict(projection.state_dict())
        with pytest.raises(PackError, match="set by hand"):
            generated(editor, PROMPTS[:1], pack_names=["legal"])
        editor.state = editor.state
        assert generated(editor, PROMPTS[:1], pack_names=["legal"]).shape == (1, 5)


class TestMoments:
    def changes(self, editor, saved):
        return (
            lambda: editor.load_pack(saved["legal"], "x"),
            lambda: editor.delete_pack("legal"),
            lambda: editor.set_active(["legal"]),
            lambda: editor.edit(FACTS[3]),
        )

    def test_inside_a_block(self, editor, saved):
        for call in self.changes(editor, saved):

            def inside(call=call):
                with editor.packs_for(["legal"]):
                    call()

            refuses(editor, r"\(\) was called in the middle of packs_for", inside)

    @pytest.mark.parametrize("named", [{}, dict(pack_names=["legal"])])
    def test_inside_a_generation(self, editor, saved, named):
        for call in self.changes(editor, saved):

            class Calling(TextStreamer):
                def put(self, value, call=call):
                    call()

            streamer = Calling(editor.tokenizer)
            refuses(
                editor,
                "in the middle of generate",
                lambda streamer=streamer: generated(editor, PROMPTS[:1], streamer=streamer, **named),
            )

    def test_inside_an_edit(self, editor, saved, monkeypatch):
        for call in self.changes(editor, saved):
            with monkeypatch.context() as patch:
                patch.setattr(Trainer, "run", lambda self, call=call: call())
                refuses(editor, "in the middle of edit", lambda: editor.edit(FACTS[3]))

    def test_teaching_what_would_not_be_answered(self, editor):
        editor.set_active(["legal"])
        try:
            refuses(
                editor,
                r"not active \(active: \['legal'\]\).*set_active\(\['default', ...\]\)",
                lambda: editor.edit(FACTS[3]),
            )
        finally:
            editor.set_active(["default"])

    def test_a_cache_from_before_the_memories_were_numbered_anew(self, saved):
        editor = with_packs(saved)
        given = editor.tokenizer(PROMPTS[0], return_tensors="pt")
        step = torch.tensor([[5]])

        def cache(name):
            with torch.no_grad(), editor.packs_for([name]):
                return editor.model(**given, use_cache=True).past_key_values

        with torch.no_grad():
            kept = cache("legal")
            editor.load_pack(saved["medical"], "more")  # behind the others, which keep their numbers
            editor.model(input_ids=step, past_key_values=kept)
            assert editor.routing.choice.tolist() == [1]
            kept = cache("medical")
            editor.delete_pack("legal")
            with editor.disabled():
                editor.model(input_ids=step, past_key_values=kept)  # asks for no memory
            with pytest.raises(PackError, match="fresh cache"):
                editor.model(input_ids=step, past_key_values=kept)
            editor.model(input_ids=torch.tensor([[5, 6]]), past_key_values=kept)  # a turn of its own is routed anew
            editor.model(input_ids=step, past_key_values=kept)

    def test_a_cache_from_before_a_memory_was_dropped(self):
        """Its only edit is superseded: the memories behind it move up, as many as before."""
        editor = new_editor(FACTS[:2], shard_size=1, batch_size=1)
        given = editor.tokenizer(FACTS[1].prompt, return_tensors="pt")
        with torch.no_grad():
            kept = editor.model(**given, use_cache=True).past_key_values
            assert editor.routing.choice.tolist() == [1]
            editor.edit(Edit(FACTS[0].prompt, "Bo"))
            assert len(editor.memories) == 2
            with pytest.raises(PackError, match="fresh cache"):
                editor.model(input_ids=torch.tensor([[5]]), past_key_values=kept)

    def test_a_bank_that_was_set_by_hand_has_no_packs_to_choose_from(self):
        editor = new_editor(OWN[:1])
        projection = editor.projection
        bank = replace(projection.held, limits=None)
        for reserved in (False, True):
            if reserved:
                editor.reserve(2)
            projection.set_bank(bank)
            before = projection.thresholds.clone()
            with pytest.raises(PackError, match="set by hand"):
                editor.set_active(["default"])
            assert torch.equal(projection.thresholds, before) and editor.active == ["default"]

    def test_memories_of_two_layouts_are_never_joined(self, saved):
        editor = new_editor(OWN[:1], layout="element")
        editor.config = editor.config.replace(layout="neuron")  # as nobody should
        refuses(editor, "one layout", lambda: editor.load_pack(saved["legal"], "x"), ConfigError)
