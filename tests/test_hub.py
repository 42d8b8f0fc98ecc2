"""Pushing edits and loading them by id, over HTTP on loopback."""

import pytest
from huggingface_hub import constants

from tests.edited import FACTS, logits, make_editor, same, wide_model
from tests.hub_server import TOKEN, running_hub
from tests.test_cli import run_json
from tests.tiny import tiny_tokenizer
from wise_fast import WiseEditor, hub, storage
from wise_fast.errors import StorageError, WiseError

ENDPOINT = constants.ENDPOINT


@pytest.fixture(scope="module")
def editor():
    return make_editor(FACTS[:2])


@pytest.fixture
def server(monkeypatch, tmp_path):
    with running_hub() as made:
        for name in ("ENDPOINT", "HUGGINGFACE_CO_URL_TEMPLATE"):  # as HF_ENDPOINT, read once, would have them
            monkeypatch.setattr(constants, name, getattr(constants, name).replace(ENDPOINT, made.url))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        yield made


def load(name, **options):
    return WiseEditor.from_pretrained(wide_model(), tiny_tokenizer(), name, **options)


def test_pushed_and_loaded_by_its_id(server, editor, tmp_path):
    url = editor.push_to_hub("me/facts", token=TOKEN, private=True, metrics={"locality": 1.0}, message="Two facts")
    assert url == f"{server.url}/me/facts" and server.messages == ["Two facts"]
    editor.save_pretrained(tmp_path / "pack", {"locality": 1.0})
    assert server.repos["me/facts"] == {path.name: path.read_bytes() for path in (tmp_path / "pack").iterdir()}
    loaded = load("me/facts", token=TOKEN)
    assert loaded.edits == editor.edits and same(logits(loaded.model), logits(editor.model))


def test_pushed_again_replaces_what_was_there(server, editor):
    editor.push_to_hub("me/facts", token=TOKEN)
    before = dict(server.repos["me/facts"])
    editor.push_to_hub("me/facts", token=TOKEN, metrics={"locality": 0.5})
    assert b"0.500" in server.repos["me/facts"][storage.CARD] and storage.CARD in before
    assert len(load("me/facts").edits) == 2


def test_what_was_fetched_serves_offline(server, editor, monkeypatch):
    editor.push_to_hub("me/facts", token=TOKEN)
    load("me/facts")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert load("me/facts").edits == editor.edits


def test_a_directory_here_comes_first(server, editor, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    editor.save_pretrained("me/facts")
    assert load("me/facts").edits == editor.edits
    with pytest.raises(StorageError, match="has no revision 'v1'"):
        load("me/facts", revision="v1")
    assert server.seen == []


def test_the_command_line_takes_an_id(server, editor):
    editor.push_to_hub("me/facts", token=TOKEN)
    assert run_json("inspect", "me/facts")["edits"] == 2


@pytest.mark.parametrize("options", [dict(token="wrong"), dict(token=TOKEN, revision="no such branch")])
def test_a_push_that_is_refused(server, editor, options):
    with pytest.raises(StorageError, match="not pushed to 'me/facts'"):
        editor.push_to_hub("me/facts", **options)
    assert not server.repos.get("me/facts")


def test_wrong_use_asks_nobody(server, editor):
    with pytest.raises(WiseError, match="holds no edits"):
        make_editor().push_to_hub("me/facts", token=TOKEN)
    with pytest.raises(StorageError, match="not pushed"):
        editor.push_to_hub("me/../facts", token=TOKEN)
    with pytest.raises(StorageError, match="not exist"):
        load(str(server.url).replace("http:/", ""))
    assert server.seen == []


def test_nothing_of_that_name_anywhere(server):
    with pytest.raises(StorageError, match="'me/absent' does not exist here.*RepositoryNotFound"):
        load("me/absent")


def test_without_a_connection():
    with pytest.raises(StorageError, match="'me/absent' does not exist here"):
        load("me/absent")


@pytest.mark.parametrize("name", ["pack", "./a/b", "/a/b", "~/a", "a/b/c", "../b"])
def test_what_cannot_be_an_id_is_a_directory(name):
    assert hub.local(name) == name
