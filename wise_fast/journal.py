"""An append-only file of JSON objects, one a line, each with its checksum: what is in it was on the disk when said so.

A line is the object with `checksum` as its last field: the sha256 of the line's bytes without that field. `append`
returns once the line is synced. A process that is killed in the middle leaves at most a torn last line, which the next
writer cuts off; damage anywhere else is an error, for what follows it can no longer be trusted to follow.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from wise_fast.atomic import sync_directory
from wise_fast.errors import StorageError

try:
    import fcntl
except ImportError:  # not a POSIX system: no lock, so one writer at a time
    fcntl = None

logger = logging.getLogger(__name__)

_MARK, _END = b',"checksum":"', b'"}\n'
_TAIL = len(_MARK) + 64 + len(_END)


class Journal:
    """One journal, opened to be written: locked against other writers, and cut back to its last whole line.

    Args:
        path: the file; made, empty, where there is none.

    Attributes:
        path: the file.
        size: bytes of its whole lines.

    Raises:
        StorageError: it cannot be opened, another process writes it, or a line before the last is damaged.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self._handle: int | None = None
        try:
            self._handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
            self._lock()
            self.size = sum(length for _, length in _scan(self.path))
            torn = os.fstat(self._handle).st_size - self.size
            if torn:
                logger.warning("%s: its last line was not finished; %d bytes are cut off", self.path, torn)
                os.ftruncate(self._handle, self.size)
            os.fsync(self._handle)
            sync_directory(self.path.parent)
        except BaseException as error:
            self.close()
            if isinstance(error, StorageError) or not isinstance(error, OSError):
                raise
            raise StorageError(
                f"{self.path}: cannot be opened to be written ({error.strerror}); check its permissions and the disk"
            ) from error

    def append(self, record: dict) -> None:
        """Add a line and wait until it is on the disk. NaN and infinities become null. On an error nothing is added.

        Raises:
            StorageError: the system refuses (full disk, ...), or the journal is closed.
        """
        if self._handle is None:
            raise StorageError(f"{self.path}: the journal is closed; open it again")
        data = encode(record)
        try:
            rest = memoryview(data)
            while rest:
                rest = rest[os.write(self._handle, rest) :]
            os.fsync(self._handle)
        except BaseException as error:
            with suppress(OSError):
                os.ftruncate(self._handle, self.size)
            if not isinstance(error, OSError):
                raise
            raise StorageError(
                f"{self.path}: {len(data)} bytes cannot be added ({error.strerror}); what it held before is whole. "
                "Make room on the disk and resume"
            ) from error
        self.size += len(data)

    def close(self) -> None:
        """Give up the file and its lock; more than once does no harm."""
        handle, self._handle = self._handle, None
        if handle is not None:
            os.close(handle)

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_error) -> None:
        self.close()

    def _lock(self) -> None:
        if fcntl is None:
            return
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StorageError(
                f"{self.path}: another process is writing it; wait until it ends, or name another directory"
            ) from None
        except OSError:
            logger.warning("%s: its file system has no locks; let only one process write it", self.path)


def read_journal(path: str | os.PathLike) -> Iterator[dict]:
    """The records of a journal, oldest first, without their checksums; a torn last line is passed over.

    Raises:
        StorageError: the file cannot be read, or a line before the last is damaged.
    """
    for record, _length in _scan(Path(path)):
        yield record


def encode(record: dict) -> bytes:
    """A record as a line of a journal."""
    body = json.dumps(jsonable(record), allow_nan=False, separators=(",", ":")).encode()
    return body[:-1] + _MARK + hashlib.sha256(body).hexdigest().encode() + _END


def jsonable(value):
    """`value` with tuples as lists, and null for the numbers that JSON does not have."""
    if isinstance(value, dict):
        return {name: jsonable(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _scan(path: Path) -> Iterator[tuple[dict, int]]:
    """Whole records and the bytes of their lines."""
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                record = _decode(line)
                if record is None:
                    _require_last(path, file, number)
                    return
                yield record, len(line)
    except OSError as error:
        if isinstance(error, StorageError):
            raise
        raise StorageError(f"{path}: cannot be read ({error.strerror}); check the path") from error


def _require_last(path: Path, file: BinaryIO, number: int) -> None:
    if file.readline():
        raise StorageError(
            f"{path}: line {number} is damaged or was changed: its checksum does not hold. Restore the file from a "
            f"copy, or delete line {number} and all after it: resuming makes up for them"
        )


def _decode(line: bytes) -> dict | None:
    """The record of a line, or None if the line is not whole."""
    body = line[:-_TAIL] + b"}"
    if line[-_TAIL:] != _MARK + hashlib.sha256(body).hexdigest().encode() + _END:
        return None
    return json.loads(body)
