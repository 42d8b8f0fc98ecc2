"""Every figure by hand on tables of probabilities, and against plain forwards of an edited model."""

import dataclasses
import functools
import json
import math
from pathlib import Path

import pytest
import torch

from tests.edited import FACTS, make_editor, read_plainly
from tests.table_method import TableMethod
from tests.tiny import tiny_tokenizer
from wise_fast import Edit, metrics
from wise_fast.data import Locality
from wise_fast.errors import EditDataError
from wise_fast.scores import Evaluation, Score
from wise_fast.state import EditReport
from wise_fast.tasks import TASKS, Before, evaluate

FIXTURES = Path(__file__).parent / "fixtures"
RICH = (
    dataclasses.replace(
        FACTS[0],
        rephrases=("Fro is led by", "Who?"),
        ood_prompts=("Who leads Fro? Ann leads it.", "Fro"),
        locality=(Locality("0 + 7", "seven"), Locality("~~~")),
        truth="Ben Ali",
    ),
    dataclasses.replace(FACTS[1], truth="Di"),
    dataclasses.replace(
        FACTS[2],
        rephrases=("The paint is of the colour",),
        locality=(Locality("zyx", "a b"),),
        ood_prompts=("The color is red",),
    ),
)


@functools.cache
def taught():
    return make_editor(FACTS, nll=0.02, wave=4)


@functools.cache
def scores(name):
    """What a task gives for all edits together."""
    return TASKS[name].score(taught(), RICH).scores


def mean(values):
    values = list(values)
    return sum(values) / len(values) if values else None


