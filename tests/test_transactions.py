"""Whatever goes wrong, the model and the memories are as they were: bad edits, diverging ones, interrupts."""

import math

import pytest
import torch
from tokenizers import normalizers

from tests.edited import FACTS, QUICK, logits, make_editor, same, untouched, wide_model
from tests.tiny import tiny_tokenizer
from wise_fast import Edit, WiseEditor
from wise_fast.errors import ConfigError, EditDataError
from wise_fast.tail import Tail
from wise_fast.training import Trainer

FIRST, BAD = FACTS[0], Edit("Zeta is", "bad")
OTHERS = FACTS[2:]


@pytest.fixture(scope="module")
def taught():
    """(an editor that knows one fact, its state)."""
    editor = make_editor([FIRST])
    return editor, editor.state


@pytest.fixture
def editor(taught):
    """The same editor for every test, as it was after its first edit."""
    taught[0].state = taught[1]
    return taught[0]


@pytest.fixture(scope="module")
def only_others():
    """An editor that was never given the bad edit."""
    editor = make_editor([FIRST])
    editor.edit(OTHERS)
    return editor


def fail_for(monkeypatch, letter, value, calls=0):
    """After `calls` calls, the tail gives these logits, or a NaN gradient, for sequences that hold this letter."""
    replay, done = Tail.replay_all, []

    def held(capture, _, positions):
        found = (capture.input_ids == tiny_tokenizer(bos=False)(letter)["input_ids"][0]).any(1)
        return found[positions // capture.input_ids.shape[1]]

    def poisoned(self, parts, *rest):
        made = replay(self, parts, *rest)
        done.append(None)
        bad = torch.cat([held(*part) for part in parts])[:, None].expand_as(made)
        if len(done) > calls and value == "gradient":
            return made.masked_scatter(bad, made[bad] + (0 * made[bad]).sqrt())
        return made if len(done) <= calls else made.masked_fill(bad, value)

    monkeypatch.setattr(Tail, "replay_all", poisoned)


class TestBadInput:
    @pytest.mark.parametrize(
        "given, words",
        [
            ([{"prompt": "", "target": "x"}], ["edit 1", "prompt"]),
            ([{"prompt": "x", "target": ""}], ["edit 1", "target"]),
            ([{"prompt": "x", "target": " \n"}], ["edit 1", "target"]),
            ([FACTS[1], {"prompt": "x"}, FACTS[2]], ["edit 2", "target"]),
            ([FACTS[1], {"prompt": "x", "target": 3}, FACTS[2]], ["edit 2", "target"]),
            ([FACTS[1], None], ["edit 2"]),
            ("a file", ["load_edits"]),
            (7, ["list"]),
            ([FACTS[1], Edit("long " * 120, "x"), FACTS[2]], ["edit 2", "512", "shorten"]),
            ([Edit("x", "long " * 120)], ["edit 1", "512"]),
            ([FACTS[1], FACTS[1], Edit("long " * 120, "x")], ["edit 3", "512"]),
        ],
        ids=range(11),
    )
    def test_is_refused_before_anything_is_learned(self, editor, given, words):
        with untouched(editor), pytest.raises(EditDataError) as caught:
            editor.edit(given)
        assert all(word in str(caught.value) for word in words)
        assert editor.edit(FACTS[1])[0].success

    def test_just_within_the_context(self):
        editor = make_editor(prefixes=0, stop="none", max_steps=1)
        longest = Edit("x" * 509, "y")  # with BOS and the joining space 512 tokens
        assert editor.edit(longest)[0].steps == 1
        with pytest.raises(EditDataError, match="513 tokens"):
            editor.edit(Edit("x" * 510, "y"))

    @pytest.mark.parametrize("edit", [Edit("Say", "\u200b"), Edit("\u200b", "word")])
    def test_text_that_tokenizes_to_nothing(self, edit):
        tokenizer = tiny_tokenizer(bos=False)
        tokenizer.backend_tokenizer.normalizer = normalizers.Replace("\u200b", "")
        editor = WiseEditor(wide_model(), tokenizer, QUICK)
        with pytest.raises(EditDataError, match="tokenizes to nothing"):
            editor.edit([FIRST, edit])
        assert editor.edits == [] and editor.edit(FIRST)[0].success

    @pytest.mark.parametrize("layer", [4, -5, 99])
    def test_a_layer_that_does_not_exist(self, layer):
        model = wide_model()
        plain, modules = logits(model), list(model.modules())
        with pytest.raises(ConfigError, match=rf"layer {layer} .*0 to 3"):
            WiseEditor(model, tiny_tokenizer(), QUICK.replace(layer=layer))
        assert same(logits(model), plain) and list(model.modules()) == modules

    def test_a_second_editor(self, editor):
        with untouched(editor), pytest.raises(ConfigError, match="unload"):
            WiseEditor(editor.model, editor.tokenizer, QUICK)
        assert editor.edit(FACTS[1])[0].success

    def test_no_eos_to_stop_with(self):
        tokenizer, model = tiny_tokenizer(), wide_model()
        tokenizer.eos_token = None
        with pytest.raises(ConfigError, match="no EOS"):
            WiseEditor(model, tokenizer, QUICK.replace(stop="eos"))
        assert WiseEditor(model, tokenizer, QUICK).edit(FIRST)[0].success

    @pytest.mark.parametrize("side", ["left", "right"])
    def test_no_pad_token_needed_and_the_tokenizers_side_does_not_matter(self, side):
        editor = WiseEditor(wide_model(), tiny_tokenizer(pad=False, padding_side=side), QUICK)
        editor.edit(FACTS)
        assert torch.equal(editor.memories[0].values, make_editor(FACTS).memories[0].values)


class TestDivergence:
    @pytest.mark.parametrize("value", [math.nan, math.inf, "gradient"])
    @pytest.mark.parametrize("calls", [0, 3])
    def test_one_edit_is_taken_back_and_the_others_stay(self, editor, only_others, monkeypatch, caplog, value, calls):
        assert not any("Z" in prefix for prefix in editor.prefixes)
        fail_for(monkeypatch, "Z", value, calls)
        reports = editor.edit([OTHERS[0], BAD, OTHERS[1]])
        assert [r.success for r in reports] == [True, False, True]
        assert "diverged" in reports[1].note and "Zeta" in caplog.text
        assert [r.edit for r in editor.edits] == [FIRST, *OTHERS]
        assert torch.equal(editor.memories[0].values, only_others.memories[0].values)
        assert torch.equal(editor._state.shard.p, only_others._state.shard.p)
        assert same(logits(editor.model), logits(only_others.model))

    def test_a_batch_that_diverges_as_a_whole_leaves_no_trace(self, editor, monkeypatch):
        fail_for(monkeypatch, "Z", math.nan)
        with untouched(editor):
            (report,) = editor.edit(BAD)
        assert not report.success and "diverged" in report.note
        monkeypatch.undo()
        assert editor.edit(BAD)[0].success

    def test_the_first_edit_ever(self, monkeypatch):
        editor = make_editor()
        fail_for(monkeypatch, "Z", math.nan)
        with untouched(editor):
            editor.edit(BAD)
        assert editor.memories == []

    def test_an_edit_that_diverges_supersedes_nothing(self, editor, monkeypatch):
        editor.edit(Edit(BAD.prompt, "ok"))
        fail_for(monkeypatch, "Z", math.nan)
        with untouched(editor):
            editor.edit(BAD)
        assert all(r.note == "" for r in editor.edits)


class TestInterrupts:
    @pytest.mark.parametrize(
        "error, layout", [(KeyboardInterrupt, "neuron"), (KeyboardInterrupt, "element"), (MemoryError, "neuron")]
    )
    def test_in_the_middle_of_a_batch(self, monkeypatch, error, layout):
        editor = make_editor([FIRST], layout=layout)
        step, steps = Trainer._step, []

        def interrupted(self, *args):
            steps.append(None)
            if len(steps) == 3:
                raise error
            return step(self, *args)

        monkeypatch.setattr(Trainer, "_step", interrupted)
        with untouched(editor), pytest.raises(error):
            editor.edit(FACTS[1:])
        reports = editor.edit(FACTS[1:])  # and editing goes on as if nothing had been
        assert all(r.success for r in reports)
        again = make_editor([FIRST], layout=layout)
        again.edit(FACTS[1:])
        assert torch.equal(editor.memories[0].values, again.memories[0].values)

    def test_batches_before_it_stay(self, monkeypatch):
        editor = make_editor(batch_size=2)
        run, runs = Trainer.run, []

        def interrupted(self):
            runs.append(None)
            if len(runs) == 2:
                raise KeyboardInterrupt
            return run(self)

        monkeypatch.setattr(Trainer, "run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            editor.edit(FACTS)
        assert [r.edit for r in editor.edits] == list(FACTS[:2])
        assert same(logits(editor.model), logits(make_editor(FACTS[:2], batch_size=2).model))

    @pytest.mark.parametrize("when", ["prefixes", "capture", "replay_all"])
    def test_inside_the_model(self, editor, monkeypatch, when):
        if when == "prefixes":
            editor = make_editor()
        method = "forward" if when == "prefixes" else when
        owner = type(editor.model) if when == "prefixes" else Tail

        def interrupted(*args, **kwargs):
            raise KeyboardInterrupt

        with untouched(editor):
            with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
                patch.setattr(owner, method, interrupted)
                editor.edit(FACTS[1])
        assert editor.edit(FACTS[1])[0].success
