"""Training rows: which variants there are, how they are grouped, and that company changes nothing."""

import pytest
import torch

from tests.edited import FACTS, make_editor, make_trainer
from wise_fast.augment import drop_words
from wise_fast.rows import Part, buckets, look_at


def unmoved(rows, numbers):
    """These rows as `look_at` wants them, under the memory they began with."""
    return [Part(group, places, group.before[group.tokens(places)]) for group, places in rows.split(numbers)]


class TestRows:
    def test_some_word_is_dropped_where_one_may_be(self):
        generator = torch.Generator().manual_seed(0)
        made = {drop_words("who built the tower of Pisa?", 1e-9, generator, "tower of Pisa") for _ in range(20)}
        assert made == {"built the tower of Pisa?", "who the tower of Pisa?", "who built tower of Pisa?"}
        assert drop_words("tower of Pisa", 0.5, generator, "tower of Pisa") == "tower of Pisa"
        assert drop_words("who built it", 0.0, generator) == "who built it"

    def test_without_a_subject_what_may_be_one_stays(self):
        generator = torch.Generator().manual_seed(0)
        made = {drop_words("The river of Lima in 1911 is", 0.9, generator) for _ in range(30)}
        assert all({"The", "Lima", "1911"} <= set(text.split()) for text in made) and len(made) > 3

    def test_a_variant_like_another_is_left_out(self):
        trainer = make_trainer(make_editor(prefixes=1, dropped=2, drop_rate=0.0), FACTS)
        assert trainer.rows.variants == 4 and trainer.rows.numbers([1, 2]) == [4, 5, 8, 9]
        assert sorted(n for group in trainer.rows.groups for n in group.numbers) == trainer.rows.numbers(range(4))
        assert all(r.success for r in make_editor(prefixes=1, dropped=2, drop_rate=0.0).edit(FACTS))

    def test_rows_are_padded_to_their_likes(self):
        lengths = [30, 4, 5, 31, 4, 29]
        assert buckets(lengths) == [[1, 2, 4], [0, 3, 5]]
        assert buckets([7]) == [[0]] and buckets([7, 8, 9]) == [[0, 1, 2]]

    def test_a_row_looks_the_same_in_any_company(self, monkeypatch):
        monkeypatch.setattr("wise_fast.rows._PER_GROUP", 8)
        editor = make_editor(prefixes=3, dropped=1)
        alone, among = (make_trainer(editor, facts).rows for facts in (FACTS[1:2], FACTS))
        assert len(among.groups) > 1
        seen = []
        for of, edit in ((alone, 0), (among, 1)):
            numbers = [edit * of.variants + variant for variant in range(of.variants)]
            nll = {}
            parts = unmoved(of, numbers)
            for part, look in zip(parts, look_at(parts, "mean", full=True), strict=True):
                numbers = [part.group.numbers[place] % of.variants for place in part.places]
                nll |= dict(zip(numbers, look.nll.tolist(), strict=True))
            seen.append([nll[variant] for variant in range(of.variants)])
        assert seen[0] == pytest.approx(seen[1], rel=1e-4)
        torch.testing.assert_close(alone.key(0), among.key(1), rtol=1e-4, atol=1e-5)
        assert alone.taught([0]).shape == among.taught([1]).shape

    def test_the_first_token_of_an_answer_weighs_more_in_its_loss(self):
        editor = make_editor(prefixes=0, dropped=0, first_token=5.0)
        trainer = make_trainer(editor, FACTS)
        rows = trainer.rows
        for part in unmoved(rows, rows.bare()):
            (look,) = look_at([part], "mean", full=True)
            places, batch = part.places, part.group.batch
            with torch.no_grad():
                output = editor.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
            logp = output.logits.log_softmax(-1).flatten(0, 1)[batch.positions].gather(1, batch.labels[:, None])[:, 0]
            for place, seen in zip(places, look.nll.tolist(), strict=True):
                mine = -logp[batch.row == place]
                assert len(mine) > 1 and seen == pytest.approx(
                    float((4 * mine[0] + mine.sum()) / (4 + len(mine))), rel=1e-4
                )

    def test_labels_of_every_row_know_the_rest_of_the_vocabulary(self):
        trainer = make_trainer(make_editor(prefixes=3, dropped=1), FACTS)
        parts = unmoved(trainer.rows, [0, 5, 10, 15])
        looks = look_at(parts, "mean", full=True)
        trainer.rows.restrict([(part.group, part.places, look) for part, look in zip(parts, looks, strict=True)])
        for part, full in zip(look_at(parts, "mean", full=False), looks, strict=True):
            torch.testing.assert_close(part.nll, full.nll, rtol=1e-3, atol=1e-4)
