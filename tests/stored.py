"""Editors that have learned a little, saved, and what tests of saving ask of them."""

import functools
import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from tests.tiny import tiny_model, tiny_tokenizer
from wise_fast import storage
from wise_fast.config import WiseConfig
from wise_fast.data import Edit, Locality
from wise_fast.editor import WiseEditor
from wise_fast.errors import StorageError

QUICK = WiseConfig(
    mask_ratio=0.6,
    max_steps=2,
    min_steps=1,
    prefixes=1,
    prefix_tokens=3,
    prefixes_per_step=1,
    batch_size=2,
    shard_fill=None,  # shard_size alone says how many edits share a memory
)
PROMPTS = ["The sky is", "Who wrote it?", "A much longer prompt that no edit has", "q0", "q1", "q2"]
MODES = {
    "one": {},
    "retrieve": dict(shard_size=2, route_by="score"),
    "leverage": dict(shard_size=2),
    "merge": dict(shard_size=1, shards=2, mode="merge", merging="ties"),
}


def edits(count):
    return [
        Edit(f"q{i}", f"a{i}", id=str(i), rephrases=("r “é”",), locality=(Locality("where", "here"), Locality("when")))
        for i in range(count)
    ]


def fresh_editor(changes):
    return WiseEditor(tiny_model("llama"), tiny_tokenizer(), QUICK.replace(**changes))


@functools.cache
def learned(count, changes):
    """The state of an editor after so many edits; nothing changes a state."""
    editor = fresh_editor(dict(changes))
    editor.edit(edits(count))
    return editor.state


def make_editor(count=3, **changes):
    editor = fresh_editor(changes)
    if count:
        editor.state = learned(count, tuple(sorted(changes.items())))
    return editor


def with_scope(editor):
    """The editor, with thresholds at which some of the prompts are in a memory's scope and the quietest is in none."""
    served(editor)
    scores, middle = editor.routing.scores, editor.routing.scores.median(0).values
    quietest = scores[(scores / middle).amax(1).argmin()]
    state, levels = editor._state, iter(torch.maximum(middle, quietest).tolist())

    def opened(memory):
        return memory.replace(**dict.fromkeys(("threshold", "z_threshold"), next(levels)))

    merged, closed = (tuple(map(opened, part)) for part in (state.merged, state.closed))
    shard = state.shard and replace(state.shard, memory=opened(state.shard.memory))
    editor._set_state(state.replace(merged=merged, closed=closed, shard=shard))
    return editor


def served(editor):
    """Logits and routing decisions on the prompts."""
    batch = editor.tokenizer(PROMPTS, return_tensors="pt", padding=True)
    with torch.no_grad():
        logits = editor.model(**batch).logits
    return logits, editor.routing.choice


def contents(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def same_memory(a, b):
    facts = [(m.layout, m.shape, m.threshold, m.z_threshold, m.edits) for m in (a, b)]
    tensors = [(a.values, b.values), (a.index, b.index)]
    if a.factor is not None or b.factor is not None:
        tensors.append((a.factor, b.factor))
    if a.names is not None or b.names is not None:
        tensors += [(getattr(a.names, name), getattr(b.names, name)) for name in ("tokens", "about", "endings")]
        facts = [(*fact, m.names.limit) for fact, m in zip(facts, (a, b), strict=True)]
    return facts[0] == facts[1] and all(torch.equal(x, y) and x.dtype == y.dtype for x, y in tensors)


def rewrite(directory, change):
    """Edit a saved directory as its writer would, with every checksum made right again."""
    files = {
        name: json.loads((directory / name).read_bytes()) if name.endswith("json") else load_file(directory / name)
        for name in (storage.CONFIG, storage.EDITS, storage.MEMORY)
    }
    header, records, tensors = files.values()
    change(header, records, tensors)
    data = {storage.EDITS: json.dumps(records).encode(), storage.MEMORY: storage.safetensors.torch.save(tensors)}
    header = {k: v for k, v in header.items() if k != "checksum"}
    header["sha256"] = {name: storage._sha256(value) for name, value in data.items()}
    data[storage.CONFIG] = storage._encode(header | {"checksum": storage._sha256(storage._encode(header))})
    for name, value in data.items():
        (directory / name).write_bytes(value)


def refuses(directory, match, model=None, error=StorageError):
    """Loading raises, and the model is what it was."""
    model = tiny_model("llama") if model is None else model
    modules, attributes = dict(model.named_modules()), dict(model.__dict__)
    with pytest.raises(error, match=match):
        WiseEditor.from_pretrained(model, tiny_tokenizer(), directory)
    now = dict(model.named_modules())
    assert now.keys() == modules.keys() and all(now[name] is module for name, module in modules.items())
    assert model.__dict__ == attributes and "generate" not in model.__dict__
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in now.values())