class TestByHand:
    """Byte tokens; a target has a joining space in front of it."""

    def test_perplexity_of_the_target(self):
        method = TableMethod({"b ": 0.9, " c": 0.5, "cd": 0.25})
        (score,) = TASKS["hallucination"].score(method, [Edit("ab", "cd")]).scores
        assert score.perplexity == pytest.approx((0.9 * 0.5 * 0.25) ** (-1 / 3))
        assert (score.reliability, score.locality, score.answer, score.exact) == (None, None, None, None)

    def test_temporal_counts_tokens_above_four_fifths(self):
        method = TableMethod({"b ": 0.9, " c": 0.8001, "cd": 0.7999, "^b": 0.1, "bc": 0.09, "^c": 0.81})
        edit = Edit("ab", "cd", ood_prompts=("bcd", "cd"))
        (score,) = TASKS["temporal"].score(method, [edit]).scores
        assert score.reliability == pytest.approx(2 / 3)  # " " and "c", not "d"
        assert score.ood == pytest.approx((0 / 3 + 1 / 2) / 2)  # BOS is seen, so the first letter is scored
        assert score.generalization is None

    def test_a_passage_without_bos_begins_at_its_second_token(self):
        method = TableMethod({"ab": 0.9, "bc": 0.2}, tokenizer=tiny_tokenizer(bos=False))
        (score,) = TASKS["temporal"].score(method, [Edit("a", "b", ood_prompts=("abc", "a"))]).scores
        assert score.ood == 0.5  # of "b" and "c"; a single token has nothing before it and counts nowhere
        (score,) = TASKS["temporal"].score(method, [Edit("a", "b", ood_prompts=("a",))]).scores
        assert score.ood is None

    def test_the_likelier_answer_by_the_mean_of_its_tokens(self):
        chances = {"b ": 0.6, " c": 0.5, "cc": 0.5, " d": 0.3, "q ": 0.9}
        edit = Edit("ab", "ccc", truth="d", rephrases=("bq",), locality=(Locality("aq", "d"), Locality("zz")))
        score = TASKS["counterfact"].score(TableMethod(chances), [edit], generate=False).scores[0]
        # log-means: target (log .6 + 3 log .5) / 4 = -.647, truth (log .6 + log .3) / 2 = -.857
        assert (score.efficacy, score.efficacy_rephrased, score.specificity) == (1.0, 1.0, 0.0)
        swapped = dataclasses.replace(edit, target="d", truth="ccc", locality=(Locality("aq", "ccc"),))
        score = TASKS["counterfact"].score(TableMethod(chances), [swapped], generate=False).scores[0]
        assert (score.efficacy, score.efficacy_rephrased, score.specificity) == (0.0, 0.0, 1.0)

    def test_without_a_truth_nothing_is_compared(self):
        edit = Edit("ab", "c", rephrases=("b",), locality=(Locality("z"),))
        score = TASKS["counterfact"].score(TableMethod({}), [edit], generate=False).scores[0]
        assert (score.efficacy, score.efficacy_rephrased, score.specificity) == (None, None, None)

    def test_shares_and_answers_before_and_after(self):
        after = {"b ": 0.9, " c": 0.9, "cd": 0.9, "d$": 0.9, "q ": 0.9, "z ": 0.9}
        before = {"b ": 0.9, " x": 0.9, "x$": 0.9, "cd": 0.9, "z ": 0.9}
        edit = Edit("ab", "cd", rephrases=("aq",), locality=(Locality("az", "cd"),))
        method = TableMethod(after, before)
        (score,) = evaluate(method, [edit]).scores
        assert (score.reliability, score.generalization) == (1.0, 1.0)
        assert score.locality == pytest.approx(2 / 3)  # the place after the space has moved from x to c
        assert (score.exact, score.exact_rephrased, score.answer, score.before) == (True, 1.0, "cd", "x")

    @pytest.mark.parametrize(
        "target, exact, answer",
        [("c\nd", True, "c\nd"), ("c", True, "c"), ("c\n\nd", True, "c\nd"), ("c d", False, "c")],
    )
    def test_as_many_lines_count_as_the_target_has(self, target, exact, answer):
        method = TableMethod({"b ": 0.9, " c": 0.9, "c\n": 0.9, "\nd": 0.9, "d$": 0.9})
        (score,) = evaluate(method, [Edit("ab", target)]).scores
        assert (score.exact, score.answer) == (exact, answer)  # repeated white space aside

    def test_a_long_target_is_not_cut_off(self):
        chances = {"b ": 0.9, " a": 0.9} | {one + two: 0.9 for one, two in zip("acdefghijklm", "cdefghijklmn")}
        chances |= {"no": 0.9} | {one + two: 0.9 for one, two in zip("opqrstuvwxyzABCDEF", "pqrstuvwxyzABCDEFG")}
        target = "acdefghijklmnopqrstuvwxyzABCDEFG"
        (score,) = evaluate(TableMethod(chances | {"G$": 0.9}), [Edit("ab", target)]).scores
        assert score.answer == target and score.exact


