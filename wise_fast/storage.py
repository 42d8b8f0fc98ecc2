"""Saved editors: a directory of three files, safetensors and JSON, that is trusted only as a whole; and a card.

wise_config.json        format and version, settings, base model, facts about each memory, the sha256 of the other
                        files, and a checksum over all of that
wise_edits.json         the reports, with their edits
wise_memory.safetensors per memory: `values` as serving reads them (in half precision when that is exact), `index`
                        (int32 columns, or mask bits), in the neuron layout the leverage `factor`, and where scope
                        asks for subjects their names (int32 tokens, and what prompts end in)
README.md               the edits card, for people: not read, not checked, may be missing (see `wise_fast.card`)

The protection matrix, [K, K], is not kept, so every memory is closed once loaded and the next edit opens a new shard.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from dataclasses import dataclass, fields

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

import wise_kernels as kernels
from wise_fast import card
from wise_fast.atomic import holds, read_directory, write_directory
from wise_fast.config import WiseConfig
from wise_fast.data import Edit
from wise_fast.errors import StorageError, WiseError
from wise_fast.memory import SideMemory
from wise_fast.state import EditorState, EditReport
from wise_fast.subjects import Names

FORMAT, VERSION = "wise_fast", 4
# Version 1 had another leverage factor, so it is routed by norms, as its thresholds are. Version 2 had no `last_limit`,
# version 3 no `names`.
_READ = (1, 2, 3, 4)
CONFIG, EDITS, MEMORY = "wise_config.json", "wise_edits.json", "wise_memory.safetensors"
CARD = "README.md"
_FILES = (CONFIG, EDITS, MEMORY)
_ADVICE = "save the editor again, or restore the directory from a copy"
_BEFORE = {"merging": "ties"}  # what was meant by a pack that does not say
_BASE = {"family", "layers", "layer", "projection", "shape", "dtype", "weights"}


@dataclass(frozen=True)
class Saved:
    """What a directory holds, checked.

    Attributes:
        config: the editor's settings.
        base: facts about the base model, see `fingerprint.describe`.
        state: the editor's state, on the CPU, without an open shard.
        header: wise_config.json.
        sizes: bytes of each file.
    """

    config: WiseConfig
    base: dict
    state: EditorState
    header: dict
    sizes: dict[str, int]

    def state_on(self, device: torch.device | str) -> EditorState:
        """The state with its tensors on `device`."""

        def moved(memory: SideMemory) -> SideMemory:
            tensors = {name: getattr(memory, name) for name in ("values", "index", "factor", "names")}
            return memory.replace(**{name: t if t is None else t.to(device) for name, t in tensors.items()})

        merged, closed = (tuple(map(moved, memories)) for memories in (self.state.merged, self.state.closed))
        return self.state.replace(merged=merged, closed=closed)


def owned(directory: str | os.PathLike) -> tuple[str, ...]:
    """Names of the files that saving may replace there; a README.md beside nothing of ours is somebody else's."""
    return (*_FILES, CARD) if holds(directory, CONFIG) else _FILES


def save(
    directory: str | os.PathLike, base: dict, config: WiseConfig, state: EditorState, about: dict | None = None
) -> None:
    """Write a directory, or replace a saved one, in one step. `about` is told in the card, see `card.about`.

    Raises:
        StorageError: the directory is not ours to replace, or cannot be written; nothing has changed then.
    """
    state = sealed(state, config)
    tensors: dict[str, Tensor] = {}
    facts, dtype = [], getattr(torch, base["dtype"])
    for place, memories in (("merged", state.merged), ("closed", state.closed)):
        for memory in memories:
            memory = memory.replace(values=memory.values.to(dtype))
            _require_sound(memory, tuple(base["shape"]), len(state.reports))
            own = _tensors(memory)
            tensors |= {f"memories.{len(facts)}.{name}": tensor for name, tensor in own.items()}
            facts.append(_facts(memory) | {"place": place, "bytes": sum(t.nbytes for t in own.values())})
    lines = [json.dumps(_record(report), allow_nan=False) for report in state.reports]
    files = {EDITS: ("[" + ",".join("\n" + line for line in lines) + "\n]\n").encode()}
    files[MEMORY] = safetensors.torch.save(tensors, {"format": "pt"})
    header = {
        "format": FORMAT,
        "version": VERSION,
        "library": _library(),
        "config": config.to_dict(),
        "base": base,
        "memories": facts,
        "state": {"opened": state.opened, "merges": state.merges},
        "sha256": {name: _sha256(data) for name, data in files.items()},
    } | ({"about": about} if about else {})
    files[CARD] = card.write(header, state.reports).encode()
    files[CONFIG] = _encode(header | {"checksum": _sha256(_encode(header))})
    write_directory(directory, files, owned(directory))


