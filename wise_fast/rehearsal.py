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
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from wise_fast import merging
from wise_fast.calibration import calibrated
from wise_fast.material import Material, seed_of
from wise_fast.memory import SideMemory, storable
from wise_fast.rows import Part, look_at
from wise_fast.state import NOT_FITTED, EditorState, EditReport, Shard
from wise_fast.training import EditDiverged, Trainer

logger = logging.getLogger(__name__)

Alive = Callable[[], None]
_GENTLE = 0.5  # of the learning rate of single edits: a step is followed by those of other edits
_WARM, _LEAST = 10, 0.02  # steps until the learning rate is whole; the share of it at the end of its cosine
_WHOLE = 0.75  # share of the passes behind which every token responds
_LOOK_EVERY = 3  # passes between two looks at which tokens of the vocabulary have become likely
_KEPT = 2**30  # bytes of activations that are kept from one pass to the next; others are captured anew


def close_shard(material: Material, state: EditorState) -> EditorState:
    """`merging.close_shard`, and what that finishes is rehearsed."""
    return _rehearsed(material, state, merging.close_shard(state, material.config))


def merge_closed(material: Material, state: EditorState, alive: Alive | None = None) -> EditorState:
    """`merging.merge_closed`, likewise; `alive` is called after every step of the rehearsal."""
    return _rehearsed(material, state, merging.merge_closed(state, material.config), alive)


def _rehearsed(material: Material, before: EditorState, state: EditorState, alive: Alive | None = None) -> EditorState:
    """The state with the memory that was finished rehearsed, if there is one and it is protected."""
    config = material.config
    shard = None if config.mode == "merge" else before.shard
    protected = config.merging == "regmean" if shard is None else shard.p is not None
    finished = len(state.merged) > len(before.merged) or state.merges > before.merges
    if not (config.rehearsals and protected and finished):
        return state
    start, memory = time.perf_counter(), state.merged[-1]
    reports = list(state.reports)
    edits = [i for i in memory.edits if not reports[i].superseded]
    try:
        memory, made = _Rehearsal(material, memory, shard, state, edits).run(alive or (lambda: None))
    except EditDiverged:
        logger.warning("the rehearsal of %d edits diverged; they stay as they were", len(edits))
        made = {}
    seconds = (time.perf_counter() - start) / max(1, len(edits))
    for i in edits:
        report = made.get(i, reports[i])
        reports[i] = report.replace(seconds=report.seconds + seconds)
    return state.replace(merged=(*state.merged[:-1], memory), reports=tuple(reports))


