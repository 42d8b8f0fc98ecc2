"""Saving: a directory holds the old or the new, whole, whatever happens."""

import errno
import logging
import os
import resource
import threading
from contextlib import contextmanager

import pytest
import torch

from tests.stored import MODES, contents, make_editor, served
from wise_fast import atomic, storage
from wise_fast.config import WiseConfig
from wise_fast.errors import StorageError
from wise_fast.state import EditorState


def test_overwriting_replaces_everything_and_leaves_no_trace(tmp_path):
    one, two = make_editor(1), make_editor(3, **MODES["retrieve"])
    one.save_pretrained(tmp_path / "out")
    two.save_pretrained(tmp_path / "out")
    assert os.listdir(tmp_path) == ["out"] and {*os.listdir(tmp_path / "out")} == {*storage._FILES, storage.CARD}
    assert storage.load(tmp_path / "out").state.reports == tuple(two.edits)


def test_parents_are_made_and_an_empty_directory_or_a_link_to_one_is_filled(tmp_path):
    editor = make_editor(1)
    editor.save_pretrained(tmp_path / "a" / "b" / "out")
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    editor.save_pretrained(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert contents(tmp_path / "empty") == contents(tmp_path / "a" / "b" / "out")


@pytest.mark.parametrize("name", ["notes.txt", "config.json", ".hidden"])
def test_a_directory_with_other_things_is_not_replaced(copied, name):
    (copied / name).write_text("mine")
    before = contents(copied)
    with pytest.raises(StorageError, match=f"other things.*{name}"):
        make_editor(1).save_pretrained(copied)
    assert contents(copied) == before and os.listdir(copied.parent) == ["editor"]


@pytest.mark.parametrize("path", ["file", "file/below", "file/below/deeper", "new/" + "n" * 300, "bad\0name"])
def test_places_that_cannot_be_written(tmp_path, path):
    (tmp_path / "file").write_text("mine")
    editor = make_editor(1)
    state, before = editor._state, served(editor)
    with pytest.raises(StorageError):
        editor.save_pretrained(tmp_path / path)
    assert os.listdir(tmp_path) == ["file"] and (tmp_path / "file").read_text() == "mine"
    assert editor._state is state and all(torch.equal(a, b) for a, b in zip(before, served(editor), strict=True))


CALLS = [(atomic, "_write"), (atomic, "sync_directory"), (os, "rename"), (os, "fsync"), (atomic.Path, "mkdir")]


def failing_after(call, count, error):
    """`call`, but the `count`-th time from 0 it raises; `.calls` tells how often it was called."""

    def wrapped(*args, **kwargs):
        wrapped.calls += 1
        if wrapped.calls == count + 1:
            raise error[0](*error[1:])
        return call(*args, **kwargs)

    wrapped.calls = 0
    return wrapped


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("where", CALLS, ids=lambda where: where[1])
@pytest.mark.parametrize("error", [(OSError, errno.ENOSPC, "No space left on device"), (KeyboardInterrupt,)])
def test_a_failure_at_any_step_leaves_the_old_or_the_new_whole(saved, tmp_path, monkeypatch, where, old, error):
    target = tmp_path / "deep" / "editor"
    pack = storage.load(saved)
    if old:
        storage.save(target, pack.base, pack.config, EditorState())
    before = contents(target) if old else None
    for count in range(20):
        module, name = where
        with monkeypatch.context() as patch:
            wrapped = failing_after(getattr(module, name), count, error)
            patch.setattr(module, name, wrapped)
            try:
                storage.save(target, pack.base, pack.config, pack.state)
            except (StorageError, KeyboardInterrupt) as raised:
                assert isinstance(raised, KeyboardInterrupt) or error[2] in str(raised)
                if old:
                    assert contents(target) in (before, contents(saved)) and os.listdir(target.parent) == ["editor"]
                else:
                    assert os.listdir(tmp_path) == [] or contents(target) == contents(saved)
            else:
                assert contents(target) == contents(saved) and os.listdir(target.parent) == ["editor"]
                if wrapped.calls <= count:
                    return
    pytest.fail(f"{name} was called 20 times")


def test_a_read_only_file_system(saved, tmp_path, monkeypatch):
    pack = storage.load(saved)
    monkeypatch.setattr(atomic.Path, "mkdir", failing_after(None, 0, (OSError, errno.EROFS, "Read-only file system")))
    with pytest.raises(StorageError, match="Read-only file system.*nothing was changed"):
        storage.save(tmp_path / "out", pack.base, pack.config, pack.state)
    assert os.listdir(tmp_path) == []


def test_a_file_that_the_system_cuts_short(saved, copied):
    """A real error of the system: no file may grow beyond 3000 bytes."""
    editor = make_editor(3)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, limits[1]))
    try:
        with pytest.raises(StorageError, match="File too large"):
            editor.save_pretrained(copied)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert contents(copied) == contents(saved) and os.listdir(copied.parent) == ["editor"]