def load(directory: str | os.PathLike) -> Saved:
    """Read and check a directory; no model is needed.

    Raises:
        StorageError: it is missing, incomplete, damaged, changed by hand, or of a newer format.
    """
    files = read_directory(directory, _FILES)
    try:
        header = _header(files[CONFIG])
        for name in (EDITS, MEMORY):
            if _sha256(files[name]) != header["sha256"][name]:
                raise StorageError(f"{name} is damaged or was changed: its sha256 is not that in {CONFIG}; {_ADVICE}")
        if set(header["base"]) != _BASE or not isinstance(getattr(torch, header["base"]["dtype"]), torch.dtype):
            raise StorageError(f"{CONFIG} does not describe a base model: {header['base']}")
        config = WiseConfig.from_dict(_BEFORE | header["config"])
        state = _state(header, files)
        return Saved(config, header["base"], state, header, {name: len(data) for name, data in files.items()})
    except StorageError as error:
        raise StorageError(f"{directory}: {error}") from None
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError, SafetensorError, WiseError) as error:
        raise StorageError(
            f"{directory}: holds something that this version of wise_fast, {_library()}, did not write "
            f"({type(error).__name__}: {error}). Load it with the version that wrote it"
        ) from error


def inspect(directory: str | os.PathLike) -> dict:
    """A checked summary of a saved directory, JSON values only; no model is needed.

    Raises:
        StorageError: as `load` does.
    """
    saved = load(directory)
    d_out, d_ff = saved.base["shape"]
    memories = []
    for fact, memory in zip(saved.header["memories"], saved.state.memories, strict=True):
        unit = "columns" if memory.layout == "neuron" else "weights"
        memories.append(fact | {"edits": len(memory.edits), unit: len(memory.values)})
    return {
        "format": FORMAT,
        "version": saved.header["version"],
        "library": saved.header["library"],
        "base": saved.base,
        "about": saved.header.get("about", {}),
        "config": saved.header["config"],
        "edits": len(saved.state.reports),
        "successful": sum(report.success for report in saved.state.reports),
        "memories": memories,
        "opened": saved.state.opened,
        "merges": saved.state.merges,
        "files": saved.sizes,
        "bytes": sum(saved.sizes.values()),
        "dense_bytes": d_out * d_ff * getattr(torch, saved.base["dtype"]).itemsize,
    }


def sealed(state: EditorState, config: WiseConfig) -> EditorState:
    """The state as loading gives it back: the open shard is a closed memory.

    No merge happens here, even when the shard completes a group of `config.shards`; where TIES merges, the next one to
    close takes it along.
    """
    if state.shard is None or not state.shard.memory.edits:
        return state.replace(shard=None)
    memory = state.shard.memory
    if config.mode == "retrieve":
        return state.replace(merged=(*state.merged, memory), shard=None)
    return state.replace(closed=(*state.closed, memory), shard=None)


def _tensors(memory: SideMemory) -> dict[str, Tensor]:
    """A memory's tensors as stored; values and factor take half precision where that is exact, as editing leaves it."""
    stored = {"values": _halved(memory.values), "index": memory.index.to(torch.int32)}
    if memory.factor is not None:
        stored["factor"] = _halved(memory.factor)
    if memory.names is not None:
        stored |= {"names": memory.names.tokens.to(torch.int32), "about": memory.names.about.to(torch.int32)}
        stored["endings"] = _halved(memory.names.endings)
    return {name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in stored.items()}


def _halved(tensor: Tensor) -> Tensor:
    half = tensor.half()
    return half if tensor.dtype == torch.float32 and torch.equal(half.float(), tensor) else tensor


def _facts(memory: SideMemory) -> dict:
    return {
        "layout": memory.layout,
        "shape": list(memory.shape),
        "threshold": _plain(memory.threshold),
        "rank": None if memory.factor is None else memory.factor.shape[1],
        "z_threshold": _plain(memory.z_threshold),
        "last_limit": _plain(memory.last_limit),
        "ending_limit": None if memory.names is None else memory.names.limit,
        "edits": list(memory.edits),
    }


def _header(data: bytes) -> dict:
    """wise_config.json, once its format, version and checksum are right."""
    try:
        header = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise StorageError(f"{CONFIG} is damaged: not JSON ({error}); {_ADVICE}") from None
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise StorageError(f"{CONFIG} is not that of a saved editor, or is damaged: its format is not {FORMAT!r}")
    version = header.get("version")
    if isinstance(version, int) and version > VERSION:
        raise StorageError(
            f"has format version {version}, written by wise_fast {header.get('library')}, newer than version {VERSION} "
            f"that wise_fast {_library()} reads; upgrade wise_fast"
        )
    content = {name: value for name, value in header.items() if name != "checksum"}
    # Encoded again it must give the same bytes, so that white space and repeated names count too.
    if version not in _READ or header.get("checksum") != _sha256(_encode(content)) or data != _encode(header):
        raise StorageError(f"{CONFIG} is damaged or was changed: its checksum does not hold; {_ADVICE}")
    return header


