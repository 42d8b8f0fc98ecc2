"""What `editor.edit` promises: reports, batches, taking back, and the same bits for the same seed."""

import copy
import statistics
from dataclasses import replace

import pytest
import torch

from tests.edited import ELSEWHERE, FACTS, QUICK, logits, make_editor, same, wide_model
from tests.tiny import tiny_tokenizer
from wise_fast import Edit, WiseConfig, WiseEditor
from wise_fast.data import Locality
from wise_fast.errors import ConfigError, WiseError
from wise_fast.metrics import answer
from wise_fast.tasks import evaluate

FIRST, SECOND = FACTS[0], Edit(FACTS[0].prompt, "Bob")


@pytest.fixture(scope="module")
def taught():
    """An editor that knows all facts; tests leave it as it is."""
    return make_editor(FACTS)


def choices(editor, texts):
    """Which memory answers each text."""
    found = []
    for text in texts:
        logits(editor.model, [text])
        found.append(int(editor.routing.choice))
    return found


class TestReports:
    def test_figures(self, taught):
        assert [r.edit for r in taught.edits] == list(FACTS)
        for report in taught.edits:
            assert report.success and report.note == "" and report.seconds > 0
            assert QUICK.min_steps <= report.steps < QUICK.max_steps
            assert report.loss_before > 3 and report.loss <= QUICK.nll + 0.01

    def test_score_and_threshold_are_what_serving_sees(self, taught):
        scores = [r.score for r in taught.edits]
        threshold = min(QUICK.act_ratio * min(scores), QUICK.z_ratio * statistics.median(scores))
        assert taught.memories[0].z_threshold == pytest.approx(threshold, rel=1e-6)
        assert float(taught.projection.thresholds) == pytest.approx(threshold, rel=1e-6)
        for report in taught.edits:
            assert choices(taught, [report.edit.prompt]) == [0]
            assert float(taught.routing.scores) == pytest.approx(report.score, rel=1e-3)

    def test_without_leverage_a_score_is_the_norm_of_the_response(self):
        editor = make_editor(FACTS[:2], route_by="score")
        threshold = QUICK.act_ratio * min(r.score for r in editor.edits)
        assert editor.projection.factors is None
        assert float(editor.projection.thresholds) == pytest.approx(threshold, rel=1e-6)
        for report in editor.edits:
            assert choices(editor, [report.edit.prompt]) == [0]
            assert float(editor.routing.scores) == pytest.approx(report.score, rel=1e-4)

    def test_the_model_answers_and_the_rest_keeps_every_bit(self, taught):
        assert evaluate(taught).summary() | {"locality": None} == {
            "reliability": 1.0,
            "exact": 1.0,
            "generalization": None,
            "exact_rephrased": None,
            "locality": None,
        }
        assert choices(taught, ELSEWHERE) == [-1] * len(ELSEWHERE)
        with taught.disabled():
            plain = logits(taught.model, ELSEWHERE)
            assert answer(taught, [f.prompt for f in FACTS]) != [f.target for f in FACTS]
        assert same(logits(taught.model, ELSEWHERE), plain)

    def test_edits_come_in_any_form(self, taught):
        for given in ([f.to_dict() for f in FACTS], iter([FACTS[0], FACTS[1].to_dict(), *FACTS[2:]])):
            editor = make_editor(given)
            assert [r.edit for r in editor.edits] == list(FACTS)
            assert torch.equal(editor.memories[0].values, taught.memories[0].values)
        for given in (FIRST, FIRST.to_dict()):
            reports = make_editor().edit(given)
            assert [(r.edit, r.success) for r in reports] == [(FIRST, True)]

    def test_no_edits_is_no_reports(self):
        editor = make_editor()
        state = editor._state
        assert editor.edit([]) == [] and editor._state is state and editor.edits == []

    def test_a_progress_bar_changes_nothing(self, taught, capsys):
        editor = make_editor(batch_size=2)
        assert editor.edit([], progress=True) == []
        assert [r.success for r in editor.edit(FACTS, progress=True)] == [True] * 4
        shown = capsys.readouterr()
        assert "4/4" in shown.out + shown.err  # wherever rich's console points

    def test_what_is_asked_before_is_not_asked_again(self, taught, monkeypatch):
        editor = make_editor()
        with torch.inference_mode():
            editor.prepare()
        monkeypatch.setattr("wise_fast.material.sample_texts", None)
        assert [r.loss for r in editor.edit(FACTS)] == [r.loss for r in taught.edits]

    def test_the_list_of_edits_is_a_copy(self, taught):
        taught.edits.clear()
        assert len(taught.edits) == len(FACTS)

    def test_too_few_steps_is_reported_and_still_served(self):
        editor = make_editor(max_steps=2)
        (report,) = editor.edit(FIRST)
        assert not report.success and report.note.startswith("not fitted") and report.steps == 2
        assert report.loss < report.loss_before and choices(editor, [FIRST.prompt]) == [0]

    def test_a_failed_edit_does_not_lower_the_threshold(self):
        editor = make_editor([FIRST], z_ratio=0.6)
        before = editor.memories[0]
        editor.config = QUICK.replace(max_steps=1, lr=0.01, z_ratio=0.6)
        (report,) = editor.edit(FACTS[1])
        assert not report.success and report.score < before.z_threshold
        assert editor.memories[0].threshold > 0.8 * before.threshold
        assert editor.memories[0].z_threshold > 0.8 * before.z_threshold

    def test_every_edit_stops_by_itself(self):
        editor = make_editor([FIRST])
        hard = Edit("Say it:", "qZj xW vK")
        easy, slow = editor.edit([FIRST, hard])
        assert easy.steps < slow.steps and easy.success

    def test_without_early_stopping_every_step_is_taken(self):
        assert [r.steps for r in make_editor(nll=0.0, max_steps=5).edit(FACTS[:2])] == [5, 5]


