"""Rehearsal: once a shard is full, all of its edits are learned once more, together.

What comes one after another is learned beside what was there before: protected directions are no longer to be had, and
the later an edit, the odder are those that it is left with. The same edits learned together from nothing, a batch at a
time, in another order each time and in small steps, share what they have in common, and are answered in more other
words. So it is with memories that are to become one, whose average loses what each was fitted to. No edit is protected
from another, since all come again; the unrelated text that a fresh shard is protected from still is. Until then the
edits are answered as they were learned, and of them nothing but their texts is kept.
"""

from __future__ import annotations

import logging
import math
import time

import torch

from wise_fast import merging
from wise_fast.calibration import calibrated
from wise_fast.material import Material, seed_of
from wise_fast.memory import SideMemory, storable
from wise_fast.state import NOT_FITTED, EditorState, EditReport, Shard
from wise_fast.training import EditDiverged, Trainer

logger = logging.getLogger(__name__)

_GENTLE = 0.5  # of the learning rate of single edits: a step is followed by those of other edits
_WARM, _LEAST = 10, 0.02  # steps until the learning rate is whole; the share of it at the end of its cosine
_LOOK_EVERY = 3  # passes between two looks at which tokens of the vocabulary have become likely
_KEPT = 2**16  # tokens whose activations are kept from one pass to the next; the others' are captured anew


def close_shard(material: Material, state: EditorState) -> EditorState:
    """`merging.close_shard`, and what that finishes is rehearsed."""
    return _rehearsed(material, state, merging.close_shard(state, material.config))


def merge_closed(material: Material, state: EditorState) -> EditorState:
    """`merging.merge_closed`, likewise."""
    return _rehearsed(material, state, merging.merge_closed(state, material.config))


def _rehearsed(material: Material, before: EditorState, state: EditorState) -> EditorState:
    """The state with the memory that was finished rehearsed, if there is one and it is protected."""
    config = material.config
    shard = None if config.mode == "merge" else before.shard
    protected = config.merging == "regmean" if shard is None else shard.p is not None
    finished = len(state.merged) > len(before.merged) or state.merges > before.merges
    if not (config.rehearsals and protected and finished):
        return state
    start, memory = time.perf_counter(), state.merged[-1]
    try:
        memory, made = _Rehearsal(material, memory, shard, state).run()
    except EditDiverged:
        logger.warning("the rehearsal of %d edits diverged; they stay as they were", len(memory.edits))
        return state
    seconds = (time.perf_counter() - start) / max(1, len(made))
    made = {i: report.replace(seconds=report.seconds + seconds) for i, report in made.items()}
    reports = tuple(made.get(i, report) for i, report in enumerate(state.reports))
    return state.replace(merged=(*state.merged[:-1], memory), reports=reports)


class _Rehearsal:
    """The edits of a memory, in batches that stay together.

    Args:
        shard: that the memory was; None for one that was merged by covariances.
        state: with the reports of all edits; superseded ones are not rehearsed.
    """

    def __init__(self, material: Material, memory: SideMemory, shard: Shard | None, state: EditorState):
        self.memory = memory.replace(values=torch.zeros_like(memory.values))
        self.material, self.shard, self.reports = material, shard, state.reports
        self.config, self.origin = material.config, memory.taught.origin if shard is None else shard.origin
        self.seed = seed_of(self.config.seed, "rehearsal", state.opened, state.merges)
        self.generator = torch.Generator().manual_seed(self.seed)
        edits = [i for i in memory.edits if not state.reports[i].superseded]
        order = [edits[i] for i in torch.randperm(len(edits), generator=self.generator).tolist()]
        self.batches = [order[i : i + self.config.batch_size] for i in range(0, len(order), self.config.batch_size)]
        self._kept: dict[int, Trainer] = {}
        self._room, self._passes = _KEPT, 0

    def run(self) -> tuple[SideMemory, dict[int, EditReport]]:
        """The memory that holds them together, and the report of each. EditDiverged if a loss is NaN or infinite."""
        z = torch.zeros_like(self.memory.values)
        moments = [torch.zeros_like(z) for _ in range(self.config.moments)]
        count = len(self.batches)
        total = self.config.rehearsals * count
        with torch.enable_grad(), self.material.tail.evaluating():
            for step in range(total):
                if step % count == 0:
                    self._passes = step // count
                    turn = torch.randperm(count, generator=self.generator).tolist()
                trainer = self._trainer(turn[step % count])
                if self._passes % _LOOK_EVERY == 1:
                    trainer.look_again(z)
                trainer.practise(z, moments, step, _pace(step, total))
            return self._mended(self.memory.replace(values=self.origin @ z))

    def _trainer(self, number: int) -> Trainer:
        """Of a batch, as it was left if there was room to keep it."""
        if number in self._kept:
            return self._kept[number]
        material, batch = self.material, self.batches[number]
        edits = [self.reports[i].edit for i in batch]
        rows, seed = material.examples(edits, batch), seed_of(self.seed, number, self._passes)
        quiet = material.quiet_texts(edits, None)
        generator = torch.Generator().manual_seed(seed)
        trainer = material.trainer(self.memory, self.origin, rows, quiet, generator)
        trainer.enter(self._passes)
        if trainer.rows.tokens <= self._room:
            self._room -= trainer.rows.tokens
            self._kept[number] = trainer
        return trainer

    def _mended(self, memory: SideMemory) -> tuple[SideMemory, dict[int, EditReport]]:
        """The memory with what it does not hold mended, its thresholds, and how it holds each edit."""
        p = merging.protection_of(memory.taught) if self.shard is None else self.shard.p
        made, keys, holds = {}, [], set()
        for number, batch in enumerate(self.batches):
            trainer = self._trainer(number)
            memory, losses, fine = trainer.mend(memory, p)
            for place, edit in enumerate(batch):
                note = "" if fine[place] else NOT_FITTED
                steps = self.reports[edit].steps + self.config.rehearsals + trainer.steps[place]
                report = self.reports[edit].replace(steps=steps, loss=losses[place], success=fine[place], note=note)
                made[edit] = report
                keys.append((edit, trainer.rows.key(place)))
            holds |= {edit for edit, good in zip(batch, fine, strict=True) if good}
        if 2 * len(holds) < len(made):  # too few to say how loud an edit is
            holds = set()
        memory = memory.replace(values=storable(memory.values))
        if self.shard is None:
            return merging.recalibrated(memory, p, keys, holds, self.config), made
        return calibrated(memory, p, keys, holds, self.config)[0], made


def _pace(step: int, total: int) -> float:
    """Share of the learning rate of single edits."""
    return _GENTLE * min(1.0, (step + 1) / _WARM) * max(_LEAST, 0.5 + 0.5 * math.cos(math.pi * step / total))
