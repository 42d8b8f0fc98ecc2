"""Files of irrelevant text beside files of edits, and that the data sets' formats bring what their task asks."""

import dataclasses
import json
from pathlib import Path

import pytest

from tests.table_method import TableMethod
from wise_fast import load_edits
from wise_fast.errors import EditDataError
from wise_fast.tasks import TASKS

FIXTURES = Path(__file__).parent / "fixtures"


class TestPartnerFiles:
    def test_irrelevant_text_of_the_record_in_the_same_place(self, tmp_path):
        partner = tmp_path / "irrelevant.json"
        place = {"locality_prompt": "The ferry leaves at", "locality_ground_truth": "ten."}
        rows = [{"prompt": "a", "target_new": "b", **place}, {"prompt": "c", "target_new": "d", "loc_prompt": "rain"}]
        partner.write_text(json.dumps(rows))
        file = FIXTURES / "hallucination.json"
        plain, paired = load_edits(file), load_edits(file, irrelevant=partner)
        assert [edit.irrelevant for edit in paired] == ["The ferry leaves at ten.", "rain"]
        assert [dataclasses.replace(edit, irrelevant=None) for edit in paired] == plain
        assert [e.irrelevant for e in load_edits(file, limit=1, irrelevant=partner)] == ["The ferry leaves at ten."]

    def test_blank_answers_and_open_prompts(self, tmp_path):
        partner = tmp_path / "irrelevant.json"
        partner.write_text(json.dumps([{"prompt": "a", "target_new": "b", "locality_prompt": "On Friday. "}]))
        (edit,) = load_edits(FIXTURES / "temporal.json", irrelevant=partner)
        assert edit.irrelevant == "On Friday. "

    def test_other_numbers_of_records(self, tmp_path):
        partner = tmp_path / "irrelevant.json"
        partner.write_text(json.dumps([{"prompt": "a", "target_new": "b", "loc_prompt": "x"}]))
        with pytest.raises(EditDataError, match="irrelevant.json: has 1 records, expected 2"):
            load_edits(FIXTURES / "hallucination.json", irrelevant=partner)
        assert len(load_edits(FIXTURES / "hallucination.json", limit=1, irrelevant=partner)) == 1

    def test_a_record_without_one(self, tmp_path):
        partner = tmp_path / "irrelevant.json"
        partner.write_text(json.dumps([{"prompt": "a", "target_new": "b"}] * 2))
        with pytest.raises(EditDataError, match="record 1: holds no irrelevant text"):
            load_edits(FIXTURES / "hallucination.json", irrelevant=partner)


@pytest.mark.parametrize("name", ["hallucination", "temporal", "counterfact"])
def test_the_data_sets_formats_bring_what_their_task_asks(name):
    edits = load_edits(FIXTURES / f"{name}.json")
    found = TASKS[name].score(TableMethod({}), edits[:1])
    assert all(value is not None for value in found.summary().values())
