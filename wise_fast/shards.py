"""A stream of edits as shards that anyone may fill, in any order: each lives in a subspace of its own.

A shard is filled from the state that one editor would have come to it with: the number of its mask, the seeds of its
batches and the prompts that were edited before are those of its place in the stream. So it becomes, bit for bit, what
it would be had one editor learned everything in turn. (Not where an edit diverged in a shard before it, one was full
before its time, or a rehearsal left edits to the next one: in turn, edits move, and here they stay in their shards,
which come to several memories.) A run's directory holds

    run.json          what the run is; going on with anything else is refused
    shards/NNNNNN/    a finished shard, from 1: a checkpoint, on the disk before the shard counts as finished
    pack/             all of them, as `save_pretrained` writes them, once the last is there
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from wise_fast import merging, rehearsal, run_header
from wise_fast.atomic import read_directory, write_directory
from wise_fast.chat import rendered
from wise_fast.checkpoint import FILES, Checkpoints, Digester
from wise_fast.config import WiseConfig
from wise_fast.data import Edit, deduplicate
from wise_fast.editor import WiseEditor
from wise_fast.errors import ConfigError, StorageError
from wise_fast.memory import SideMemory
from wise_fast.state import EditorState, EditReport

logger = logging.getLogger(__name__)

FORMAT, VERSION = "wise_fast distributed run", 1
SHARDS, PACK = "shards", "pack"


class Shards:
    """The shards of one stream of edits, and which of them a directory holds already.

    Args:
        editor: a fresh one, of the settings that the run is to have; in mode "merge" all shards become one memory at
            the end, whatever `config.shards` says.
        edits: the stream; of edits with the same prompt the last one counts.
        out: the run's directory: new, empty, or with the same run.
        source, partner: the files that the edits came from, for the header.

    Attributes:
        edits: the stream without what is superseded.
        superseded: how many those are.
        count: how many shards it fills.

    Raises:
        ConfigError: the editor holds edits already, or its settings have no `shard_size`.
        EditDataError: an edit cannot be learned.
    """

    def __init__(
        self,
        editor: WiseEditor,
        edits: Sequence[Edit],
        out: Path,
        source: Path | None = None,
        partner: Path | None = None,
    ):
        if editor.edits:
            raise ConfigError(f"the editor holds {len(editor.edits)} edits already; a run needs a fresh one")
        require_shard_size(editor.config)
        self.editor, self.config, self.out = editor, editor.config, out
        self.edits, superseded = deduplicate(rendered(editor.tokenizer, edits))
        self.superseded, self.size = len(superseded), editor.config.shard_size
        editor.check(self.edits)
        self.count = -(-len(self.edits) // self.size)
        self._source = (source, partner)
        # Merged at the end only: a shard may come to several memories if it is full before its time.
        self._filling = self.config.replace(undo_depth=0, shards=max(2, len(self.edits) + 1))

    def claim(self) -> None:
        """Begin the run in its directory, or go on with the one that is there.

        Raises:
            StorageError: the directory holds other things, or cannot be written.
            ConfigError: it holds a run of other edits, settings, or of another model.
        """
        # As many records of one file may come to as many edits, but to others, when a later one supersedes.
        kept = run_header.describe_edits(self.edits, None)["sha256"]
        header = {
            "format": FORMAT,
            "version": VERSION,
            "T": len(self.edits),
            "edits": run_header.describe_edits(self.edits, *self._source) | {"kept": kept},
            **run_header.describe_method(self.editor),
            "libraries": run_header.libraries(self.editor.device),
        }
        found = run_header.claim(self.out, True, FORMAT, VERSION)
        if found is None:
            run_header.write_header(self.out, header)
        else:
            run_header.require_same(found, header)

    def edits_of(self, number: int) -> list[Edit]:
        """The edits of a shard, counted from 0."""
        return self.edits[number * self.size : (number + 1) * self.size]

    def name(self, number: int) -> str:
        """What a shard is called in messages."""
        first = number * self.size
        return f"shard {number + 1} of {self.count}, edits {first + 1} to {first + len(self.edits_of(number))}"

    def present(self, number: int) -> bool:
        """Whether the directory has a finished shard, sound or not."""
        checkpoints, batches = self._files(number)
        return batches in checkpoints.numbers()

    def finished(self, number: int) -> EditorState | None:
        """As `load`; None where the shard is not on the disk, or is damaged (a warning)."""
        if not self.present(number):
            return None
        try:
            return self.load(number)
        except StorageError as error:
            logger.warning("%s; %s is filled once more", error, self.name(number))
            return None

    def load(self, number: int) -> EditorState:
        """What a finished shard became, its edits counted from 0. StorageError where it is missing or damaged."""
        checkpoints, batches = self._files(number)
        return checkpoints.load(batches, self.editor.device)[0]

    def fill(self, number: int, advance: Callable[[int], None]) -> None:
        """Learn a shard's edits and put it on the disk; `advance` is told how many edits each batch had, and 0 where a
        rehearsal is under way.

        Raises:
            StorageError: the disk refuses. Shards that were finished stay.
        """
        first, edits = number * self.size, self.edits_of(number)
        before = tuple(EditReport(edit) for edit in self.edits[:first])
        self.editor.config = self._filling
        try:
            self.editor.state = EditorState(opened=number, reports=before)
            with self.editor.watched(partial(advance, 0)):
                for start in range(0, len(edits), self.config.batch_size):
                    batch = edits[start : start + self.config.batch_size]
                    self.editor.edit(batch)
                    advance(len(batch))
        finally:
            self.editor.config = self.config
        state = self.editor.state
        if state.shard is not None:  # the last of the stream, or one with an edit that diverged: not full
            state = merging.close_shard(state, self._filling)
        checkpoints, batches = self._files(number)
        checkpoints.save(batches, _moved(state, -first).replace(reports=state.reports[first:]))

    def pack_up(self, number: int) -> dict[str, bytes]:
        """A finished shard as `FILES`, for `unpack` in another directory. StorageError where it is not there."""
        checkpoints, batches = self._files(number)
        return read_directory(checkpoints.path(batches), FILES)

    def unpack(self, number: int, files: dict[str, bytes]) -> None:
        """Put what `pack_up` gave in this directory. StorageError as writing raises it."""
        checkpoints, batches = self._files(number)
        write_directory(checkpoints.path(batches), files, FILES)

    def save(self, states: Sequence[EditorState]) -> str:
        """Join all shards, in their order, serve them in the editor and write the pack.

        Returns:
            The digest of the state that was saved.

        Raises:
            StorageError: the pack cannot be written; the shards stay.
        """
        state = joined(states)
        if len(state.closed) > 1:
            state = rehearsal.merge_closed(self.editor, state)
        self.editor.state = state
        self.editor.save_pretrained(self.out / PACK)
        return Digester().digest(state)

    def _files(self, number: int) -> tuple[Checkpoints, int]:
        """A shard's directory, and the number of the only checkpoint in it: of batches."""
        batches = -(-len(self.edits_of(number)) // self.config.batch_size)
        return Checkpoints(self.out / SHARDS / f"{number + 1:06d}"), batches


def require_shard_size(config: WiseConfig) -> None:
    """Raise ConfigError unless shards end somewhere."""
    if config.shard_size is None:
        raise ConfigError(
            "shard_size is None, which fills one shard with everything, and one shard cannot be filled by several; "
            "give a whole number, such as --shard-size 50"
        )


def joined(states: Iterable[EditorState]) -> EditorState:
    """One state of shards in their order, each counting its edits from 0."""
    whole = EditorState()
    for number, state in enumerate(states):
        state = _moved(state, len(whole.reports))
        whole = whole.replace(
            merged=whole.merged + state.merged,
            closed=whole.closed + state.closed,
            opened=whole.opened + state.opened - number,
            reports=whole.reports + state.reports,
        )
    return whole


def _moved(state: EditorState, by: int) -> EditorState:
    """The state with its memories' edits counted from elsewhere."""

    def moved(memory: SideMemory) -> SideMemory:
        taught = memory.taught
        if taught is not None:
            taught = replace(taught, keys=tuple((edit + by, key) for edit, key in taught.keys))
        return memory.replace(edits=tuple(edit + by for edit in memory.edits), taught=taught)

    merged, closed = (tuple(map(moved, memories)) for memories in (state.merged, state.closed))
    return state.replace(merged=merged, closed=closed)
