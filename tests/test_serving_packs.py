"""transformers' server with an edited model and packs: many requests at once, each answered by the pack it names."""

import json
import random
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.edited import FACTS, wide_model
from tests.packs import LEGAL, MEDICAL, OWN, PROMPTS, new_editor, save_packs, with_packs
from tests.test_serving import TEMPLATE, alone, completed, post, serving
from tests.tiny import tiny_tokenizer
from wise_fast import WiseEditor

REQUESTS = 200
KINDS = ("completion", "chat", "stream")
MODELS = ("edited", "edited:legal", "edited:medical", "edited:__base__")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return save_packs(tmp_path_factory.mktemp("packs"))


@pytest.fixture(scope="module")
def editor(saved):
    made = with_packs(saved)
    made.tokenizer.chat_template = TEMPLATE
    made.model.generation_config.pad_token_id = 258
    return made


@pytest.fixture(scope="module")
def address(editor):
    with serving(editor, editable=True) as found:
        yield found


@pytest.fixture(scope="module")
def expected(saved):
    """(prompt, model) -> the answer of an editor that has that pack alone, on a model of its own."""
    editors = {"edited": new_editor(OWN), "edited:__base__": new_editor()}
    for name, path in saved.items():
        editors[f"edited:{name}"] = WiseEditor.from_pretrained(wide_model(), tiny_tokenizer(), path)
    for editor in editors.values():
        editor.model.generation_config.pad_token_id = 258
    return {(prompt, model): alone(editors[model], prompt) for prompt in PROMPTS for model in MODELS}


def read(text):
    return text.strip(" \ufffd")  # a stream holds back the bytes of a character that does not end


def test_hundreds_of_requests_at_once_are_each_answered_by_their_pack(address, expected):
    for facts, model in ((OWN, "edited"), (LEGAL, "edited:legal"), (MEDICAL, "edited:medical")):
        assert all(expected.get((fact.prompt, model)).strip() == fact.target for fact in facts)
    cases = [(prompt, kind, model) for prompt in PROMPTS for kind in KINDS for model in MODELS]
    asked = (cases * (REQUESTS // len(cases) + 1))[:REQUESTS]
    random.Random(0).shuffle(asked)
    with ThreadPoolExecutor(REQUESTS) as pool:
        found = list(pool.map(lambda ask: completed(address, *ask), asked))
    assert len(found) == REQUESTS
    assert [read(text) for text in found] == [read(expected[prompt, model]) for prompt, _, model in asked]


def test_packs_and_edits_come_and_go_among_requests(editor, address, saved, expected):
    state, fact = editor.state, FACTS[3]
    known, other = (LEGAL[0].prompt, "completion", "edited:legal"), (MEDICAL[1].prompt, "chat", "edited:medical")
    try:
        with ThreadPoolExecutor(20) as pool:
            asked = [pool.submit(completed, address, *ask) for ask in (known, other) for _ in range(4)]
            loaded = pool.submit(editor.load_pack, saved["medical"], "more")
            taught = pool.submit(post, f"{address}/v1/edits", fact.to_dict())
            asked += [pool.submit(completed, address, *ask) for ask in (known, other) for _ in range(4)]
        loaded.result()
        assert taught.result()[0] == 200
        assert {request.result().strip() for request in asked} == {LEGAL[0].target, MEDICAL[1].target}
        assert completed(address, fact.prompt).strip() == fact.target
        assert completed(address, fact.prompt, model="edited:default", kind="chat").strip() == fact.target
        assert completed(address, fact.prompt, model="edited:more").strip() != fact.target
        assert completed(address, MEDICAL[0].prompt, model="edited:more").strip() == MEDICAL[0].target
        editor.set_active(["legal"])
        assert completed(address, LEGAL[1].prompt).strip() == LEGAL[1].target
    finally:
        editor.set_active(["default"])
        editor.delete_pack("more")
        editor.state = state
    assert read(completed(address, fact.prompt)) == read(alone(editor, fact.prompt))
    assert post(f"{address}/v1/completions", dict(model="edited:more", prompt="x"))[0] == 400


def test_the_answer_names_its_pack_and_the_list_of_models_has_them(address):
    text = post(f"{address}/v1/completions", dict(model="edited:legal", prompt="x", max_tokens=1))[1]
    assert json.loads(text)["model"].startswith("edited:legal")
    with urllib.request.urlopen(f"{address}/v1/models", timeout=60) as found:
        names = [model["id"] for model in json.load(found)["data"]]
    assert names == ["edited", "edited:__base__", "edited:default", "edited:legal", "edited:medical"]


@pytest.mark.parametrize("kind", ["completions", "chat/completions", "responses"])
def test_a_pack_that_is_not_there(editor, address, kind):
    body = {
        "completions": dict(prompt="x", max_tokens=1),
        "chat/completions": dict(messages=[{"role": "user", "content": "x"}], max_tokens=1),
        "responses": dict(input="x", stream=False, max_output_tokens=1),
    }[kind]
    status, text = post(f"{address}/v1/{kind}", dict(model="edited:finance", **body))
    assert status == 400 and json.loads(text)["error"]["type"] == "PackError" and "'legal', 'medical'" in text
    for model in ("other:legal", "edited:", "edite", 3):
        assert post(f"{address}/v1/{kind}", dict(model=model, **body))[0] == 400
    assert post(f"{address}/v1/{kind}", body)[0] == 200


def test_one_thread_generates(editor, address):
    """As transformers' server has it for one model, so that what is compiled or captured stays with its thread."""
    from wise_fast.serving import _State

    state = _State()
    assert state.get_manager("edited@main") is state.get_manager("edited:legal@main")
