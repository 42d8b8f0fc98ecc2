"""Perplexity on held-out text: every token alike, damage shows, nothing is asked twice."""

import json
import math

import pytest

from tests.edited import FACTS, make_editor, read_plainly
from tests.table_method import TableMethod
from wise_fast.data import demo_edits
from wise_fast.errors import EditDataError
from wise_fast.tasks import general_ability, held_out_texts


class TestGeneralAbility:
    def test_by_hand_every_token_has_the_same_weight(self):
        method = TableMethod({"^a": 0.5, "ab": 0.25, "^c": 0.125}, {"^a": 0.25, "ab": 0.5, "^c": 0.5})
        found = general_ability(method, ["ab", "c"])
        assert found["perplexity_after"] == pytest.approx((0.5 * 0.25 * 0.125) ** (-1 / 3))
        assert found["perplexity_before"] == pytest.approx((0.25 * 0.5 * 0.5) ** (-1 / 3))

    def test_against_plain_forwards_and_damage_shows(self):
        editor = make_editor(FACTS, last_ratio=None, by_subject=False)
        texts = ["A plain text.", "Who leads Fro? Nobody knows it.", "x"]

        def plainly():
            logp = [v for text in texts for v in read_plainly(editor, text)[0]]
            return math.exp(-sum(logp) / len(logp))

        found = general_ability(editor, texts)
        with editor.disabled():
            before = plainly()
        assert found["perplexity_after"] == pytest.approx(plainly(), rel=1e-4)
        assert found["perplexity_before"] == pytest.approx(before, rel=1e-4)
        editor.projection.thresholds.fill_(0.0)
        damaged = general_ability(editor, texts, before=found["perplexity_before"])
        assert damaged["perplexity_before"] == found["perplexity_before"]
        assert damaged["perplexity_after"] == pytest.approx(plainly(), rel=1e-4)
        assert damaged["perplexity_after"] != pytest.approx(found["perplexity_after"], rel=1e-2)

    def test_known_before_is_not_asked(self):
        method = TableMethod({})
        assert general_ability(method, ["abc"], before=5.0)["perplexity_before"] == 5.0 and not method.asked_before

    def test_nothing_to_read(self):
        assert general_ability(TableMethod({}), []) == {"perplexity_before": None, "perplexity_after": None}
        with pytest.raises(EditDataError, match="expected a list of texts"):
            general_ability(TableMethod({}), "one text")
        with pytest.raises(EditDataError, match="context is 512"):
            general_ability(TableMethod({}), ["word " * 200])

    def test_the_packaged_passages(self):
        texts = held_out_texts()
        assert len(set(texts)) == len(texts) == 30 and all(60 < len(text) < 300 for text in texts)
        edits = json.dumps([edit.to_dict() for edit in demo_edits()])
        assert not [text for text in texts for part in text.split(". ") if part in edits]
        found = general_ability(TableMethod({}))
        assert found["perplexity_before"] == found["perplexity_after"] == pytest.approx(260, rel=1e-3)
