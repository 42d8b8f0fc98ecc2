"""Figures by hand, on what a model really answers, and alike however edits are batched."""

import dataclasses
import functools

import pytest
import torch

from tests.edited import FACTS, make_editor
from tests.tiny import tiny_tokenizer
from wise_fast import Edit, metrics, tokens
from wise_fast.data import Locality
from wise_fast.metrics import Reading, answer, matches, question, readings
from wise_fast.tasks import TASKS, Before, evaluate

EOS, NEWLINE = 257, 10


@functools.cache
def taught(stop="auto"):
    """An editor that knows all facts."""
    return make_editor(FACTS, stop=stop)


def full(edit, **changes):
    return dataclasses.replace(edit, **changes)


RICH = (
    full(FACTS[0], rephrases=("Fro is led by", "Who?"), locality=(Locality("0 + 7", "seven"), Locality("~~~"))),
    FACTS[1],
    full(FACTS[2], rephrases=("The paint is of the colour",), locality=(Locality("zyx", "a b"),)),
)


class TestByHand:
    """With given predictions in place of the model's."""

    def evaluated(self, monkeypatch, edits, wrong, moved=(), answers=None, **settings):
        """`wrong`: (prompt, target) to how many tokens are wrong. `moved`: locality prompts to moved positions."""
        editor = make_editor()

        def read(asked, rows, advance=None):
            made = []
            for row in rows:
                text = tiny_tokenizer().decode(row.ids[: row.first], skip_special_tokens=True)
                labels = torch.tensor(row.ids[row.first :])
                best = labels.clone()
                best[: wrong.get(text, 0)] += 1
                if asked.routing.enabled:
                    best[: dict(moved).get(text, 0)] += 5
                made.append(Reading(labels, best, torch.zeros(len(labels))))
            return made

        monkeypatch.setattr(metrics, "readings", read)
        monkeypatch.setattr(metrics, "answer", lambda _editor, prompts, **_: [answers[p] for p in prompts])
        return evaluate(editor, edits, generate=answers is not None, **settings)

    def test_shares(self, monkeypatch):
        edit = Edit("ask", "abcd", rephrases=("one", "two"), locality=(Locality("far", "xyz"), Locality("off", "u")))
        # with the joining space, targets are 5, 4 and 2 tokens long
        found = self.evaluated(monkeypatch, [edit], {"ask": 1, "one": 5, "two": 2}, {"far": 1, "off": 0})
        (score,) = found.scores
        assert score.reliability == pytest.approx(4 / 5)
        assert score.generalization == pytest.approx((0 + 3 / 5) / 2)
        assert score.locality == pytest.approx((3 / 4 + 1) / 2)
        assert (score.exact, score.exact_rephrased, score.answer) == (None, None, None)

    def test_means_leave_out_what_an_edit_does_not_have(self, monkeypatch):
        edits = [Edit("a", "xyz", rephrases=("b",)), Edit("c", "xyz"), Edit("d", "xyz", locality=(Locality("e", "f"),))]
        found = self.evaluated(monkeypatch, edits, {"a": 2, "b": 1, "c": 0, "d": 4}, {"e": 1})
        summary = found.summary()
        assert summary["reliability"] == pytest.approx((0.5 + 1 + 0) / 3)
        assert summary["generalization"] == pytest.approx(0.75) and summary["locality"] == pytest.approx(0.5)
        assert summary["exact"] is None and self.evaluated(monkeypatch, [], {}).summary()["reliability"] is None

    def test_free_generation(self, monkeypatch):
        edits = [Edit("a", "New York", rephrases=("b", "c")), Edit("d", "Rome")]
        answers = {"a": " New  York ", "b": "New York.", "c": "New York", "d": "rome"}
        one, two = self.evaluated(monkeypatch, edits, {}, answers=answers).scores
        assert (one.exact, one.exact_rephrased, one.answer) == (True, 0.5, " New  York ")
        assert (two.exact, two.exact_rephrased, two.answer) == (False, None, "rome")

    def test_before_replaces_asking_the_unedited_model(self, monkeypatch):
        edit = Edit("a", "x", locality=(Locality("far", "xyz"),))
        row = question(tiny_tokenizer(), "far", "xyz")
        labels = torch.tensor(row.ids[row.first :])
        best = torch.tensor([labels[0], 0, 0, *labels[3:]])
        before = Before({row: Reading(labels, best, torch.zeros(4))})
        assert self.evaluated(monkeypatch, [edit], {}, before=before).scores[0].locality == 0.5


@pytest.mark.parametrize(
    "given, target, same",
    [
        ("Ann", "Ann", True),
        (" Ann\n", "Ann", True),
        ("New\t York", " New York", True),
        ("Anne", "Ann", False),
        ("ann", "Ann", False),
        ("Ann.", "Ann", False),
        ("", "Ann", False),
    ],
)
def test_matches(given, target, same):
    assert matches(given, target) == same