class _Practice(Trainer):
    """A batch of edits whose steps take turns with those of other batches."""

    def enter(self, passes: int) -> None:
        """Begin with all edits at once, as after so many of their steps."""
        self.standing.steps, self.quiet.always = [passes] * self.count, True
        self._begin()
        self._begin_anew(range(self.count))

    def practise(self, z: Tensor, moments: list[Tensor], taken: int, pace: float, whole: bool) -> None:
        """One step on every edit.

        Args:
            z, moments: what all batches have in common; changed in place.
            taken: steps that were taken before, by all.
            pace: of the learning rate.
            whole: whether all tokens respond.

        Raises:
            EditDiverged: a loss or a gradient is NaN or infinite.
        """
        everyone, before = list(range(self.count)), (self.lr, self.last_dropout)
        self.z, self.moments, self.since = z, moments, taken
        self.lr, self.last_dropout = pace * self.lr, 0.0 if whole else self.last_dropout
        self._step(everyone, self.standing.draw(everyone))
        self.lr, self.last_dropout = before
        self.standing.steps = [steps + 1 for steps in self.standing.steps]

    @torch.no_grad()
    def look_again(self, z: Tensor) -> None:
        """Choose anew which tokens steps compute, under what they have written so far."""
        self.z = z
        split = self.rows.split(self.rows.bare())
        parts = [Part(group, places, self._response(group, places)) for group, places in split]
        looks = look_at(parts, self.config.reduction, full=True)
        self._restrict([(part.group, part.places, look) for part, look in zip(parts, looks, strict=True)])

    @torch.no_grad()
    def judge(self, memory: SideMemory) -> tuple[list[float], list[bool], list[Tensor]]:
        """Under this memory: the NLL of every bare prompt, whether its target is the argmax, and its `key`."""
        self.memory, nll, right = memory, {}, {}
        for group, places, look in self._look(self.rows.bare(), full=True):
            edits = [group.numbers[place] // self.variants for place in places]
            self._check_finite(look.nll, edits)
            nll |= dict(zip(edits, look.nll.tolist(), strict=True))
            right |= dict(zip(edits, look.right.tolist(), strict=True))
        order = range(self.count)
        return [nll[e] for e in order], [right[e] for e in order], [self.rows.key(e) for e in order]


class _Rehearsal:
    """The edits of a memory, in batches that stay together.

    Args:
        shard: that the memory was; None for one that was merged by covariances.
        state: with the reports of all edits.
        edits: those of the memory that no later one supersedes.
    """

    def __init__(
        self, material: Material, memory: SideMemory, shard: Shard | None, state: EditorState, edits: Sequence[int]
    ):
        self.material, self.learned, self.shard, self.reports = material, memory, shard, state.reports
        self.memory = memory.replace(values=torch.zeros_like(memory.values))
        self.config, self.origin = material.config, memory.taught.origin if shard is None else shard.origin
        self.seed = seed_of(self.config.seed, "rehearsal", state.opened, state.merges)
        self.generator = torch.Generator().manual_seed(self.seed)
        order = [edits[i] for i in torch.randperm(len(edits), generator=self.generator).tolist()]
        self.batches = [order[i : i + self.config.batch_size] for i in range(0, len(order), self.config.batch_size)]
        self.prompts = {report.edit.prompt for report in state.reports}
        self._kept: dict[int, _Practice] = {}
        self._room, self._passes = _KEPT, 0

    def run(self, alive: Alive) -> tuple[SideMemory, dict[int, EditReport]]:
        """The memory that holds them together, and the report of each; as it was learned, and no reports, if that
        answers more of them. EditDiverged if a loss is NaN or infinite."""
        z = torch.zeros_like(self.memory.values)
        moments = [torch.zeros_like(z) for _ in range(self.config.moments)]
        count, passes = len(self.batches), self.config.rehearsals
        with torch.inference_mode(False), torch.enable_grad(), self.material.tail.evaluating():
            for step in range(passes * count):
                if step % count == 0:
                    self._passes = step // count
                    turn = torch.randperm(count, generator=self.generator).tolist()
                practice = self._practice(turn[step % count])
                if self._passes % _LOOK_EVERY == 1:
                    practice.look_again(z)
                whole = self._passes >= _WHOLE * passes
                practice.practise(z, moments, step, _pace(step, passes * count), whole)
                alive()
            return self._judged(self.memory.replace(values=storable(self.origin @ z)), alive)

    def _practice(self, number: int) -> _Practice:
        """Of a batch, as it was left if there was room to keep it."""
        if number in self._kept:
            return self._kept[number]
        material, batch = self.material, self.batches[number]
        edits = [self.reports[i].edit for i in batch]
        rows, seed = material.examples(edits, batch), seed_of(self.seed, number, self._passes)
        quiet = material.quiet_texts(edits, None, self.prompts)
        generator = torch.Generator().manual_seed(seed)
        practice = material.trainer(self.memory, self.origin, rows, quiet, generator, _Practice)
        practice.enter(self._passes)
        if practice.rows.size <= self._room:
            self._room -= practice.rows.size
            self._kept[number] = practice
        return practice

    def _judged(self, memory: SideMemory, alive: Alive) -> tuple[SideMemory, dict[int, EditReport]]:
        made, keys, before = {}, [], 0
        for number, batch in enumerate(self.batches):
            practice = self._practice(number)
            before += sum(practice.judge(self.learned)[1])
            for edit, loss, right, key in zip(batch, *practice.judge(memory), strict=True):
                steps, note = self.reports[edit].steps + self.config.rehearsals, "" if right else NOT_FITTED
                made[edit] = self.reports[edit].replace(steps=steps, loss=loss, success=right, note=note)
                keys.append((edit, key))
            alive()
        holds = {edit for edit, report in made.items() if report.success}
        if len(holds) < before:
            logger.warning("rehearsal answers %d of %d edits; they stay as learned (%d)", len(holds), len(made), before)
            return self.learned, {}
        measure = merging.recalibrated if self.shard is None else calibrated
        p = merging.protection_of(memory.taught) if self.shard is None else self.shard.p
        memory, scores = measure(memory, p, keys, holds, self.config)
        return memory, {edit: report.replace(score=scores.get(edit, report.score)) for edit, report in made.items()}


def _pace(step: int, total: int) -> float:
    """Share of the learning rate of single edits."""
    warm = min(1.0, (step + 1) / min(_WARM, 1 + total // 10))
    return _GENTLE * warm * max(_LEAST, 0.5 + 0.5 * math.cos(math.pi * step / total))
