"""transformers' OpenAI-compatible server with an edited model, over HTTP on loopback, under many requests at once."""

import json
import sys
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
from transformers.utils.import_utils import is_serve_available

from tests.edited import ELSEWHERE, FACTS, QUICK, saved_model, wide_model
from tests.test_cli import run
from tests.tiny import tiny_tokenizer
from wise_fast import WiseEditor
from wise_fast.errors import WiseError
from wise_fast.metrics import answer
from wise_fast.serve_command import serve  # noqa: F401  registers the command

if not is_serve_available():
    pytest.skip("needs wise_fast[serve]", allow_module_level=True)

import uvicorn  # noqa: E402

from wise_fast.serving import application  # noqa: E402

TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
LENGTH = 6


@pytest.fixture(scope="module")
def editor():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    made = WiseEditor(wide_model(), tokenizer, QUICK)
    made.model.generation_config.pad_token_id = 258
    made.edit(FACTS[:3])
    return made


@contextmanager
def serving(editor, **settings):
    """The server's address, while it runs in a thread of its own."""
    config = uvicorn.Config(application(editor, **settings), host="127.0.0.1", port=0, log_level="error")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.005)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def address(editor):
    with serving(editor, editable=True) as found:
        yield found


def post(url, body):
    """(status, text) of what the server answers."""
    data, headers = json.dumps(body).encode(), {"Content-Type": "application/json"}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=60) as found:
            return found.status, found.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def completed(address, prompt, kind="completion", model="edited"):
    """The answer to a prompt by one of the server's ways to ask."""
    settings = dict(model=model, max_tokens=LENGTH, temperature=0)
    if kind == "completion":
        status, text = post(f"{address}/v1/completions", dict(prompt=prompt, **settings))
        found = json.loads(text)["choices"][0]["text"] if status == 200 else text
    else:
        messages = [{"role": "user", "content": prompt}]
        body = dict(messages=messages, stream=kind == "stream", **settings)
        status, text = post(f"{address}/v1/chat/completions", body)
        if kind == "chat":
            found = json.loads(text)["choices"][0]["message"]["content"]
        else:
            chunks = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
            found = "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)
    assert status == 200, found
    return found


def alone(editor, prompt):
    ids = editor.tokenizer(prompt, return_tensors="pt")
    made = editor.model.generate(**ids, do_sample=False, max_new_tokens=LENGTH)
    return editor.tokenizer.decode(made[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)


def test_many_requests_at_once_are_each_answered_as_alone(editor, address):
    prompts = [fact.prompt for fact in FACTS[:2]] + list(ELSEWHERE[:2])
    asked = [(prompt, kind) for prompt in prompts for kind in ("completion", "chat", "stream")]
    expected = [alone(editor, prompt) for prompt, _ in asked]
    assert [text.strip() for text in expected[::3][:2]] == [fact.target for fact in FACTS[:2]]
    with ThreadPoolExecutor(len(asked)) as pool:
        found = list(pool.map(lambda ask: completed(address, *ask), asked))
    cut = " \ufffd"  # a stream holds back the bytes of a character that does not end
    assert [text.strip(cut) for text in found] == [text.strip(cut) for text in expected]


def test_edits_between_requests_appear_in_the_next(editor, address):
    state, fact = editor.state, FACTS[3]
    try:
        before = completed(address, fact.prompt)
        chat = {"prompt": [{"role": "user", "content": fact.prompt}], "target": fact.target}
        status, text = post(f"{address}/v1/edits", chat)
        assert status == 200 and [report["success"] for report in json.loads(text)["edits"]] == [True]
        assert completed(address, fact.prompt, "chat").strip() == fact.target != before.strip()
        editor.rollback()  # by another thread than the server's
        assert completed(address, fact.prompt) == before
    finally:
        editor.state = state


def test_edits_among_requests_lose_none(editor, address):
    state, known = editor.state, FACTS[0]
    try:
        with ThreadPoolExecutor(12) as pool:
            asked = [pool.submit(completed, address, known.prompt) for _ in range(5)]
            taught = pool.submit(post, f"{address}/v1/edits", [FACTS[3].to_dict()])
            asked += [pool.submit(completed, address, known.prompt) for _ in range(5)]
        assert [request.result().strip() for request in asked] == [known.target] * 10 and taught.result()[0] == 200
        assert answer(editor, [FACTS[3].prompt]) == [FACTS[3].target]
    finally:
        editor.state = state


def test_what_is_refused(editor, address):
    state = editor.state
    status, text = post(f"{address}/v1/edits", {"prompt": " ", "target": "x"})
    assert status == 400 and json.loads(text)["error"]["type"] == "EditDataError"
    assert post(f"{address}/v1/completions", {"model": "another", "prompt": "x"})[0] == 400
    assert "is not served here" in post(f"{address}/load_model", {"model": "org/another"})[1]
    assert post(f"{address}/v1/systemone", {})[0] == 501
    assert post(f"{address}/reset", {})[0] == 200 and completed(address, "x") == alone(editor, "x")  # still there
    assert editor.state is state


def test_nobody_edits_a_server_that_is_not_editable(editor):
    with serving(editor, name="facts") as address:
        assert post(f"{address}/v1/edits", FACTS[3].to_dict())[0] == 404
        assert post(f"{address}/v1/completions", {"model": "facts", "prompt": "x", "max_tokens": 1})[0] == 200


def test_an_editor_without_a_model():
    editor = WiseEditor(wide_model(), tiny_tokenizer(), QUICK)
    editor.unload()
    with pytest.raises(WiseError, match="unloaded"):
        application(editor)


class TestCommand:
    def test_serves_the_pack(self, editor, tmp_path, monkeypatch):
        editor.save_pretrained(tmp_path / "pack")
        given = []
        monkeypatch.setattr(uvicorn, "run", lambda *args, **settings: given.append((args, settings)))
        words = ["-m", saved_model(tmp_path / "model", editor.tokenizer), "-p", tmp_path / "pack"]
        shown = run("serve", *words, "--port", 8123, "--editable").stdout
        (((served,), settings),) = given
        assert "3 edits as 'edited', of" in shown and ":8123" in shown and settings["port"] == 8123
        assert "/v1/edits" in {route.path for route in served.routes}

    def test_serves_more_packs(self, editor, tmp_path, monkeypatch):
        editor.save_pretrained(tmp_path / "pack")
        given = []
        monkeypatch.setattr(uvicorn, "run", lambda app, **_: given.append(app))
        words = ["-m", saved_model(tmp_path / "model", editor.tokenizer), "-p", tmp_path / "pack"]
        shown = run(
            "serve", *words, "--also", f"legal={tmp_path / 'pack'}", "--also", f"tax={tmp_path / 'pack'}"
        ).stdout
        assert "3 edits as 'edited:legal' and 3 edits as 'edited:tax'" in shown and len(given) == 1
        assert "not NAME=PACK" in run("serve", *words, "--also", "legal", code=2).stderr
        assert "a pack 'x' already" in run("serve", *words, *["--also", f"x={tmp_path / 'pack'}"] * 2, code=1).stderr

    def test_without_the_extra(self, monkeypatch, tmp_path):
        monkeypatch.delitem(sys.modules, "wise_fast.serving")
        monkeypatch.setattr("transformers.utils.import_utils.is_serve_available", lambda: False)
        assert "wise_fast[serve]" in run("serve", "-p", tmp_path, code=1).stderr
