"""Edits given as chat messages: the template is part of what is taught, routed, scored, saved and served."""

import json

import pytest
from transformers import pipeline

from tests.edited import QUICK, make_editor, untouched, wide_model
from tests.tiny import tiny_tokenizer
from wise_fast import Edit, WiseEditor, evaluate, load_edits
from wise_fast.chat import render, rendered, reworded
from wise_fast.data import Locality
from wise_fast.errors import EditDataError
from wise_fast.lifelong import Run
from wise_fast.messages import Message, check_messages

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m.role[0] }}:{{ m.content | trim }}\n{% endfor %}"
    "{% if add_generation_prompt %}a:\n{% endif %}"
)


def said(text, *before):
    """The messages of a chat in which the user says this at last."""
    return [*before, {"role": "user", "content": text}]


QUESTIONS = (said("Who leads Fro?"), said("Capital of Zed", {"role": "system", "content": "Be brief."}))
CHATS = (
    Edit(QUESTIONS[0], "Ann", rephrases=(said("Fro is led by"), "Fro's leader:"), id="fro"),
    Edit(QUESTIONS[1], "Bo", subject="Zed", locality=(Locality(said("0 + 7"), "7"), Locality("zyx"))),
)


def chat_tokenizer(template=TEMPLATE, **settings):
    tokenizer = tiny_tokenizer(**settings)
    tokenizer.chat_template = template
    return tokenizer


def answers(editor, messages):
    """What a server gives: the template's own token ids, and what is generated behind them."""
    tokenizer = editor.tokenizer
    given = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    made = editor.model.generate(**given, do_sample=False, max_new_tokens=6, pad_token_id=258)
    return tokenizer.decode(made[0, given["input_ids"].shape[1] :], skip_special_tokens=True).strip()


@pytest.fixture(scope="module")
def taught():
    editor = WiseEditor(wide_model(), chat_tokenizer(), QUICK)
    editor.edit(CHATS)
    return editor


def test_the_chat_answers_with_the_edits_and_routes_on_the_whole_template(taught):
    for chat, report in zip(CHATS, taught.edits, strict=True):
        assert report.success and answers(taught, [m.to_dict() for m in chat.prompt]) == chat.target
        assert float(taught.routing.scores) == pytest.approx(report.score, rel=1e-4)
    with taught.disabled():
        assert answers(taught, QUESTIONS[0]) != "Ann"


def test_a_pipeline_is_given_messages(taught):
    pipe = pipeline("text-generation", model=taught.model, tokenizer=taught.tokenizer)
    made = pipe(list(QUESTIONS), batch_size=2, max_new_tokens=6, do_sample=False)
    assert [row[0]["generated_text"][-1]["content"].strip() for row in made] == [chat.target for chat in CHATS]


def test_scores_are_of_the_rendered_prompts(taught):
    given, held = evaluate(taught, CHATS), evaluate(taught)
    assert given.summary() == held.summary() and given.scores == held.scores
    assert (given.summary()["reliability"], given.summary()["exact"]) == (1.0, 1.0)
    assert all(
        isinstance(prompt, str) for score in given.scores for prompt in (score.edit.prompt, *score.edit.rephrases)
    )


def test_saved_and_loaded_whole(taught, tmp_path):
    taught.save_pretrained(tmp_path / "pack")
    loaded = WiseEditor.from_pretrained(wide_model(), chat_tokenizer(), tmp_path / "pack")
    assert loaded.edits == taught.edits
    assert [report.edit.messages for report in loaded.edits] == [chat.prompt for chat in CHATS]
    assert answers(loaded, QUESTIONS[1]) == "Bo"


def test_a_later_edit_of_the_same_chat_supersedes_it(taught):
    state = taught.state
    try:
        first, second = taught.edit([Edit(QUESTIONS[0], "Eve"), Edit(QUESTIONS[0], "Ida")])
        assert "superseded by edit 2" in first.note and second.success and answers(taught, QUESTIONS[0]) == "Ida"
        assert taught.edits[0].note == "superseded by a later edit"
    finally:
        taught.state = state


