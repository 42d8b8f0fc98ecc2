"""The journal: what append has returned from is there, a torn line is cut off, and damage is not passed over."""

import errno
import json
import math
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wise_fast.errors import StorageError
from wise_fast.journal import Journal, encode, read_journal

LINES = [{"batch": 1, "text": "a\nb\u2028é"}, {"batch": 2, "values": [1.5, None, True]}, {"batch": 3}]
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@pytest.fixture
def path(tmp_path):
    with Journal(tmp_path / "journal.jsonl") as journal:
        for line in LINES:
            journal.append(line)
    return journal.path


class TestReading:
    def test_gives_what_was_appended(self, path):
        assert list(read_journal(path)) == LINES
        assert [json.loads(line)["batch"] for line in path.read_text().splitlines()] == [1, 2, 3]

    @settings(max_examples=40)
    @given(st.dictionaries(st.text(), VALUES, min_size=1))
    def test_of_any_record(self, record):
        record.pop("checksum", None)
        line = encode(record)
        assert line.count(b"\n") == 1 and line.endswith(b"\n")
        found = json.loads(line)
        assert len(found.pop("checksum")) == 64 and found == record

    def test_numbers_that_json_has_not_become_null(self, tmp_path):
        with Journal(tmp_path / "j") as journal:
            journal.append({"loss": math.nan, "all": (math.inf, 1.0)})
        assert list(read_journal(journal.path)) == [{"loss": None, "all": [None, 1.0]}]

    def test_floats_come_back_exactly(self, tmp_path):
        values = [0.1, 1 / 3, 5e-324, 1.7976931348623157e308]
        with Journal(tmp_path / "j") as journal:
            journal.append({"values": values})
        assert [v.hex() for v in next(read_journal(journal.path))["values"]] == [v.hex() for v in values]

    def test_of_no_file(self, tmp_path):
        with pytest.raises(StorageError, match="cannot be read"):
            list(read_journal(tmp_path / "none"))


class TestTornLine:
    def test_is_passed_over_by_readers_and_cut_off_by_writers_at_every_length(self, path):
        whole = path.read_bytes()
        kept = len(whole) - len(encode(LINES[-1]))
        for length in range(kept, len(whole)):
            path.write_bytes(whole[:length])
            assert list(read_journal(path)) == LINES[:-1] and path.stat().st_size == length
            with Journal(path) as journal:
                assert journal.size == path.stat().st_size == kept
                journal.append(LINES[-1])
            assert path.read_bytes() == whole

    def test_a_last_line_with_a_wrong_checksum_counts_as_torn(self, path):
        path.write_bytes(path.read_bytes().replace(b'"batch":3', b'"batch":4'))
        assert list(read_journal(path)) == LINES[:-1]


class TestDamage:
    @pytest.mark.parametrize("place", [0, 5, 40, 90])
    def test_before_the_last_line_is_an_error_that_names_the_line(self, path, place):
        data = bytearray(path.read_bytes())
        data[place] ^= 1
        path.write_bytes(data)
        for use in (lambda: list(read_journal(path)), lambda: Journal(path)):
            with pytest.raises(StorageError, match=r"line 1 is damaged"):
                use()
        assert path.read_bytes() == data

    def test_a_line_that_was_changed_with_its_form_intact(self, path):
        lines = path.read_bytes().splitlines(keepends=True)
        path.write_bytes(lines[0] + lines[1].replace(b"1.5", b"1.6") + lines[2])
        with pytest.raises(StorageError, match="line 2"):
            Journal(path)


class TestFullDisk:
    @pytest.mark.parametrize("call", ["write", "fsync"])
    def test_leaves_what_was_there_and_goes_on_later(self, path, monkeypatch, call):
        before, real = path.read_bytes(), os.write

        def full(handle, *data):
            for part in data:
                real(handle, bytes(part[:7]))  # a part of the line got through
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        with Journal(path) as journal:
            with monkeypatch.context() as patch, pytest.raises(StorageError, match="No space left"):
                patch.setattr(os, call, full)
                journal.append({"batch": 4})
            assert path.read_bytes() == before
            journal.append({"batch": 4})
        assert list(read_journal(path)) == [*LINES, {"batch": 4}]

    def test_short_writes_are_completed(self, path, monkeypatch):
        real = os.write
        monkeypatch.setattr(os, "write", lambda handle, data: real(handle, bytes(data[:3])))
        with Journal(path) as journal:
            journal.append({"batch": 4})
        assert list(read_journal(path))[-1] == {"batch": 4}

    def test_an_interrupt_in_the_middle_leaves_no_line(self, path, monkeypatch):
        def interrupted(handle):
            raise KeyboardInterrupt

        with Journal(path) as journal:
            with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
                patch.setattr(os, "fsync", interrupted)
                journal.append({"batch": 4})
        assert list(read_journal(path)) == LINES


def test_append_syncs_before_it_returns(tmp_path, monkeypatch):
    order, write, sync = [], os.write, os.fsync
    with Journal(tmp_path / "j") as journal:
        monkeypatch.setattr(os, "write", lambda *a: order.append("write") or write(*a))
        monkeypatch.setattr(os, "fsync", lambda *a: order.append("sync") or sync(*a))
        journal.append({"batch": 1})
    assert order == ["write", "sync"]


def test_a_second_writer_is_refused(path):
    pytest.importorskip("fcntl")
    with Journal(path):
        with pytest.raises(StorageError, match="another process"):
            Journal(path)
    Journal(path).close()


def test_a_closed_journal_takes_nothing(path):
    journal = Journal(path)
    journal.close()
    with pytest.raises(StorageError, match="closed"):
        journal.append({"batch": 4})


def test_a_place_that_cannot_be_opened(tmp_path):
    with pytest.raises(StorageError, match="cannot be opened"):
        Journal(tmp_path)
    with pytest.raises(StorageError, match="cannot be opened"):
        Journal(tmp_path / "none" / "j")
