"""The edits as a plain checkpoint: the memories merged into one and folded into the projection's weight, `W + D`.

Routing is lost. A folded memory answers every prompt, also those that the router would have left to the main memory, so
unrelated answers change; and a merge of several memories says each fact more weakly than the memory it came from. What
that costs is what `cost` measures. Keep the editor where you can, and export where nothing but a checkpoint is read.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path

from safetensors import SafetensorError
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from wise_fast import merging
from wise_fast.atomic import sync_directory
from wise_fast.data import Edit
from wise_fast.errors import ConfigError, StorageError, WiseError
from wise_fast.scores import Evaluation
from wise_fast.state import EditReport
from wise_fast.tasks import TASKS

MERGES = ("ties", "sum")
_CARD = """---
library_name: transformers
tags:
- wise
- model-editing
---

# A base model with {edits} edits folded into one weight

Exported by wise_fast. The router that keeps unrelated answers as they were is not part of this checkpoint, so they may
have changed.
"""


def check(directory: str | os.PathLike | None, merge: str) -> None:
    """Raise, as `export` would, if the directory holds anything or `merge` is unknown."""
    if merge not in MERGES:
        raise ConfigError(f"merge is {merge!r}, expected one of {', '.join(MERGES)}")
    target = None if directory is None else Path(directory).expanduser()
    if target is not None and os.path.lexists(target) and not (target.is_dir() and not any(target.iterdir())):
        raise StorageError(f"{target}: exists and is no empty directory; nothing is replaced, so name another")


def merged(editor, merge: str = "ties") -> Tensor:
    """`D`, [d_out, d_ff] fp32: the editor's only memory, or the TIES merge or the sum of its memories.

    Raises:
        ConfigError: `merge` is neither.
        WiseError: the editor holds no edits.
    """
    check(None, merge)
    memories = [memory for memory in editor.memories if memory.edits]
    if not memories:
        raise WiseError("the editor holds no edits, so there is nothing to fold into the weight; edit() first")
    if merge == "ties" and len(memories) > 1:
        memories = [merging.merge_memories(memories, editor.config.density)]
    total = memories[0].dense().clone()
    for memory in memories[1:]:
        total += memory.dense()
    return total


def _require_plain(editor) -> None:
    if not editor.projection.plain:
        raise WiseError(
            "the edited projection's weight is quantized, offloaded or cut over ranks, so nothing can be folded into "
            "it; load the base model plainly, in floating point and at one place, and edit that"
        )


def folded_weight(editor, merge: str = "ties") -> Tensor:
    """The projection's weight with the memories in it, as its module stores it (a Conv1D's is transposed)."""
    _require_plain(editor)
    base, delta = editor.projection.base_layer, merged(editor, merge)
    weight = base.weight.detach()
    return (weight.float() + (delta.t() if isinstance(base, Conv1D) else delta).to(weight.device)).to(weight.dtype)


def export(editor, directory: str | os.PathLike, merge: str = "ties") -> None:
    """Write the checkpoint, its generation config and its tokenizer. See `WiseEditor.export_dense`."""
    check(directory, merge)
    weight, target = folded_weight(editor, merge), Path(directory).expanduser()
    name, inner = editor.architecture.projection, f"{editor.architecture.projection}.base_layer."
    own = {f"{name}.{key}" for key in editor.projection.state_dict() if not key.startswith("base_layer.")}
    tensors = editor.model.state_dict()
    plain = {key.replace(inner, f"{name}."): tensor for key, tensor in tensors.items() if key not in own}
    scratch = target.with_name(f".{target.name}.{os.getpid()}.wise-new")
    try:
        scratch.mkdir(parents=True)
        editor.model.save_pretrained(scratch, state_dict=plain | {f"{name}.weight": weight})
        editor.tokenizer.save_pretrained(scratch)
        (scratch / "README.md").write_text(_CARD.format(edits=len(editor.edits)), encoding="utf-8")
        sync_directory(scratch)
        os.replace(scratch, target)
    except (OSError, ValueError, SafetensorError) as error:
        raise StorageError(f"{target}: the checkpoint cannot be written ({error}); nothing was changed") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


class Dense:
    """The model as the export would be, for scoring it: a `wise_fast.metrics.Method` that edits nothing."""

    def __init__(self, editor):
        self.model, self.tokenizer, self.stop = editor.model, editor.tokenizer, editor.stop
        self.device, self.edits, self.head_at = editor.device, editor.edits, editor.head_at
        _require_plain(editor)
        self._weight = editor.projection.base_layer.weight
        self._plain = self._weight.data

    def edit(self, edits, progress: bool = False) -> list[EditReport]:
        raise WiseError("a folded model cannot be edited; edit with the editor and fold again")

    def disabled(self):
        """The unedited model inside the block."""
        return _swapped(self._weight, self._plain)

    def asking(self, prompt_mask: Tensor):
        return nullcontext()


@contextmanager
def _swapped(parameter: Tensor, data: Tensor) -> Iterator[None]:
    before, parameter.data = parameter.data, data
    try:
        yield
    finally:
        parameter.data = before


@contextmanager
def folded(editor, merge: str = "ties") -> Iterator[Dense]:
    """The model as `export` would write it, in place of the edited one; every bit of the model is back afterwards."""
    method, weight = Dense(editor), folded_weight(editor, merge)
    with editor.routing.turn, editor.disabled(), _swapped(editor.projection.base_layer.weight, weight):
        yield method


def cost(
    editor,
    edits: Iterable[Edit | Mapping] | None = None,
    *,
    merge: str = "ties",
    task: str = "qa",
    generate: bool = True,
) -> dict[str, Evaluation]:
    """Scores of the same edits with the router ("routed") and folded into the weight ("dense").

    Args:
        edits: what to score, locality prompts with them; None takes all that the editor holds.
        merge, task: how to fold, and a key of `wise_fast.tasks.TASKS`.
        generate: also answer freely.
    """
    edits = [report.edit for report in editor.edits if not report.superseded] if edits is None else list(edits)
    before = TASKS[task].before(editor, edits, generate)
    routed = TASKS[task].score(editor, edits, generate, before)
    with folded(editor, merge) as method:
        return {"routed": routed, "dense": TASKS[task].score(method, edits, generate, before)}