def _state(header: dict, files: dict[str, bytes]) -> EditorState:
    reports = tuple(_report(record) for record in json.loads(files[EDITS]))
    tensors = safetensors.torch.load(files[MEMORY])
    places: dict[str, list[SideMemory]] = {"merged": [], "closed": []}
    for number, fact in enumerate(header["memories"]):
        factor = None if fact["rank"] is None else tensors.pop(f"memories.{number}.factor").float()
        if header["version"] == 1:
            factor, fact = None, fact | {"z_threshold": "inf"}
        if header["version"] < 3:
            fact = fact | {"last_limit": "inf"}
        if header["version"] < 4:
            fact = fact | {"ending_limit": None}
        names = None
        if fact["ending_limit"] is not None:
            tokens, about = (tensors.pop(f"memories.{number}.{name}").long() for name in ("names", "about"))
            endings = tensors.pop(f"memories.{number}.endings").float()
            names = Names(tokens, about, endings, _number(fact["ending_limit"]))
        values, index = tensors.pop(f"memories.{number}.values"), tensors.pop(f"memories.{number}.index")
        index = index.long() if fact["layout"] == "neuron" else index
        limits = {name: _number(fact[name]) for name in ("threshold", "z_threshold", "last_limit")}
        shape, edits = tuple(fact["shape"]), tuple(fact["edits"])
        kept = dict(factor=factor, names=names, edits=edits)
        memory = SideMemory(fact["layout"], values.float(), index, shape, **kept, **limits)
        _require_sound(memory, tuple(header["base"]["shape"]), len(reports))
        places[fact["place"]].append(memory)
    if tensors or len({m.layout for m in places["merged"] + places["closed"]}) > 1:
        raise StorageError(f"{MEMORY} does not fit {CONFIG}: mixed layouts, or left over: {sorted(tensors)[:3]}")
    opened, merges = header["state"]["opened"], header["state"]["merges"]
    if not all(type(count) is int and count >= 0 for count in (opened, merges)):
        raise StorageError(f"{CONFIG} counts {opened!r} opened shards and {merges!r} merges")
    return EditorState(tuple(places["merged"]), tuple(places["closed"]), None, opened, reports, merges)


def _require_sound(memory: SideMemory, shape: tuple[int, int], reports: int) -> None:
    """Raise StorageError unless serving this memory reads and writes only what it should."""
    (d_out, d_ff), values, index, sound = shape, memory.values, memory.index, memory.shape == shape
    if memory.layout == "neuron":
        sound = sound and index.ndim == 1 and values.shape == (len(index), d_out) and index.dtype == torch.int64
        sound = sound and len(index) > 0 and int(index[0]) >= 0 and int(index[-1]) < d_ff
        sound = sound and bool((index[1:] > index[:-1]).all())
    elif memory.layout == "element":
        sound = sound and index.dtype == torch.int32 and index.shape == (d_out, -(-d_ff // 32)) and values.ndim == 1
        mask = kernels.unpack_bits(index, d_ff) if sound else None
        sound = sound and int(mask.sum()) == len(values) and torch.equal(kernels.pack_bits(mask), index)
    else:
        sound = False
    if memory.factor is not None:
        sound = sound and memory.factor.ndim == 2 and len(memory.factor) == len(index)
        sound = sound and bool(memory.factor.isfinite().all())
    sound = sound and (memory.names is None or memory.names.are_sound(len(memory.edits), d_ff))
    edits = all(isinstance(edit, int) and 0 <= edit < reports for edit in memory.edits)
    limits = min(memory.threshold, memory.z_threshold, memory.last_limit) >= 0
    if not (sound and edits and limits and bool(values.isfinite().all())):
        raise StorageError(f"a memory ({memory.layout!r}, {memory.shape}, {len(memory.edits)} edits) is not sound")


def _record(report: EditReport) -> dict:
    return {f.name: _plain(getattr(report, f.name)) for f in fields(report)} | {"edit": report.edit.to_dict()}


def _report(record: dict) -> EditReport:
    known = {f.name: f for f in fields(EditReport)}
    values = {name: _number(v) if known[name].type == "float" else v for name, v in record.items()}
    return EditReport(**values | {"edit": Edit.from_dict(values["edit"])})


def _plain(value):
    """JSON has no NaN and no infinity: null and "inf"."""
    if not isinstance(value, float) or math.isfinite(value):
        return value
    return None if math.isnan(value) else str(value)


def _number(value) -> float:
    if isinstance(value, bool) or not (value in (None, "inf", "-inf") or isinstance(value, (int, float))):
        raise StorageError(f"{value!r} is not a number")
    return math.nan if value is None else float(value)


def _encode(content: dict) -> bytes:
    return (json.dumps(content, indent=2, sort_keys=True, allow_nan=False) + "\n").encode()


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _library() -> str:
    from wise_fast import __version__  # the package imports this module first

    return __version__
