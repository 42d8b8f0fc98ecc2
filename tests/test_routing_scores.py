"""Ratios of score to threshold, against the router itself."""

import pytest
import torch

from tests.edited import make_editor
from tests.killed import EDITS
from tests.running import new_editor
from wise_fast.routing_scores import routing_ratios


class TestRoutingRatios:
    @pytest.fixture(scope="class")
    @classmethod
    def editor(cls):
        editor = new_editor(max_steps=30, mask_ratio=0.6)
        editor.edit(EDITS[:8])
        return editor

    def test_are_score_over_threshold_of_each_prompt_alone(self, editor):
        found = routing_ratios(editor, EDITS[:3])
        for kind, text in (("edit", EDITS[0].prompt), ("rephrase", EDITS[0].rephrases[0]), ("unrelated", "Bread O")):
            with torch.no_grad():
                editor.model(**editor.tokenizer(text, return_tensors="pt"))
            limits = editor.routing.thresholds.expand(1, -1)[0].tolist()
            best = max(s / limit for s, limit in zip(editor.routing.scores[0].tolist(), limits, strict=True))
            assert found[kind][0] == pytest.approx(best, rel=1e-4)
        assert len(editor.memories) > 1 and min(found["edit"]) > 1

    def test_of_a_seeded_sample(self, editor):
        few = [routing_ratios(editor, EDITS[:8], seed=seed, most=3) for seed in (0, 0, 1)]
        assert few[0] == few[1] != few[2] and all(len(values) == 3 for values in few[0].values())
        everything = routing_ratios(editor, EDITS[:8])["edit"]
        assert len(everything) == 8 and all(
            any(r == pytest.approx(e, rel=1e-4) for e in everything) for r in few[0]["edit"]
        )

    def test_without_memories_or_router(self):
        assert routing_ratios(make_editor(), EDITS) is None and routing_ratios(object(), EDITS) is None