class TestSameFactTwice:
    @pytest.mark.parametrize("other, word", [(SECOND, "contradicts"), (Edit(f" {FIRST.prompt} ", "Ann"), "duplicate")])
    def test_in_one_call_the_last_counts(self, other, word):
        editor = make_editor()
        reports = editor.edit([FIRST, FACTS[1], other])
        assert [r.edit for r in reports] == [FIRST, FACTS[1], other]
        assert "superseded by edit 3" in reports[0].note and word in reports[0].note
        assert not reports[0].success and reports[0].steps == 0
        assert [r.edit for r in editor.edits] == [FACTS[1], other]
        assert answer(editor, [other.prompt]) == [other.target]

    @pytest.mark.parametrize("changes", [{}, {"shard_size": 1}, {"shard_size": 1, "route_by": "score"}])
    def test_over_two_calls_the_last_counts(self, changes):
        editor = make_editor([FIRST], **changes)
        (report,) = editor.edit(SECOND)
        assert report.success and answer(editor, [SECOND.prompt]) == ["Bob"]
        assert "superseded" in editor.edits[0].note and editor.edits[1].note == ""

    @pytest.mark.parametrize("changes", [{}, {"mask_ratio": 1.0}, {"route_by": "score"}])
    @pytest.mark.parametrize("target", ["Bob", "Kim", "xx"])
    def test_a_closed_memory_forgets_what_a_later_one_was_taught(self, target, changes):
        """The other edits in it stay as they are."""
        editor = make_editor(FACTS[:2], shard_size=2, **changes)
        editor.edit(Edit(FIRST.prompt, target))
        editor.edit(FACTS[2])
        assert answer(editor, [FIRST.prompt]) == [target]
        assert answer(editor, [f.prompt for f in FACTS[1:3]]) == [f.target for f in FACTS[1:3]]
        assert (
            choices(editor, [FIRST.prompt]) == choices(editor, [FACTS[2].prompt]) != choices(editor, [FACTS[1].prompt])
        )

    def test_what_is_forgotten_by_name_costs_the_others_nothing(self):
        editor = make_editor(FACTS[:4], shard_size=4, mask_ratio=1.0)
        (before,) = editor.memories
        editor.edit([Edit(fact.prompt, "xx") for fact in FACTS[:3]])
        assert torch.equal(editor.memories[0].values, before.values)
        assert answer(editor, [fact.prompt for fact in FACTS[:4]]) == ["xx"] * 3 + [FACTS[3].target]

    def test_a_superseded_edit_is_not_scored(self):
        editor = make_editor(FACTS[:2])
        editor.edit(SECOND)
        assert evaluate(editor, generate=False).summary()["reliability"] == 1.0

    def test_taking_the_later_one_back_brings_the_earlier_back(self):
        editor = make_editor([FIRST])
        editor.edit(SECOND)
        editor.rollback()
        assert answer(editor, [FIRST.prompt]) == ["Ann"] and editor.edits[0].note == ""


