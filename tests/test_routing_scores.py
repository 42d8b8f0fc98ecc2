"""Ratios to what decides scope, against the router itself."""

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

    def test_say_of_each_prompt_whether_it_is_in_scope(self, editor):
        found, kinds = (
            routing_ratios(editor, EDITS[:8]),
            {"edit": lambda e: e.prompt, "rephrase": lambda e: e.rephrases[0]},
        )
        for kind, text in kinds.items():
            for edit, ratio in zip(EDITS[:8], found[kind], strict=True):
                with torch.no_grad():
                    editor.model(**editor.tokenizer(text(edit), return_tensors="pt"))
                assert (ratio > 1) == (int(editor.routing.choice) >= 0)

    def test_without_leverage_they_are_score_over_threshold_of_each_prompt_alone(self, editor):
        editor.config = editor.config.replace(route_by="score")
        editor.state = editor.state
        found = routing_ratios(editor, EDITS[:3])
        for kind, text in (("edit", EDITS[0].prompt), ("rephrase", EDITS[0].rephrases[0]), ("unrelated", "Bread O")):
            with torch.no_grad():
                editor.model(**editor.tokenizer(text, return_tensors="pt"))
            best = max(s / m.threshold for s, m in zip(editor.routing.scores[0].tolist(), editor.memories, strict=True))
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
