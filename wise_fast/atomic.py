"""Small directories that are replaced whole: a crash at any moment leaves the old one or the new one.

The files of `NAME` are written to a hidden sibling, `.NAME.wise-new`, and synced. Then `NAME` becomes
`.NAME.wise-old`, the new one becomes `NAME`, and the old one is deleted. Where a crash left no `NAME`, readers take
`.NAME.wise-old` and the next writer puts it back first. An advisory lock on the parent directory, which the system
drops with its holder, keeps writers and readers apart.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from wise_fast.errors import StorageError

try:
    import fcntl
except ImportError:  # not a POSIX system: no lock, so one writer at a time
    fcntl = None

logger = logging.getLogger(__name__)


def write_directory(directory: str | os.PathLike, files: dict[str, bytes], owned: Iterable[str]) -> None:
    """Make `directory` hold exactly `files`; parents are made as needed. On any error nothing has changed.

    Raises:
        StorageError: `directory` is a file or holds anything but files named in `owned`, or the system refuses
            (read-only, full, ...).
    """
    made: list[Path] = []
    try:
        target = _resolved(directory)
        made = [path for path in target.parents if not path.exists()]
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(target.parent, exclusive=True):
            _settle(target)
            _require_replaceable(target, set(owned))
            _replace(target, files)
    except BaseException as error:
        for path in made:
            with suppress(OSError):
                path.rmdir()
        if isinstance(error, StorageError) or not isinstance(error, (OSError, ValueError)):
            raise
        size = sum(map(len, files.values()))
        raise StorageError(
            f"{directory}: cannot be written ({_reason(error)}); nothing was changed. Choose a directory whose parent "
            f"is writable and has {size} bytes free"
        ) from error


def write_file(path: str | os.PathLike, data: bytes) -> None:
    """Make or replace one file in one step. On any error the old one, or none, is there.

    Raises:
        StorageError: the system refuses (read-only, full, ...).
    """
    target = Path(path)
    new = _new(target)
    try:
        new.unlink(missing_ok=True)
        _write(new, data)
        os.replace(new, target)
        sync_directory(target.parent)
    except OSError as error:
        with suppress(OSError):
            new.unlink()
        raise StorageError(
            f"{path}: cannot be written ({_reason(error)}); nothing was changed. It needs {len(data)} bytes on the disk"
        ) from error


def read_directory(directory: str | os.PathLike, names: Iterable[str]) -> dict[str, bytes]:
    """The named files' bytes. Writes nothing.

    Raises:
        StorageError: there is no such directory, or one of the files is missing or unreadable.
    """
    try:
        target = _resolved(directory)
        with _locked(target.parent, exclusive=False):
            if not target.exists() and _old(target).is_dir():
                logger.warning("%s: saving it was interrupted; reading what was saved before, %s", target, _old(target))
                target = _old(target)
            if not target.is_dir():
                state = "is a file" if target.exists() else "does not exist"
                raise StorageError(f"{state}; expected a directory written by save_pretrained")
            missing = [name for name in names if not (target / name).is_file()]
            if missing:
                raise StorageError(f"has no {missing[0]}; expected a directory written by save_pretrained")
            return {name: (target / name).read_bytes() for name in names}
    except StorageError as error:
        raise StorageError(f"{directory}: {error}") from None
    except (OSError, ValueError) as error:
        raise StorageError(f"{directory}: cannot be read ({_reason(error)}); check the path") from error


def holds(directory: str | os.PathLike, name: str) -> bool:
    """Whether the directory, or what an interrupted writer left of it, has a file of that name."""
    try:
        target = _resolved(directory)
    except (OSError, ValueError):
        return False
    return any((place / name).is_file() for place in (target, _old(target)))


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


def _resolved(directory: str | os.PathLike) -> Path:
    return Path(os.path.realpath(Path(directory).expanduser()))


def _old(target: Path) -> Path:
    return target.with_name(f".{target.name}.wise-old")


def _new(target: Path) -> Path:
    return target.with_name(f".{target.name}.wise-new")


def _require_replaceable(target: Path, owned: set[str]) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise StorageError(f"{target}: is a file; give the name of a directory, new, empty, or a saved editor")
    foreign = sorted(path.name for path in target.iterdir() if path.name not in owned or not path.is_file())
    if foreign:
        raise StorageError(
            f"{target}: holds other things ({foreign[0]!r}) and will not be replaced; give a new or empty directory, "
            "or a saved editor"
        )


@contextmanager
def _locked(parent: Path, exclusive: bool) -> Iterator[None]:
    """Hold the parent's lock where the system and its file system have one."""
    handle = None
    if fcntl is not None:
        with suppress(OSError):
            handle = os.open(parent, os.O_RDONLY)
            fcntl.flock(handle, fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH)
    try:
        yield
    finally:
        if handle is not None:
            os.close(handle)


def _settle(target: Path) -> None:
    """Clear up after a writer that was killed: under the lock, nobody else uses the siblings."""
    old = _old(target)
    if old.is_dir() and not target.exists():
        os.rename(old, target)
    for leftover in (old, _new(target)):
        if leftover.exists():
            shutil.rmtree(leftover)


def _replace(target: Path, files: dict[str, bytes]) -> None:
    new, old = _new(target), _old(target)
    try:
        new.mkdir()
        for name, data in files.items():
            _write(new / name, data)
        sync_directory(new)
        if target.exists():
            os.rename(target, old)
        os.rename(new, target)
    except BaseException:
        if old.exists() and not target.exists():
            os.rename(old, target)
        shutil.rmtree(new, ignore_errors=True)
        raise
    try:
        with suppress(OSError):  # the new one is in place: too late to say no
            sync_directory(target.parent)
    finally:
        shutil.rmtree(old, ignore_errors=True)


def _write(path: Path, data: bytes) -> None:
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_directory(directory: Path) -> None:
    """Put a directory's entries on the disk, where the system can."""
    if fcntl is None:
        return
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