class TestTakingBack:
    def test_every_step_back_is_bit_identical(self):
        editor = make_editor(batch_size=1)
        states, served = [editor._state], [logits(editor.model)]
        for fact in FACTS:
            editor.edit(fact)
            states.append(editor._state)
            served.append(logits(editor.model))
        for left, back in ((3, 1), (1, 2), (0, 1)):
            editor.rollback(back)
            assert editor._state is states[left] and len(editor.edits) == left
            assert same(logits(editor.model), served[left])
        editor.edit(FACTS)  # and on it goes
        assert all(same([a], [b]) for a, b in zip(logits(editor.model), served[-1], strict=True))

    def test_one_call_of_several_batches_can_be_taken_back_batch_by_batch(self):
        editor = make_editor(batch_size=1)
        editor.edit(FACTS[:3])
        editor.rollback(2)
        assert [r.edit for r in editor.edits] == [FIRST]

    def test_checkpoints(self):
        editor = make_editor([FIRST], undo_depth=0)
        editor.checkpoint("one")
        state, served = editor._state, logits(editor.model)
        editor.edit(FACTS[1:])
        editor.rollback("one")
        assert editor._state is state and same(logits(editor.model), served)
        with pytest.raises(WiseError, match=r"no checkpoint 'two'; there are: one"):
            editor.rollback("two")
        with pytest.raises(WiseError, match="cannot take back 1"):
            editor.rollback()

    def test_what_cannot_be_taken_back(self):
        editor = make_editor(FACTS[:2], undo_depth=1)
        editor.edit(FACTS[2])
        for count in (2, 3, 9, -1):
            with pytest.raises(WiseError, match=rf"cannot take back {count} edits; .*\[1\]"):
                editor.rollback(count)
        assert len(editor.edits) == 3

    def test_a_model_is_not_saved_with_an_editor_in_it(self, tmp_path):
        """What loads again would lack the projection."""
        editor = make_editor([FIRST])
        for model in (editor.model, copy.deepcopy(editor.model)):
            with pytest.raises(WiseError, match=r"editor\.save_pretrained .* editor\.export_dense .* editor\.unload"):
                model.save_pretrained(tmp_path / "broken")
        assert not (tmp_path / "broken").exists()
        before = {name: tensor.clone() for name, tensor in editor.model.state_dict().items()}
        editor.export_dense(tmp_path / "dense")
        editor.unload().save_pretrained(tmp_path / "plain")
        again = type(editor.model).from_pretrained(tmp_path / "plain").state_dict()
        assert len(again) > 3 and all(
            torch.equal(again[name.replace("base_layer.", "")], tensor)
            for name, tensor in before.items()
            if name.replace("base_layer.", "") in again
        )

    def test_it_says_what_it_is(self):
        editor = make_editor(FACTS, shard_size=3)
        assert repr(editor) == "WiseEditor(MistralForCausalLM, layer 2: 4 edits in 2 memories)"

    def test_unload(self):
        model = wide_model()
        plain, original = logits(model), model.model.layers[2].mlp.down_proj
        editor = WiseEditor(model, tiny_tokenizer(), QUICK)
        editor.edit(FIRST)
        with pytest.raises(ConfigError, match="unload"):
            WiseEditor(model, tiny_tokenizer(), QUICK)
        assert editor.unload() is model and model.model.layers[2].mlp.down_proj is original
        assert same(logits(model), plain)
        for use in (editor.unload, lambda: editor.edit(FACTS[1])):
            with pytest.raises(WiseError, match="unloaded"):
                use()
        assert WiseEditor(model, tiny_tokenizer(), QUICK).edit(FIRST)[0].success