class TestOnAModel:
    def test_readings_are_the_models_own_on_the_prompts_decision(self):
        editor = taught()
        facts = (*FACTS, Edit("far away", "no"))
        rows = [question(editor.tokenizer, f.prompt, f.target) for f in facts]
        for row, found in zip(rows, readings(editor, rows), strict=True):
            ids = torch.tensor([row.ids[:-1]])
            mask = torch.arange(ids.shape[1])[None] < row.prompt
            with torch.no_grad(), editor.routing.prompt(mask):
                logits = editor.model(ids).logits[0, row.first - 1 :]
            labels = torch.tensor(row.ids[row.first :])
            assert torch.equal(found.labels, labels) and torch.equal(found.best, logits.argmax(-1))
            expected = logits.log_softmax(-1).gather(1, labels[:, None])[:, 0]
            assert torch.allclose(found.logp, expected, atol=1e-4)

    def test_mixed_lengths_in_a_batch_are_what_each_gives_alone(self):
        editor = taught()
        alone = [evaluate(editor, [edit]).scores[0] for edit in RICH]
        assert list(evaluate(editor, RICH).scores) == alone
        assert list(evaluate(editor, RICH[::-1]).scores) == alone[::-1]

    def test_many_edits_in_several_batches(self):
        editor = taught()
        edits = [Edit("x" * n, "y" * (n % 5 + 1)) for n in range(1, 40)] + list(FACTS)
        scores = evaluate(editor, edits, generate=False).scores
        assert [s.edit for s in scores] == edits
        assert [s.reliability for s in scores[-4:]] == [1.0] * 4 and min(s.reliability for s in scores) < 0.5

    def test_all_edits_held_by_default(self):
        assert [s.edit for s in evaluate(taught(), generate=False).scores] == list(FACTS)
        assert evaluate(taught(), taught().edits, generate=False) == evaluate(taught(), FACTS, generate=False)
        assert evaluate(make_editor()).scores == ()

    def test_locality_is_exactly_one_when_nothing_is_in_scope(self):
        editor = taught()
        assert [s.locality for s in evaluate(editor, RICH, generate=False).scores] == [1.0, None, 1.0]
        editor = make_editor(FACTS, last_ratio=None, by_subject=False)
        editor.projection.thresholds.fill_(0.0)  # everything is in scope now
        assert evaluate(editor, RICH, generate=False).summary()["locality"] < 1.0

    def test_outputs_taken_before_the_first_edit_give_the_same(self):
        editor = make_editor()
        before = TASKS["qa"].before(editor, RICH)
        editor.edit(FACTS)
        editor.projection.thresholds.fill_(0.0)
        asked = evaluate(editor, RICH, generate=False)
        known = evaluate(editor, RICH, generate=False, before=before)
        assert known.scores == asked.scores and asked.unedited is None
        with editor.disabled():
            unedited = evaluate(editor, RICH, generate=False).scores
        assert [dataclasses.replace(s, answer=None, before=None, exact=None) for s in known.unedited] == list(unedited)

    def test_generalization_counts_an_equal_prompt_as_one(self):
        edit = full(FACTS[0], rephrases=(FACTS[0].prompt,))
        score = evaluate(taught(), [edit]).scores[0]
        assert score.generalization == 1.0 and score.exact_rephrased == 1.0

    def test_progress_reaches_its_end(self):
        seen = []
        evaluate(taught(), RICH, progress=lambda done, total: seen.append((done, total)))
        done, totals = zip(*seen)
        assert list(done) == sorted(done) and set(totals) == {done[-1]} and len(seen) > 3

    def test_modes_and_routing_are_left_alone(self):
        editor = taught()
        editor.model.train()
        evaluate(editor, RICH)
        assert all(m.training for m in editor.model.modules()) and editor.routing.enabled
        editor.model.eval()


class TestStopping:
    def generated(self, editor, prompt, length=12):
        """Ids that the model itself gives after the prompt."""
        given = editor.tokenizer(prompt, return_tensors="pt")
        made = editor.model.generate(**given, max_new_tokens=length, do_sample=False, pad_token_id=258)
        return made[0, given["input_ids"].shape[1] :].tolist()

    @pytest.mark.parametrize("stop, token", [("auto", EOS), ("eos", EOS), ("newline", NEWLINE)])
    def test_an_edited_answer_ends(self, stop, token):
        editor = taught(stop)
        token = editor.tokenizer("\n", add_special_tokens=False)["input_ids"][0] if token == NEWLINE else token
        for fact in FACTS:
            row = tokens.encode_target(editor.tokenizer, fact.prompt, fact.target)
            assert self.generated(editor, fact.prompt)[: len(row.target) + 1] == [*row.target, token]
        assert answer(editor, [f.prompt for f in FACTS]) == [f.target for f in FACTS]

    def test_without_a_stop_token_none_is_trained(self):
        editor = make_editor(FACTS, stop="none")
        for fact in FACTS:
            for row in editor.examples([fact], [0])[0]:
                assert EOS not in row.target
                assert editor.tokenizer.decode(row.target).strip() == fact.target
            expected = tokens.encode_target(editor.tokenizer, fact.prompt, fact.target).target
            found = self.generated(editor, fact.prompt)
            assert tuple(found[: len(expected)]) == expected and found[len(expected)] != EOS
        assert all(a.startswith(f.target) for a, f in zip(answer(editor, [f.prompt for f in FACTS]), FACTS))

    def test_an_answer_is_its_first_line(self, monkeypatch):
        editor = make_editor()
        ids = editor.tokenizer(" Ann Lee \nand more", add_special_tokens=False)["input_ids"]

        def generate(input_ids, **settings):
            self.settings = settings
            return torch.cat([input_ids, torch.tensor([ids]).expand(len(input_ids), -1)], 1)

        monkeypatch.setattr(editor.model, "generate", generate)
        assert answer(editor, ["a", "bcd"]) == ["Ann Lee", "Ann Lee"]
        assert EOS in self.settings["eos_token_id"] and self.settings["do_sample"] is False

    def test_nothing_but_a_stop_is_an_empty_answer(self, monkeypatch):
        editor = make_editor()
        monkeypatch.setattr(
            editor.model, "generate", lambda input_ids, **_: torch.cat([input_ids, input_ids[:, :1] * 0 + EOS], 1)
        )
        assert answer(editor, ["a"]) == [""] and answer(editor, []) == []