def test_records_and_files_hold_messages(tmp_path):
    for edit in (*CHATS, *rendered(chat_tokenizer(), CHATS)):
        assert Edit.from_dict(json.loads(json.dumps(edit.to_dict()))) == edit and hash(edit)
    file = tmp_path / "edits.jsonl"
    file.write_text("\n".join(json.dumps(edit.to_dict()) for edit in CHATS))
    assert load_edits(file) == list(CHATS)
    assert Edit.from_dict({"prompt": QUESTIONS[0], "target_new": "Ann"}) == Edit(QUESTIONS[0], "Ann")


@pytest.mark.parametrize("bos", [True, False], ids=["tokenizer adds BOS", "template alone"])
def test_the_text_is_read_as_the_template_meant_it(bos):
    tokenizer = chat_tokenizer(bos=bos)
    text = render(tokenizer, check_messages(QUESTIONS[1], "prompt"))
    assert text == "<bos>" * (not bos) + "s:Be brief.\nu:Capital of Zed\na:\n"
    expected = tokenizer.apply_chat_template(QUESTIONS[1], add_generation_prompt=True, return_dict=True)["input_ids"]
    assert tokenizer(text)["input_ids"] == expected


def test_a_run_is_of_the_rendered_edits(tmp_path):
    editor = WiseEditor(wide_model(), chat_tokenizer(), QUICK)
    assert Run(editor, CHATS, tmp_path / "run").edits == rendered(editor.tokenizer, CHATS)


def test_text_is_left_as_it_is():
    edit = Edit("p", "t", rephrases=("q",))
    assert rendered(tiny_tokenizer(), [edit])[0] is edit


def test_only_what_the_user_said_is_reworded():
    chat, plain = rendered(chat_tokenizer(), [CHATS[1], Edit("a b", "c")])
    assert reworded(chat, lambda text: [text.upper(), ""]) == [
        "s:Be brief.\nu:CAPITAL OF ZED\na:\n",
        "s:Be brief.\nu:\na:\n",
    ]
    assert reworded(plain, str.split) == ["a", "b"]
    editor = make_editor(dropped=2, near=3, drop_rate=0.9)
    assert {text[:13] + text[-4:] for text in editor._shortened(chat)} == {"s:Be brief.\nu\na:\n"}
    assert all(text.startswith("s:Be brief.\nu:Capital of ") for text in editor._neighbours(chat))


class TestRefused:
    @pytest.mark.parametrize(
        "prompt, word",
        [
            ([], "expected messages"),
            (said("x") + [{"role": "assistant", "content": "y"}], "the last message is the assistant's"),
            ([{"role": "user"}], r"prompt\[0\]"),
            ([{"role": "user", "content": " "}], r"prompt\[0\]\.content"),
            ([{"role": "user", "content": [{"type": "text"}]}], r"prompt\[0\]\.content"),
            ([{"role": "user", "content": "x", "tool_calls": []}], "tools"),
            (["hello"], r"prompt\[0\]"),
        ],
    )
    def test_messages_of_another_form(self, prompt, word):
        with pytest.raises(EditDataError, match=word):
            Edit(prompt, "t")
        with pytest.raises(EditDataError, match=word):
            Edit.from_dict({"prompt": prompt, "target": "t"})

    @pytest.mark.parametrize(
        "template, word",
        [
            (None, "has no chat template"),
            ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
            ("{% for m in messages %}{{ m.content }}{% endfor %}", "otherwise than its chat template"),
        ],
        ids=["none", "raises", "no BOS where the tokenizer adds one"],
    )
    def test_a_template_that_does_not_serve(self, taught, template, word):
        before, taught.tokenizer.chat_template = taught.tokenizer.chat_template, template
        try:
            with untouched(taught), pytest.raises(EditDataError, match=word):
                taught.edit([Edit("text", "t"), Edit(said("x"), "t")])
            with pytest.raises(EditDataError, match=word):
                taught.check([Edit(said("x"), "t")])
        finally:
            taught.tokenizer.chat_template = before

    def test_messages_are_a_value(self):
        given = said("x")
        edit = Edit(given, "t")
        given.clear()
        assert edit.prompt == (Message("user", "x"),)
