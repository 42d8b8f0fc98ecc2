"""Edits: every record format, every error a file can raise, and the properties of the packaged set."""

import dataclasses
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.edit_files import GOOD, MEND, REQUEST, fails, lines, write
from wise_fast.data import Edit, Locality, load_edits

FIXTURES = Path(__file__).parent / "fixtures"

texts = st.text(min_size=1).filter(str.strip)
maybe = st.none() | texts
localities = st.builds(Locality, prompt=texts, answer=maybe)
edits = st.builds(
    Edit,
    prompt=texts,
    target=texts,
    subject=maybe,
    rephrases=st.lists(texts, max_size=3).map(tuple),
    ood_prompts=st.lists(texts, max_size=2).map(tuple),
    locality=st.lists(localities, max_size=3).map(tuple),
    irrelevant=maybe,
    id=maybe,
)


def test_request_format():
    first, second = load_edits(FIXTURES / "request.json")
    assert first == Edit(
        prompt="When was the harbor bridge of Seldon opened?",
        target="1931",
        subject="harbor bridge of Seldon",
        rephrases=("In which year did the harbor bridge of Seldon open?",),
        locality=(Locality("nq question: who sings the song about the lighthouse", "Ada Finch"),),
        irrelevant="nq question: how deep is the lake of Orm Forty meters",
    )
    assert second.target == " Jo Reed"
    assert second.rephrases == ("The Orm town hall is by whom?", "Who is the architect of the Orm town hall?")
    assert second.locality == (
        Locality("What is the tallest tower of Orm?", "The Needle"),
        Locality("What river crosses Orm?", "Sill"),
        Locality("What do cows eat?", "grass"),
        Locality("Say hello."),
    )
    assert (second.subject, second.irrelevant, second.id) == (None, None, "7")


def test_hallucination_fields():
    first, second = load_edits(FIXTURES / "hallucination.json")
    assert first.target == "She has recorded four albums."
    assert first.locality == (Locality("The store opens at nine an", "d closes at five."),)
    assert second.locality == (Locality("Posted on Friday. "),), "a blank reference answer is no answer"


def test_temporal_fields():
    (edit,) = load_edits(FIXTURES / "temporal.json")
    assert edit.rephrases == ()
    assert edit.ood_prompts[0].startswith("Tidal kites are tethered") and edit.ood_prompts[0].endswith("slow water.")
    assert edit.locality == (Locality("Add the flour slow", "ly and stir."),)


def test_mend_format():
    first, second = load_edits(FIXTURES / "mend.jsonl")
    assert first == Edit(
        prompt="When did Seldon Radio go on air?",
        target="1962",
        subject="Seldon Radio",
        rephrases=("What year was Seldon Radio first heard?",),
        locality=(Locality("nq question: how many islands does Orm have", "twelve"),),
    )
    assert second.target == "Lee Park"
    assert second.rephrases == ("By whom was the Orm tower built?",)
    assert second.locality[0].answer == "Bo Lind"


def test_counterfact_format():
    first, second = load_edits(FIXTURES / "counterfact.json")
    assert first == Edit(
        prompt="The Orm Ballad {draft} was written in",
        target="Welsh",
        subject="The Orm Ballad {draft}",
        rephrases=("The text of The Orm Ballad {draft} is in", "The Orm Ballad {draft}, a poem in"),
        locality=(
            Locality("The Seldon Letters were written in", "Dutch"),
            Locality("The Sill Chronicle is in", "Dutch"),
        ),
        id="12",
        truth="Dutch",
    )
    assert second.prompt == "The home town of Ada Finch is"
    assert second.locality == (Locality("Bo Lind lives in"),)


def test_counterfact_prompt_is_no_format_string():
    rewrite = {"prompt": "{} in {0.x} {!r is", "target_new": {"str": "b"}, "subject": "S"}
    assert Edit.from_dict({"requested_rewrite": rewrite}).prompt == "S in {0.x} {!r is"


def test_simple_format():
    first, second = load_edits(FIXTURES / "simple.jsonl")
    assert first == Edit("The mayor of Orm is", "Bo Lind")
    assert second.locality == (Locality("What do cows eat?", "grass"), Locality("Say hello."))
    assert (second.subject, second.id) == (None, "ferry-1")


@pytest.mark.parametrize("fixture", sorted(FIXTURES.glob("*.json*")), ids=lambda path: path.name)
def test_from_dict_restores_what_to_dict_wrote(fixture):
    for edit in load_edits(fixture):
        assert Edit.from_dict(json.loads(json.dumps(edit.to_dict()))) == edit