def test_a_writer_killed_between_the_renames_loses_nothing(saved, copied, caplog):
    aside = copied.parent / ".editor.wise-old"
    copied.rename(aside)
    (copied.parent / ".editor.wise-new").mkdir()
    with caplog.at_level(logging.WARNING):
        assert storage.inspect(copied)["edits"] == 3
    assert "interrupted" in caplog.text and not copied.exists()
    with pytest.raises(StorageError):
        storage.save(copied, {"shape": (1, 1), "dtype": "float32"}, WiseConfig(), storage.load(copied).state)
    assert storage.inspect(copied)["edits"] == 3
    make_editor(1).save_pretrained(copied)
    assert os.listdir(copied.parent) == ["editor"] and storage.inspect(copied)["edits"] == 1


def test_a_writer_killed_after_the_renames_leaves_the_new(saved, copied):
    aside = copied.parent / ".editor.wise-old"
    aside.mkdir()
    (aside / storage.CONFIG).write_text("old")
    assert storage.inspect(copied)["edits"] == 3
    make_editor(1).save_pretrained(copied)
    assert os.listdir(copied.parent) == ["editor"]


def test_readers_and_writers_at_once_see_whole_directories(tmp_path):
    packs = []
    for count in (1, 2):
        make_editor(count).save_pretrained(tmp_path / "out")
        packs.append(storage.load(tmp_path / "out"))
    failures = []

    def repeat(action):
        try:
            for _ in range(15):
                action()
        except Exception as error:  # noqa: BLE001 - a thread's failure is reported by the test
            failures.append(error)

    actions = [lambda p=p: storage.save(tmp_path / "out", p.base, p.config, p.state) for p in packs]
    threads = [threading.Thread(target=repeat, args=(a,)) for a in [*actions, lambda: storage.load(tmp_path / "out")]]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures and os.listdir(tmp_path) == ["out"]


def test_a_directory_that_another_writer_is_replacing_is_looked_at_under_the_lock(tmp_path, monkeypatch):
    """Looked at before, its files seem to be no files while the other writer renames it."""
    editor, locked, seen = make_editor(1), atomic._locked, []
    editor.save_pretrained(tmp_path / "out")
    look = atomic._require_replaceable

    @contextmanager
    def watched(*given, **more):
        with locked(*given, **more):
            seen.append("locked")
            yield

    monkeypatch.setattr(atomic, "_locked", watched)
    monkeypatch.setattr(atomic, "_require_replaceable", lambda *given: seen.append("looked") or look(*given))
    editor.save_pretrained(tmp_path / "out")
    assert seen == ["locked", "looked"]


def test_state_that_could_not_be_loaded_again_is_not_written(tmp_path):
    editor = make_editor(1)
    memory = editor._state.shard.memory
    broken = memory.replace(values=memory.values.clone().fill_(torch.inf))
    editor._state = editor._state.replace(merged=(broken,))
    with pytest.raises(StorageError, match="not sound"):
        editor.save_pretrained(tmp_path / "out")
    assert os.listdir(tmp_path) == []
