"""The packaged edits, and that reading edits needs neither torch nor transformers."""

import json
import re
import sys
from collections import Counter
from importlib import resources
from pathlib import Path

import pytest

from wise_fast.data import deduplicate, demo_edits


def folded(text: str) -> str:
    return " ".join(text.split()).casefold()


class TestDemoEdits:
    edits = demo_edits()
    prompts = [folded(edit.prompt) for edit in edits]
    rephrases = [folded(text) for edit in edits for text in edit.rephrases]
    locality = [place for edit in edits for place in edit.locality]
    unrelated = [folded(place.prompt) for place in locality] + [folded(edit.irrelevant) for edit in edits]

    def test_the_file_is_canonical(self):
        file = resources.files("wise_fast") / "datasets" / "counterfactuals.json"
        assert json.loads(file.read_text(encoding="utf-8")) == [edit.to_dict() for edit in self.edits]

    def test_size_and_relations(self):
        relations = Counter(edit.id.rsplit("-", 1)[0] for edit in self.edits)
        assert len(self.edits) >= 48 and len(relations) >= 10 and min(relations.values()) >= 4
        assert len({edit.id for edit in self.edits}) == len(self.edits)
        assert all(re.fullmatch(r"[a-z]+(-[a-z]+)*-\d\d", edit.id) for edit in self.edits)

    def test_every_edit_can_be_scored(self):
        for edit in self.edits:
            assert len(edit.rephrases) == 2 and len(edit.locality) == 2 and edit.irrelevant, edit.id
            assert all(place.answer for place in edit.locality), edit.id
            assert edit.subject in edit.prompt and all(edit.subject in text for text in edit.rephrases), edit.id

    def test_targets_are_short_and_not_given_away(self):
        for edit in self.edits:
            assert 1 <= len(edit.target.split()) <= 3 and edit.target == edit.target.strip(), edit.id
            assert all(edit.target.casefold() not in text.casefold() for text in (edit.prompt, *edit.rephrases)), (
                edit.id
            )

    def test_half_are_questions_and_half_completions(self):
        questions = [edit for edit in self.edits if edit.prompt.endswith("?")]
        assert 0.4 <= len(questions) / len(self.edits) <= 0.6
        for edit in self.edits:
            ends = {text[-1] == "?" for text in (edit.prompt, *edit.rephrases)}
            assert ends == {edit in questions}, f"{edit.id}: paraphrases take the form of the prompt"
            if edit not in questions:
                assert all(text[-1].isalnum() for text in (edit.prompt, *edit.rephrases)), edit.id

    def test_no_prompt_occurs_twice(self):
        assert deduplicate(self.edits) == (self.edits, [])
        every = self.prompts + self.rephrases + self.unrelated
        assert [text for text, count in Counter(every).items() if count > 1] == []

    def test_what_is_unrelated_names_no_edited_subject(self):
        subjects = [edit.subject.casefold() for edit in self.edits]
        assert len(set(subjects)) == len(subjects)
        assert [(s, text) for s in subjects for text in self.unrelated if s in text] == []

    def test_locality_answers_are_short_and_not_given_away(self):
        assert all(len(place.answer.split()) <= 3 for place in self.locality)
        assert [place for place in self.locality if place.answer.casefold() in place.prompt.casefold().split()] == []

    def test_each_call_reads_afresh(self):
        again = demo_edits()
        assert again == self.edits and again is not self.edits


@pytest.mark.parametrize("module", ["wise_fast.data", "wise_fast.formats"])
def test_reading_edits_needs_neither_torch_nor_transformers(module):
    # The source is what counts: the package's own __init__ may well import torch.
    source = Path(sys.modules[module].__file__).read_text(encoding="utf-8")
    assert re.findall(r"^\s*(?:import|from) (torch|transformers|wise_kernels)\b", source, re.MULTILINE) == []