class TestAgainstPlainForwards:
    def test_hallucination(self):
        editor = taught()
        for score in TASKS["hallucination"].score(editor, RICH).scores:
            logp, _ = read_plainly(editor, score.edit.prompt, score.edit.target)
            assert score.perplexity == pytest.approx(math.exp(-sum(logp) / len(logp)), rel=1e-4)

    def test_temporal(self):
        editor = make_editor(
            FACTS, nll=0.02, wave=4, by_subject=False
        )  # the passages end otherwise than the edits' prompts
        found = TASKS["temporal"].score(editor, RICH)
        for score in found.scores:
            logp, _ = read_plainly(editor, score.edit.prompt, score.edit.target)
            assert score.reliability == pytest.approx(mean(math.exp(v) > 0.8 for v in logp))
            shares = [mean(math.exp(v) > 0.8 for v in read_plainly(editor, t)[0]) for t in score.edit.ood_prompts]
            assert score.ood == pytest.approx(mean(shares)) if shares else score.ood is None
        summary = found.summary()
        assert summary["reliability"] > 0.9 and 0 < summary["ood"] < 0.5 and summary["locality"] == 1.0
        assert set(summary) == {"reliability", "ood", "locality"}

    def test_a_passage_is_routed_on_all_of_it(self):
        editor = make_editor(FACTS, last_ratio=None, by_subject=False)
        editor.projection.thresholds.fill_(0.0)
        text = RICH[0].ood_prompts[0]
        (inside,) = metrics.readings(editor, [metrics.passage(editor.tokenizer, text)])
        with torch.no_grad():
            editor.model(**editor.tokenizer(text, return_tensors="pt"))
        score = float(editor.routing.scores[0, 0])
        editor.projection.thresholds.fill_(score * 1.001)
        (outside,) = metrics.readings(editor, [metrics.passage(editor.tokenizer, text)])
        editor.projection.thresholds.fill_(score * 0.999)
        (again,) = metrics.readings(editor, [metrics.passage(editor.tokenizer, text)])
        assert torch.equal(again.logp, inside.logp) and not torch.equal(outside.logp, inside.logp)

    def test_counterfact(self):
        editor = taught()

        def better(prompt, one, other):
            return mean(read_plainly(editor, prompt, one)[0]) > mean(read_plainly(editor, prompt, other)[0])

        found = TASKS["counterfact"].score(editor, RICH, generate=False)
        for score in found.scores:
            edit = score.edit
            assert score.reliability == mean(read_plainly(editor, edit.prompt, edit.target)[1])
            truth = [edit.truth] if edit.truth else []
            assert score.efficacy == mean(better(edit.prompt, edit.target, t) for t in truth)
            assert score.efficacy_rephrased == mean(better(p, edit.target, t) for p in edit.rephrases for t in truth)
            known = [p for p in edit.locality if p.answer]
            assert score.specificity == mean(better(p.prompt, p.answer, edit.target) for p in known)
        assert found.summary()["efficacy"] == 1.0 and found.summary()["exact"] is None

    @pytest.mark.parametrize("name", TASKS)
    def test_alike_alone_in_small_batches_and_in_any_order(self, name, monkeypatch):
        editor, task = taught(), TASKS[name]
        alone = [task.score(editor, [edit]).scores[0] for edit in RICH]
        assert_alike(task.score(editor, RICH[::-1]).scores[::-1], alone)
        monkeypatch.setattr(metrics, "_LOGITS", 5 * 260)
        assert_alike(task.score(editor, RICH).scores, alone)

    @pytest.mark.parametrize("settings", [dict(pad=False), dict(padding_side="right"), dict(padding_side="left")])
    @pytest.mark.parametrize("name", TASKS)
    def test_alike_with_any_padding(self, name, settings):
        editor, task, expected = taught(), TASKS[name], scores(name)
        kept, editor.tokenizer = editor.tokenizer, tiny_tokenizer(**settings)
        try:
            assert_alike(task.score(editor, RICH).scores, expected)
        finally:
            editor.tokenizer = kept


def assert_alike(found, expected):
    for one, other in zip(found, expected, strict=True):
        for field in dataclasses.fields(Score):
            value, wanted = getattr(one, field.name), getattr(other, field.name)
            assert value == (pytest.approx(wanted, rel=1e-4) if isinstance(wanted, float) else wanted), field.name


