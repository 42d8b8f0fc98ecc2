"""run.json: what a run is, so that nothing else is ever appended to it."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers

from wise_fast import __version__, fingerprint
from wise_fast.atomic import write_file
from wise_fast.data import Edit
from wise_fast.errors import ConfigError, StorageError
from wise_fast.journal import jsonable
from wise_fast.recorded import FORMAT, HEADER, VERSION, read_header

_FREE = ("libraries", "checkpoint_every")  # may differ when a run is resumed
_NAMES = {"config": "{}", "base": "the model's {}", "edits": "edits ({})"}
_UNFINISHED = f".{HEADER}.wise-new"


def claim(out: Path, resume: bool, kind: str = FORMAT, version: int = VERSION) -> dict | None:
    """The header of the run of this kind in `out`, or None if a new run may begin there. Writes nothing.

    Raises:
        StorageError: `out` holds a run that is not to be resumed, or anything else; or its header is damaged.
    """
    if out.exists() and not out.is_dir():
        raise StorageError(f"{out}: is a file, expected a directory for the run; name another")
    names = {path.name for path in out.iterdir()} - {_UNFINISHED} if out.exists() else set()
    if HEADER in names and resume:
        return read_header(out, kind, version)
    if HEADER in names:
        raise StorageError(f"{out}: holds a run already; go on with it by --resume (resume=True), or name another")
    if names:
        raise StorageError(f"{out}: holds other things ({min(names)!r}); name a new or an empty directory")
    parent = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise StorageError(f"{out}: {parent} cannot be written; name another place or change its permissions")
    return None


def write_header(out: Path, header: dict) -> None:
    """Make `out` a run. Raises StorageError when the system refuses; then it is none."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"{out}: cannot be made ({error.strerror}); name another place") from error
    write_file(out / HEADER, (json.dumps(jsonable(header), indent=1) + "\n").encode())


def describe_edits(edits: Sequence[Edit], source: Path | None, partner: Path | None = None) -> dict:
    """The files the edits came from, and the sha256 of their bytes; of the edits themselves without a file."""
    if source is None:
        data = json.dumps([edit.to_dict() for edit in edits]).encode()
    else:
        data = b"".join(path.read_bytes() for path in (source, partner) if path is not None)
    names = {"file": source, "irrelevant": partner}
    named = {name: None if path is None else str(path.absolute()) for name, path in names.items()}
    return {**named, "sha256": hashlib.sha256(data).hexdigest()}


def describe_method(method) -> dict:
    """What the header says of an editor: settings, base model, and a digest of what the model wrote for it to learn by.

    Of a method without settings, None for each.
    """
    config = getattr(method, "config", None)
    known = {"config": config.to_dict() if config else None, "base": None, "material": None}
    known |= {name: getattr(config, name, None) for name in ("mode", "seed")}
    known["batch_size"] = getattr(config, "batch_size", 1)
    if hasattr(method, "state"):
        material = repr([*method.prefixes, method.unit.hex()]).encode()
        known["base"] = fingerprint.describe(method.model, method.architecture)
        known["material"] = hashlib.sha256(material).hexdigest()
    return known


def libraries(device: torch.device) -> dict:
    """What results may depend on beside the settings."""
    return {
        "wise_fast": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "device": str(device),
    }


def require_same(header: dict, given: dict) -> None:
    """Raise ConfigError, naming the setting, unless a run with header `given` goes on as one with `header` would."""
    for name in given:
        was, now = header.get(name), given[name]
        if was == now or name in _FREE or (name == "model" and given["base"]):
            continue
        if isinstance(was, dict) and isinstance(now, dict):
            part = next(key for key in {**was, **now} if was.get(key) != now.get(key))
            if name == "edits" and part == "file" and was["sha256"] == now["sha256"]:
                continue  # the same content under another name
            name, was, now = _NAMES.get(name, name + ".{}").format(part), was.get(part), now.get(part)
        if name == "material":
            raise ConfigError(
                "the model does not write the same texts to learn by as when the run was begun, so it would not be the "
                f"same run ({differences(header, given['libraries'])}); resume with what it was begun with"
            )
        raise ConfigError(
            f"the run was begun with {name} {was!r:.80}, but now {name} is {now!r:.80}; resume with what it was begun "
            "with (leave the option out), or begin a new run in another directory"
        )


def differences(header: dict, now: dict) -> str:
    """The libraries that differ, for messages about results that do."""
    was = header.get("libraries", {})
    found = [f"{name} {was.get(name)} then, {now[name]} now" for name in now if was.get(name) != now[name]]
    return "; ".join(found) or "the libraries are the same"
