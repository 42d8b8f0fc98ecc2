"""Complete editor states on the disk, bit for bit: a run that loads one goes on as if it had never stopped.

Unlike a saved editor (`wise_fast.storage`), which is for serving and compact, a checkpoint keeps the open shard with
its protection matrix, keys and quiet texts. `NNNNNN/`, the number of batches done, holds

state.json         format and version, what is not a tensor, the state's digest, the sha256 of the tensors, a checksum
state.safetensors  every tensor of the state, as it is

and is written in one step, so that a crash at any moment leaves the checkpoints before it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from contextlib import suppress
from dataclasses import fields
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from wise_fast.atomic import read_directory, write_directory
from wise_fast.calibration import Keys
from wise_fast.data import Edit
from wise_fast.errors import StorageError, WiseError
from wise_fast.memory import SideMemory, Taught
from wise_fast.state import EditorState, EditReport, Shard
from wise_fast.subjects import Names
from wise_fast.texts import Texts

logger = logging.getLogger(__name__)

FORMAT, VERSION = "wise_fast checkpoint", 4
FACTS, TENSORS = "state.json", "state.safetensors"
FILES = (FACTS, TENSORS)
_KEPT = 2


class Digester:
    """Digests of states. It remembers those of tensors that it has seen, which later states share with earlier ones."""

    def __init__(self):
        self._seen = WeakTensorKeyDictionary()

    def digest(self, state: EditorState) -> str:
        """sha256 over every tensor of the state, its memories' thresholds and edits, and its counters, in hex.

        Reports are left out: they hold wall times. States are values, so no tensor changes once it was seen.
        """
        facts, tensors = flatten(state)
        facts.pop("reports")
        whole = hashlib.sha256(_encode(facts | {"held": len(state.reports)}))
        for name, tensor in tensors.items():
            if tensor not in self._seen:
                self._seen[tensor] = hashlib.sha256(_bytes(tensor)).digest()
            whole.update(f"{name} {tuple(tensor.shape)} {tensor.dtype};".encode() + self._seen[tensor])
        return whole.hexdigest()


class Checkpoints:
    """The checkpoints of one run, newest last; the latest two are kept.

    Args:
        directory: where they are; made with the first.
        digester: shared with whoever digests the same states; a new one when None.
    """

    def __init__(self, directory: Path, digester: Digester | None = None):
        self.directory = directory
        self.digester = Digester() if digester is None else digester

    def numbers(self) -> list[int]:
        """Of the checkpoints that are there, good or not, ascending."""
        if not self.directory.is_dir():
            return []
        return sorted(int(path.name) for path in self.directory.iterdir() if path.name.isdecimal())

    def save(self, number: int, state: EditorState) -> None:
        """Write the state after `number` batches; then only it and the one before it stay.

        Raises:
            StorageError: the system refuses (full disk, ...); the checkpoints before are as they were.
        """
        facts, tensors = flatten(state)
        data = {TENSORS: safetensors.torch.save(_separate(tensors))}
        header = {
            "format": FORMAT,
            "version": VERSION,
            "batches": number,
            "digest": self.digester.digest(state),
            "facts": facts,
            "sha256": _sha256(data[TENSORS]),
        }
        data[FACTS] = _encode(header | {"checksum": _sha256(_encode(header))})
        write_directory(self.path(number), data, FILES)
        self._prune(number)

    def load(self, number: int, device: torch.device | str = "cpu") -> tuple[EditorState, str]:
        """The state after `number` batches, its tensors on `device`, and its digest.

        Raises:
            StorageError: it is missing, incomplete, damaged or of another version.
        """
        path = self.path(number)
        files = read_directory(path, FILES)
        try:
            header = json.loads(files[FACTS])
            content = {name: value for name, value in header.items() if name != "checksum"}
            if header.get("checksum") != _sha256(_encode(content)) or header["sha256"] != _sha256(files[TENSORS]):
                raise StorageError("is damaged: a checksum does not hold")
            if (header["format"], header["version"], header["batches"]) != (FORMAT, VERSION, number):
                raise StorageError(f"is not version {VERSION} of a checkpoint after {number} batches")
            # Copied, for memory that is aligned as editing's own is: sums may take another order elsewhere.
            tensors = {n: t.clone().to(device) for n, t in safetensors.torch.load(files[TENSORS]).items()}
            state = restore(header["facts"], tensors)
            if self.digester.digest(state) != header["digest"]:
                raise StorageError("does not give the state that was saved: its digest differs")
            return state, header["digest"]
        except StorageError as error:
            raise StorageError(f"{path}: {error}") from None
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError, SafetensorError, WiseError) as error:
            raise StorageError(f"{path}: is damaged ({type(error).__name__}: {error})") from error

    def latest(self, digests: list[str], most: int, device: torch.device | str = "cpu") -> tuple[int, EditorState]:
        """The newest good checkpoint, as (batches done, state); (0, empty state) when there is none.

        One that is damaged is passed over with a warning, and so is one that does not belong to the run.

        Args:
            digests: of the states after each batch that the run acknowledged.
            most: batches done, at most.
        """
        for number in reversed(self.numbers()):
            if not 0 < number <= most:
                continue
            try:
                state, digest = self.load(number, device)
            except StorageError as error:
                logger.warning("%s; going back to an earlier one", error)
                continue
            if digest == digests[number - 1]:
                return number, state
            logger.warning("%s: is not of this run; going back to an earlier one", self.path(number))
        return 0, EditorState()

    def path(self, number: int) -> Path:
        """The directory of the checkpoint after `number` batches."""
        return self.directory / f"{number:06d}"

    def _prune(self, number: int) -> None:
        """Drop all but `number` and the one before it, and what killed writers left."""
        before = [n for n in self.numbers() if n < number]
        kept = {self.path(n).name for n in [*before[1 - _KEPT :], number]}
        with suppress(OSError):  # what could not be removed now is removed next time
            for path in self.directory.iterdir():
                if path.name not in kept and (path.name.isdecimal() or path.name.endswith((".wise-new", ".wise-old"))):
                    shutil.rmtree(path)


def flatten(state: EditorState) -> tuple[dict, dict[str, Tensor]]:
    """The state as JSON values and named tensors; `restore` makes the same state of them."""
    tensors: dict[str, Tensor] = {}
    shard = None if state.shard is None else _flatten_shard(state.shard, tensors)
    facts = {
        name: [_flatten_memory(memory, f"{name}.{i}.", tensors) for i, memory in enumerate(getattr(state, name))]
        for name in ("merged", "closed")
    }
    facts |= {"shard": shard, "opened": state.opened, "merges": state.merges}
    return facts | {"reports": [_flatten_report(report) for report in state.reports]}, tensors


def restore(facts: dict, tensors: dict[str, Tensor]) -> EditorState:
    """The state that `flatten` took apart. Any disagreement is a KeyError, TypeError, ValueError or WiseError."""
    parts = {
        name: tuple(_restore_memory(fact, f"{name}.{i}.", tensors) for i, fact in enumerate(facts[name]))
        for name in ("merged", "closed")
    }
    shard = None if facts["shard"] is None else _restore_shard(facts["shard"], tensors)
    reports = tuple(_restore_report(record) for record in facts["reports"])
    return EditorState(**parts, shard=shard, opened=facts["opened"], reports=reports, merges=facts["merges"])


def _flatten_memory(memory: SideMemory, prefix: str, tensors: dict[str, Tensor]) -> dict:
    tensors |= {prefix + "values": memory.values, prefix + "index": memory.index}
    if memory.factor is not None:
        tensors[prefix + "factor"] = memory.factor
    names = memory.names
    if names is not None:
        tensors |= {f"{prefix}names.{name}": getattr(names, name) for name in ("tokens", "about", "endings")}
    taught = memory.taught
    if taught is not None:
        tensors |= {f"{prefix}taught.{name}": getattr(taught, name) for name in ("information", "origin")}
        tensors |= _flatten_keys(taught.keys, prefix + "taught.")
    return {
        "layout": memory.layout,
        "shape": list(memory.shape),
        "threshold": memory.threshold.hex(),
        "z_threshold": memory.z_threshold.hex(),
        "last_limit": memory.last_limit.hex(),
        "ending_limit": None if names is None else names.limit.hex(),
        "edits": list(memory.edits),
        "taught": None if taught is None else [edit for edit, _ in taught.keys],
    }


def _restore_memory(fact: dict, prefix: str, tensors: dict[str, Tensor]) -> SideMemory:
    values, index, factor = tensors[prefix + "values"], tensors[prefix + "index"], tensors.get(prefix + "factor")
    names = None
    if fact["ending_limit"] is not None:
        parts = (tensors[f"{prefix}names.{name}"] for name in ("tokens", "about", "endings"))
        names = Names(*parts, float.fromhex(fact["ending_limit"]))
    limits = {name: float.fromhex(fact[name]) for name in ("threshold", "z_threshold", "last_limit")}
    shape, edits, taught = tuple(fact["shape"]), tuple(fact["edits"]), None
    if fact["taught"] is not None:
        matrices = (tensors[f"{prefix}taught.{name}"] for name in ("information", "origin"))
        taught = Taught(*matrices, _restore_keys(fact["taught"], prefix + "taught.", tensors))
    kept = dict(factor=factor, names=names, edits=edits, taught=taught)
    return SideMemory(fact["layout"], values, index, shape, **kept, **limits)


def _flatten_keys(keys: Keys, prefix: str) -> dict[str, Tensor]:
    return {f"{prefix}keys.{i}": key for i, (_, key) in enumerate(keys)}


def _restore_keys(edits: list[int], prefix: str, tensors: dict[str, Tensor]) -> tuple[tuple[int, Tensor], ...]:
    return tuple((edit, tensors[f"{prefix}keys.{i}"]) for i, edit in enumerate(edits))


def _flatten_shard(shard: Shard, tensors: dict[str, Tensor]) -> dict:
    memory = _flatten_memory(shard.memory, "shard.", tensors)
    tensors |= {f"shard.{name}": t for name in ("p", "origin") if (t := getattr(shard, name)) is not None}
    tensors |= _flatten_keys(shard.keys, "shard.")
    if shard.quiet is not None:
        tensors |= {f"shard.quiet.{name}": getattr(shard.quiet, name) for name in ("a", "text", "limit")}
    names = None if shard.quiet is None else list(shard.quiet.names)
    return {"memory": memory, "keys": [edit for edit, _ in shard.keys], "quiet": names}


def _restore_shard(fact: dict, tensors: dict[str, Tensor]) -> Shard:
    keys = _restore_keys(fact["keys"], "shard.", tensors)
    quiet = None
    if fact["quiet"] is not None:
        quiet = Texts(tuple(fact["quiet"]), *(tensors[f"shard.quiet.{name}"] for name in ("a", "text", "limit")))
    memory = _restore_memory(fact["memory"], "shard.", tensors)
    return Shard(memory, tensors.get("shard.p"), tensors.get("shard.origin"), keys, quiet)


def _flatten_report(report: EditReport) -> dict:
    """Floats in hexadecimal: exact, and JSON has no NaN."""
    values = report.to_dict()
    return {name: value.hex() if isinstance(value, float) else value for name, value in values.items()}


def _restore_report(record: dict) -> EditReport:
    real = {field.name for field in fields(EditReport) if field.type == "float"}
    values = {name: float.fromhex(value) if name in real else value for name, value in record.items()}
    return EditReport(**values | {"edit": Edit.from_dict(values["edit"])})


def _separate(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """On the CPU, contiguous, and no two in the same memory, as safetensors wants them."""
    separate, seen = {}, set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        place = tensor.untyped_storage().data_ptr()
        separate[name] = tensor.clone() if place in seen else tensor
        seen.add(place)
    return separate


def _bytes(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy())


def _encode(content: dict) -> bytes:
    return (json.dumps(content, sort_keys=True, allow_nan=False) + "\n").encode()


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