class TestBefore:
    @pytest.mark.parametrize("name", TASKS)
    def test_asked_once_it_serves_any_of_its_edits(self, name):
        task = TASKS[name]
        method = TableMethod({"? ": 0.9, " A": 0.9}, {" B": 0.9})
        alone = task.score(method, RICH[:2])
        method.asked_before = 0
        before = task.before(method, RICH)
        found = task.score(method, RICH[:2], before=before)
        assert method.asked_before == 1 and found.scores == alone.scores
        assert alone.unedited is None and alone.summary_before() is None
        assert len(found.unedited) == 2 and set(found.summary_before()) == set(task.figures)

    def test_figures_of_the_unedited_model(self):
        after, before = {"b ": 0.9, " c": 0.9, "c$": 0.9}, {"b ": 0.9, " c": 0.05, " x": 0.9, "x$": 0.9}
        edit = Edit("ab", "c", locality=(Locality("zz", "c"),))
        method = TableMethod(after, before)
        found = evaluate(method, [edit], before=TASKS["qa"].before(method, [edit]))
        assert (found.mean("reliability"), found.summary_before()["reliability"]) == (1.0, 0.5)
        assert found.summary_before()["locality"] == 1.0 and found.unedited[0].answer == "x"
        perplexity = TASKS["hallucination"]
        found = perplexity.score(method, [edit], before=perplexity.before(method, [edit]))
        assert found.summary_before()["perplexity"] == pytest.approx((0.9 * 0.05) ** -0.5)

    def test_what_it_lacks_is_asked(self):
        method = TableMethod({" A": 0.9}, {" B": 0.9})
        before = TASKS["qa"].before(method, RICH[:1])
        found = evaluate(method, RICH, before=before)
        assert found.scores == evaluate(method, RICH).scores and found.unedited is None
        assert evaluate(method, RICH, before=Before()).scores == found.scores

    def test_generating_can_be_left_out(self):
        before = TASKS["qa"].before(TableMethod({}), RICH, generate=False)
        assert not before.answers and before.readings
        assert not TASKS["temporal"].before(TableMethod({}), RICH).answers


class TestEdges:
    @pytest.mark.parametrize("name", TASKS)
    def test_no_edits(self, name):
        found = TASKS[name].score(TableMethod({}), [])
        assert found.scores == () and set(found.summary().values()) == {None}
        assert TASKS[name].score(TableMethod({})) == found  # none held

    @pytest.mark.parametrize("name", TASKS)
    def test_an_edit_with_nothing_but_prompt_and_target(self, name):
        found = TASKS[name].score(TableMethod({}), [Edit("a", "b")])
        assert found.mean("locality") is None and found.mean(found.figures[0]) is not None

    @pytest.mark.parametrize("name", TASKS)
    def test_given_as_records_reports_or_one_alone(self, name):
        task, method = TASKS[name], TableMethod({"a ": 0.9})
        expected = task.score(method, [Edit("a", "b")]).scores
        for given in ({"prompt": "a", "target_new": "b"}, Edit("a", "b"), [EditReport(Edit("a", "b"))]):
            assert task.score(method, given).scores == expected

    @pytest.mark.parametrize("name", TASKS)
    def test_progress_ends_at_its_total(self, name):
        seen = []
        task, method = TASKS[name], TableMethod({})
        task.score(method, [*RICH, *RICH], progress=lambda done, total: seen.append((done, total)))
        assert seen[-1][0] == seen[-1][1] and sorted(seen) == seen
        task.before(method, RICH, progress=lambda done, total: seen.append((done, total)))
        assert seen[-1][0] == seen[-1][1]

    @pytest.mark.parametrize("name", TASKS)
    def test_scores_are_plain_json(self, name):
        found = TASKS[name].score(TableMethod({}), RICH)
        record = json.loads(json.dumps(found.scores[0].to_dict()))
        assert Edit.from_dict(record.pop("edit")) == RICH[0]
        assert {"answer", "before", *found.figures} <= record.keys() and found.figures == tuple(found.summary())

    def test_a_mean_is_over_the_edits_that_have_the_figure(self):
        edit = Edit("a", "b")
        found = Evaluation((Score(edit, ood=0.5), Score(edit), Score(edit, ood=1.0, exact=True)), ("ood", "exact"))
        assert found.summary() == {"ood": 0.75, "exact": 1.0}

    def test_too_long_for_the_context(self):
        with pytest.raises(EditDataError, match="601 tokens, but the model's context is 512"):
            TASKS["temporal"].score(TableMethod({}), [Edit("a", "b", ood_prompts=("x" * 600,))])

    def test_a_task_cannot_be_added_by_accident(self):
        with pytest.raises(TypeError):
            TASKS["other"] = TASKS["qa"]