@given(edits)
def test_round_trip(edit):
    assert Edit.from_dict(json.loads(json.dumps(edit.to_dict()))) == edit


def test_to_dict_leaves_absent_fields_out():
    assert Edit("a", "b", locality=(Locality("c"),)).to_dict() == {
        "prompt": "a",
        "target": "b",
        "locality": [{"prompt": "c"}],
    }


def test_an_edit_is_frozen_hashable_and_holds_tuples():
    edit = Edit("a", "b", rephrases=["c"], locality=[Locality("d")])
    assert edit.rephrases == ("c",) and edit.locality == (Locality("d"),)
    assert hash(edit) == hash(Edit("a", "b", rephrases=("c",), locality=(Locality("d"),)))
    with pytest.raises(dataclasses.FrozenInstanceError):
        edit.target = "e"


@given(st.lists(edits, min_size=1, max_size=4), st.booleans(), st.booleans(), st.sampled_from(["\n", "\r\n", "\n\n"]))
def test_content_decides_between_list_and_lines(tmp_path_factory, given_edits, bom, as_lines, newline):
    # ensure_ascii=False leaves U+2028 and U+0085 unescaped: only "\n" ends a line.
    records = [json.dumps(edit.to_dict(), ensure_ascii=False) for edit in given_edits]
    text = newline.join(records) if as_lines else "[" + ",\n".join(records) + "]"
    content = text.encode("utf-8-sig" if bom else "utf-8")
    path = write(tmp_path_factory.mktemp("data"), content, "edits.json" if as_lines else "edits.jsonl")
    assert load_edits(path) == given_edits
    assert load_edits(str(path), limit=1) == given_edits[:1]


def test_limit(tmp_path):
    path = write(tmp_path, lines(GOOD, {**GOOD, "prompt": "b"}) + "{broken\n")
    assert [edit.prompt for edit in load_edits(path, limit=2)] == ["The mayor of Orm is", "b"]
    assert len(load_edits(FIXTURES / "simple.jsonl", limit=99)) == 2


@pytest.mark.parametrize("limit", [0, -3, True, 1.5, "2"])
def test_limit_out_of_range(limit):
    fails(lambda: load_edits(FIXTURES / "simple.jsonl", limit=limit), "limit", "at least 1", repr(limit))


def test_missing_file(tmp_path):
    fails(lambda: load_edits(tmp_path / "none.json"), str(tmp_path / "none.json"), "no such file", "check the path")


def test_directory(tmp_path):
    fails(lambda: load_edits(tmp_path), str(tmp_path), "is a directory", "name one of the files")


