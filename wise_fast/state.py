"""The editor's state as a value: every batch of edits makes a new one, so undo is an assignment."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from wise_fast.config import WiseConfig
from wise_fast.data import Edit
from wise_fast.memory import SideMemory
from wise_fast.texts import Texts

NOT_FITTED = "not fitted: its target or its routing margin did not hold within max_steps"


@dataclass(frozen=True)
class EditReport:
    """What became of one edit.

    Attributes:
        edit: the edit itself.
        steps: optimiser steps taken.
        loss_before: mean token NLL of the target (with its stop token) given the prompt, before; its first token weighs
            `config.first_token`.
        loss: the same after, over the prompt and every augmented one.
        score: routing score of the bare prompt when it was taught, as the router measures it (`WiseConfig.route_by`).
        success: every target token is the argmax and the margins hold, on the prompt and every augmented one; of one
            that was rehearsed and stayed, that every target token is the argmax on the prompt.
        seconds: wall time of the edit; edits of one batch share its time equally.
        note: what else there is to say ("superseded by ...", "diverged ...", ...), or "".
    """

    edit: Edit
    steps: int = 0
    loss_before: float = float("nan")
    loss: float = float("nan")
    score: float = float("nan")
    success: bool = False
    seconds: float = 0.0
    note: str = ""

    @property
    def superseded(self) -> bool:
        """Whether a later edit of the same prompt stands in this one's place."""
        return self.note.startswith("superseded")

    def replace(self, **changes) -> EditReport:
        return replace(self, **changes)

    def to_dict(self) -> dict:
        return {**self.__dict__, "edit": self.edit.to_dict()}


@dataclass(frozen=True)
class Shard:
    """A shard that still takes edits.

    Attributes:
        memory: its values so far.
        p: [K, K] fp32 protection matrix, or None without the protected update.
        origin: `p` before the first edit, for merging.
        keys: per edit held, (index of the edit, prompt activations [n, K]), for thresholds.
        quiet: neighbours of the latest edits, which later ones must leave quiet as well.
    """

    memory: SideMemory
    p: Tensor | None
    origin: Tensor | None = None
    keys: tuple[tuple[int, Tensor], ...] = ()
    quiet: Texts | None = None

    @property
    def taken(self) -> float:
        """Share of the trace of `P` that its edits have taken: of what can be learned without moving them."""
        now, before = (float(p.diagonal().double().sum()) for p in (self.p, self.origin))
        return 1 - now / before

    def room(self, config: WiseConfig) -> int:
        """How many more edits it takes; where `shard_fill` decides, of edits like those that it has."""
        held = len(self.memory.edits)
        room = config.batch_size if config.shard_size is None else config.shard_size - held
        if not held or self.p is None or config.shard_fill is None:
            return room
        taken = self.taken
        return min(room, max(0, round((config.shard_fill - taken) * held / taken)))

    def replace(self, **changes) -> Shard:
        return replace(self, **changes)


@dataclass(frozen=True)
class EditorState:
    """Everything that editing changes.

    Attributes:
        merged: finished memories (in mode "retrieve" every closed shard; in mode "merge" one, and what was loaded but
            cannot be merged).
        closed: closed shards that wait for their merge (mode "merge").
        shard: the open shard, or None before the first edit and after loading.
        opened: shards opened so far; seeds the next mask.
        reports: one per edit held, in order.
        merges: merges so far.
    """

    merged: tuple[SideMemory, ...] = ()
    closed: tuple[SideMemory, ...] = ()
    shard: Shard | None = None
    opened: int = 0
    reports: tuple[EditReport, ...] = ()
    merges: int = 0

    @property
    def memories(self) -> list[SideMemory]:
        """Memories to serve, oldest first."""
        return [*self.merged, *self.closed, *([self.shard.memory] if self.shard else [])]

    def replace(self, **changes) -> EditorState:
        return replace(self, **changes)