class TestShardFill:
    """A shard also closes once its edits have taken their share of P."""

    def test_a_full_shard_closes_and_the_next_opens(self):
        editor = make_editor(FACTS, shard_fill=1e-6, batch_size=1)
        assert [m.edits for m in editor.memories] == [(0,), (1,), (2,), (3,)] and editor.state.shard is None
        assert evaluate(editor, generate=False).summary()["reliability"] == 1.0

    def test_longer_edits_fill_it_sooner(self):
        long = [replace(fact, prompt=f"{fact.prompt} {'abcdefgh ijklmnop qrstuv ' * 2}", id=None) for fact in FACTS]
        taken = []
        for facts in (FACTS[:2], long[:2]):
            editor = make_editor(facts, max_steps=1)
            taken.append(editor.state.shard.taken)
            p, origin = editor.state.shard.p, editor.state.shard.origin
            assert taken[-1] == pytest.approx(1 - float(p.trace() / origin.trace()), abs=1e-5)
        assert 0 < taken[0] < taken[1] < 1

    def test_a_batch_ends_where_edits_like_those_before_would_fill_it(self):
        one = make_editor(FACTS[:1]).state.shard.taken
        editor = make_editor(FACTS[:1], shard_fill=3.2 * one)
        editor.edit(FACTS[1:])  # room for two more like the first, so the batch of three is cut
        editor.rollback(1)
        assert [r.edit for r in editor.edits] == list(FACTS[:3])

    @pytest.mark.parametrize("changes", [dict(protect=False), dict(layout="element", protect=False)])
    def test_without_p_only_their_number_counts(self, changes):
        assert len(make_editor(FACTS, shard_fill=1e-6, max_steps=1, shard_size=2, **changes).memories) == 2


class TestSettings:
    @pytest.mark.parametrize(
        "changes",
        [
            dict(batch_size=1),
            dict(layout="element"),
            dict(protect=False),
            dict(optimizer="sgd", lr=0.1, wave=4),
            dict(optimizer="sgd", lr=0.02, momentum=0.8, layout="element"),
            dict(weight_decay=1e-5, clamp=0.5),
            dict(reduction="max"),
            dict(prefixes=0),
            dict(stop="newline"),
            dict(stop="none"),
            dict(layer=1),
            dict(units="absolute", lr=0.1, alpha=10, beta=40, gamma=20),
            dict(mask_ratio=1.0),
        ],
        ids=lambda changes: ",".join(f"{k}={v}" for k, v in changes.items()),
    )
    def test_facts_are_learned(self, changes):
        editor = make_editor(FACTS, **changes)
        assert all(r.loss < 0.25 * r.loss_before for r in editor.edits)
        assert evaluate(editor, generate=False).summary()["reliability"] == 1.0
        assert not torch.isnan(editor.memories[0].values).any()

    def test_the_papers_settings_run(self):
        config = WiseConfig.paper(max_steps=12, prefixes=2, prefixes_per_step=2)
        reports = WiseEditor(wide_model(), tiny_tokenizer(), config).edit(FACTS[:2])
        assert [r.steps for r in reports] == [12, 12] and all(r.loss < r.loss_before for r in reports)

    def test_clamp_bounds_the_delta(self):
        editor = make_editor([FIRST], clamp=0.01, protect=False)
        assert float(editor.memories[0].values.abs().max()) == pytest.approx(0.01, rel=1e-3)

    def test_irrelevant_and_locality_texts_are_taken(self):
        fact = Edit(FIRST.prompt, FIRST.target, irrelevant="0 + 7", locality=(Locality("~~~", "a"),))
        editor = make_editor([fact])
        assert editor.edits[0].success
        assert evaluate(editor, generate=False).summary()["locality"] == 1.0


class TestSeeds:
    def test_same_seed_same_bits(self, taught):
        again = make_editor(FACTS)
        for one, other in zip(taught.memories, again.memories, strict=True):
            assert torch.equal(one.values, other.values) and torch.equal(one.index, other.index)
            assert one.threshold == other.threshold
        assert same(logits(again.model), logits(taught.model)) and again.prefixes == taught.prefixes

    def test_global_randomness_plays_no_part(self, taught):
        torch.manual_seed(1234)
        state = torch.get_rng_state()
        again = make_editor(FACTS)
        assert torch.equal(torch.get_rng_state(), state)
        assert torch.equal(again.memories[0].values, taught.memories[0].values)

    @pytest.mark.parametrize("layout", ["neuron", "element"])
    def test_another_seed_another_mask(self, layout):
        one, other = (make_editor([FIRST], seed=seed, layout=layout).memories[0] for seed in (0, 1))
        assert one.index.shape == other.index.shape and not torch.equal(one.index, other.index)