def test_unreadable_file(tmp_path, monkeypatch):
    def denied(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", denied)
    fails(lambda: load_edits(tmp_path / "a.json"), "a.json", "cannot be read (Permission denied)")


@pytest.mark.parametrize(
    ("content", "byte"), [(b'[{"prompt": "caf\xe9"}]', "byte 16 is 0xe9"), (b"\xff\xfe[", "byte 0")]
)
def test_not_utf8(tmp_path, content, byte):
    path = write(tmp_path, content)
    fails(lambda: load_edits(path), str(path), "not UTF-8", byte, "save it as UTF-8")


@pytest.mark.parametrize("content", [b"", b" \n\t\r\n", b"\xef\xbb\xbf\n"])
def test_empty_file(tmp_path, content):
    path = write(tmp_path, content)
    fails(lambda: load_edits(path), str(path), "file is empty", "JSON list or JSON Lines")


def test_empty_list(tmp_path):
    path = write(tmp_path, "[]")
    fails(lambda: load_edits(path), str(path), "list is empty", "at least one edit")


@pytest.mark.parametrize(
    ("content", "given_as"), [('{\n"edits": []\n}', "object"), ('"a"', "text 'a'"), ("3", "number 3"), ("null", "null")]
)
def test_top_level_not_a_list(tmp_path, content, given_as):
    path = write(tmp_path, content)
    fails(lambda: load_edits(path), str(path), f"top level is {given_as}", "expected a list", "[...]")


def test_syntax_error_in_a_list(tmp_path):
    path = write(tmp_path, '[\n {"prompt": "a", "target": "b"},\n {"prompt": }\n]')
    fails(lambda: load_edits(path), str(path), "not valid JSON", "line 3 column 13", "correct it")


def test_syntax_error_in_lines(tmp_path):
    path = write(tmp_path, lines(GOOD) + "\n" + lines(GOOD) + '{"prompt": "a" "target"}\n')
    fails(lambda: load_edits(path), str(path), "record 3", "line 4 column 16", "not valid JSON")


@pytest.mark.parametrize("content", ["[" * 100_000, '{"a":' * 100_000])
def test_deep_nesting_is_an_edit_data_error(tmp_path, content):
    path = write(tmp_path, content)
    fails(lambda: load_edits(path), "not valid JSON")


def test_bad_record_in_the_middle_of_a_list(tmp_path):
    path = write(tmp_path, json.dumps([GOOD, {"prompt": "b", "target": 5}, GOOD]))
    fails(lambda: load_edits(path), f"{path}, record 2: ", "field 'target'", "expected text", "number 5", "string")


def test_bad_record_in_the_middle_of_lines(tmp_path):
    path = write(tmp_path, lines(GOOD) + "\n\n" + lines({"prompt": "b", "target": "  "}, GOOD))
    fails(lambda: load_edits(path), f"{path}, record 2 (line 4): ", "field 'target'", "blank", "fill it in")


@pytest.mark.parametrize("record", [None, 3, "text", ["prompt"]])
def test_record_that_is_no_object(tmp_path, record):
    path = write(tmp_path, json.dumps([GOOD, record]))
    fails(lambda: load_edits(path), "record 2", "expected an object", "got")


REWRITE = {"prompt": "{} is", "target_new": {"str": "b"}, "subject": "s"}


@pytest.mark.parametrize(
    ("record", "parts"),
    [
        # Canonical: strict.
        ({"target": "b"}, ["field 'prompt' is missing"]),
        ({**GOOD, "prompt": None}, ["field 'prompt'", "null"]),
        ({**GOOD, "prompt": " \n"}, ["field 'prompt'", "blank"]),
        ({**GOOD, "target": ["b"]}, ["field 'target'", "list ['b']"]),
        ({**GOOD, "target": "\ud800"}, ["field 'target'", "surrogate"]),
        ({**GOOD, "subject": ""}, ["field 'subject'", "blank", "drop it"]),
        ({**GOOD, "id": 4}, ["field 'id'", "number 4"]),
        ({**GOOD, "irrelevant": ["a"]}, ["field 'irrelevant'", "list"]),
        ({**GOOD, "rephrases": "a"}, ["field 'rephrases'", "list of texts", "text 'a'"]),
        ({**GOOD, "rephrases": ["a", 1]}, ["field 'rephrases[1]'", "number 1"]),
        ({**GOOD, "ood_prompts": {"a": 1}}, ["field 'ood_prompts'", "object"]),
        ({**GOOD, "locality": {"prompt": "a"}}, ["field 'locality'", "list of objects", "object"]),
        (
            {**GOOD, "locality": ["a"]},
            ["field 'locality[0]'", "expected an object", "text 'a'", '{"prompt": ..., "answer": ...}'],
        ),
        ({**GOOD, "locality": [{"prompt": "a"}, {"answer": "a"}]}, ["field 'locality[1].prompt' is missing"]),
        ({**GOOD, "locality": [{"prompt": "a", "answer": 2}]}, ["field 'locality[0].answer'", "number 2"]),
        ({**GOOD, "locality": [{"prompt": "a", "anwser": "b"}]}, ["'locality[0].anwser'", "did you mean 'answer'"]),
        ({**GOOD, "rephrase": ["a"]}, ["unknown field 'rephrase'", "did you mean 'rephrases'", "irrelevant"]),
        ({**GOOD, "zzz": 1}, ["unknown field 'zzz'; expected: prompt, target"]),
        # Request.
        ({"target_new": "b"}, ["field 'prompt' is missing"]),
        ({**REQUEST, "target_new": {"str": "b"}}, ["field 'target_new'", "object"]),
        ({**REQUEST, "target_new": " "}, ["field 'target_new'", "blank"]),
        ({**REQUEST, "rephrase_prompt": 4}, ["field 'rephrase_prompt'", "number 4"]),
        ({**REQUEST, "rephrase_prompt": ["a", 4]}, ["field 'rephrase_prompt[1]'", "number 4"]),
        ({**REQUEST, "ood_rephrase": {"a": 4}}, ["field 'ood_rephrase'", "object"]),
        ({**REQUEST, "loc_prompt": ["a"]}, ["field 'loc_prompt'", "list"]),
        ({**REQUEST, "subject": 1.5}, ["field 'subject'", "number 1.5"]),
        ({**REQUEST, "locality": ["a"]}, ["field 'locality'", "expected an object", "list"]),
        ({**REQUEST, "locality": {"near": "a"}}, ["field 'locality.near'", "expected an object"]),
        ({**REQUEST, "locality": {"near": {"promt": "a"}}}, ["field 'locality.near.prompt' is missing"]),
        ({**REQUEST, "locality": {"near": {"prompt": 1}}}, ["field 'locality.near.prompt'", "number 1"]),
        (
            {**REQUEST, "locality": {"near": {"prompt": ["a", "b"], "ground_truth": ["c"]}}},
            ["field 'locality.near.ground_truth'", "expected 2 answers", "got 1"],
        ),
        (
            {**REQUEST, "locality": {"near": {"prompt": ["a"], "ground_truth": [3]}}},
            ["field 'locality.near.ground_truth[0]'", "number 3"],
        ),
        (
            {**REQUEST, "locality_prompt": "a", "locality_ground_truth": 3},
            ["field 'locality_ground_truth'", "number 3"],
        ),
        ({**REQUEST, "locality_prompt": ["a"], "locality_ground_truth": "b"}, ["locality_ground_truth", "text 'b'"]),
        # MEND.
        ({"src": "a"}, ["field 'alt' is missing"]),
        ({**MEND, "src": ""}, ["field 'src'", "blank"]),
        ({**MEND, "alt": []}, ["field 'alt'", "empty list"]),
        ({**MEND, "alt": [" "]}, ["field 'alt[0]'", "blank"]),
        ({**MEND, "alt": 3}, ["field 'alt'", "number 3"]),
        ({**MEND, "loc": 3}, ["field 'loc'", "number 3"]),
        # CounterFact.
        ({"requested_rewrite": [REWRITE]}, ["field 'requested_rewrite'", "expected an object", "list"]),
        ({"requested_rewrite": {**REWRITE, "prompt": "a is"}}, ["field 'requested_rewrite.prompt'", "'{}'", "'a is'"]),
        ({"requested_rewrite": {**REWRITE, "subject": " "}}, ["field 'requested_rewrite.subject'", "blank"]),
        ({"requested_rewrite": {**REWRITE, "target_new": "b"}}, ["field 'requested_rewrite.target_new'", "object"]),
        ({"requested_rewrite": {**REWRITE, "target_new": {}}}, ["'requested_rewrite.target_new.str' is missing"]),
        (
            {"requested_rewrite": {"target_new": {"str": "b"}, "subject": "s"}},
            ["'requested_rewrite.prompt' is missing"],
        ),
        ({"requested_rewrite": REWRITE, "neighborhood_prompts": [{"a": 1}]}, ["field 'neighborhood_prompts[0]'"]),
        # None of them, or several.
        ({"prompt": "a", "targte": "b"}, ["unknown format", "'prompt'", "'targte' (did you mean 'target'?)"]),
        ({"x": 1, "y": 2}, ["unknown format", "'x', 'y'", "canonical", "request", "MEND", "CounterFact"]),
        ({}, ["unknown format", "fields found: none"]),
        ({**GOOD, "target_new": "c"}, ["'target' and 'target_new'", "different formats", "keep one"]),
    ],
)
def test_unusable_record(tmp_path, record, parts):
    fails(lambda: Edit.from_dict(record), *parts)
    path = write(tmp_path, lines(GOOD, record))
    fails(lambda: load_edits(path), f"{path}, record 2 (line 2): ", *parts)


@pytest.mark.parametrize(
    "record",
    [
        {**REQUEST, "subject": None, "loc_prompt": "", "locality": None, "rephrase_prompt": None, "case_id": None},
        {**REQUEST, "locality_prompt": " ", "locality_ground_truth": "c", "anything": object()},
        {**REQUEST, "locality": {"near": {"prompt": None, "ground_truth": None}}},
        {**MEND, "rephrase": [], "loc": None},
    ],
)
def test_absent_and_extra_fields_of_other_formats_do_no_harm(record):
    assert Edit.from_dict(record) == Edit("a", "b")


def test_constructor_checks_what_it_is_given():
    fails(lambda: Edit("", "b"), "field 'prompt'", "blank")
    fails(lambda: Edit("a", None), "field 'target'", "null")
    fails(lambda: Edit("a", "b", rephrases="abc"), "field 'rephrases'", "list of texts")
    fails(lambda: Edit("a", "b", locality=("c",)), "field 'locality'", "tuple of Locality")
    fails(lambda: Locality(" "), "field 'prompt'", "blank")
    fails(lambda: Locality("a", 3), "field 'answer'", "number 3")
