"""Rehearsal: once a shard is full, all of its edits are learned once more, together.

What comes one after another is learned beside what was there before: protected directions are no longer to be had, and
the later an edit, the odder are those that it is left with. The same edits learned together from nothing, some at a
time, in another order each time and in smaller steps, share what they have in common, and are answered in more other
words; most of all by the mean of where the second half of the steps led, all of one size (Izmailov et al. 2018, arXiv
1803.05407). So it is with memories that are to become one, whose average loses what each was fitted to. No edit
is protected from another, since all come again; the unrelated text that a fresh shard is protected from still is. Until
then the edits are answered as they were learned, and of them nothing but their texts is kept.

Where the passes that were asked for lose more than a tenth of what was answered, or so much that what was learned would
stay, another round of as many follows, and the best round is taken. Those few that are answered no more afterwards,
most often since others contradict them, are learned in the next shard.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from wise_fast import merging
from wise_fast.calibration import calibrated
from wise_fast.material import Material, seed_of
from wise_fast.memory import SideMemory, storable
from wise_fast.rows import Part, look_at
from wise_fast.state import NOT_FITTED, EditorState, EditReport, Shard
from wise_fast.tokens import encode
from wise_fast.training import EditDiverged, Trainer

logger = logging.getLogger(__name__)

Outcome = tuple[SideMemory, dict[int, EditReport], list[int]]
_TOGETHER = 16  # edits of a step, at most
_OTHERS = 1  # augmented prompts of each in a step (`Standing.draw`)
_GENTLE = 0.7  # of the learning rate of single edits: a step is followed by those of other edits
_WARM = 10  # steps until the learning rate is whole
_LOOK_EVERY = 6  # passes between two looks at which tokens of the vocabulary have become likely
_ROUNDS = 3  # at most so many times the passes asked for
_LOST = 0.1  # share of what was answered before that a round may lose
_LABELS = 512  # tokens of answers in one part, of which the whole vocabulary's logits are held at once
_KEPT = 2**31  # bytes of activations that are kept from one pass to the next; others are captured anew


def close_shard(material: Material, state: EditorState) -> tuple[EditorState, list[int]]:
    """`merging.close_shard`, and what that finishes is rehearsed; with the edits, at most half of the shard's, that its
    memory is not asked for any more and that are to be learned elsewhere."""
    return _rehearsed(material, state, merging.close_shard(state, material.config))


def merge_closed(material: Material, state: EditorState) -> EditorState:
    """`merging.merge_closed`, likewise."""
    return _rehearsed(material, state, merging.merge_closed(state, material.config))[0]


def _rehearsed(material: Material, before: EditorState, state: EditorState) -> tuple[EditorState, list[int]]:
    """The state with the memory that was finished rehearsed, if there is one and it is protected; what it left."""
    config = material.config
    shard = None if config.mode == "merge" else before.shard
    protected = config.merging == "regmean" if shard is None else shard.p is not None
    finished = len(state.merged) > len(before.merged) or state.merges > before.merges
    if not (config.rehearsals and protected and finished):
        return state, []
    start, memory = time.perf_counter(), state.merged[-1]
    reports = list(state.reports)
    edits = [i for i in memory.edits if not reports[i].superseded]
    made, left = {}, []
    try:
        memory, made, left = _Rehearsal(material, memory, shard, state, edits).run()
    except EditDiverged:
        logger.warning("the rehearsal of %d edits diverged; they stay as they were", len(edits))
    seconds = (time.perf_counter() - start) / max(1, len(edits))
    for i in edits:
        report = made.get(i, reports[i])
        reports[i] = report.replace(seconds=report.seconds + seconds)
    return state.replace(merged=(*state.merged[:-1], memory), reports=tuple(reports)), left


@dataclass(frozen=True)
class _Found:
    """What a round led to.

    Attributes:
        memory: with the mean of the round's second half.
        made: the report of each edit under it.
        keys: what their prompts activate, for thresholds.
        holds: the edits that it answers.
    """

    memory: SideMemory
    made: dict[int, EditReport]
    keys: list[tuple[int, Tensor]]
    holds: frozenset[int]


class _Practice(Trainer):
    """Edits whose steps take turns with those of others."""

    def enter(self, passes: int) -> None:
        """Begin with all edits at once, as after so many passes."""
        self.standing.steps, self.quiet.always = [passes] * self.count, True
        self.standing.others = min(_OTHERS, self.standing.others)
        # Behind the last layer's tokens nothing asks the others: a silent one would answer as the unedited model.
        self.last_dropout = 0.0 if self.rows.groups[0].tail.at_last_layer else self.config.last_dropout
        self._begin()
        self._begin_anew(range(self.count))

    def practise(self, edits: list[int], z: Tensor, moments: list[Tensor], taken: int, pace: float) -> None:
        """One step on these edits.

        Args:
            z, moments: what all edits of the memory have in common; changed in place.
            taken: steps that were taken before, by all.
            pace: of the learning rate.

        Raises:
            EditDiverged: a loss or a gradient is NaN or infinite.
        """
        self.z, self.moments, self.since = z, moments, taken
        self.lr, whole = pace * self.lr, self.lr
        self._step(edits, self.standing.draw(edits))
        self.lr = whole
        for edit in edits:
            self.standing.steps[edit] += 1

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
    """The edits of a memory, in parts that are captured together.

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
        self.parts = self._parts([edits[i] for i in self._shuffled(len(edits))])
        self.prompts = {report.edit.prompt for report in state.reports}
        self._kept: dict[int, _Practice] = {}
        self._before: set[int] | None = None  # what the memory answered as it was learned, once that is asked
        self._room = _KEPT

    def _shuffled(self, count: int) -> list[int]:
        return torch.randperm(count, generator=self.generator).tolist()

    def _parts(self, edits: Sequence[int]) -> list[list[int]]:
        """The edits in as few parts of like size as their answers allow: a part asks the whole LM head at once."""
        answers = [self.reports[edit].edit.target for edit in edits]
        labels = sum(len(encode(self.material.tokenizer, answer)) + 1 for answer in answers)
        count = min(-(-labels // _LABELS), -(-len(edits) // self.config.batch_size)) or 1
        return [list(edits[i::count]) for i in range(count)]

    def run(self) -> Outcome:
        """The memory that holds them together, the report of each, and those that it does not hold; as it was learned,
        no reports and none, if that answers more. EditDiverged if a loss is NaN or infinite."""
        z = torch.zeros_like(self.memory.values)
        moments = [torch.zeros_like(z) for _ in range(self.config.moments)]
        self.material.require_gradients()
        best: _Found | None = None
        with torch.inference_mode(False), torch.enable_grad(), self.material.tail.evaluating():
            for number in range(1, _ROUNDS + 1):
                try:
                    mean = self._round(z, moments, number)
                    memory = self.memory.replace(values=storable(self.origin @ mean))
                    found = self._judged(memory, number * self.config.rehearsals)
                except EditDiverged:
                    if best is None:
                        raise
                    break
                if best is None or len(found.holds) > len(best.holds):
                    best = found
                if self._is_enough(found):
                    break
            return self._concluded(best)

    def _round(self, z: Tensor, moments: list[Tensor], number: int) -> Tensor:
        """The mean of where the second half of these passes led, the `number`th so many (from 1); changes `z` and
        `moments`."""
        count = self.config.rehearsals
        total = count * sum(-(-len(part) // _TOGETHER) for part in self.parts)
        first = taken = (number - 1) * total
        mean = torch.zeros_like(z)
        for passes in range((number - 1) * count, number * count):
            for place in self._shuffled(len(self.parts)):
                practice = self._practice(place, passes)
                if passes % _LOOK_EVERY == 1:
                    practice.look_again(z)
                order, steps = self._shuffled(practice.count), -(-practice.count // _TOGETHER)
                for start in range(steps):
                    practice.practise(order[start::steps], z, moments, taken, _pace(taken, total))
                    taken += 1
                    if 2 * (taken - first) > total:
                        mean += z
                    self.material.alive()
        return mean / (total - total // 2)

    def _practice(self, number: int, passes: int) -> _Practice:
        """Of a part, as it was left if there was room to keep it, or as after so many passes."""
        if number in self._kept:
            return self._kept[number]
        material, part = self.material, self.parts[number]
        edits = [self.reports[i].edit for i in part]
        rows, seed = material.examples(edits, part), seed_of(self.seed, number, passes)
        quiet = material.quiet_texts(edits, None, self.prompts)
        generator = torch.Generator().manual_seed(seed)
        practice = material.trainer(self.memory, self.origin, rows, quiet, generator, _Practice)
        practice.enter(passes)
        if practice.rows.size <= self._room:
            self._room -= practice.rows.size
            self._kept[number] = practice
        return practice

    def _judged(self, memory: SideMemory, passes: int) -> _Found:
        """What it gives, after so many passes."""
        made, keys, asked = {}, [], self._before is not None
        before = self._before if asked else set()
        for number, part in enumerate(self.parts):
            practice = self._practice(number, passes)
            if not asked:
                before |= self._answered(part, practice)
            for edit, loss, right, key in zip(part, *practice.judge(memory), strict=True):
                steps, note = self.reports[edit].steps + passes, "" if right else NOT_FITTED
                made[edit] = self.reports[edit].replace(steps=steps, loss=loss, success=right, note=note)
                keys.append((edit, key))
            self.material.alive()
        self._before = before
        return _Found(memory, made, keys, frozenset(edit for edit, report in made.items() if report.success))

    def _answered(self, part: Sequence[int], practice: _Practice) -> set[int]:
        """Which of these edits the memory answers as it was learned. All of a shard's that held when learned, which is
        more than to be answered, and which it protects: then nobody asks again."""
        if self.shard is not None and all(self.reports[edit].success for edit in part):
            return set(part)
        return {edit for edit, right in zip(part, practice.judge(self.learned)[1], strict=True) if right}

    def _is_enough(self, found: _Found) -> bool:
        """Whether no more than a tenth is lost, and it would be taken."""
        lost = self._before - found.holds
        taken = len(found.holds) >= len(self._before) or self._left(found.memory, lost)
        return len(lost) <= _LOST * len(self._before) and bool(taken)

    def _concluded(self, found: _Found) -> Outcome:
        """`run`'s, of the best that was found."""
        memory, made, keys, holds = found.memory, found.made, found.keys, found.holds
        left = self._left(memory, self._before - holds)
        if len(holds) < len(self._before) and not left:
            counts = len(holds), len(made), len(self._before)
            logger.warning("rehearsal answers %d of %d edits; they stay as learned (%d)", *counts)
            return self.learned, {}, []
        if left:
            logger.info("rehearsal answers %d of %d edits; %d go to the next shard", len(holds), len(made), len(left))
            kept = [row for row, edit in enumerate(memory.edits) if edit not in left]
            memory = memory.replace(edits=tuple(memory.edits[row] for row in kept), names=memory.names.only(kept))
            made = made | {edit: self.reports[edit].replace(steps=made[edit].steps) for edit in left}
            keys = [(edit, key) for edit, key in keys if edit not in left]
        measure = merging.recalibrated if self.shard is None else calibrated
        p = merging.protection_of(memory.taught) if self.shard is None else self.shard.p
        memory, scores = measure(memory, p, keys, holds, self.config)
        made = {edit: report.replace(score=scores.get(edit, report.score)) for edit, report in made.items()}
        return memory, made, left

    def _left(self, memory: SideMemory, lost: Collection[int]) -> list[int]:
        """Which of the edits that are answered no more are to be learned in the next shard: all, unless they are more
        than half. None where there is no next one, or a memory is asked for whatever is loud."""
        if memory.names is None or self.shard is None or 2 * len(lost) > sum(map(len, self.parts)):
            return []
        return sorted(lost)


def _pace(step: int, total: int) -> float:
    """Share of the learning rate of single edits."""
    return _GENTLE * min(1.0, (step + 1) / min(_WARM, 1 + total // 10))
